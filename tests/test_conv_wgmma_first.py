"""conv_wgmma_first: its PTX for sm_90a on the CPU, copy engine and warpgroups included, against the oracle; its plan.

Every case runs under the detector. Sizes are chosen around the edges of a tile, of a strip and of a step: rows that end
inside a strip, strips of three widths, filters more than a tile has, boxes across batch items, taps that lie outside.
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
from test_conv_kernels import Case, last_blocks, name
from test_static_gates import compiled

from cuconv.cuda import conv as launching
from cuconv.cuda.runtime import CudaRuntime, current, probe
from cuconv.geometry import conv_shape
from cuconv.plan import conv as planning
from cuconv.plan import transpose, wgmma, wgmma_first
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import MAP_BOX, PlanError

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# So few blocks that each has several tiles, and both ends of a band.
LIMITS = replace(DEVICES["H200"], multiprocessors=3)
ALIGNED = (0, 0, 0)
SMALL = wgmma_first.TILES[-1]
FIRST = {"data_format": "channels_first"}


@contextmanager
def only(tile, bk=None, span=None):
    """Plans are conv_wgmma_first's wherever it computes this, and find no other tile."""
    no_other = mock.Mock(side_effect=PlanError("only that tile"))
    with (
        mock.patch.object(wgmma_first, "TILES", (tile,)),
        mock.patch.object(wgmma_first, "STEPS", (bk,) if bk else wgmma_first.STEPS),
        mock.patch.object(wgmma_first, "SPANS", (span,) if span else wgmma_first.SPANS),
        mock.patch.object(planning, "WARPGROUP_FACTOR", math.inf),
        mock.patch.object(planning, "plan_narrow", no_other),
        mock.patch.object(planning, "plan_taps", no_other),
    ):
        forget_plans()
        try:
            yield
        finally:
            forget_plans()


def forget_plans():
    functions = (planning.plan_conv, transpose.plan_transpose, wgmma_first.plan_wgmma_first, wgmma_first.choose_strips)
    for function in functions:
        function.cache_clear()


def plan_of(shape, dtype="bfloat16", activation="linear", aligned=ALIGNED, limits=DEVICES["H200"]):
    """conv_wgmma_first's."""
    return wgmma_first.plan_wgmma_first.__wrapped__(planning.form_of(shape), dtype, activation, aligned, limits)


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def of_rank(rank, last, others=(3, 2)):
    return (*others[: rank - 1], last)


def cases(tile, rank, bk):
    """(x_shape, w_shape, options) that meet every edge of `tile`."""
    bm, bn, *_ = tile
    taps = {1: (3,), 2: (2, 3), 3: (2, 1, 2)}[rank]
    # Rows of several tiles, of which the last ends inside a strip; filters of several bands; a step of 8 channels.
    yield (2, bk + 8, *of_rank(rank, bn + 40)), (*taps, bk + 8, 2 * bm + 8), {"padding": "same"}
    # Boxes across items, of which the last is not full; results in rows of an odd length; channels of no whole vector.
    yield (5, 7, *of_rank(rank, 24)), (*taps, 7, 8), {"padding": "valid"}
    # The other axes at strides of their own.
    strides = (3, 2)[: rank - 1]
    yield (2, 8, *of_rank(rank, 40, (7, 5))), (*taps, 8, 8), {"padding": "same", "strides": (*strides, 1)}
    # Dilation, and groups whose filters end inside a tile.
    dilated = {"padding": "same", "groups": 2, "dilation_rate": 2}
    yield (1, 4 * bk, *of_rank(rank, bn - 8)), (*taps, 2 * bk, 48), dilated
    # One row of one strip, and taps that are padding alone.
    yield (3, 16, *(1,) * (rank - 1), 8), (*taps, 16, 16), {"padding": "same"}
    if rank == 1:
        yield (3, 24, 32), (3, 24, 24), {"padding": "causal", "dilation_rate": 11}
        yield (2, 8, 16), (4, 8, 8), {"padding": (3, 5)}


def gradients(tile, rank, bk):
    """The same for input gradients: groups of which w is in pieces, and phases of the other axes."""
    bm, bn, *_ = tile
    taps = {1: (3,), 2: (2, 3), 3: (2, 1, 2)}[rank]
    yield (2, bm + 8, *of_rank(rank, bn + 24)), (*taps, bm + 8, bk + 8), {"padding": "same"}
    merged = {"padding": "same", "groups": 2, "strides": (*(3, 2)[: rank - 1], 1)}
    yield (3, 48, *of_rank(rank, 40, (7, 5))), (*taps, 24, 2 * bk), merged
    yield (2, 16, *of_rank(rank, 24)), (*taps, 16, 16), {"padding": "same", "dilation_rate": 3}


def run_tile(dtype, tile, rank, bk=16, span=None, make_runtime=trace):
    forwards = [*cases(tile, rank, bk)]
    with only(tile, bk, span):
        for number, (x_shape, w_shape, options) in enumerate((*forwards, *gradients(tile, rank, bk))):
            runtime, forward = make_runtime(seed=number + 1), number < len(forwards)
            case = Case(x_shape, w_shape, dtype, seed=number, **FIRST, **options)
            try:
                case.check_forward(runtime) if forward else case.check_input_grad(runtime)
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
                raise
            if isinstance(runtime, CudaRuntime):
                continue
            assert {plan.kernel for plan in runtime.launches} - {"pack_weights"} == {"conv_wgmma_first"}
            assert all(plan.tile.startswith(name(tile[:2])) for plan in runtime.launches if plan.maps)


# --- Every tile --------------------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize("dtype, rank, tile", [("bfloat16", 1, SMALL), ("float16", 2, (64, 256, 64, 128))], ids=name)
def test_two_tiles(dtype, rank, tile):
    run_tile(dtype, tile, rank)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(wgmma_first.TILES)), ids=lambda number: name(wgmma_first.TILES[number]))
def test_every_tile(number):
    """Each with another rank, strip and step; the small one has all ranks."""
    tile = wgmma_first.TILES[number]
    for rank in (1, 2, 3) if tile == SMALL else (number % 3 + 1,):
        run_tile(("float16", "bfloat16")[number % 2], tile, rank, (16, 64, 32)[rank - 1], wgmma_first.SPANS[number % 3])


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("span", wgmma_first.SPANS)
@pytest.mark.parametrize("tile", wgmma_first.TILES, ids=name)
def test_every_tile_on_a_gpu(tile, span, rank, dtype):
    if current().limits.capability != wgmma.ONLY:
        pytest.skip(f"wgmma is of compute capability 9.0. Received: {current().limits.name}")
    run_tile(dtype, tile, rank, 64, span, make_runtime=lambda seed: current())


# --- What tiles do not show --------------------------------------------------------------------------------------


@in_the_emulator
def test_fused_activation():
    case = Case((2, 16, 24), (3, 16, 8), "bfloat16", padding="same", **FIRST)
    with only(SMALL):
        for bias in (True, False):
            case.check_forward(trace(), "hard_sigmoid", bias)


@in_the_emulator
def test_the_same_bits_in_any_order_of_threads_and_on_any_number_of_multiprocessors():
    case, results = Case((3, 24, 152), (3, 24, 72), "bfloat16", padding="same", **FIRST), []
    with only(SMALL):
        for seed, multiprocessors in ((0, 1), (1, 2), (2, 5), (3, 132)):
            results.append(case.forward(trace(seed, replace(LIMITS, multiprocessors=multiprocessors))))
    assert len({each.tobytes() for each in results}) == 1


@in_the_emulator
@pytest.mark.parametrize("groups", [1, 2])
def test_nan_stays_where_it_is_read(groups):
    """In x: an item, a group of channels, and positions that no window takes. In w: a filter."""
    case = Case((2, 64 * groups, 9, 8), (2, 1, 64, 24 * groups), "bfloat16", strides=(4, 1), groups=groups, **FIRST)
    read = np.zeros(9, bool)
    for _, _, i in oracle.reads((9,), (2,), 4, "valid", 1)[1]:
        read[i] = True
    clean = oracle.conv(case.x, case.w, case.bias, strides=(4, 1), groups=groups, **FIRST)
    case.x[:, :, ~read] = np.nan
    case.x[1, -64:] = np.nan
    case.w[..., -1] = np.nan
    with only(SMALL):
        y = case.forward(trace())
    lost = np.zeros(y.shape, bool)
    lost[1, -24:] = lost[:, -1] = True
    assert np.array_equal(np.isnan(y.astype(np.float32)), lost)
    assert_close(y[~lost], clean[~lost], dtype="bfloat16", terms=128)


@in_the_emulator
def test_indices_beyond_32_bits():
    """y has more than 2**32 elements; only the last block runs, on memory that exists where it is touched."""
    n, c = 2**29 + 72, 8
    shape = conv_shape((1, c, n), (3, c, c), padding="same", **FIRST)
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    rng = np.random.default_rng(0)
    w, x[:, :, -300:] = uniform(rng, (3, c, c), "float16"), uniform(rng, (1, c, 300), "float16")
    runtime = EmulatedRuntime(replace(LIMITS, multiprocessors=1 << 24), blocks=last_blocks)  # a tile each
    with only(SMALL):
        launching.conv(runtime, shape, x, w, None, None, y, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8
    columns = n % SMALL[1]
    expected = oracle.conv(x[:, :, -300:], w, padding="same", **FIRST)
    assert_close(y[:, :, -columns:], expected[:, :, -columns:], dtype="float16", terms=24)
    assert not y[:, :, -300:-columns].any()


@in_the_emulator
def test_no_bank_conflicts_and_whole_sectors():
    runtime = trace(seed=0)
    with only(SMALL):
        Case((2, 64, 128), (1, 64, 64), "bfloat16", **FIRST).check_forward(runtime)
    assert not [row for row in runtime.traffic if row.space == "shared" and row.bank_conflicts]
    stores = [row for row in runtime.traffic if row.space == "global" and row.instruction.startswith("st")]
    assert stores and all(row.sectors == row.least_sectors and row.bytes == row.requests * 512 for row in stores)


# --- Planted -----------------------------------------------------------------------------------------------------


def sequence(runtime):
    """Ten steps for six stages, two spans; rows that end inside a strip, steps and filters that end outside."""
    Case((1, 120, 136), (5, 120, 72), "bfloat16", padding="same", dilation_rate=3, **FIRST).check_forward(runtime)


def images(runtime):
    """Strips of 16 in boxes of two rows and three items; results in rows of 13."""
    Case((5, 16, 3, 16), (2, 4, 16, 24), "bfloat16", padding="valid", **FIRST).check_forward(runtime)


def few_positions(runtime):
    """Three strips of 32 in a box, one for each of three items, of five; the fourth has nothing."""
    Case((5, 16, 1, 24), (1, 3, 16, 24), "bfloat16", padding="same", **FIRST).check_forward(runtime)


def two_groups(runtime):
    Case((1, 128, 40), (3, 64, 48), "bfloat16", padding="same", groups=2, **FIRST).check_forward(runtime)


def bands(runtime):
    """Of two tiles of filters and of one."""
    Case((1, 64, 136), (1, 64, 136), "bfloat16", padding="same", **FIRST).check_forward(runtime)


def many_tiles(runtime):
    """Nine for each block, of more steps than stages, so that warpgroups that take turns have several."""
    Case((9, 72, 120), (4, 72, 136), "bfloat16", padding="same", **FIRST).check_forward(runtime)


def two_of_three_spans(runtime):
    """Of four, so that the third strip of a tile could hold what another tile has."""
    Case((1, 16, 256), (1, 16, 64), "bfloat16", padding="same", **FIRST).check_forward(runtime)


GIVEN_BACK = """    ptx::products_wait<1>(acc);
    if (step > 0 && lane == 0) ptx::barrier_arrive(before);
"""
PLANTS = {
    "the producer waits for the wrong round": (
        "ring.empty(), ring.parity ^ 1", "ring.empty(), ring.parity",
        sequence, {"deadlock"}),
    "fewer bytes than come": ("W_BYTES + p.spans * copy", "W_BYTES + copy", sequence, {"barrier"}),
    "more bytes than come": (
        "W_BYTES + p.spans * copy", "W_BYTES + STRIPS * STRIP_BYTES",
        few_positions, {"deadlock"}),
    "no wait for what is there": ("    ptx::barrier_wait(ring.full(), ring.parity);\n", "", sequence, {"race"}),
    "a stage given back too early": (
        GIVEN_BACK, "    if (lane == 0) ptx::barrier_arrive(ring.empty());\n",
        sequence, {"race"}),
    "products that are not waited for": ("products_wait<1>(acc);", "products_wait<2>(acc);", sequence, {"race"}),
    "sums before they are there": ("products_wait<0>(acc);", "products_wait<1>(acc);", sequence, {"pending"}),
    "strips that nobody fills": ("at < STAGES * spare", "at < 0", few_positions, {"uninitialised"}),
    "zeros that products may not see": ("  ptx::fence_async();\n", "", few_positions, {"fence"}),
    "dilation of the last axis forgotten": (
        "tap[RANK - 1] * p.dilation[RANK - 1]", "tap[RANK - 1]",
        sequence, {WRONG}),
    "padding of the last axis forgotten": (" - p.pad[RANK - 1];", ";", sequence, {WRONG}),
    "the row of the tap before": ("tap[a] * p.dilation[a]", "0", images, {WRONG}),
    "the first span again": ("++s, from[0] += SPAN", "++s", sequence, {WRONG}),
    "a span over another": ("W_BYTES + s * copy", "W_BYTES", sequence, {"race"}),
    "the tap before": ("p.group_taps + r;", "p.group_taps;", sequence, {WRONG}),
    "channels of the first group": (
        "from[1] = tile.g * p.channels + w_from[1]", "from[1] = w_from[1]",
        two_groups, {WRONG}),
    "channels of the step before": (
        "from[1] = tile.g * p.channels + w_from[1]", "from[1] = tile.g * p.channels",
        sequence, {WRONG}),
    "filters of the first group": ("w_from[0] = tile.g * p.group_columns +", "w_from[0] =", two_groups, {WRONG}),
    "filters of the next group": (
        "inside && m + r < p.columns", "inside && m + r < p.columns + 8",
        two_groups, {"race"}),
    "items behind the last": ("return inside && b < p.batch", "return inside", few_positions, {"bounds"}),
    "rows behind the last": ("inside = inside && to[a] < p.out[a];", "", sequence, {"bounds"}),
    "spans behind the last": ("inside = span < p.spans", "inside = true", two_of_three_spans, {"race"}),
    "strips too close": ("ROW_BYTES, STRIP_BYTES)", "ROW_BYTES, STRIP_BYTES / 2)", images, {WRONG}),
    "channels too far apart": (
        "SWIZZLE_32, 8 * ROW_BYTES", "SWIZZLE_32, 16 * ROW_BYTES",
        sequence, {"uninitialised"}),
    "another swizzle": ("SPAN == 32 ? SWIZZLE_64", "SPAN == 16 ? SWIZZLE_64", images, {WRONG}),
    "w as if it lay along the sum": ("multiply_tiles<true>", "multiply_tiles<false>", sequence, {WRONG}),
    "the k of the step before": ("x + k * ROW_BYTES / 16", "x + k / 2 * ROW_BYTES / 16", sequence, {WRONG}),
    "bias of the row 8 before": ("m + lane / 4 + half * 8; p", "m + lane / 4; p", sequence, {WRONG}),
    "y before it is there": (
        "          __syncwarp();\n#pragma unroll\n          for (int c", "#pragma unroll\n          for (int c",
        sequence, {"race"}),
    "halves of a product exchanged": (
        "acc[i][(q + j) / 2 + half * 2 + e]", "acc[i][(q + j) / 2 + e * 2 + half]",
        sequence, {WRONG}),
    "a tile twice": ("tile -= first * p.tiles_n;", "", bands, {WRONG}),
}  # fmt: skip
TURNS = {
    "both warpgroups in one turn": (
        "if constexpr (IN_TURNS) ptx::barrier_wait(turns + group * 8, turn_parity);", "",
        many_tiles, {"race"}),
    "one's own turn again": ("turns + (1 - group) * 8", "turns + group * 8", many_tiles, {"race"}),
    "the second warpgroup first": ("turn_parity = !group", "turn_parity = group", many_tiles, {"race"}),
    "stages of the other's tile": (
        "turn_parity ^= 1, ring.skip(p.steps)", "turn_parity ^= 1",
        many_tiles, {"deadlock"}),
    "one's own tile in the other's stages": ("if (begin > 0) ring.skip(p.steps);", "", many_tiles, {"deadlock"}),
    "a stage that both must leave": ("ring.init(SHARERS);", "ring.init();", many_tiles, {"deadlock"}),
}  # fmt: skip
IN_TURNS = (64, 128, 64, 128)
OTHER_TILES = {"spans behind the last": (128, 192, 64, 192), **dict.fromkeys(TURNS, IN_TURNS)}
PLANTS |= TURNS
DEFAULT = {"a span over another", "fewer bytes than come", "strips too close", "strips that nobody fills"}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    right, wrong, run, caught = PLANTS[name]
    with planted("conv_wgmma_first.cu", right, wrong), only(OTHER_TILES.get(name, SMALL)):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


MISTAKEN_MAPS = {
    "no swizzle": (0, lambda x: {"swizzle": 0}, {WRONG}),
    "positions of the next channel": (0, lambda x: {"sizes": (136 + 8, *x.sizes[1:])}, {"bounds"}),
    "channels too close": (0, lambda x: {"strides": (256, *x.strides[1:])}, {WRONG}),
    "a channel less": (0, lambda x: {"box": (x.box[0], x.box[1] - 1, x.box[2])}, {"deadlock"}),
    "channels of the next tap": (1, lambda w: {"sizes": (72, 120 + 64, 5)}, {"bounds"}),
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

SEQUENCE = conv_shape((8, 128, 16384), (2, 128, 256), padding="causal", dilation_rate=512, **FIRST)
IMAGE = conv_shape((64, 512, 14, 16), (3, 3, 512, 512), padding="same", **FIRST)
VOLUME = conv_shape((2, 64, 12, 30, 48), (3, 3, 3, 64, 48), padding="same", strides=(2, 3, 1), **FIRST)


@pytest.mark.parametrize("shape", [SEQUENCE, IMAGE, VOLUME], ids=["sequence", "image", "volume"])
@pytest.mark.parametrize("tile", wgmma_first.TILES, ids=name)
def test_strips_cover_all_positions(shape, tile):
    with mock.patch.object(wgmma_first, "TILES", (tile,)):
        plan = plan_of(shape)
    (x_map, w_map), constants = plan.maps, dict(plan.constants)
    tiles, tiles_m, tiles_n, band, groups, channels, filters, _, _, taps, steps, batch, items, spans, beside, *sizes = (
        plan.integers
    )
    box, boxes, out = (sizes[i * shape.rank : (i + 1) * shape.rank] for i in range(3))
    assert tiles == tiles_m * tiles_n * groups and tiles_n == prod(boxes) * -(-batch // items)
    assert tiles_m == -(-filters // tile[0]) and 1 <= band <= tiles_m
    assert spans * beside * constants["SPAN"] == items * prod(box) <= tile[1] and max(x_map.box) <= MAP_BOX
    assert beside == items * prod(box[:-1]) and box[-1] == spans * constants["SPAN"]
    assert all(n <= size * count < n + size for n, size, count in zip(out, box, boxes))
    assert x_map.box_bytes * spans == items * prod(box) * constants["BK"] * 2
    assert w_map.box_bytes == constants["BK"] * 128 and not x_map.problem() + w_map.problem()
    assert steps == taps * -(-channels // constants["BK"]) and plan.grid == (min(tiles, 132), 1, 1)
    assert plan.shared_bytes <= DEVICES["H200"].shared_bytes
    assert 0 < plan.cost.least_flops <= plan.cost.flops and plan.cost.bound


def test_strips_waste_little():
    """Of rows that no tile divides they take several, and of short rows short strips."""
    for size, columns, least in ((14, 128, 0.87), (28, 256, 0.87), (56, 256, 0.87), (64, 128, 1), (1000, 256, 0.97)):
        strips = wgmma_first.choose_strips(64, (size, size), (1, 1), columns)
        assert 64 * size * size / (strips.tiles * columns) >= least, (size, strips)


REFUSED = {
    "another GPU": ((2, 64, 48), (3, 64, 64), {}, "bfloat16", ALIGNED, "B200", "9.0 alone"),
    "float32": ((2, 64, 48), (3, 64, 64), {}, "float32", ALIGNED, "H200", "only 16-bit"),
    "odd rows": ((2, 64, 50), (3, 64, 64), {}, "float16", ALIGNED, "H200", "50 inputs and 64 filters"),
    "odd filters": ((2, 64, 48), (3, 64, 66), {}, "float16", ALIGNED, "H200", "48 inputs and 66 filters"),
    "small groups": ((2, 24, 48), (3, 12, 64), {"groups": 2}, "float16", ALIGNED, "H200", "a group of 12"),
    "anywhere in memory": ((2, 64, 48), (3, 64, 64), {}, "float16", (0, 4, 0), "H200", "16-byte boundary"),
    "strides": ((2, 64, 48), (3, 64, 64), {"strides": 2}, "float16", ALIGNED, "H200", "stride 1 on the last"),
    "long strides": ((2, 64, 48, 48), (3, 3, 64, 64), {"strides": (9, 1)}, "float16", ALIGNED, "H200", "up to 8"),
    "no items": ((0, 64, 48), (3, 64, 64), {}, "float16", ALIGNED, "H200", "no products"),
    "far away": ((1, 8, 2**31), (1, 8, 8), {}, "float16", ALIGNED, "H200", "32 bits"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_reason(name):
    x_shape, w_shape, options, dtype, aligned, device, reason = REFUSED[name]
    shape = conv_shape(x_shape, w_shape, **FIRST, **options)
    with pytest.raises(PlanError, match=reason):
        plan_of(shape, dtype, "linear", aligned, DEVICES[device])
    if name not in ("anywhere in memory", "no items"):
        plan = planning.plan_conv(shape, dtype, "linear", aligned, DEVICES[device])
        assert plan.kernel != "conv_wgmma_first" and any(reason in each for each in plan.rejected)


def test_it_is_chosen_where_it_is_predicted_to_be_faster():
    for shape in (SEQUENCE, IMAGE):
        plan = planning.plan_conv(shape, "bfloat16", "linear", ALIGNED, DEVICES["H200"])
        assert plan.kernel == "conv_wgmma_first" and any("us predicted" in each for each in plan.rejected)
        assert planning.plan_conv(shape, "bfloat16", "linear", ALIGNED, DEVICES["A100"]).kernel != plan.kernel


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("activation", ["linear", pytest.param("gelu", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "tile",
    [wgmma_first.TILES[0], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in wgmma_first.TILES[1:])],
    ids=name,
)
def test_machine_code(tile, activation):
    """No spill, products and copies that belong to sm_90 alone, and few instructions between products."""
    shape = VOLUME if tile[0] == 256 else IMAGE if tile[1] == 128 else SEQUENCE
    with mock.patch.object(wgmma_first, "TILES", (tile,)):
        plan = plan_of(shape, activation=activation)
    code = compiled(plan, "sm_90")
    assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
    assert code.count("USETMAXREG") == 2 and code.count("UTMALDG") >= 1 + tile[0] // 64
    assert code.count("STG", "128") == code.count("STG") and code.count("LDS", "128") == code.count("LDS")
    loop = code.main_loop("HGMMA")
    products = dict(plan.constants)["BK"] // 16 * tile[2] // 64
    assert loop.count("HGMMA") == products and loop.count("HGMMA", f"64x{tile[3]}x16") == products
    assert not loop.count("BAR") and len(loop.instructions) <= 40 + 10 * products, loop.mix()
    # Waiting for the products before, once a step: what the compiler puts between each two would be more.
    assert loop.count("WARPGROUP", "DEPBAR") == 1
