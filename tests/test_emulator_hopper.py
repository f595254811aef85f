"""The emulator's copy engine and warpgroups against NumPy, and what it reports of planted mistakes.

What the manuals say of swizzles, boxes and matrix descriptors is written down here once more, in NumPy.
"""

import functools
import itertools
import re
import shutil
from pathlib import Path

import emulator
import ml_dtypes
import numpy as np
import pytest
from emulator import EmulationError, Module, Swizzle, TensorMapError, build, compile_ptx, map_of
from emulator.tensor_map import SIZE, DataType, encode

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SAMPLES = Path(emulator.__file__).parent / "samples"
RUNS = [("plain", 0), ("plain", 1), ("trace", 0), ("trace", 1), ("trace", 2)]
every_run = pytest.mark.parametrize("mode, seed", RUNS, ids=[f"{mode}-{seed}" for mode, seed in RUNS])


@functools.cache
def sample(name: str, *defines: str) -> Module:
    """A sample's module; a define is "NAME" or "NAME=value"."""
    macros = {key: value or None for key, _, value in (define.partition("=") for define in defines)}
    return Module(compile_ptx(SAMPLES / f"{name}.cu", "sm_90a", macros))


def kinds(launch) -> set[str]:
    return {report.kind for report in launch.reports}


def whole_numbers(shape, dtype, seed) -> np.ndarray:
    """Small ones: sums of their products are exact."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(dtype)


def flipped(address, span: int, base: int = 0):
    """Where a byte lies under a swizzle of that many bytes: address bits from 4 on are flipped by those from 7 on."""
    return address ^ ((address >> 7) - base & span // 16 - 1) << 4 if span else address


# --- Tensor maps -------------------------------------------------------------------------------------------------

GOOD = {"address": 4096, "data_type": DataType.BFLOAT16, "sizes": (64, 200, 3), "strides": (128, 25600)}
GOOD |= {"box": (64, 32, 1), "steps": (1, 1, 1), "swizzle": Swizzle.BYTES_128}

LIMITS = {
    "address": ({"address": 4104}, "`address` must be a multiple of 16. Received: address=4104"),
    "stride": ({"strides": (136, 25600)}, "multiple of 16 bytes. Received: axis=1, stride=136"),
    "long stride": ({"strides": (128, 2**40)}, "less than 2^40 bytes. Received: axis=2"),
    "size": ({"sizes": (64, 2**32 + 1, 3)}, "a size must be 1 to 2^32. Received: axis=1"),
    "no size": ({"sizes": (64, 0, 3)}, "a size must be 1 to 2^32. Received: axis=1, size=0"),
    "box": ({"box": (64, 257, 1)}, "1 to 256 elements along an axis. Received: axis=1, box=257"),
    "no box": ({"box": (64, 32, 0)}, "1 to 256 elements along an axis. Received: axis=2, box=0"),
    "step": ({"steps": (1, 9, 1)}, "a step must be 1 to 8. Received: axis=1, step=9"),
    "no step": ({"steps": (1, 0, 1)}, "a step must be 1 to 8. Received: axis=1, step=0"),
    "span": ({"box": (72, 32, 1)}, "at most 128 bytes under this swizzle. Received: row=144"),
    "span of 64": ({"swizzle": Swizzle.BYTES_64}, "at most 64 bytes under this swizzle. Received: row=128"),
    "span of 32": ({"box": (24, 32, 1), "swizzle": Swizzle.BYTES_32}, "at most 32 bytes under this swizzle"),
    "row": ({"box": (12, 32, 1)}, "a multiple of 16 bytes. Received: row=24"),
    "axes": ({"sizes": (8,) * 6, "strides": (16,) * 5, "box": (8,) * 6, "steps": (1,) * 6}, "1 to 5 axes"),
    "no axes": ({"sizes": (), "strides": (), "box": (), "steps": ()}, "1 to 5 axes"),
    "strides": ({"strides": (128,)}, "one stride fewer than axes"),
    "boxes": ({"box": (64, 32)}, "one stride fewer than axes, a box and steps of all axes"),
    "interleave": ({"interleave": 1}, "`interleave` must be 0"),
    "swizzle": ({"swizzle": 4}, "`swizzle` must be 0 to 3"),
    "promotion": ({"l2_promotion": 4}, "`l2_promotion` must be 0 to 3"),
    "fill": ({"fill": 1, "data_type": DataType.UINT16}, "`fill` must be 0 for integers"),
    "type": ({"data_type": 13}, "`data_type` must be one of"),
}


@pytest.mark.parametrize("changes, message", LIMITS.values(), ids=LIMITS)
def test_limits_of_tensor_maps(changes, message):
    with pytest.raises(TensorMapError, match=re.escape(message)):
        encode(**GOOD | changes)


def test_tensor_maps_at_their_limits():
    for changes in (
        {"strides": (0, 2**40 - 16)},
        {"sizes": (2**32, 1, 1)},
        {"steps": (8, 8, 8), "fill": 1, "l2_promotion": 3},
        {"box": (256, 256, 256), "swizzle": 0},
    ):
        assert len(encode(**GOOD | changes)) == SIZE
    assert len({encode(**GOOD | changes) for changes in ({}, {"swizzle": 2, "box": (32, 32, 1)}, {"address": 16})}) == 3


# --- Boxes -------------------------------------------------------------------------------------------------------


def box_of(x: np.ndarray, start, box, steps, fill=0) -> np.ndarray:
    """Element by element, with axes and coordinates innermost first as the copy engine has them."""
    counts = [box[0], *(-(-extent // step) for extent, step in zip(box[1:], steps[1:]))]
    out = np.full(counts[::-1], fill, x.dtype)
    for index in itertools.product(*map(range, counts)):
        at = [first + i * (step if axis else 1) for axis, (first, i, step) in enumerate(zip(start, index, steps))]
        if all(0 <= c < size for c, size in zip(at, x.shape[::-1])):
            out[index[::-1]] = x[tuple(at[::-1])]
    return out


# Type, sizes, box, steps and start, innermost first, the swizzle, and where the box lies in shared memory.
BOXES = {
    "1 axis": (np.float32, (50,), (32,), (1,), (-7,), 0, 0),
    "2 axes": (np.float32, (36, 20), (32, 9), (1, 1), (3, 15), 3, 0),
    "every second row from outside": (ml_dtypes.bfloat16, (40, 30, 2), (32, 15, 1), (1, 2, 1), (-8, -3, 1), 2, 0),
    "32 bytes": (ml_dtypes.bfloat16, (24, 30, 3), (16, 20, 2), (1, 3, 1), (16, -5, 2), 1, 0),
    "64 bytes": (np.float32, (16, 70), (16, 33), (1, 1), (0, 40), 2, 0),
    "128 bytes, from line 3 on": (np.float16, (64, 40), (64, 21), (1, 1), (0, 25), 3, 384),
    "32 bytes, from line 1 on": (np.float16, (16, 40), (16, 21), (1, 1), (-2, -1), 1, 128),
    "4 axes": (np.uint8, (16, 5, 4, 3), (16, 3, 2, 2), (1, 1, 1, 1), (0, 3, -1, 2), 0, 0),
    "5 axes": (np.float64, (4, 3, 3, 2, 3), (2, 2, 3, 1, 2), (1, 1, 2, 1, 2), (1, 1, -1, 1, 0), 0, 0),
    "outside": (np.float32, (36, 20), (32, 9), (1, 1), (40, 0), 3, 0),
}
TYPES = {np.float32: 7, ml_dtypes.bfloat16: 9, np.float16: 6, np.uint8: 0, np.float64: 8}


@pytest.mark.parametrize("mode, seed", [("plain", 0), ("trace", 1)])
@pytest.mark.parametrize("dtype, sizes, box, steps, start, swizzle, skipped", BOXES.values(), ids=BOXES)
def test_boxes(dtype, sizes, box, steps, start, swizzle, skipped, mode, seed):
    x = np.random.default_rng(0).integers(1, 200, sizes[::-1]).astype(dtype)
    expected = box_of(x, start, box, steps)
    strides = x.strides[-2::-1]
    given = map_of(x, TYPES[dtype], sizes, strides, box, steps, swizzle=swizzle)
    # The way back: to a tensor that the box fills, at an offset of one in the outermost axis.
    y = np.zeros((expected.shape[0] + 2, *expected.shape[1:]), dtype)
    back_box = expected.shape[::-1]
    back = map_of(y, TYPES[dtype], y.shape[::-1], y.strides[-2::-1], back_box, swizzle=swizzle)
    out = np.zeros(expected.nbytes, np.uint8)
    starts = [
        np.array([*at, *(0,) * (5 - len(at))], np.int32).view("V20")[0] for at in (start, (*(0,) * (x.ndim - 1), 1))
    ]
    args = (given, back, out, *starts, np.int32(skipped), np.int32(out.size))
    options = {"mode": mode, "seed": seed, "uninitialised": (2,)}
    sample("boxes").launch(f"boxes{x.ndim}", (1,), (64,), args, skipped + out.size, **options)
    where = flipped(np.arange(out.size) + skipped, 16 << swizzle if swizzle else 0) - skipped
    np.testing.assert_array_equal(out[where], expected.reshape(-1).view(np.uint8))
    np.testing.assert_array_equal(y[1:-1], expected)
    assert not y[0].any() and not y[-1].any()


def test_a_box_of_tf32_is_rounded_on_its_way():
    """To nearest, ties to even, up into the exponent; infinities and NaN stay. What is stored is not rounded."""
    one = 0x3F800000
    bits = {
        one: one, one + 0xFFF: one, one + 0x1000: one, one + 0x1001: one + 0x2000, one + 0x3000: one + 0x4000,
        one + 0x7FFFFF: 0x40000000, 0x80000FFF: 0x80000000, 0x00001001: 0x00002000, 0x7F7FEFFF: 0x7F7FE000,
        0x7F7FFFFF: 0x7F800000, 0x7F800000: 0x7F800000, 0xFF800000: 0xFF800000, 0x7F801234: 0x7F801234,
    }  # fmt: skip
    values = np.resize(np.array([*bits], np.uint32), 256)
    expected = np.array([bits[each] for each in values.tolist()], np.uint32)
    x, y, out = values.view(np.float32).reshape(8, 32), np.zeros((8, 32), np.float32), np.zeros(256, np.float32)
    starts = [np.zeros(5, np.int32).view("V20")[0]] * 2
    for kind, loaded in ((11, expected), (7, values)):
        given, back = (map_of(each, kind, (32, 8), (128,), (32, 8)) for each in (x, y))
        sample("boxes").launch("boxes2", (1,), (64,), (given, back, out, *starts, np.int32(0), np.int32(1024)), 1024)
        assert np.array_equal(out.view(np.uint32), loaded) and np.array_equal(y.view(np.uint32).reshape(-1), loaded)


def launch_box(x=None, given=None, to=None, **options):
    """A box of 8 rows of 32 numbers there and back, with whatever maps."""
    x = np.ones((8, 32), np.float32) if x is None else x
    plain = map_of(x, 7, (32, 8), (128,), (32, 8))
    maps = (plain if each is None else each for each in (given, to))
    args = (*maps, np.zeros(256, np.float32), *[np.zeros(5, np.int32).view("V20")[0]] * 2, np.int32(0), np.int32(1024))
    return sample("boxes").launch("boxes2", (1,), (64,), args, 1024, check=False, **options)


def test_a_box_filled_with_nan():
    x, out = np.ones((8, 32), np.float32), np.zeros(256, np.float32)
    given = map_of(x, 7, (32, 8), (128,), (32, 8), fill=1)
    starts = [np.array([0, 4, 0, 0, 0], np.int32).view("V20")[0]] * 2
    args = (given, given, out, *starts, np.int32(0), np.int32(1024))
    sample("boxes").launch("boxes2", (1,), (64,), args, 1024)
    assert (out[:128] == 1).all() and np.isnan(out[128:]).all()


def test_boxes_that_no_map_describes():
    x = np.ones((8, 32), np.float32)
    beyond = map_of(x, 7, (32, 9), (128,), (32, 9))
    assert "bounds" in kinds(launch_box(x, given=beyond))
    assert kinds(launch_box(given=np.zeros(SIZE, np.uint8).view("V128")[0])) >= {"copy", "deadlock"}
    other_rank = map_of(x, 7, (32, 8, 1), (128, 1024), (32, 8, 1))
    launch = launch_box(x, to=other_rank)
    copies = [report.text for report in launch.reports if report.kind == "copy"]
    assert len(copies) == 1 and copies[0].startswith("2 coordinates for a tensor map of 3 axes")
    frozen = np.ones((8, 32), np.float32)
    frozen.flags.writeable = False
    assert kinds(launch_box(frozen)) == {"read-only"}
    narrow = map_of(x, 7, (32, 8), (128,), (16, 8), swizzle=Swizzle.BYTES_128)
    assert any("the manual leaves open" in report.text for report in launch_box(x, given=narrow).reports)
    launch = launch_box(given=map_of(x, 7, (32, 8), (128,), (32, 8), (1, 2)))  # half the rows, all the bytes
    assert kinds(launch) == {"deadlock"} and "lacks 0 arrivals and 512 bytes" in launch.reports[0].text


@pytest.mark.exhaustive
def test_planted_map_that_is_not_a_grid_constant(tmp_path):
    """The compiler copies such a parameter to local memory, where the copy engine cannot read it."""
    shutil.copy(SAMPLES / "sm90.cuh", tmp_path)
    text = (SAMPLES / "wgmma_tile.cu").read_text()
    assert text.count("const __grid_constant__ Map b") == 1
    (tmp_path / "kernel.cu").write_text(text.replace("const __grid_constant__ Map b", "Map b"))
    case = WgmmaTile(module=Module(compile_ptx(tmp_path / "kernel.cu", "sm_90a")))
    assert "bounds" in kinds(case.launch(check=False))


def test_a_box_reads_what_was_never_written():
    x = np.full((8, 32), np.nan, np.float32)
    assert kinds(launch_box(x, mode="trace", uninitialised=(0,))) == {"uninitialised"}


@every_run
def test_plain_bytes(mode, seed):
    x, y = np.arange(100, dtype=np.uint32), np.zeros(100, np.uint32)
    sample("boxes").launch("bytes", (1,), (32,), (x, y, np.uint32(96 * 4)), mode=mode, seed=seed)
    np.testing.assert_array_equal(y, np.where(np.arange(100) < 96, x, 0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_use_of_what_a_copy_writes(seed):
    module = sample("boxes", "BUG_OUTPUT_WAIT")
    args = (np.zeros(4, np.uint32), np.zeros(4, np.uint32), np.uint32(16))
    assert "race" in kinds(module.launch("bytes", (1,), (32,), args, mode="trace", seed=seed, check=False))


# --- A product through stages ------------------------------------------------------------------------------------


class WgmmaTile:
    """A product [100, 200] [72, 200] transposed: three edges that are no multiples of a tile."""

    def __init__(self, *defines: str, swizzle: int = Swizzle.BYTES_128, module: Module | None = None):
        self.module = module or sample("wgmma_tile", *defines)
        self.a = whole_numbers((100, 200), ml_dtypes.bfloat16, 1)
        self.b = whole_numbers((72, 200), ml_dtypes.bfloat16, 2)
        self.y = np.full((100, 72), np.nan, np.float32)
        self.swizzle = swizzle

    def launch(self, **options):
        maps = [map_of(x, 9, (200, len(x)), (400,), (64, 64), swizzle=self.swizzle) for x in (self.a, self.b)]
        args = (*maps, map_of(self.y, 7, (72, 100), (288,), (64, 64)), np.int32(72), np.int32(200))
        return self.module.launch("wgmma_tile", (2,), (160,), args, uninitialised=(2,), **options)

    def check(self):
        np.testing.assert_array_equal(self.y, self.a.astype(np.float32) @ self.b.astype(np.float32).T)


def test_traffic_of_copies():
    """A box counts the bytes that it has inside, line by line."""
    case = WgmmaTile()
    launch = case.launch(mode="trace")
    assert launch.touched == case.a.nbytes + case.b.nbytes + case.y.nbytes
    traffic = [each for each in launch.traffic if each.instruction.startswith("cp.async.bulk.tensor")]
    assert {each.space for each in traffic} == {"global"}
    loads = [each for each in traffic if "complete_tx" in each.instruction]
    stored = next(each for each in traffic if "bulk_group" in each.instruction)
    assert (
        sum(each.bytes for each in loads) == 2 * case.b.nbytes + 2 * case.a.nbytes
    )  # two blocks, two tiles of columns
    assert stored.bytes == case.y.nbytes and stored.requests == 2 * 100
    assert all(each.least_sectors <= each.sectors <= each.least_sectors * 1.5 for each in traffic)


@every_run
@pytest.mark.parametrize("defines", [(), ("PIPELINED",)], ids=["one by one", "pipelined"])
def test_wgmma_tile(mode, seed, defines):
    case = WgmmaTile(*defines)
    case.launch(mode=mode, seed=seed)
    case.check()


WGMMA_BUGS = {
    "BUG_INIT_FENCE": {"fence"},
    "BUG_EMPTY_WAIT": {"barrier"},
    "BUG_FEW_BYTES": {"barrier"},
    "BUG_MANY_BYTES": {"deadlock"},
    "BUG_PARITY": {"race", "uninitialised", "deadlock"},
    "BUG_FULL_WAIT": {"race"},
    "BUG_PRODUCT_FENCE": {"fence"},
    "BUG_COMMIT": {"pending"},
    "BUG_PRODUCT_WAIT": {"pending"},
    "PIPELINED BUG_EARLY_RELEASE": {"race"},
    "BUG_STORE_READ": {"race"},
    "BUG_STORE_BARRIER": {"race"},
    "BUG_ENGINE_FENCE": {"fence"},
    "BUG_LAST_STORE": {"pending"},
}


# The others wait for `make test-exhaustive`, since each is compiled by itself.
COMMON = ("BUG_FEW_BYTES", "BUG_FULL_WAIT", "BUG_PRODUCT_FENCE", "BUG_ENGINE_FENCE", "PIPELINED BUG_EARLY_RELEASE")


@pytest.mark.parametrize(
    "bug, found",
    [pytest.param(*each, marks=[pytest.mark.exhaustive] * (each[0] not in COMMON)) for each in WGMMA_BUGS.items()],
    ids=WGMMA_BUGS,
)
def test_planted_in_wgmma_tile(bug, found):
    for seed in (0, 1, 2):
        assert kinds(WgmmaTile(*bug.split()).launch(mode="trace", seed=seed, check=False)) & found, seed


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug", ["BUG_FEW_BYTES", "BUG_MANY_BYTES", "BUG_PRODUCT_WAIT", "BUG_COMMIT", "BUG_LAST_STORE"])
def test_waits_and_bytes_are_checked_without_tracing(bug):
    with pytest.raises(EmulationError, match=r"wgmma_tile\.cu:\d+"):
        WgmmaTile(bug).launch()


@pytest.mark.parametrize(
    "case",
    [
        lambda: WgmmaTile("BUG_K_STEP"),
        lambda: WgmmaTile("BUG_DESCRIPTOR"),
        lambda: WgmmaTile(swizzle=Swizzle.NONE),
    ],
    ids=["k step", "descriptor", "swizzle"],
)
def test_planted_gives_a_wrong_product(case):
    case = case()
    case.launch()
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        case.check()


@pytest.mark.parametrize(
    "file, right, wrong",
    [
        pytest.param("tensor_copies.cpp", "swizzle == 3 ? 8", "swizzle == 3 ? 4", marks=pytest.mark.exhaustive),
        ("warpgroup.cpp", "(at >> 7) - base", "(at >> 8) - base"),
    ],
    ids=["copies", "products"],
)
def test_a_swizzle_misread_on_one_side_shows(file, right, wrong, tmp_path, monkeypatch):
    for path in (*build.HERE.glob("*.h"), *build.HERE.glob("*.cpp")):
        shutil.copy(path, tmp_path)
    text = (tmp_path / file).read_text()
    assert text.count(right) == 1
    (tmp_path / file).write_text(text.replace(right, wrong))
    monkeypatch.setattr(build, "HERE", tmp_path)
    case = WgmmaTile(module=Module(compile_ptx(SAMPLES / "wgmma_tile.cu", "sm_90a", {})))
    case.launch()
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        case.check()


# --- A product by pairs of blocks --------------------------------------------------------------------------------


class WgmmaCluster:
    """A product [300, 200] [100, 200] transposed: four blocks, the last of which has 44 rows outside."""

    def __init__(self, *defines: str):
        self.module = sample("wgmma_cluster", *defines)
        self.a = whole_numbers((300, 200), ml_dtypes.bfloat16, 1)
        self.b = whole_numbers((100, 200), ml_dtypes.bfloat16, 2)
        self.y = np.full((300, 100), np.nan, np.float32)

    def launch(self, **options):
        maps = [
            map_of(x, 9, (200, len(x)), (400,), (64, rows), swizzle=Swizzle.BYTES_128)
            for x, rows in ((self.a, 64), (self.b, 32))
        ]
        args = (*maps, self.y, *map(np.int32, (300, 100, 200)))
        return self.module.launch("wgmma_cluster", (4,), (384,), args, 3 * 192 * 128, uninitialised=(2,), **options)


@every_run
def test_wgmma_cluster(mode, seed):
    case = WgmmaCluster()
    case.launch(mode=mode, seed=seed)
    np.testing.assert_array_equal(case.y, case.a.astype(np.float32) @ case.b.astype(np.float32).T)


@pytest.mark.exhaustive
@pytest.mark.parametrize("bug, found", [("BUG_OWN_RELEASE", "race"), ("BUG_EARLY_EXIT", "bounds")])
def test_planted_in_wgmma_cluster(bug, found):
    for seed in (0, 1, 2):
        assert found in kinds(WgmmaCluster(bug).launch(mode="trace", seed=seed, check=False)), seed


# --- Products, form by form --------------------------------------------------------------------------------------

HEADER = ".version 8.0\n.target sm_90a\n.address_size 64\n"
ELEMENTS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32}
HALF_BYTES = 1 << 16  # of shared memory, for each of the two matrices


class Form:
    """A product of one form: its kernel, and its operands as they lie in memory.

    `a` and `b` are (span of the swizzle, transposed); `a` None: in registers. `base` is the line of 128 bytes, within
    eight, on which the pattern of the swizzle begins.
    """

    def __init__(self, element, columns, a, b, *, signs=(1, 1), adds=True, base=0):
        self.element, self.columns, self.a, self.b = element, columns, a, b
        self.signs, self.adds, self.base = signs, adds, base
        self.dtype = np.dtype(ELEMENTS[element])
        self.depth = 32 // self.dtype.itemsize

    def kernel(self, name: str) -> str:
        sums = [f"%f{i}" for i in range(self.columns // 2)]
        transposes = "".join(f", {int(each[1])}" for each in (self.a, self.b) if each) if self.depth == 16 else ""
        first = "%rd4" if self.a else "{%r4, %r5, %r6, %r7}"
        shape = f"m64n{self.columns}k{self.depth}.f32.{self.element}.{self.element}"
        moves = [
            "mov.u32 %r0, %tid.x; mov.u32 %r1, tile; shl.b32 %r2, %r0, 4;",
            *(f"ld.param.u64 %rd{i}, [{name}_{i}];" for i in range(5)),
            "cvt.u64.u32 %rd5, %r2; add.u64 %rd0, %rd0, %rd5; add.u32 %r1, %r1, %r2;",
            "COPY: ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0]; st.shared.v4.b32 [%r1], {%r4, %r5, %r6, %r7};",
            "add.u32 %r2, %r2, 2048; add.u32 %r1, %r1, 2048; add.u64 %rd0, %rd0, 2048;",
            f"setp.lt.u32 %p0, %r2, {2 * HALF_BYTES}; @%p0 bra COPY; fence.proxy.async; bar.sync 0;",
            "mov.u32 %r1, tile; shr.u32 %r1, %r1, 4; cvt.u64.u32 %rd5, %r1;",
            "add.u64 %rd3, %rd3, %rd5; add.u64 %rd4, %rd4, %rd5;",
            "cvt.u64.u32 %rd5, %r0; shl.b64 %rd6, %rd5, 4; add.u64 %rd1, %rd1, %rd6;",
            "ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1];",
            f"mul.lo.u64 %rd6, %rd5, {4 * len(sums)}; add.u64 %rd2, %rd2, %rd6;",
            *(f"ld.global.f32 {each}, [%rd2+{4 * i}];" for i, each in enumerate(sums)),
            f"mov.u32 %r3, {int(self.adds)}; setp.ne.u32 %p0, %r3, 0; wgmma.fence.sync.aligned;",
            f"wgmma.mma_async.sync.aligned.{shape} {{{', '.join(sums)}}}, {first.replace('%rd4', '%rd3')}, %rd4, %p0, "
            f"{self.signs[0]}, {self.signs[1]}{transposes};",
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;",
            *(f"st.global.f32 [%rd2+{4 * i}], {each};" for i, each in enumerate(sums)),
        ]
        parameters = ", ".join(f".param .u64 {name}_{i}" for i in range(5))
        registers = f".reg .pred %p<2>; .reg .b32 %r<8>; .reg .b64 %rd<8>; .reg .f32 %f<{len(sums)}>;"
        shared = f".shared .align 1024 .b8 tile[{2 * HALF_BYTES}];"
        return "\n".join([f".visible .entry {name}({parameters})", "{", registers, shared, *moves, "ret;", "}"])

    def lay_out(self, x: np.ndarray, memory: np.ndarray, start: int, span: int, transposed: bool) -> int:
        """Puts x [rows, depth] into memory in the canonical layout of CUTLASS; its descriptor, from there on."""
        start += 128 * self.base
        unit = 16 // x.itemsize  # elements in 16 bytes
        width = max(span, 16) // 16
        leading, stride = (span or 16) * 128, 8 * max(span, 16)
        row, k = np.indices(x.shape)
        if transposed:
            inner = row % unit * x.itemsize + row // unit % width * 16
            at = inner + row // unit // width * (leading if span else stride) + k % 8 * 16 * width
            at += k // 8 * (stride if span else leading)
        else:
            at = row % 8 * 16 * width + row // 8 * stride
            at += k % unit * x.itemsize + k // unit * (16 if span else leading)
        at = flipped(start + at, span, self.base)
        memory.view(x.dtype)[at // x.itemsize] = x
        modes = {0: 0, 128: 1, 64: 2, 32: 3}
        return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | self.base << 49 | modes[span] << 62

    def run(self, module: Module, name: str, seed: int) -> None:
        a = whole_numbers((64, self.depth), self.dtype, 3)
        b = whole_numbers((self.columns, self.depth), self.dtype, 4)
        c = whole_numbers((64, self.columns), np.float32, 5)
        memory = np.full(2 * HALF_BYTES, 0xFF, np.uint8)
        descriptors = [
            self.lay_out(a, memory, 0, *(self.a or (0, False))),
            self.lay_out(b, memory, HALF_BYTES, *self.b),
        ]
        if not self.a:
            memory[:HALF_BYTES] = 0xFF
        thread, i = np.indices((128, 4))
        pairs = np.arange(4 // self.dtype.itemsize)
        rows, k = thread // 32 * 16 + thread % 32 // 4 + i % 2 * 8, thread % 4 * pairs.size + i // 2 * (self.depth // 2)
        fragments = np.ascontiguousarray(a[rows[..., None], k[..., None] + pairs]).view(np.uint32).reshape(128, 4)
        thread, j = np.indices((128, self.columns // 2))
        place = thread // 32 * 16 + thread % 32 // 4 + j // 2 % 2 * 8, j // 4 * 8 + thread % 4 * 2 + j % 2
        sums = np.ascontiguousarray(c[place])
        args = (memory, fragments, sums, *map(np.uint64, descriptors))
        module.launch(name, (1,), (128,), args, mode="trace", seed=seed)
        product = a.astype(np.float32) @ b.astype(np.float32).T * self.signs[0] * self.signs[1]
        np.testing.assert_array_equal(sums, (product + c * self.adds)[place], err_msg=name)


FORMS = {
    "rows": Form("bf16", 64, (128, False), (128, False)),
    "narrow": Form("f16", 8, (64, False), (32, False)),
    "no_swizzle": Form("f16", 24, (0, False), (0, False)),
    "no_swizzle_transposed": Form("bf16", 40, (0, True), (0, True)),
    "transposed": Form("bf16", 256, (128, True), (128, True)),
    "transposed_64": Form("f16", 96, (64, True), (64, True)),
    "transposed_32": Form("bf16", 48, (32, True), (32, True)),
    "one_transposed": Form("f16", 136, (32, False), (128, True), signs=(-1, 1)),
    "tf32_rows": Form("tf32", 24, (128, False), (64, False), signs=(-1, -1)),
    "tf32_registers": Form("tf32", 80, None, (0, False)),
    "registers": Form("f16", 72, None, (128, True), signs=(1, -1)),
    "assigned": Form("bf16", 16, None, (32, False), adds=False),
    "shifted": Form("bf16", 32, (128, False), (128, False), base=3),
    "shifted_64": Form("f16", 32, (64, False), (64, True), base=1),
}


@functools.cache
def forms() -> Module:
    return Module(HEADER + "\n".join(form.kernel(name) for name, form in FORMS.items()))


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_products(name):
    for seed in (0, 1):
        FORMS[name].run(forms(), name, seed)


# --- From the text -----------------------------------------------------------------------------------------------


def entry(name: str, body: str, bounds: str = "") -> str:
    """A kernel of two arrays, with 2 KiB of shared memory and an mbarrier."""
    return "\n".join(
        [
            f".visible .entry {name}(.param .u64 {name}_0, .param .u64 {name}_1) {bounds}",
            "{",
            ".reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>; .reg .f32 %f<16>;",
            ".shared .align 1024 .b8 tile[2048]; .shared .b64 bar;",
            f"ld.param.u64 %rd6, [{name}_0]; ld.param.u64 %rd7, [{name}_1];",
            body,
            "ret;",
            "}",
        ]
    )


@functools.cache
def module(*entries: str) -> Module:
    return Module(HEADER + "\n".join(entries))


def launch(code: Module, name: str = "k", threads: int = 128, **options):
    args = (np.zeros(1024, np.uint32), np.zeros(1024, np.float32))
    return code.launch(name, (1,), (threads,), args, check=False, **{"timeout": 5, **options})


def name_of(key: str) -> str:
    return re.sub(r"\W", "_", key)


def kernels(cases: dict, body=lambda case: "\n".join(case[0]), bounds=lambda case: "") -> Module:
    """A module of a kernel for each case."""
    return module(*(entry(name_of(key), body(case), bounds(case)) for key, case in cases.items()))


# Fragments of A in registers, B in shared memory: 8 columns of 16 elements, without a swizzle.
READY = """
mov.u32 %r0, %tid.x; shl.b32 %r1, %r0, 2; mov.u32 %r2, tile; add.u32 %r1, %r1, %r2;
st.shared.b32 [%r1], 0; st.shared.b32 [%r1+512], 0; fence.proxy.async; bar.sync 0;
shr.u32 %r2, %r2, 4; cvt.u64.u32 %rd0, %r2; add.u64 %rd0, %rd0, 0x800080000;
mov.b32 %r4, 0; mov.b32 %r5, 0; mov.b32 %r6, 0; mov.b32 %r7, 0;
cvt.u64.u32 %rd1, %r0; shl.b64 %rd1, %rd1, 2; add.u64 %rd1, %rd1, %rd7;
"""
FENCE, COMMIT = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
PRODUCT = (
    "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, {%r4, %r5, %r6, %r7}, %rd0, 1, 1, 1, 0;"
)


def wait_for(groups: int) -> str:
    return f"wgmma.wait_group.sync.aligned {groups};"


RIGHT = (READY, FENCE, PRODUCT, COMMIT, wait_for(0))
USE = "st.global.f32 [%rd1], %f0;"
LINTED = {
    "right": ((*RIGHT,), set()),
    "twice": ((READY, FENCE, PRODUCT, PRODUCT, COMMIT, wait_for(0)), set()),
    "moved": ((*RIGHT, "mov.f32 %f8, %f0; add.f32 %f8, %f8, %f8; mov.f32 %f0, %f8;", *RIGHT[1:]), set()),
    "no fence": ((READY, PRODUCT, COMMIT, wait_for(0)), {"fence"}),
    "written after the fence": ((READY, FENCE, "add.f32 %f2, %f1, %f1;", *RIGHT[2:]), {"fence"}),
    "fragment after the fence": ((READY, FENCE, "add.u32 %r5, %r5, 1;", *RIGHT[2:]), {"fence"}),
    "brought by a move": ((READY, FENCE, "add.f32 %f9, %f8, %f8; mov.f32 %f2, %f9;", *RIGHT[2:]), {"fence"}),
    "read since": ((*RIGHT, "add.f32 %f9, %f3, %f3;", *RIGHT[2:]), {"fence"}),
    "around a loop": ((READY, FENCE, "AGAIN:", *RIGHT[2:], "add.f32 %f3, %f3, 0f00000000; add.u32 %r8, %r8, 1;",
                       "setp.lt.u32 %p1, %r8, 3; @%p1 bra AGAIN;"), {"fence"}),
    "fragment in use": ((READY, FENCE, PRODUCT, COMMIT, "add.u32 %r5, %r5, 1;", wait_for(0)), {"pending"}),
    "fragment of the group before": (
        (READY, FENCE, PRODUCT, COMMIT, wait_for(1), "add.u32 %r5, %r5, 1;", wait_for(0)), {"pending"},
    ),
    "fragment of a group that is over": (
        (READY, FENCE, PRODUCT, COMMIT, COMMIT, wait_for(1), "add.u32 %r5, %r5, 1;", wait_for(0)), set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINTED)
def test_lint_of_products(name):
    """A run of such a kernel goes well; only the text shows the mistake."""
    report = launch(kernels(LINTED), name_of(name), mode="trace")
    assert kinds(report) == LINTED[name][1]
    assert all(each.place.startswith("PTX line") for each in report.reports)


RUN = {
    "right": ((*RIGHT, USE), set()),
    "used too early": ((*RIGHT[:-1], USE, wait_for(0)), {"pending"}),
    "moved and used too early": ((*RIGHT[:-1], "mov.f32 %f8, %f1; add.f32 %f8, %f8, %f8;", wait_for(0)), {"pending"}),
    "packed too early": ((*RIGHT[:-1], "mov.b64 %rd2, {%f0, %f1};", wait_for(0)), {"pending"}),
    "multiplied too early": (
        (*RIGHT[:-1], FENCE, "mov.b32 %r5, %f0;", PRODUCT, COMMIT, wait_for(0)), {"pending"},
    ),
    "one group left": ((*RIGHT[:-1], wait_for(1), USE, wait_for(0)), {"pending"}),
    "not committed": ((READY, FENCE, PRODUCT, wait_for(0), USE), {"pending"}),
    "left behind": (RIGHT[:-1], {"pending"}),
    "other places": (
        (*RIGHT[:-1], "mov.f32 %f8, %f0; mov.f32 %f0, %f1; mov.f32 %f1, %f8;", PRODUCT, COMMIT, wait_for(0)),
        {"pending"},
    ),
    "no engine fence": ((READY.replace("fence.proxy.async;", ""), *RIGHT[1:]), {"fence"}),
    "another engine fence": ((READY.replace("proxy.async;", "proxy.async.global;"), *RIGHT[1:]), {"fence"}),
    "the reader's engine fence": (
        (READY.replace("fence.proxy.async; bar.sync 0;", "bar.sync 0; fence.proxy.async;"), *RIGHT[1:]), set(),
    ),
    "no barrier": ((READY.replace("bar.sync 0;", ""), *RIGHT[1:]), {"race"}),
    "overwritten": ((*RIGHT[:-1], "st.shared.b32 [%r1], 1;", wait_for(0)), {"race"}),
    "overwritten by a neighbour": (
        (*RIGHT, "xor.b32 %r1, %r1, 128; st.shared.b32 [%r1], 1;"), set(),  # all have waited for the same product
    ),
    "beyond the tile": (
        (READY.replace("0x800080000", "0x807000800"), *RIGHT[1:]), {"bounds"},
    ),
    "two descriptors": ((READY, "cvt.u64.u32 %rd3, %r0; shr.u64 %rd3, %rd3, 6; add.u64 %rd0, %rd0, %rd3;", *RIGHT[1:]),
                        {"divergence"}),
}  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", RUN)
def test_planted_in_a_product(name, seed):
    assert kinds(launch(kernels(RUN), name_of(name), mode="trace", seed=seed)) == RUN[name][1]


def test_a_warpgroup_has_four_warps():
    report = launch(kernels(RUN), "right", threads=96).reports
    assert [each.kind for each in report] == ["divergence"] and "this one has fewer" in report[0].text


# --- Registers ---------------------------------------------------------------------------------------------------

BOUNDS = ".maxntid 384, 1, 1 .minnctapersm 1"
TRADE = """
mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 128; @%p0 bra GIVE;
setmaxnreg.inc.sync.aligned.u32 {take}; bra DONE;
GIVE: setmaxnreg.dec.sync.aligned.u32 {give};
DONE: bar.sync 0;
"""


TRADES = {
    "most": (24, 240, BOUNDS, set(), ""),
    "fewer": (32, 232, BOUNDS, set(), ""),
    "too many": (40, 240, BOUNDS, {"deadlock"}, "1 for registers"),
    "no multiple": (24, 236, BOUNDS, {"registers"}, "236 registers: a multiple of 8 from 24 to 256 is possible"),
    "low": (16, 240, BOUNDS, {"registers"}, "16 registers"),
    "high": (24, 264, BOUNDS, {"registers"}, "264 registers"),
    "gives more": (176, 168, BOUNDS, {"registers"}, "setmaxnreg.dec to 176, from 168"),
    "takes fewer": (24, 160, BOUNDS, {"registers"}, "setmaxnreg.inc to 160, from 168"),
    "without blocks": (24, 240, ".maxntid 384, 1, 1", {"registers"}, "the compiler ignores setmaxnreg"),
    "of fewer": (24, 240, f"{BOUNDS} .maxnreg 160", {"deadlock"}, "1 for registers"),
}


@pytest.mark.parametrize("name", TRADES)
def test_trade_with_registers(name):
    code = kernels(TRADES, lambda case: TRADE.format(give=case[0], take=case[1]), lambda case: case[2])
    report = launch(code, name_of(name), 384)
    assert kinds(report) == TRADES[name][3]
    assert all(TRADES[name][4] in each.text for each in report.reports)


def test_registers_are_traded_by_warpgroups():
    part = "mov.u32 %r0, %tid.x; setp.lt.u32 %p0, %r0, 64; @%p0 setmaxnreg.dec.sync.aligned.u32 24;"
    assert kinds(launch(module(entry("k", part, BOUNDS)))) == {"deadlock"}


# --- mbarriers and clusters --------------------------------------------------------------------------------------

ONE_THREAD = "mov.u32 %r0, %tid.x; setp.ne.u32 %p0, %r0, 0; @%p0 bra END; mov.u32 %r1, bar; mbarrier.init.b64 [%r1], 1;"
WAIT = "AGAIN: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 %p1, [%r1], 0; @!%p1 bra AGAIN; END:"
COUNTED = {
    "one by one": ("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r1], 32; mbarrier.arrive.shared.b64 _, [%r1]; "
                   "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r1], 16; "
                   "mbarrier.complete_tx.relaxed.cluster.shared::cluster.b64 [%r1], 16;", set(), ""),
    "completed before": ("mbarrier.complete_tx.shared.b64 [%r1], 48; "
                         "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %rd0, [%r1], 48;", set(), ""),
    "too few": ("mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 32; mbarrier.complete_tx.shared.b64 [%r1], 16;",
                {"deadlock"}, "1 at an mbarrier, which lacks 0 arrivals and 16 bytes"),
    "too many": ("mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 32; mbarrier.complete_tx.shared.b64 [%r1], 48;",
                 {"deadlock"}, "lacks 0 arrivals and -16 bytes"),
    "no arrival": ("mbarrier.expect_tx.shared.b64 [%r1], 32; mbarrier.complete_tx.shared.b64 [%r1], 32;",
                   {"deadlock"}, "lacks 1 arrivals and 0 bytes"),
    "more than it counts": ("mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 1048576;", {"barrier"},
                            "1048575 are possible"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_bytes_of_an_mbarrier(name):
    report = launch(kernels(COUNTED, lambda case: f"{ONE_THREAD} {case[0]} {WAIT}"), name_of(name), 32)
    _, found, text = COUNTED[name]
    assert kinds(report) == found and all(text in each.text for each in report.reports)


def test_polling_for_a_copy_ends():
    """A thread that asks again and again lets the copy come, under the seed that delays copies the longest too."""
    copy = (
        "fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared.b64 _, [%r1], 16; mov.u32 %r2, tile; "
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd6], 16, [%r1];"
    )
    code = module(entry("k", f"{ONE_THREAD} {copy} {WAIT.replace('try_wait', 'test_wait')}"))
    for seed in (0, 1):
        assert kinds(launch(code, threads=32, seed=seed)) == set()


def test_a_lane_is_elected():
    body = (
        "mov.u32 %r0, %tid.x; elect.sync %r1|%p0, 0xffffffff; selp.u32 %r2, 1, 0, %p0; cvt.u64.u32 %rd1, %r0; "
        "shl.b64 %rd1, %rd1, 2; add.u64 %rd0, %rd6, %rd1; st.global.u32 [%rd0], %r2;"
    )
    x = np.full(64, 7, np.uint32)
    module(entry("k", body)).launch("k", (1,), (64,), (x, None))
    np.testing.assert_array_equal(np.flatnonzero(x), [0, 32])


# --- Clusters ----------------------------------------------------------------------------------------------------

PAIR = ".maxntid 64, 1, 1 .explicitcluster .reqnctapercluster 2, 1, 1"
ARRIVE, MEET = "barrier.cluster.arrive.aligned;", "barrier.cluster.wait.aligned;"
# Each block writes its rank and reads the other's; both write to their own place of the second array.
SWAP = """
mov.u32 %r0, %tid.x; mov.u32 %r1, %cluster_ctarank; mov.u32 %r2, tile; shl.b32 %r3, %r0, 2; add.u32 %r2, %r2, %r3;
add.u32 %r4, %r1, 100; st.shared.u32 [%r2], %r4;
{first} xor.b32 %r5, %r1, 1; mapa.shared::cluster.u32 %r6, %r2, {rank}; ld.shared::cluster.u32 %r7, [%r6]; {last}
mov.u32 %r8, %ctaid.x; shl.b32 %r8, %r8, 8; add.u32 %r8, %r8, %r3; cvt.u64.u32 %rd0, %r8; add.u64 %rd0, %rd0, %rd6;
st.global.u32 [%rd0], %r7;
"""
PAIRS = {
    "right": (ARRIVE + MEET, "%r5", ARRIVE + MEET, set()),
    "its own": (ARRIVE + MEET, "%r1", ARRIVE + MEET, set()),
    "no barrier": ("", "%r5", ARRIVE + MEET, {"race", "uninitialised"}),
    "a barrier of the block": ("bar.sync 0;", "%r5", ARRIVE + MEET, {"race", "uninitialised"}),
    "relaxed": ("barrier.cluster.arrive.relaxed.aligned;" + MEET, "%r5", ARRIVE + MEET, {"race"}),
    "only arrived": (ARRIVE, "%r5", MEET, {"race", "uninitialised"}),
    "not arrived": (MEET, "%r5", "", {"barrier"}),
    "arrived twice": (ARRIVE + ARRIVE, "%r5", MEET, {"barrier"}),
    "no such block": (ARRIVE + MEET, "2", ARRIVE + MEET, {"bounds"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_blocks_of_a_cluster(name):
    code = kernels(PAIRS, lambda case: SWAP.format(first=case[0], rank=case[1], last=case[2]), lambda _: PAIR)
    *_, found = PAIRS[name]
    for seed in (0, 1, 2):
        x = np.zeros(4 * 64, np.uint32)
        options = {"mode": "trace", "seed": seed, "check": False}
        report = code.launch(name_of(name), (4,), (64,), (x, None), **options)
        assert kinds(report) <= found and bool(kinds(report)) == bool(found), seed
        if not found:
            swapped = [101, 100] if name == "right" else [100, 101]
            np.testing.assert_array_equal(x.reshape(4, 64), np.repeat([swapped * 2], 64, 0).T)


def test_a_block_of_a_cluster_that_has_ended():
    late = (
        "setp.eq.u32 %p0, %r1, 1; @%p0 bra END; LATER: add.u32 %r9, %r9, 1; setp.lt.u32 %p1, %r9, 9000; @%p1 bra LATER;"
    )
    code = module(entry("k", SWAP.format(first=late, rank="%r5", last="") + "END:", PAIR))
    report = code.launch("k", (2,), (64,), (np.zeros(128, np.uint32), None), check=False)
    assert kinds(report) == {"bounds"} and "block 1 of the cluster, which has ended" in report.reports[0].text


def test_clusters_are_whole():
    code = kernels(PAIRS, lambda case: SWAP.format(first=case[0], rank=case[1], last=case[2]), lambda _: PAIR)
    with pytest.raises(ValueError, match="`grid` must be clusters of 2 blocks along x"):
        code.launch("right", (3,), (64,), (np.zeros(256, np.uint32), None))
    x = np.zeros(256, np.uint32)
    code.launch("right", (4,), (64,), (x, None), blocks=[3])
    np.testing.assert_array_equal(np.flatnonzero(x) // 64, np.repeat([2, 3], 64))
    with pytest.raises(emulator.PtxError, match="clusters are supported along x"):
        module(entry("k", "", ".reqnctapercluster 1, 2, 1"))
