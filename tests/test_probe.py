"""benchmarks/probe.py without a GPU: its kernels compile to the instructions they are about, those the emulator can run
are right, its experiments tell a GPU that does what plans count on from one that does not, and each is on its own.

The GPU of the third part is a model in NumPy, from what the PTX manual says of tensor maps and matrix descriptors.
"""

import ctypes
import json
import math
import re
import sys
from types import SimpleNamespace

import disassembly
import emulator
import fake_cupy
import ml_dtypes
import numpy as np
import pytest

from benchmarks import probe
from benchmarks.probe import FOLDER, MIB, Answer, DryGpu, Gpu, RefusedError, descriptor, expected_product, swizzled
from cuconv.cuda import cubins, runtime
from cuconv.plan.types import LaunchPlan

needs_nvrtc = pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))
needs_nvdisasm = pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
needs_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@pytest.fixture
def small(monkeypatch):
    """Experiments with little memory."""
    monkeypatch.setattr(probe, "COPY_MIB", (1, 2))
    monkeypatch.setattr(probe, "L2_MIB", (1, 2, 4))
    monkeypatch.setattr(probe, "STAGING_MIB", {1: 3, 2: 1})
    monkeypatch.setattr(probe, "STRIDE_MIB", 2)


# --- The kernels -------------------------------------------------------------------------------------------------

TILE = {"ROWS": 128, "TRANSPOSED_A": 0, "TRANSPOSED_B": 0, "FROM_MAP": 0, "STAGE_ONLY": 0}

# Kernel, the architecture it needs at least, constants, most registers, and how often instructions must occur.
KERNELS = (
    ("empty", "sm_75", {}, 8, {}),
    ("copy", "sm_75", {"VECTORS": 4}, 48, {"LDG.128": 4, "STG.128": 4}),
    ("read", "sm_75", {}, 48, {"LDG.128.STRONG": 4}),
    ("stage", "sm_80", {"STAGES": 4}, 48, {"LDGSTS.BYPASS.128": 4, "LDS.128": 1}),
    ("box", "sm_90", {"RANK": 2, "BOX_BYTES": 8192}, 32, {"UTMALDG.2D": 1}),
    ("box", "sm_90", {"RANK": 3, "BOX_BYTES": 8192}, 32, {"UTMALDG.3D": 1}),
    ("stream", "sm_90", {"STAGES": 6, "BOX_BYTES": 16384}, 64, {"UTMALDG.3D": 1}),
    ("cluster", "sm_90", {"BOX_BYTES": 8192}, 64, {"UTMALDG.3D.MULTICAST": 1, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2}),
    ("registers", "sm_90a", {}, 168, {"USETMAXREG": 2}),
    *(
        (
            "product",
            "sm_90a",
            {**TILE, "TRANSPOSED_A": a, "TRANSPOSED_B": b, "FROM_MAP": m},
            96,
            {"HGMMA.64x64x16.BF16": 4, "UTMALDG.2D": m},
        )
        for a in (0, 1)
        for b in (0, 1)
        for m in (0, 1)
    ),
)
NEWER = {"sm_75": ("sm_80", "sm_90", "sm_90a"), "sm_80": ("sm_90", "sm_90a"), "sm_90": ("sm_90a",)}


@needs_nvrtc
@needs_nvdisasm
@pytest.mark.parametrize("name, arch, constants, registers, needs", KERNELS, ids=lambda value: str(value))
def test_a_kernel_is_made_of_what_it_is_about(name, arch, constants, registers, needs):
    for each in (arch, *NEWER.get(arch, ())):
        function = disassembly.functions(emulator.compile_cubin(FOLDER / f"{name}.cu", each, constants))[name]
        assert function.registers <= registers and function.stack_bytes == 0 and function.spills == 0, each
        for opcode, count in needs.items():
            first, *modifiers = opcode.split(".")
            assert function.count(first, *modifiers) >= count, (each, opcode, function.mix())
            if name == "product":
                assert function.count(first, *modifiers) == count, (each, opcode)


@needs_nvrtc
def test_products_and_traded_registers_are_for_one_architecture():
    """Else nobody would have to compile for sm_90a."""
    for name, constants in (("product", TILE), ("registers", {})):
        with pytest.raises(emulator.CompileError):
            emulator.compile_cubin(FOLDER / f"{name}.cu", "sm_90", constants)


@needs_nvrtc
@needs_nvdisasm
def test_the_consumers_use_the_registers_they_took():
    function = disassembly.functions(emulator.compile_cubin(FOLDER / "registers.cu", "sm_90a"))["registers"]
    used = max(int(n) for each in function.instructions for n in re.findall(r"\bR(\d+)", each.operands))
    # At the start all have as many as will be there in all: taking would otherwise wait for ever.
    assert 168 < used < 240 and function.registers == 168 and 3 * 168 == 24 + 2 * 240
    sizes = {each.operands.rpartition("0x")[2] for each in function.instructions if each.name == "USETMAXREG"}
    assert sizes == {f"{24:x}", f"{240:x}"}


def test_every_kernel_is_in_the_list_and_assembly_in_one_header():
    assert {path.stem for path in FOLDER.glob("*.cu")} == {name for name, *_ in KERNELS}
    files = list(FOLDER.iterdir())
    with_assembly = {path.name for path in files if re.search(r"\basm\b", re.sub(r"//.*", "", path.read_text()))}
    assert with_assembly == {"instructions.cuh"}
    for path in files:
        assert path.suffix in (".cu", ".cuh") and path.read_text().startswith(f"// {path.name} -- ")
        assert "<" not in "".join(re.findall(r"#include.*", path.read_text()))


def emulated(name, grid, block, arguments, arch="sm_80", mode="trace", **constants):
    module = emulator.Module(emulator.compile_ptx(FOLDER / f"{name}.cu", arch, constants))
    module.launch(name, (grid,), (block,), arguments, mode=mode, seed=1)


def random_words(count, seed=0):
    return np.random.default_rng(seed).integers(0, 1 << 32, count, np.uint32)


@needs_emulator
def test_the_copy_kernel_copies():
    x, y = random_words(4 * 2500), np.zeros(4 * 2500, np.uint32)
    emulated("copy", -(-2500 // 1024), 256, (x, y, np.int64(2500)), VECTORS=4)
    assert np.array_equal(x, y)


@needs_emulator
@pytest.mark.parametrize("passes", [1, 3])
def test_the_reading_kernels_read_every_word(passes):
    x = random_words(4 * 256 * 20)
    for name, threads, blocks in (("read", 512, 2), ("stage", 256, 3)):
        sums = np.zeros(blocks * threads, np.uint32)
        constants = {"STAGES": 4} if name == "stage" else {}
        emulated(name, blocks, threads, (x, sums, np.int64(x.size // 4), np.int32(passes)), **constants)
        assert probe.every_word(sums) == probe.every_word(x) != 0, name


@needs_emulator
def test_the_product_stages_its_rows_as_the_swizzle_says():
    a = probe.whole_numbers((128, 64), 1)
    out = np.zeros(128 * 64, np.uint16)
    nothing = np.zeros(1, np.uint32)
    arguments = (probe.NO_MAP[0], a.view(np.uint32), nothing, out, np.uint64(0), np.uint64(0), np.int32(0), np.int32(0))
    emulated("product", 1, 128, arguments, **{**TILE, "STAGE_ONLY": 1})
    assert np.array_equal(out.reshape(128, 64), swizzled(a.view(np.uint16)))


class EmulatedGpu(DryGpu):
    """The emulator in the place of a GPU: tensor maps, copies and products are what it takes them for."""

    def poison(self, nbytes):
        return np.full(nbytes, 0xFF, np.uint8)

    random = poison

    def tensor_map(self, array, sizes, strides, box, steps=None, swizzle=0):
        given = emulator.map_of(array, probe.BFLOAT16, sizes, strides, box, steps, swizzle=swizzle)
        try:
            given.pack((array.ctypes.data // 16 * 16,))
        except emulator.TensorMapError as error:
            raise RefusedError(str(error)) from None
        return given

    def launch(self, name, grid, block, arguments, shared_bytes=0, arch=None, **constants):
        module = emulator.Module(emulator.compile_ptx(FOLDER / f"{name}.cu", arch or "sm_90", constants))
        given = [each[0] if getattr(each, "dtype", None) == "V128" else each for each in arguments]
        module.launch(name, (grid,), (block,), given, shared_bytes, mode="trace", seed=1)


TRANSPOSED = [(False, False), (False, True), (True, False), (True, True)]


@needs_emulator
@pytest.mark.parametrize("transposed", TRANSPOSED, ids=str)
@pytest.mark.parametrize("skip", [0, 5])
def test_the_product_kernel(transposed, skip):
    """Staging, descriptors, steps and epilogue; from any row on, since the swizzle flips bits of whole addresses."""
    a, b = probe.whole_numbers((128, 64), 1), probe.whole_numbers((64, 64), 2)
    got = probe._product(EmulatedGpu(), a, b, *transposed, skip)
    assert np.array_equal(got, expected_product(a, b, *transposed, skip=skip))


@needs_emulator
@pytest.mark.parametrize("row, skip", [(-3, 1), (100, 16), (5, 63)])
def test_the_product_kernel_on_what_was_copied(row, skip):
    gpu, x, b = EmulatedGpu(), probe.whole_numbers((200, 64), 1), probe.whole_numbers((64, 64), 2)
    given = gpu.tensor_map(x, (64, 200), (128,), (64, 128), None, probe.SWIZZLE_128)
    tile = probe.box_of(x, (row, 0), (128, 64))
    got = probe._product(gpu, x, b, False, False, skip, 0, given, row)
    assert np.array_equal(got, expected_product(tile, b, False, False, skip=skip))


@needs_emulator
def test_a_base_offset_moves_the_pattern():
    """So a start between multiples of 1024 bytes must not be told as one where the pattern begins."""
    a, b = probe.whole_numbers((128, 64), 1), probe.whole_numbers((64, 64), 2)
    got = probe._product(EmulatedGpu(), a, b, False, False, 5, 5)
    assert not np.array_equal(got, expected_product(a, b, False, False, skip=5))


def launched_cluster(folder, **options):
    """Whether two blocks have seen and brought the right numbers, and what the emulator reports."""
    gpu, x = EmulatedGpu(), probe.whole_numbers((1, 64, 64), 10)
    given = gpu.tensor_map(x, (64, 64, 1), (128, x.nbytes), (64, 64, 1), None, probe.SWIZZLE_128)
    seen, out = np.zeros(4, np.uint32), np.zeros((4, 64, 128), np.uint8)
    module = emulator.Module(emulator.compile_ptx(folder / "cluster.cu", "sm_90", {"BOX_BYTES": x.nbytes}))
    launch = module.launch("cluster", (4,), (128,), (given, seen, out), x.nbytes + 1024, check=False, **options)
    right = seen.tolist() == [1001, 1000, 1003, 1002] and bool((out == swizzled(x[0].view(np.uint8))).all())
    return right, {report.kind for report in launch.reports}


@needs_emulator
@pytest.mark.parametrize("mode, seed", [("plain", 0), ("trace", 1), ("trace", 2)])
def test_one_box_is_brought_to_two_blocks(mode, seed):
    assert launched_cluster(FOLDER, mode=mode, seed=seed) == (True, set())


@needs_emulator
@pytest.mark.parametrize(
    "right, wrong, found",
    [
        ("__syncthreads();\n  ptx::cluster_sync();", "__syncthreads();", {"barrier", "race", "uninitialised"}),
        ("0, 0, 0, 3);", "0, 0, 0, 1);", {"deadlock"}),
        ("0, 0, 0, 3);", "0, 0, 0, 7);", {"barrier"}),
        ("ptx::cluster_rank() ^ 1);", "ptx::cluster_rank() ^ 2);", {"bounds"}),
        ("ptx::cluster_rank() == 0)", "true)", {"barrier"}),
    ],
    ids=["no barrier of the cluster", "one block", "three blocks", "no such neighbour", "both ask"],
)
def test_a_mistake_in_a_cluster_is_caught(right, wrong, found, tmp_path):
    text = (FOLDER / "cluster.cu").read_text()
    assert text.count(right) == 1
    (tmp_path / "cluster.cu").write_text(text.replace(right, wrong))
    (tmp_path / "instructions.cuh").write_text((FOLDER / "instructions.cuh").read_text())
    for seed in (0, 1):
        assert launched_cluster(tmp_path, mode="trace", seed=seed)[1] & found, seed


@needs_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["tensor", "product", "shift", "halo", "stride", "overlap", "cluster", "registers"])
def test_experiments_in_the_emulator(name, small):
    """Where the emulator and the model below agree, both read the manual alike."""
    for each in probe.EXPERIMENTS[name].ask(EmulatedGpu()):
        assert each.ok is not False, each


@needs_emulator
def test_a_box_in_the_emulator():
    gpu, x = EmulatedGpu(), probe.whole_numbers((200, 64), 1)
    for swizzle in (probe.NO_SWIZZLE, probe.SWIZZLE_128):
        given = gpu.tensor_map(x, (64, 200), (128,), (64, 30), (1, 3), swizzle)
        expected = probe.box_of(x, (-4, 0), (30, 64), (3, 1)).view(np.uint8)
        got = probe._box(gpu, given, (0, -4), expected.nbytes, 2).reshape(expected.shape)
        assert np.array_equal(got, swizzled(expected) if swizzle else expected)


# --- Arithmetic of the host --------------------------------------------------------------------------------------


def test_descriptor():
    """Field by field: bits 16-29 and 32-45 in units of 16 bytes, 49-51 in rows, 62-63 the swizzle."""
    value = descriptor(stride=2048, leading=4096, base_offset=5)
    assert [value >> low & (1 << bits) - 1 for low, bits in ((0, 14), (16, 14), (32, 14), (49, 3), (62, 2))] == [
        0,
        256,
        128,
        5,
        1,
    ]
    assert descriptor() == 1 << 62 | 64 << 32 | 1 << 16
    assert value & ~(0x3FFF << 16 | 0x3FFF << 32 | 7 << 49 | 3 << 62) == 0


def test_swizzled():
    """Of address bits: 4 to 6 are flipped by 7 to 9."""
    rows = np.arange(24 * 128, dtype=np.uint32).view(np.uint8).reshape(-1, 128)
    flat = rows.reshape(-1)
    got = swizzled(rows).reshape(-1)
    address = np.arange(flat.size)
    assert np.array_equal(got[address ^ (address >> 7 & 7) << 4], flat)
    assert not np.array_equal(got, flat) and np.array_equal(swizzled(swizzled(rows)), rows)
    halves = probe.whole_numbers((16, 64), 0).view(np.uint16)
    assert np.array_equal(swizzled(halves).view(np.uint8), swizzled(halves.view(np.uint8)))


def test_box_of():
    x = np.arange(1, 21).reshape(4, 5)
    assert np.array_equal(probe.box_of(x, (1, 2), (2, 2)), x[1:3, 2:4])
    assert probe.box_of(x, (-1, 3), (3, 4)).tolist() == [[0, 0, 0, 0], [4, 5, 0, 0], [9, 10, 0, 0]]
    assert probe.box_of(x, (-1, 0), (5, 1), (2, 1)).tolist() == [[0], [6], [16]]
    assert not probe.box_of(x, (7, 0), (2, 2)).any()


def test_products_are_exact():
    a, b = probe.whole_numbers((128, 64), 1), probe.whole_numbers((64, 64), 2)
    assert set(a.astype(int).ravel()) == set(range(-8, 9))
    for kind in ((0, 0), (0, 1), (1, 0), (1, 1)):
        left, right = (each.astype(np.float32) for each in (a[7:71], b))
        single = (left.T if kind[0] else left) @ (right if kind[1] else right.T)
        assert np.array_equal(expected_product(a, b, *kind, skip=7), single)


def test_a_map_is_asked_of_the_driver_in_its_own_terms():
    seen = {}

    def encode(place, dtype, rank, address, sizes, strides, box, steps, *rest):
        seen.update(rank=rank.value, address=address.value, dtype=dtype.value, rest=[each.value for each in rest])
        seen.update(sizes=list(sizes), strides=list(strides), box=list(box), steps=list(steps))
        assert [type(each)._type_ for each in (sizes, strides, box, steps)] == [ctypes.c_uint64] * 2 + [
            ctypes.c_uint32
        ] * 2
        assert place.value % 64 == 0
        ctypes.memset(place.value, 0xAB, 128)
        return 0

    driver = SimpleNamespace(cuTensorMapEncodeTiled=encode)
    made = probe.encode(driver, 4096, (64, 200, 3), (128, 25600), (64, 32, 1), swizzle=3)
    assert made.tobytes() == b"\xab" * 128 and made.size == 1 and made.dtype == "V128"
    assert seen == {
        "rank": 3,
        "address": 4096,
        "dtype": 9,
        "rest": [0, 3, 3, 0],
        "sizes": [64, 200, 3],
        "strides": [128, 25600],
        "box": [64, 32, 1],
        "steps": [1, 1, 1],
    }
    made = [probe.encode(driver, 0, (64, 2), (128,), (64, 2)) for _ in range(30)]  # wherever they lie
    assert len({each.ctypes.data for each in made}) == 30
    with pytest.raises(RefusedError, match="error 1"):
        probe.encode(SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 1), 4096, (64, 2), (128,), (64, 2))


# --- A GPU of NumPy ----------------------------------------------------------------------------------------------


class ModelGpu(DryGpu):
    """What the manual promises, kernel by kernel; flaws are words that change it.

    A tensor map of it holds a number, under which its terms are kept.
    """

    def __init__(self, *flaws):
        super().__init__()
        self.flaws = flaws
        self.maps = {}

    def random(self, nbytes):
        return np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)

    def seconds(self, call, calls=20, samples=7, wait=False):
        call()
        return 1e-3

    host_seconds = seconds

    def matmul_seconds(self, dtype, n):
        return 1e-3

    def tensor_map(self, array, sizes, strides, box, steps=None, swizzle=0):
        overlaps = strides[0] < 128 and "no overlap" in self.flaws
        if any(stride % 16 for stride in strides) or max(box) > 256 or overlaps:
            raise RefusedError("the driver's error 1")
        number = len(self.maps) + 1
        self.maps[number] = (array, sizes, strides, box, steps or (1,) * len(box), swizzle)
        return np.frombuffer(number.to_bytes(128, "little"), "V128")

    def launch(self, name, grid, block, arguments, shared_bytes=0, arch=None, **constants):
        super().launch(name, grid, block, arguments, shared_bytes, arch, **constants)
        assert arch == ("sm_90a" if name in ("product", "registers") else None)
        plain = [int(each) if isinstance(each, np.integer) else each for each in arguments]
        getattr(self, f"_{name}")(grid, constants, *plain)

    def _copy(self, grid, constants, x, y, n):
        copied = min(grid * 256 * constants["VECTORS"], n) * 16 - ("short copy" in self.flaws) * 16
        y[:copied] = x[:copied]

    def _read(self, grid, constants, x, sums, n, passes):
        sums[:] = 0
        skipped = 16 if "short read" in self.flaws else 0
        sums.view(np.uint32)[0] = probe.every_word(x[: n * 16 - skipped]) * (passes % 2)

    _stage = _read

    def load(self, given, start):
        """The bytes of a box, element by element from its address."""
        x, sizes, strides, box, steps, swizzle = self.maps[int.from_bytes(given.tobytes()[:8], "little")]
        axes = [first + np.arange(0, extent, step) for first, extent, step in zip(start, box, steps)]
        grids = np.meshgrid(*reversed(axes), indexing="ij")[::-1]
        address = sum(at * pitch for at, pitch in zip(grids, (2, *strides)))
        inside = np.all([(at >= 0) & (at < size) for at, size in zip(grids, sizes)], axis=0)
        if "repeats edges" in self.flaws:
            inside = (address >= 0) & (address < x.size)
        words = np.where(inside, x.view(np.uint16)[np.where(inside, address // 2, 0)], 0)
        out = np.zeros(words.size, np.uint16)
        place = np.arange(words.size) * 2
        if swizzle and "no swizzle" not in self.flaws:
            place ^= (place >> 7 & 7) << 4
        out[place // 2] = words.ravel()
        return out.view(np.uint8)

    def _box(self, grid, constants, given, out, *start):
        out[:] = self.load(given, start[: constants["RANK"]])

    def _stream(self, grid, constants, given, sums, *numbers):
        *boxes, _, _, _, passes = numbers
        _, _, _, box, steps, _ = self.maps[int.from_bytes(given.tobytes()[:8], "little")]
        assert 2 * math.prod(-(-extent // step) for extent, step in zip(box, steps)) == constants["BOX_BYTES"]
        sums[:] = 0
        sums.view(np.uint32)[0] = math.prod(boxes) * passes - ("lost box" in self.flaws)

    def _product(self, grid, constants, given, a, b, out, a_fixed, b_fixed, skip, row):
        assert constants["STAGE_ONLY"] == 0
        bytes_a = self.load(given, (0, row)) if constants["FROM_MAP"] else swizzled(a.reshape(-1, 128)).reshape(-1)
        tiles = bytes_a, swizzled(b.reshape(-1, 128)).reshape(-1)
        kinds = constants["TRANSPOSED_A"], constants["TRANSPOSED_B"]
        starts = 5 * 1024 + skip * 128, 64 * 1024
        total = np.zeros((64, 64))
        for k in range(4):
            sides = []
            for side in (0, 1):
                encoded = (a_fixed, b_fixed)[side] + (starts[side] >> 4) + k * ((2048 if kinds[side] else 32) >> 4)
                sides.append(self.operand(tiles[side], (5 * 1024, 64 * 1024)[side], encoded, kinds[side]))
            total += sides[0] @ sides[1].T
        out.view(np.float32)[:] = total.ravel()

    def operand(self, tile, tile_at, encoded, transposed):
        """64 x 16 elements that a descriptor names; a tile lies at an address."""
        start, stride = (encoded & 0x3FFF) << 4, (encoded >> 32 & 0x3FFF) << 4
        assert encoded >> 62 == 1, "128-byte swizzle"
        r, k = np.meshgrid(np.arange(64), np.arange(16), indexing="ij")
        if transposed and "no transposition" not in self.flaws:
            r, k = k, r
            address = start + r // 8 * stride + r % 8 * 128 + k * 2
        else:
            address = start + r // 8 * stride + r % 8 * 128 + k * 2
        pattern = (address >> 7) - (encoded >> 49 & 7)
        if "anchored at the start" in self.flaws:
            pattern = (address - (start & ~127) >> 7) + (encoded >> 49 & 7)
        address = address & ~0x70 | ((address >> 4 ^ pattern) & 7) << 4
        inside = (address >= tile_at) & (address < tile_at + tile.size)
        words = tile.view(ml_dtypes.bfloat16)[np.where(inside, address - tile_at, 0) // 2]
        return np.where(inside, words.astype(np.float64), np.nan)

    def _cluster(self, grid, constants, given, seen, out):
        other = 0 if "no cluster" in self.flaws else 1
        seen.view(np.uint32)[:] = 1000 + (np.arange(grid) ^ other)
        out.reshape(grid, -1)[: 1 if "no cluster" in self.flaws else grid] = self.load(given, (0, 0, 0))

    def _registers(self, grid, constants, x, out, rounds):
        weights = np.add.outer(np.arange(192), np.arange(rounds)).sum(0).astype(np.float32)
        sums = weights @ x.view(np.float32).reshape(rounds, 256)
        out.view(np.float32)[:] = np.tile(sums, grid)
        if "lost registers" in self.flaws:
            out.view(np.float32)[-1] = np.nan


def ask(name, *flaws):
    return list(probe.EXPERIMENTS[name].ask(ModelGpu(*flaws)))


@pytest.mark.parametrize("name", probe.EXPERIMENTS)
def test_a_gpu_that_does_what_is_counted_on(name, small):
    given = ask(name)
    assert given
    for each in given:
        assert each.ok is not False or "the model of plans" in each.answer, each
        assert each.figure is None or each.figure > 0


# What a GPU may do instead, the experiment that shows it, and how many of its answers it changes.
FLAWS = (
    ("short copy", "copy", 2),
    ("short read", "l2", 3),
    ("short read", "staging", 4),
    ("lost box", "staging", 2),
    ("lost box", "stride", 3),
    ("no swizzle", "tensor", 1),
    ("repeats edges", "tensor", 2),
    ("no swizzle", "stride", 4),
    ("no overlap", "overlap", 3),
    ("no swizzle", "halo", 2),
    ("no transposition", "product", 3),
    ("anchored at the start", "shift", 2),
    ("no cluster", "cluster", 4),
    ("lost registers", "registers", 1),
)


@pytest.mark.parametrize("flaw, name, count", FLAWS, ids=[f"{flaw}-{name}" for flaw, name, _ in FLAWS])
def test_a_gpu_that_does_something_else(flaw, name, count, small):
    assert sum(each.ok is False for each in ask(name, flaw)) >= count


def test_shifts_say_what_would_do_instead():
    """A pattern that starts where the operand does, not at multiples of 1024 bytes, needs the base offset."""
    right = [each.answer for each in ask("shift", "anchored at the start") if "all 65 right" in each.answer]
    assert len(right) == 2 and all("base offset shift % 8" in each for each in right)
    right = [each.answer for each in ask("shift") if "all 65 right" in each.answer]
    assert len(right) == 2 and all("base offset 0" in each for each in right)


def test_figures_are_bytes_and_operations_over_time(small, monkeypatch):
    monkeypatch.setattr(probe, "COPY_MIB", (1024,))
    monkeypatch.setattr(ModelGpu, "_copy", lambda *_: None)
    monkeypatch.setattr(ModelGpu, "random", lambda self, nbytes: np.zeros(nbytes, np.uint8))
    monkeypatch.setattr(ModelGpu, "poison", lambda self, nbytes: np.zeros(nbytes, np.uint8))
    assert [each.figure for each in ask("copy")] == [2 * 1024 * MIB / 1e-3] * 2
    assert [each.figure for each in ask("gemm")][:1] == [2 * 8192**3 / 1e-3]
    between = [each.figure for each in ask("launch") if "in a graph" in each.answer]
    assert between == [1e-3 / 100]
    rates = [each.figure for each in ask("stride") if each.figure]
    monkeypatch.undo()
    assert rates[0] == 2 * rates[1] == 2 * rates[2], "every second row is half the bytes"


def test_a_figure_that_is_none_is_no_answer():
    assert probe.record("copy", Answer("lost", math.nan, "B/s"))["ok"] is False
    assert probe.record("copy", Answer("lost", math.nan, "B/s"))["figure"] is None
    assert probe.record("copy", Answer("said"))["ok"] is True


def test_a_gpu_is_not_asked_for_what_it_cannot_have():
    gpu = ModelGpu()
    gpu.capability = (8, 9)
    (given,) = probe.answers("product", gpu)
    assert given["ok"] is None and "compute capability 8.9" in given["answer"]
    gpu.capability = (12, 0)
    (given,) = probe.answers("product", gpu)
    assert given["ok"] is None
    assert len(list(probe.answers("tensor", gpu))) == 2


# --- Through CuPy ------------------------------------------------------------------------------------------------


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path))
    fake = fake_cupy.install(monkeypatch)
    yield fake
    fake_cupy.forget()


def test_kernels_go_cuconvs_own_way(cupy):
    gpu = Gpu()
    kernel = gpu.kernel("product", "sm_90a", **TILE)
    assert gpu.kernel("product", "sm_90a", **TILE) is kernel
    (name, options) = cupy.compiled[-1]
    assert name == "product.cu" and "-arch=sm_90a" in options and "-DROWS=128" in options
    gpu.kernel("copy", VECTORS=4)
    assert "-arch=sm_90" in cupy.compiled[-1][1]


def test_the_launch_that_is_timed_is_cuconvs_own(cupy):
    gpu = Gpu()
    arrays = [cupy.cupy.empty(64, np.uint8) for _ in range(3)]
    plan = LaunchPlan("empty", (), (1,) * 8, (1, 1, 1), (32, 1, 1))
    call = gpu.launcher(plan, arrays)
    before = len(cupy.launches)
    call()
    call()
    assert len(cupy.launches) == before + 2 and cupy.compiled[-1][0] == "empty.cu"
    assert len(cupy.launches[-1].parameters) == 56 and cupy.launches[-1].kernel == "empty"
    assert runtime.kernel_directory() != FOLDER


class Memory:
    """What `array.data` is of a CuPy array."""

    def __init__(self, array):
        self.bytes, self.ptr = array.view(np.ndarray).reshape(-1).view(np.uint8), array.ctypes.data

    def memset(self, value, count):
        self.bytes[:count] = value

    def copy_from_device_async(self, source, count):
        self.bytes[:count] = source.bytes[:count]


class Placed(np.ndarray):
    data = property(Memory)


class Stream:
    depth = 0

    def __init__(self, non_blocking=False):
        self.calls = []

    def __enter__(self):
        Stream.depth += 1

    def __exit__(self, *_):
        Stream.depth -= 1

    def begin_capture(self):
        assert Stream.depth == 1

    def end_capture(self):
        return SimpleNamespace(launch=lambda stream: stream.synchronize())

    def synchronize(self):
        pass


class ModelCupy:
    """CuPy, its compiler and libcuda with the model's GPU below them: what :class:`probe.Gpu` asks is asked here."""

    def __init__(self, monkeypatch):
        self.model = ModelGpu()
        self.files = {}
        event = SimpleNamespace(record=lambda: None, synchronize=lambda: None)
        self.cuda = SimpleNamespace(
            Event=lambda: event, Stream=Stream, get_current_stream=Stream, get_elapsed_time=lambda first, last: 1.0
        )
        self.matmul = np.matmul
        self.launches = 0
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setattr(runtime, "_Compiler", lambda: self)
        monkeypatch.setattr(runtime, "cubin_cache", lambda: self)
        monkeypatch.setattr(runtime, "current", lambda: self)
        monkeypatch.setattr(probe.ctypes, "CDLL", lambda name: {"libcuda.so.1": self}[name])
        self.limits = self.model.limits

    # CuPy

    def empty(self, shape, dtype):
        return np.empty(shape, dtype).view(Placed)

    def asarray(self, host):
        return host.copy().view(Placed)

    def asnumpy(self, array):
        return np.array(array)

    def RawModule(self, path):  # noqa: N802
        def get_function(name):
            assert self.files[path][0] == name
            return Kernel(self, *self.files[path])

        return SimpleNamespace(get_function=get_function)

    # The compiler, and the cache of what it makes

    def target(self, capability):
        return runtime.Target("sm_{}{}".format(*capability))

    def recipe(self, name, source, constants, target):
        assert f" {name}(" in source
        return name, constants, target.arch

    def compile(self, recipe):
        return recipe

    def obtain(self, recipe, build):
        name, constants, arch = build()
        path = f"{name}-{constants}-{arch}"
        self.files[path] = name, dict(constants), None if arch == "sm_90" else arch
        return path

    # The runtime

    def launch(self, plan, arrays):
        assert plan.kernel == "empty" and len(arrays) == 3
        self.launches += 1

    # The driver

    def cuTensorMapEncodeTiled(self, place, dtype, rank, address, sizes, strides, box, steps, *rest):  # noqa: N802
        last = 2 * sizes[0] + sum((size - 1) * pitch for size, pitch in zip(list(sizes)[1:], strides))
        array = np.ctypeslib.as_array(ctypes.cast(address.value, ctypes.POINTER(ctypes.c_uint8)), (last,))
        try:
            made = self.model.tensor_map(array, *map(tuple, (sizes, strides, box, steps)), rest[1].value)
        except RefusedError:
            return 1
        ctypes.memmove(place.value, made.tobytes(), 128)
        return 0


class Kernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, cupy, name, constants, arch):
        self.cupy, self.name, self.constants, self.arch = cupy, name, constants, arch

    def __call__(self, grid, block, arguments, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.cupy.launches += 1
        if self.name != "empty":
            plain = [each.view(np.ndarray) if isinstance(each, Placed) else each for each in arguments]
            self.cupy.model.launch(self.name, *grid, *block, plain, shared_mem, self.arch, **self.constants)


@pytest.mark.parametrize("name", sorted(set(probe.EXPERIMENTS) - {"gemm"}))
def test_experiments_through_cupy(name, small, monkeypatch):
    cupy = ModelCupy(monkeypatch)
    given = list(probe.answers(name, Gpu()))
    assert given and (cupy.launches or name == "machine")
    for each in given:
        assert each["ok"] is not False or "the model of plans" in each["answer"], each


def test_matrix_products(monkeypatch):
    gpu = (ModelCupy(monkeypatch), Gpu())[1]
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu.matmul_seconds("float32", 32) == 1e-3 / 20 and gpu.matmul_seconds("bfloat16", 32) is None
    said = []
    torch = SimpleNamespace(
        float32=np.float32,
        bfloat16=np.float16,
        set_float32_matmul_precision=said.append,
        randn=lambda n, m, device, dtype: np.ones((n, m), dtype),
        empty_like=np.empty_like,
        matmul=np.matmul,
        cuda=SimpleNamespace(
            Event=lambda enable_timing: SimpleNamespace(
                record=lambda: None, synchronize=lambda: None, elapsed_time=lambda last: 4.0
            )
        ),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gpu.matmul_seconds("bfloat16", 32) == gpu.matmul_seconds("tf32", 32) == 4e-3 / 20
    assert said == ["highest", "high"]


# --- Each on its own ---------------------------------------------------------------------------------------------


def test_a_dry_run_exercises_every_experiment(tmp_path, capsys):
    path = tmp_path / "folder" / "probe.json"
    assert probe.main(["--dry-run", "--json", str(path)]) == 0
    records = json.loads(path.read_text())
    assert {each["name"] for each in records} == set(probe.EXPERIMENTS)
    for each in records:
        assert set(each) == {"name", "question", "answer", "figure", "unit", "ok", "seconds"}
        assert (each["answer"], each["figure"], each["ok"]) == ("dry run", None, None)
    assert capsys.readouterr().out.count("dry run") == len(records)
    assert [each.name for each in path.parent.iterdir()] == ["probe.json"]


SAID = json.dumps(probe.record("copy", Answer("before it happened", 1e9, "B/s")))

# What an experiment may do to its process, and what is told of it.
ENDS = {
    "raises": ("raise RuntimeError('illegal memory access')", "exit code 1; RuntimeError: illegal memory access"),
    "aborts": ("import os; os.abort()", "exit code -6"),
    "hangs": (f"import time; time.sleep(60); print({SAID!r})", "nothing more after 5 s"),
    "half a line": ("print('{\"name\": \"co', end='', flush=True); raise SystemExit(3)", "exit code 3"),
}


@pytest.mark.parametrize("end", ENDS)
def test_one_that_breaks_costs_its_own_answer_only(end, monkeypatch, tmp_path, capsys):
    code, told = ENDS[end]
    whole = probe.command
    monkeypatch.setattr(
        probe,
        "command",
        lambda name, dry: (
            [sys.executable, "-c", f"print({SAID!r}, flush=True)\n{code}"] if name == "copy" else whole(name, dry)
        ),
    )
    quick = {"copy": probe.Experiment("?", probe.copy, 5.0 if end == "hangs" else 60.0)}
    monkeypatch.setattr(probe, "EXPERIMENTS", {**probe.EXPERIMENTS, **quick})
    path = tmp_path / "probe.json"
    assert probe.main(["--dry-run", "--only", "machine", "copy", "gemm", "--json", str(path)]) == 1
    records = json.loads(path.read_text())
    before, broken = (each for each in records if each["name"] == "copy")
    assert before["answer"] == "before it happened" and before["figure"] == 1e9
    assert broken["ok"] is False and told in broken["answer"] and broken["answer"].startswith("no answer: ")
    assert all(each["answer"] == "dry run" for each in records if each["name"] != "copy")
    assert {each["name"] for each in records} == {"machine", "copy", "gemm"}
    captured = capsys.readouterr()
    assert "no answer from copy" in captured.err and "1 GB/s  before it happened" in captured.out


def test_silence_is_no_answer(monkeypatch):
    monkeypatch.setattr(probe, "command", lambda name, dry: [sys.executable, "-c", ""])
    (given,) = probe.ask_apart("copy", True)
    assert given["ok"] is False and "nothing printed" in given["answer"]


def test_without_a_gpu_the_exit_code_is_2(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "probe", lambda: runtime.Probe(False, "no usable NVIDIA driver"))
    assert probe.main([]) == 2
    assert "no usable NVIDIA driver" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        probe.main(["--only", "nothing"])
    assert error.value.code == 2
