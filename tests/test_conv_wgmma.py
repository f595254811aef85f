"""conv_wgmma: its PTX for sm_90a on the CPU, copy engine and warpgroups included, against the oracle; and its plan.

Every case runs under the detector. Sizes are chosen around the edges of a tile and of a step: channels that are no
multiple of 64, filters and positions more than a tile has, boxes across batch items, taps that lie outside.
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from math import prod
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from strategies import uniform
from test_conv_kernels import Case, around, last_blocks, name
from test_static_gates import compiled

from cuconv.cuda import conv as launching
from cuconv.cuda.runtime import CudaRuntime, current, probe
from cuconv.geometry import conv_shape
from cuconv.plan import conv as planning
from cuconv.plan import transpose, wgmma
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import MAP_BOX, PlanError

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# So few blocks that each has several tiles, and both ends of a band.
LIMITS = replace(DEVICES["H200"], multiprocessors=3)
ALIGNED = (0, 0, 0)
SMALL = wgmma.TILES[-1]


@contextmanager
def only(tile, bk=64):
    """Plans are conv_wgmma's wherever it computes this, and find no other tile."""
    with (
        mock.patch.object(wgmma, "TILES", (tile,)),
        mock.patch.object(wgmma, "STEPS", (bk,)),
        mock.patch.object(planning, "WARPGROUP_FACTOR", math.inf),
        mock.patch.object(planning, "plan_narrow", side_effect=PlanError("only that tile")),
        mock.patch.object(planning, "plan_taps", side_effect=PlanError("only that tile")),
    ):
        forget_plans()
        yield
    forget_plans()


def forget_plans():
    for function in (planning.plan_conv, transpose.plan_transpose, wgmma.plan_wgmma):
        function.cache_clear()


def plan_of(shape, dtype="bfloat16", activation="linear", aligned=ALIGNED, limits=DEVICES["H200"]):
    """conv_wgmma's."""
    return wgmma.plan_wgmma.__wrapped__(planning.form_of(shape), dtype, activation, aligned, limits)


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def cases(tile, rank, bk=64):
    """(x_shape, w_shape, options) that meet every edge of `tile`."""
    bm, bn, *_ = tile

    def shapes(batch, sizes, channels, taps, filters, groups=1):
        return (batch, *sizes, channels), (*taps, channels // groups, filters)

    taps = {1: (3,), 2: (2, 3), 3: (2, 1, 2)}[rank]
    # Positions more than a tile has, filters of several bands, a step of 8 channels besides a whole one, and padding.
    yield *shapes(2, around(rank, bm + 5), 72, taps, 2 * bn + 8), {"padding": "same"}
    # Boxes across items, of which the last is not full.
    yield *shapes(5, around(rank, bm // 3), 8, taps, 8), {"padding": "valid"}
    # Each axis at a stride of its own.
    yield *shapes(2, around(rank, 2 * bm + 3), 8, taps, 8), {"padding": "same", "strides": (3, 2, 5)[:rank]}
    # Dilation, and groups whose filters end inside a tile.
    yield *shapes(1, around(rank, bm - 3), 2 * bk, taps, 48, 2), {"padding": "same", "groups": 2, "dilation_rate": 2}
    # One position, whose other taps are padding.
    yield *shapes(3, (1,) * rank, 16, taps, 16), {"padding": "same"}
    if rank == 1:
        yield *shapes(3, (29,), 24, (3,), 24), {"padding": "causal", "dilation_rate": 11}
        yield *shapes(2, (11,), 8, (2,), 8), {"padding": (3, 4), "strides": 8}


def gradients(tile, rank, bk=64):
    """The same for input gradients: phases in the columns, phases apart, groups of which w is in pieces."""
    bm, bn, *_ = tile

    def shapes(batch, sizes, channels, taps, filters, groups=1):
        return (batch, *sizes, channels), (*taps, channels // groups, filters)

    yield *shapes(2, around(rank, bm + 5), bn + 8, {1: (3,), 2: (2, 3), 3: (2, 1, 2)}[rank], 72), {"padding": "same"}
    merged = {"padding": "same", "groups": 2, "strides": (3, 2, 1)[:rank]}
    yield *shapes(3, around(rank, bm), 48, {1: (5,), 2: (3, 2), 3: (2, 2, 1)}[rank], 2 * bk, 2), merged
    yield *shapes(1, around(rank, bm), 16, (2,) * rank, 8), {"strides": 2, "dilation_rate": 3, "padding": "same"}


def run_tile(dtype, tile, rank, bk=64, make_runtime=trace):
    forwards = [*cases(tile, rank, bk)]
    with only(tile, bk):
        for number, (x_shape, w_shape, options) in enumerate((*forwards, *gradients(tile, rank, bk))):
            runtime, forward = make_runtime(seed=number + 1), number < len(forwards)
            case = Case(x_shape, w_shape, dtype, seed=number, **options)
            try:
                case.check_forward(runtime) if forward else case.check_input_grad(runtime)
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
                raise
            if isinstance(runtime, CudaRuntime):
                continue
            assert {plan.kernel for plan in runtime.launches} - {"pack_weights"} == {"conv_wgmma"}
            assert all(plan.tile.startswith(name(tile[:2])) for plan in runtime.launches if plan.maps)


# --- Every tile --------------------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize(
    "dtype, rank, tile", [("bfloat16", 1, wgmma.TILES[-1]), ("float16", 2, (128, 128, 64, 128))], ids=name
)
def test_two_tiles(dtype, rank, tile):
    run_tile(dtype, tile, rank)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(wgmma.TILES)), ids=lambda number: name(wgmma.TILES[number]))
def test_every_tile(number):
    """Each with another rank, so that the small ones have all."""
    dtype = ("float16", "bfloat16")[number % 2]
    for rank in {(number + 2) % 3 + 1, 3} if number == 5 else {(number + 2) % 3 + 1}:
        run_tile(dtype, wgmma.TILES[number], rank)


@in_the_emulator
@pytest.mark.parametrize(
    "tile, rank",
    [
        (SMALL, 1),
        *(pytest.param(each, 3, marks=pytest.mark.exhaustive) for each in ((256, 96, 128, 96), (64, 256, 64, 128))),
    ],
    ids=name,
)
def test_steps_of_32_channels(tile, rank):
    run_tile("bfloat16", tile, rank, bk=32)


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("tile", wgmma.TILES, ids=name)
def test_every_tile_on_a_gpu(tile, rank, dtype):
    if current().limits.capability != wgmma.ONLY:
        pytest.skip(f"wgmma is of compute capability 9.0. Received: {current().limits.name}")
    run_tile(dtype, tile, rank, make_runtime=lambda seed: current())


# --- What tiles do not show --------------------------------------------------------------------------------------


@in_the_emulator
def test_fused_activation():
    case = Case((2, 9, 16), (3, 16, 8), "bfloat16", padding="same")
    with only(SMALL):
        for bias in (True, False):
            case.check_forward(trace(), "hard_sigmoid", bias)


@in_the_emulator
def test_the_same_bits_in_any_order_of_threads_and_on_any_number_of_multiprocessors():
    case, results = Case((3, 150, 24), (3, 24, 72), "bfloat16", padding="same"), []
    with only(SMALL):
        for seed, multiprocessors in ((0, 1), (1, 2), (2, 5), (3, 132)):
            results.append(case.forward(trace(seed, replace(LIMITS, multiprocessors=multiprocessors))))
    assert len({each.tobytes() for each in results}) == 1


@in_the_emulator
@pytest.mark.parametrize("groups", [1, 2])
def test_nan_stays_where_it_is_read(groups):
    """In x: an item, a group of channels, and positions between those that a stride takes. In w: a filter."""
    case = Case((2, 41, 64 * groups), (2, 64, 24 * groups), "bfloat16", strides=4, groups=groups)
    read = np.zeros(41, bool)
    for _, _, i in oracle.reads((41,), (2,), 4, "valid", 1)[1]:
        read[i] = True
    clean = oracle.conv(case.x, case.w, case.bias, strides=4, groups=groups)
    case.x[:, ~read] = np.nan
    case.x[1, :, -64:] = np.nan
    case.w[..., -1] = np.nan
    with only(SMALL):
        y = case.forward(trace())
    lost = np.zeros(y.shape, bool)
    lost[1, :, -24:] = lost[..., -1] = True
    assert np.array_equal(np.isnan(y.astype(np.float32)), lost)
    assert_close(y[~lost], clean[~lost], dtype="bfloat16", terms=128)


@in_the_emulator
def test_indices_beyond_32_bits():
    """y has more than 2**32 elements; only the last block runs, on memory that exists where it is touched."""
    n, c = 2**29 + 77, 8
    shape = conv_shape((1, n, c), (3, c, c), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    rng = np.random.default_rng(0)
    w, x[:, -300:] = uniform(rng, (3, c, c), "float16"), uniform(rng, (1, 300, c), "float16")
    limits = replace(LIMITS, multiprocessors=1 << 24)  # a tile each
    runtime = EmulatedRuntime(limits, blocks=last_blocks)
    with only(SMALL):
        launching.conv(runtime, shape, x, w, None, None, y, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8
    rows = n % plan.maps[0].box[1]
    expected = oracle.conv(x[:, -300:], w, padding="same")
    assert_close(y[:, -rows:], expected[:, -rows:], dtype="float16", terms=24)
    assert not y[:, -300:-rows].any()


@in_the_emulator
def test_no_bank_conflicts_and_whole_sectors():
    case = Case((2, 128, 64), (1, 64, 64), "bfloat16")
    runtime = trace(seed=0)
    with only(SMALL):
        case.check_forward(runtime)
    assert not [row for row in runtime.traffic if row.space == "shared" and row.bank_conflicts]
    stores = [row for row in runtime.traffic if row.space == "global" and row.instruction.startswith("st")]
    assert stores and all(row.sectors == row.least_sectors and row.bytes == row.requests * 512 for row in stores)


# --- Planted -----------------------------------------------------------------------------------------------------


def sequence(runtime):
    """Nine steps for six stages; boxes that end outside, steps and column tiles that do."""
    Case((2, 131, 136), (3, 136, 72), "bfloat16", padding="same", dilation_rate=3).check_forward(runtime)


def few_positions(runtime):
    """Three items in a box, of five."""
    Case((5, 40, 72), (3, 72, 24), "bfloat16", padding="same").check_forward(runtime)


def two_groups(runtime):
    Case((1, 40, 128), (3, 64, 48), "bfloat16", padding="same", groups=2).check_forward(runtime)


def bands(runtime):
    """Of two column tiles and of one."""
    Case((1, 140, 64), (1, 64, 136), "bfloat16", padding="same").check_forward(runtime)


GIVEN_BACK = """    ptx::products_wait<1>(acc);
    if (step > 0 && lane == 0) ptx::barrier_arrive(before);
"""
PLANTS = {
    "the producer waits for the wrong round": (
        "ring.empty(), ring.parity ^ 1", "ring.empty(), ring.parity",
        sequence, {"deadlock"}),
    "the consumers wait for the wrong round": (
        "barrier_wait(ring.full(), ring.parity)", "barrier_wait(ring.full(), ring.parity ^ 1)",
        sequence, {"race"}),
    "a round that is not counted": ("stage = 0, parity ^= 1;", "stage = 0;", sequence, {"barrier"}),
    "fewer bytes than come": ("p.rows * ROW_BYTES + W_BYTES", "p.rows * ROW_BYTES", sequence, {"barrier"}),
    "more bytes than come": ("p.rows * ROW_BYTES + W_BYTES", "BM * ROW_BYTES + W_BYTES", few_positions, {"deadlock"}),
    "no wait for what is there": ("    ptx::barrier_wait(ring.full(), ring.parity);\n", "", sequence, {"race"}),
    "a stage given back too early": (
        GIVEN_BACK, "    if (lane == 0) ptx::barrier_arrive(ring.empty());\n",
        sequence, {"race"}),
    "a stage given back by one warpgroup": ("CONSUMERS * 4);", "4);", sequence, {"deadlock"}),
    "products that are not waited for": ("products_wait<1>(acc);", "products_wait<2>(acc);", sequence, {"race"}),
    "sums before they are there": ("products_wait<0>(acc);", "products_wait<1>(acc);", sequence, {"pending"}),
    "no fence before products": ("    ptx::products_fence();\n", "", sequence, {"fence"}),
    "no barrier before the roles part": ("  __syncthreads();\n", "", sequence, {"barrier"}),
    "rows that nobody fills": ("at < STAGES * spare", "at < 0", few_positions, {"uninitialised"}),
    "zeros that products may not see": ("  ptx::fence_async();\n", "", few_positions, {"fence"}),
    "dilation forgotten": ("tap[a] * p.dilation[a]", "tap[a]", sequence, {WRONG}),
    "padding forgotten": (" - p.pad[a];", ";", sequence, {WRONG}),
    "the tap before": ("p.group_taps + r;", "p.group_taps;", sequence, {WRONG}),
    "channels of the step before": (
        "from[0] = tile.g * p.channels + w_from[1];", "from[0] = tile.g * p.channels;",
        sequence, {WRONG}),
    "channels of the first group": ("from[0] = tile.g * p.channels", "from[0] = 0", two_groups, {WRONG}),
    "filters of the first group": ("w_from[0] = tile.g * p.group_columns", "w_from[0] = 0", two_groups, {WRONG}),
    "filters of the next group": ("n0 + GN - q : p.columns;", "n0 + GN - q : p.columns + 8;", two_groups, {"race"}),
    "columns that no warpgroup has": ("GN - q < 64 && ", "false && ", bands, {"race"}),
    "items behind the last": (" && tile.b0 + item < p.batch", "", few_positions, {"bounds"}),
    "positions behind the last": ("inside[r] = inside[r] && at[a] < p.out[a];", "", sequence, {"race"}),
    "rows 8 too far apart": (
        "X_SWIZZLE | (8 * ROW_BYTES", "X_SWIZZLE | (16 * ROW_BYTES",
        sequence, {WRONG}),
    "columns too close": ("(SLICE_BYTES / 16ull) << 16", "(SLICE_BYTES / 32ull) << 16", bands, {WRONG}),
    "the k of the step before": ("w + k * W_ROW_BYTES / 16", "w + k / 2 * W_ROW_BYTES / 16", sequence, {WRONG}),
    "y before it is there": (
        "          __syncwarp();\n          const Index n", "          const Index n",
        sequence, {"race"}),
    "y over what is still read": ("lane % 8 * 8));\n          __syncwarp();", "lane % 8 * 8));", bands, {"race"}),
    "halves of a product exchanged": (
        "acc[i][(q + j) / 2 + half * 2 + e]", "acc[i][(q + j) / 2 + e * 2 + half]",
        sequence, {WRONG}),
    "a tile twice": ("tile -= first * p.tiles_m;", "", bands, {WRONG}),
}  # fmt: skip
OTHER_TILES = {
    "columns too close": (128, 128, 64, 128),
    "y over what is still read": (128, 128, 64, 128),
    "columns that no warpgroup has": (256, 96, 128, 96),
}
DEFAULT = {"a stage given back too early", "fewer bytes than come", "dilation forgotten", "rows that nobody fills"}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    right, wrong, run, caught = PLANTS[name]
    with planted("conv_wgmma.cu", right, wrong), only(OTHER_TILES.get(name, SMALL)):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


MISTAKEN_MAPS = {
    "no swizzle": (0, lambda x: {"swizzle": 0}, {WRONG}),
    "another swizzle": (1, lambda w: {"swizzle": 64, "box": (32, 64, 1)}, {"deadlock"}),
    "a row of the next item": (0, lambda x: {"sizes": (136, 131 + 3, 2)}, {"bounds"}),
    "items too close": (0, lambda x: {"strides": (272, 272 * 130)}, {WRONG}),
    "a position less": (0, lambda x: {"box": (64, x.box[1] - 1, x.box[2])}, {"deadlock"}),
    "every second position": (0, lambda x: {"box": (64, x.box[1] * 2, x.box[2]), "steps": (1, 2, 1)}, {WRONG}),
    "channels of the next tap": (1, lambda w: {"sizes": (72, 136 + 64, 3)}, {"bounds"}),
}


@in_the_emulator
@pytest.mark.parametrize("name", MISTAKEN_MAPS)
def test_a_mistake_in_a_map_is_caught(name):
    number, changes, caught = MISTAKEN_MAPS[name]

    class Tampered(EmulatedRuntime):
        def launch(self, plan, arrays):
            maps = list(plan.maps)
            maps[number] = replace(maps[number], **changes(maps[number]))
            super().launch(replace(plan, maps=tuple(maps)), arrays)

    with only(SMALL):
        found = what_catches(sequence, Tampered(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


@in_the_emulator
def test_without_a_bug_nothing_is_caught():
    for run in {run for _, _, run, _ in PLANTS.values()}:
        with only(SMALL):
            assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()


# --- Plans -------------------------------------------------------------------------------------------------------

SEQUENCE = conv_shape((8, 16384, 128), (2, 128, 256), padding="causal", dilation_rate=512)
IMAGE = conv_shape((64, 7, 7, 512), (3, 3, 512, 512), padding="same")
VOLUME = conv_shape((2, 12, 30, 50, 64), (3, 3, 3, 64, 48), padding="same", strides=(1, 2, 3))


@pytest.mark.parametrize("shape", [SEQUENCE, IMAGE, VOLUME], ids=["sequence", "image", "volume"])
@pytest.mark.parametrize("tile", wgmma.TILES, ids=name)
def test_boxes_cover_all_positions(shape, tile):
    with mock.patch.object(wgmma, "TILES", (tile,)):
        plan = plan_of(shape)
    (x_map, w_map), bk = plan.maps, dict(plan.constants)["BK"]
    tiles, tiles_m, tiles_n, band, groups, channels, columns, _, _, taps, steps, batch, items, rows, *sizes = (
        plan.integers
    )
    box, boxes, out = (sizes[i * shape.rank : (i + 1) * shape.rank] for i in range(3))
    assert tiles == tiles_m * tiles_n * groups and tiles_m == prod(boxes) * -(-batch // items)
    assert tiles_n == -(-columns // tile[1]) and 1 <= band <= tiles_n
    assert rows == items * prod(box) <= tile[0] and max(x_map.box) <= MAP_BOX
    assert all(n <= size * count < n + size for n, size, count in zip(out, box, boxes))
    assert x_map.box_bytes == rows * bk * 2 and w_map.box_bytes == bk * 128 and not x_map.problem() + w_map.problem()
    assert steps == taps * -(-channels // bk) and plan.grid == (min(tiles, 132), 1, 1)
    assert plan.shared_bytes <= DEVICES["H200"].shared_bytes
    assert 0 < plan.cost.least_flops <= plan.cost.flops and plan.cost.bound


def test_a_box_wastes_little():
    """Of images that no tile divides, it takes several, and what is left over is small."""
    for size, rows, least in ((7, 128, 0.87), (14, 128, 0.95), (28, 256, 0.99), (56, 128, 0.99), (19, 128, 0.9)):
        box = wgmma.choose_box(64, (size, size), (1, 1), rows)
        assert 64 * size * size / (box.tiles * rows) >= least, (size, box)


REFUSED = {
    "another GPU": ((2, 50, 64), (3, 64, 64), {}, "bfloat16", ALIGNED, "B200", "9.0 alone"),
    "float32": ((2, 50, 64), (3, 64, 64), {}, "float32", ALIGNED, "H200", "only 16-bit"),
    "channels_first": ((2, 64, 50), (3, 64, 64), {"data_format": "channels_first"}, "float16", ALIGNED, "H200", "last"),
    "odd channels": ((2, 50, 60), (3, 60, 64), {}, "float16", ALIGNED, "H200", "60 channels and 64 filters"),
    "odd filters": ((2, 50, 64), (3, 64, 66), {}, "float16", ALIGNED, "H200", "64 channels and 66 filters"),
    "small groups": ((2, 50, 32), (3, 16, 64), {"groups": 2}, "float16", ALIGNED, "H200", "a group of 16"),
    "anywhere in memory": ((2, 50, 64), (3, 64, 64), {}, "float16", (0, 4, 0), "H200", "16-byte boundary"),
    "long strides": ((2, 50, 64), (3, 64, 64), {"strides": 9}, "float16", ALIGNED, "H200", "strides up to 8"),
    "far away": ((2**31, 4, 64), (1, 64, 64), {}, "float16", ALIGNED, "H200", "32 bits"),
    "no input": ((2, 0, 64), (1, 64, 64), {"padding": (1, 1)}, "float16", ALIGNED, "H200", "no tensor map"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_reason(name):
    x_shape, w_shape, options, dtype, aligned, device, reason = REFUSED[name]
    shape = conv_shape(x_shape, w_shape, **options)
    with pytest.raises(PlanError, match=reason):
        plan_of(shape, dtype, "linear", aligned, DEVICES[device])
    if name != "anywhere in memory":
        plan = planning.plan_conv(shape, dtype, "linear", aligned, DEVICES[device])
        assert plan.kernel != "conv_wgmma" and any(reason in each for each in plan.rejected)


def test_it_is_chosen_where_it_is_predicted_to_be_faster():
    for shape in (SEQUENCE, IMAGE):
        plan = planning.plan_conv(shape, "bfloat16", "linear", ALIGNED, DEVICES["H200"])
        assert plan.kernel == "conv_wgmma" and any("us predicted" in each for each in plan.rejected)
        assert planning.plan_conv(shape, "bfloat16", "linear", ALIGNED, DEVICES["B200"]).kernel != "conv_wgmma"
    small = conv_shape((1, 40, 16), (3, 16, 16))
    plan = planning.plan_conv(small, "bfloat16", "linear", ALIGNED, DEVICES["H200"])
    assert any("warpgroups" in each for each in (*plan.rejected, plan.reason))


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("activation", ["linear", pytest.param("gelu", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "tile", [wgmma.TILES[0], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in wgmma.TILES[1:])], ids=name
)
def test_machine_code(tile, activation):
    """No spill, products and copies that belong to sm_90 alone, and few instructions between products."""
    shape = VOLUME if tile[0] == 256 else IMAGE if tile[1] == 128 else SEQUENCE
    with mock.patch.object(wgmma, "TILES", (tile,)):
        plan = plan_of(shape, activation=activation)
    code = compiled(plan, "sm_90")
    assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
    assert code.count("USETMAXREG") == 2 and code.count("UTMALDG") == 1 + -(-tile[1] // 64)
    assert code.count("STG", "128") == code.count("STG") and code.count("LDS", "128") == code.count("LDS")
    loop = code.main_loop("HGMMA")
    products = 4 * tile[2] // 64
    assert loop.count("HGMMA") == products and loop.count("HGMMA", f"64x{tile[3]}x16") == products
    assert not loop.count("BAR") and len(loop.instructions) <= 40 + 10 * products, loop.mix()
    # Waiting for the products before, once a step: what the compiler puts between each two would be more.
    assert loop.count("WARPGROUP", "DEPBAR") == 1
