"""kernel_grad_wgmma: its PTX for sm_90a on the CPU, copy engine and warpgroups included, against the oracle; its plan.

Every case runs under the detector, in every order of positions that the plan knows, with a halo and without. Sizes are
chosen around the edges of a tile and of a box: channels and filters more than a tile has, positions that end inside of
a box and of a product, taps that lie outside.
"""

import math
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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

import cuconv.cuda.conv as engine
from cuconv.cuda.runtime import CudaRuntime, current, probe
from cuconv.geometry import conv_shape
from cuconv.plan import conv as planning
from cuconv.plan import kernel_grad_wgmma as grads
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ELEMENTS, MAP_BOX, PlanError

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

H200 = DEVICES["H200"]
ALIGNED = (0, 0, 0)
MODES = ("halo of items", "halo of places", "halo of residues", "halo of rows", "reload of items", "reload of places",
         "reload of residues", "reload of rows", "reload of positions")  # fmt: skip
SMALL = (1, 64, "taps")


@contextmanager
def found_only(tile=None, mode="", taps=None, rows=None):
    """Plans find no other tile and mode, and boxes of at most `rows` positions."""
    views, reaches, tap_counts = grads.views, grads.reaches, grads.tap_counts
    kind, _, of = mode.partition(" of ")

    def reaches_of(view, count):
        return (each for each in reaches(view, count) if not mode or each.is_halo == (kind == "halo"))

    changes = {
        "views": lambda shape: (each for each in views(shape) if each.name.startswith(of)),
        "reaches": reaches_of,
        "tap_counts": lambda *arguments: [taps] if taps else tap_counts(*arguments),
    }
    with ExitStack() as stack:
        for attribute, change in changes.items():
            stack.enter_context(mock.patch.object(grads, attribute, change))
        if tile:
            stack.enter_context(mock.patch.object(grads, "TILES", (tile,)))
        if rows:
            stack.enter_context(mock.patch.object(grads, "ROWS", (rows,)))
        yield


def plan_of(shape, dtype="bfloat16", aligned=ALIGNED, most=1000, limits=H200, splits=None, **only):
    """The launch of kernel_grad_wgmma, and its splits: `splits`, if there are as many boxes."""
    with found_only(**only), ExitStack() as stack:
        if splits:
            stack.enter_context(mock.patch.object(grads, "_splits", return_value=[splits]))
        return grads.plan_on_warpgroups(shape, dtype, aligned, most, limits)


@contextmanager
def on_warpgroups(**options):
    """The engine's kernel gradient is this kernel's; `options` of plan_of()."""

    def plan(shape, dtype, aligned, workspace, limits, precision):
        grad, splits = plan_of(shape, dtype, aligned, limits=limits, **options)
        count = math.prod(shape.w_shape)
        return planning._with_reduction(grad, splits, count, dtype, aligned, limits)

    with mock.patch.object(engine, "plan_kernel_grad", plan):
        yield


def trace(seed=1, limits=H200):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def cases(mode, tile, rank):
    """(x_shape, w_shape, splits, options) that meet every edge of `tile` in `mode`."""
    slices, bn, _ = tile
    kind, _, of = mode.partition(" of ")
    channels, filters = slices * 64 + 8, bn + 8
    batch = {"items": 11}.get(of, 2)

    def shapes(sizes, channels, taps, filters, groups=1, batch=batch):
        return (batch, *sizes, channels), (*taps, channels // groups, filters)

    if of == "positions":
        yield *shapes(around(rank, 70), channels, (1,) * rank, filters), 2, {}
        yield *shapes(around(rank, 37), 48, (1,) * rank, 80, 2), 1, {"groups": 2}
        yield *shapes((1,) * rank, 8, (1,) * rank, 8, batch=1), 1, {}
        return
    taps = {1: (3,), 2: (2, 3), 3: (2, 1, 3)}[rank]
    last = (1,) * (rank - 1)
    if of == "residues":
        # Strands that are whole, and of which the last three are outside of the dilation.
        for d, in_item in ((8, 3), (5, 7)):
            yield *shapes((*around(rank, 4)[:-1], d * in_item), channels, taps, filters), 2, {
                "padding": "same", "dilation_rate": (*last, d)
            }  # fmt: skip
        yield *shapes((*around(rank, 4)[:-1], 16), 48, taps, 80, 2, batch=1), 1, {
            "padding": "same", "groups": 2, "dilation_rate": (*last, 4)
        }  # fmt: skip
        return
    d = 8 if mode == "halo of rows" else 1
    wide = 9 if of == "places" else 3
    sizes = {1: (71,), 2: (wide, 13), 3: (2, wide, 6)}[rank]
    # More channels and filters than a tile has; padding; parts that end where they end.
    yield *shapes(sizes, channels, taps, filters), 3, {"padding": "same", "dilation_rate": (*last, d)}
    # Groups whose channels and filters end inside of a slice, with dilation.
    options = {"padding": "same", "groups": 2, "dilation_rate": 2 if d == 1 else (*last, d)}
    yield *shapes(sizes, 48, taps, 80, 2), 1, options
    strides = (3, 2)[-rank:] if rank < 3 else (1, 3, 2)
    if kind == "reload" or (of != "rows" and grads.tap_counts(5, *tile)[0] > strides[-1]):
        # Each axis at a stride of its own; a halo is of taps that meet every second place.
        yield (
            *shapes([stride * n for stride, n in zip(strides, sizes)], 8, (*taps[:-1], 5), 8),
            2,
            {"padding": "same", "strides": strides},
        )
    if mode == "reload of rows":
        yield *shapes((1,) * rank, 16, taps, 16, batch=1), 1, {"padding": "same"}
    if rank == 1 and of in ("items", "rows"):
        # All but one tap are padding, before and behind.
        yield *shapes((5,), 8, (3,), 8), 1, {"padding": "causal", "dilation_rate": 8}
        yield *shapes((11,), 8, (4,), 8), 1, {"padding": (14, 16), "dilation_rate": 8}


def run(mode, tile, rank, dtype, make_runtime=trace):
    for number, (x_shape, w_shape, splits, options) in enumerate(cases(mode, tile, rank)):
        case = Case(x_shape, w_shape, dtype, seed=number, **options)
        runtime = make_runtime(seed=number + 1)
        try:
            with on_warpgroups(tile=tile, mode=mode, splits=splits):
                case.check_kernel_grad(runtime)
        except (AssertionError, PlanError, emulator.EmulationError) as error:
            error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[:1]}")
            raise
        if isinstance(runtime, CudaRuntime):
            continue
        plan = runtime.launches[0]
        assert plan.kernel == "kernel_grad_wgmma" and mode in plan.reason, plan
        assert dict(plan.constants)["SPLIT"] == len(runtime.launches) - 1 <= (splits > 1)


def is_possible(mode, tile, rank):
    """Places and residues want axes to be there; a halo, and warpgroups that share taps, several in a block."""
    kind, _, of = mode.partition(" of ")
    axes = (of != "places" or rank > 1) and (of != "residues" or rank < 3) and (of != "positions" or tile[2] != "taps")
    return axes and (kind == "reload" or grads.tap_counts(3, *tile)[:1] > [1])


ALL = [
    (mode, tile, rank) for mode in MODES for tile in grads.TILES for rank in (1, 2, 3) if is_possible(mode, tile, rank)
]


# --- Every tile and mode -----------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize("mode, rank", [("halo of items", 1), ("reload of rows", 2)])
def test_two_modes(mode, rank):
    run(mode, SMALL, rank, "bfloat16")


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", MODES)
def test_every_mode(mode):
    """In every rank, with a tile that is its own."""
    for rank in (1, 2, 3):
        number = (MODES.index(mode) + rank) % 3
        tile = (SMALL, (1, 128, "filters"), (2, 64, "channels"))[number]
        if is_possible(mode, tile, rank):
            run(mode, tile, rank, ("float16", "bfloat16")[rank % 2])


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("tile", grads.TILES, ids=name)
def test_every_tile(tile):
    number = grads.TILES.index(tile)
    mode, rank = (("halo of items", 1), ("halo of places", 2), ("reload of items", 3))[number % 3]
    if not is_possible(mode, tile, rank):
        mode = mode.replace("halo", "reload")
    run(mode, tile, rank, ("float16", "bfloat16")[number % 2])


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("taps", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("tile", [SMALL, (1, 128, "filters"), (2, 64, "channels")], ids=name)
def test_every_number_of_taps(tile, taps):
    """Of eleven: the last block of an axis has fewer, and where warpgroups share an odd number, one too many."""
    case = Case((8, 25, 16), (11, 16, 24), "bfloat16", padding="same")
    for mode in ("halo of items", "reload of items"):
        with on_warpgroups(tile=tile, mode=mode, taps=taps):
            case.check_kernel_grad(trace())


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mode, tile, rank", ALL, ids=name)
def test_every_tile_on_a_gpu(mode, tile, rank, dtype):
    if current().limits.capability != grads.ONLY:
        pytest.skip(f"wgmma is of compute capability 9.0. Received: {current().limits.name}")
    run(mode, tile, rank, dtype, make_runtime=lambda seed: current())


@in_the_emulator
def test_a_transposed_convolution_has_it_too():
    """Its kernel's gradient is the one of a convolution, with x and dy exchanged."""
    from cuconv import ops

    x_shape, w_shape = (8, 9, 16), (3, 24, 16)
    rng = np.random.default_rng(0)
    x, dy = uniform(rng, x_shape, "bfloat16"), uniform(rng, (8, 18, 24), "bfloat16")
    expected = ops.conv_transpose_kernel_grad(x, dy, w_shape, strides=2, padding="same")
    shape = conv_shape((8, 18, 24), w_shape, strides=2, padding="same")
    out = np.full(w_shape, np.nan, x.dtype)
    with on_warpgroups(tile=SMALL, mode="halo of items"):
        engine.kernel_grad(trace(), shape, dy, x, out, 0)
    assert_close(out, expected, dtype="bfloat16", terms=72)


# --- What tiles do not show --------------------------------------------------------------------------------------


@in_the_emulator
def test_the_same_bits_in_any_order_of_threads():
    case = Case((8, 41, 72), (3, 72, 72), "bfloat16", padding="same")
    with on_warpgroups(tile=SMALL, mode="halo of items", splits=2, rows=64):
        results = [case.kernel_grad(trace(seed)) for seed in range(4)]
    assert len({each.tobytes() for each in results}) == 1


@in_the_emulator
def test_the_same_bits_on_any_number_of_multiprocessors():
    """As long as positions are not split, which is a matter of the device."""
    case, results = Case((8, 41, 72), (3, 72, 72), "bfloat16", padding="same"), []
    for multiprocessors in (1, 5, 132):
        with on_warpgroups(tile=SMALL, mode="halo of items", splits=1, rows=64):
            results.append(case.kernel_grad(trace(1, replace(H200, multiprocessors=multiprocessors))))
    assert len({each.tobytes() for each in results}) == 1


UNREAD = {
    "between strides": ("reload of items", (8, 40, 16), (2, 16, 16), {"strides": 4}),
    "between strides, with a halo": ("halo of items", (8, 61, 16), (2, 16, 16), {"strides": 4, "dilation_rate": 4}),
    "behind the last window": ("reload of items", (8, 41, 16), (3, 16, 16), {"strides": 3}),
    "between far taps": ("reload of items", (8, 13, 16), (2, 16, 16), {"dilation_rate": 9}),
}


@in_the_emulator
@pytest.mark.parametrize("where", UNREAD)
def test_nan_that_nobody_reads(where):
    mode, x_shape, w_shape, options = UNREAD[where]
    case = Case(x_shape, w_shape, "bfloat16", **options)
    read = np.zeros(x_shape[1], bool)
    for _, _, i in oracle.reads(x_shape[1:2], w_shape[:1], options.get("strides", 1), "valid",
                                options.get("dilation_rate", 1))[1]:  # fmt: skip
        read[i] = True
    assert not read.all()
    clean = oracle.conv_kernel_grad(case.x, case.dy, w_shape, **options)
    case.x[:, ~read] = np.nan
    with on_warpgroups(tile=SMALL, mode=mode):
        dw = case.kernel_grad(trace())
    assert_close(dw, clean, dtype="bfloat16", terms=case.dy.size // 16)


@in_the_emulator
def test_nan_stays_in_its_channel_and_filter():
    """Also where a slice of channels or filters reaches into the next group."""
    case = Case((8, 21, 48), (3, 24, 80), "bfloat16", groups=2, padding="same")
    clean = oracle.conv_kernel_grad(case.x, case.dy, case.w.shape, groups=2, padding="same")
    case.x[..., 30] = np.nan  # channel 6 of the second group
    case.dy[..., 3] = np.nan
    with on_warpgroups(tile=SMALL, mode="halo of items"):
        dw = case.kernel_grad(trace())
    lost = np.zeros(dw.shape, bool)
    lost[:, 6, 40:] = lost[..., 3] = True
    assert np.array_equal(np.isnan(dw.astype(np.float32)), lost)
    assert_close(dw[~lost], clean[~lost], dtype="bfloat16", terms=168)


@in_the_emulator
def test_indices_beyond_32_bits():
    """dw has more than 2**31 elements; only the last block runs, on memory that exists where it is touched."""
    channels, filters = 1 << 17, (1 << 14) + 72
    shape = conv_shape((1, 16, channels), (1, channels, filters))
    rng = np.random.default_rng(0)
    x, dy = uniform(rng, shape.x_shape, "float16"), uniform(rng, shape.y_shape, "float16")
    dw = np.zeros(shape.w_shape, np.float16)
    with on_warpgroups(tile=SMALL, mode="reload of positions", splits=1, taps=1):
        runtime = EmulatedRuntime(H200, blocks=last_blocks)
        with mock.patch.object(grads, "TILES", (SMALL,)):
            engine.kernel_grad(runtime, shape, x, dy, dw, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8
    expected = x[0, :, -64:].astype(np.float64).T @ dy[0, :, -8:].astype(np.float64)
    assert_close(dw[0, -64:, -8:], expected, dtype="float16", terms=16)
    assert not dw[0, -192:-64].any() and not dw[0, -64:, :-200].any()


# --- Bytes -------------------------------------------------------------------------------------------------------

COUNTED = [
    ("halo of items", SMALL, (11, 71, 72), (3, 72, 136), {"padding": "same"}),
    ("halo of places", (1, 128, "filters"), (2, 9, 23, 72), (2, 3, 72, 72), {"padding": "same"}),
    ("halo of rows", (2, 64, "channels"), (2, 71, 136), (3, 136, 72), {"padding": "same", "dilation_rate": 8}),
    ("halo of items", SMALL, (8, 61, 16), (5, 16, 16), {"strides": 4}),
    ("reload of rows", (2, 96, "channels"), (2, 11, 13, 48), (3, 3, 24, 144), {"padding": "same", "groups": 2}),
]


@in_the_emulator
@pytest.mark.parametrize(
    "mode, tile, x_shape, w_shape, options",
    [COUNTED[0], *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in COUNTED[1:])],
    ids=name,
)
@pytest.mark.parametrize("splits", [1, 2])
def test_bytes_are_those_of_the_model(mode, tile, x_shape, w_shape, options, splits):
    case = Case(x_shape, w_shape, "bfloat16", **options)
    runtime = trace(seed=0)
    with on_warpgroups(tile=tile, mode=mode, splits=splits, rows=64):
        case.check_kernel_grad(runtime)
    traffic = [row for row in runtime.results[0].traffic if row.space == "global"]
    loads = [row for row in traffic if not row.instruction.startswith("st")]
    assert loads and all(row.instruction.startswith("cp.async.bulk.tensor") for row in loads)
    assert sum(row.bytes for row in traffic) == runtime.launches[0].cost.bytes
    if splits > 1:  # 16-bit results fill halves of their sectors, floats all
        stores = [row for row in traffic if row.instruction.startswith("st")]
        assert stores and all(row.sectors == row.least_sectors for row in stores)


@in_the_emulator
def test_the_least_bytes_are_reached_where_nothing_is_read_twice():
    """One tile, one tap: every array once, which is what the memory gives at least."""
    case = Case((2, 50, 64), (1, 64, 64), "bfloat16")
    runtime = trace(seed=0)
    with on_warpgroups(tile=(1, 128, "filters"), mode="reload of positions", splits=1):
        case.check_kernel_grad(runtime)
    (plan,) = runtime.launches
    assert plan.cost.bytes == plan.cost.least_bytes == case.x.nbytes + case.dy.nbytes + case.w.nbytes
    assert sum(row.bytes for row in runtime.traffic if row.space == "global") == plan.cost.least_bytes


# --- Planted -----------------------------------------------------------------------------------------------------


def with_case(*arguments, tile=SMALL, mode="halo of items", splits=1, rows=64, taps=None, **options):
    def run(runtime):
        with on_warpgroups(tile=tile, mode=mode, splits=splits, rows=rows, taps=taps):
            Case(*arguments, "bfloat16", **options).check_kernel_grad(runtime)

    return run


# Eight boxes for six stages and fewer, of which the last ends outside; two slices and two tiles of filters.
sequence = with_case((8, 63, 72), (3, 72, 72), padding="same")
split = with_case((8, 63, 72), (3, 72, 72), padding="same", splits=3)
image = with_case((9, 7, 6, 24), (2, 3, 24, 24), padding="same", rows=192)
groups = with_case((8, 20, 48), (3, 24, 80), padding="same", groups=2)
strided = with_case((8, 41, 24), (5, 24, 24), padding="same", strides=2)
reload = with_case((8, 33, 24), (3, 24, 24), mode="reload of items", padding="same")
many_taps = with_case((8, 20, 24), (5, 24, 24), taps=3, padding="same")
channels = with_case((8, 33, 136), (3, 136, 72), tile=(2, 64, "channels"), padding="same")
filters = with_case((8, 33, 24), (3, 24, 136), tile=(1, 128, "filters"), padding="same")

RELEASE = """    ptx::products_wait<1>(acc);
    if (box > tile.first && lane == 0) ptx::barrier_arrive(before);
"""
KERNEL, SHARED = "kernel_grad_wgmma.cu", "warpgroups.cuh"
PLANTS = {
    "the producer waits for the wrong round": (
        KERNEL, "ring.empty(), ring.parity ^ 1", "ring.empty(), ring.parity", sequence, {"deadlock"}),
    "the consumers wait for the wrong round": (
        KERNEL, "barrier_wait(ring.full(), ring.parity)", "barrier_wait(ring.full(), ring.parity ^ 1)",
        sequence, {"race"}),
    "a round that is not counted": (SHARED, "stage = 0, parity ^= turns;", "stage = 0;", sequence, {"barrier"}),
    "a stage given back by one warpgroup": (
        SHARED, "int warpgroups = CONSUMERS", "int warpgroups = 1",
        sequence, {"deadlock"}),
    "barriers that the copy engine does not see": (
        SHARED, "    ptx::barriers_visible();\n", "", sequence, {"fence"}),
    "fewer bytes than come": (
        KERNEL, "barrier_expect(ring.full(), p.stage_bytes)", "barrier_expect(ring.full(), p.stage_bytes - p.x_bytes)",
        sequence, {"barrier"}),
    "no wait for what is there": (
        KERNEL, "    ptx::barrier_wait(ring.full(), ring.parity);\n", "", sequence, {"race"}),
    "a stage given back too early": (
        KERNEL, RELEASE, "    if (lane == 0) ptx::barrier_arrive(ring.empty());\n", sequence, {"race"}),
    "products that are not waited for": (
        KERNEL, "products_wait<1>(acc);", "products_wait<2>(acc);", sequence, {"race"}),
    "sums before they are there": (KERNEL, "products_wait<0>(acc);", "products_wait<1>(acc);", sequence, {"pending"}),
    "no fence before products": (KERNEL, "    ptx::products_fence();\n", "", sequence, {"fence"}),
    "no barrier before the roles part": (KERNEL, "  __syncthreads();\n", "", sequence, {"barrier"}),
    "rows of x as if they lay along memory": (
        KERNEL, "multiply_tiles<true>", "multiply_tiles<false>", sequence, {WRONG}),
    "eight positions too far apart": (
        KERNEL, "d_layout = layout(SWIZZLE_128, 8 * ROW_BYTES", "d_layout = layout(SWIZZLE_128, 16 * ROW_BYTES",
        sequence, {"race"}),
    "no swizzle": (KERNEL, "x_layout = layout(SWIZZLE_128", "x_layout = layout(SWIZZLE_64", sequence, {WRONG}),
    "filters too close": (KERNEL, "8 * ROW_BYTES, D_BYTES)", "8 * ROW_BYTES, D_BYTES / 2)",
                          with_case((8, 33, 24), (3, 24, 136), tile=(1, 128, "taps"), padding="same"), {WRONG}),
    "all taps the first": (KERNEL, " + tap_from[i % GT])", ")", sequence, {WRONG}),
    "taps of the other warpgroup": (KERNEL, "smaller(tap + t, TAPS - 1)", "smaller(t, TAPS - 1)", sequence, {WRONG}),
    "a tap too many is stored": (KERNEL, "tap + t >= TAPS || ", "", many_taps, {"race"}),
    "a tap behind the last is stored": (
        KERNEL, " || tile.part[HALO] * TAPS + tap + t >= p.taps", "", many_taps, {"bounds"}),
    "the taps of the first block": (KERNEL, " + tile.part[a] * p.part_step[a]", "", many_taps, {WRONG}),
    "padding forgotten": (KERNEL, " + p.x_from[a]", "", sequence, {WRONG}),
    "strides forgotten": (KERNEL, "at[a] * p.x_step[a]", "at[a] * p.d_step[a]", strided, {WRONG}),
    "one box of x twice": (KERNEL, "on_halo + p.box_from[i]", "on_halo + p.box_from[0]", strided, {WRONG}),
    "one box of x for all taps": (KERNEL, "on_halo + p.box_from[i]", "on_halo", reload, {WRONG}),
    "no gap between lines": (KERNEL, ": p.gap;", ": 16 * ROW_BYTES / 16;", image, {WRONG}),
    "a line that is not counted": (KERNEL, "      if (!left) left = p.steps;\n", "", image, {WRONG}),
    "the k of the step before": (
        KERNEL, "d + k * ROW_BYTES / 16", "d + k / 32 * 32 * ROW_BYTES / 16", sequence, {WRONG}),
    "channels of the first group": (KERNEL, "tile.g * p.channels + tile.c0", "tile.c0", groups, {WRONG}),
    "filters of the first group": (KERNEL, "tile.g * p.columns + tile.n0", "tile.n0", groups, {WRONG}),
    "channels of the next group": (KERNEL, "if (c >= p.channels) continue;", "", groups, {"race"}),
    "filters of the next group": (KERNEL, "if (n >= p.columns) continue;", "", groups, {"race"}),
    "the slice of the other warpgroup": (
        KERNEL, "SHARED == CHANNELS ? group * GC : 0,", "SHARED == CHANNELS ? 0 * GC : 0,", channels, {"race"}),
    "filters of the other warpgroup": (
        KERNEL, "+ column / 64 * D_BYTES) >> 4", ") >> 4", filters, {WRONG}),
    "a split in another's place": (KERNEL, "tile.number * p.count", "0 * p.count", split, {"race"}),
    "boxes of the next split": (
        KERNEL, "end = p.boxes - first < p.chunk ? p.boxes : first + p.chunk;", "end = p.boxes;", split, {WRONG}),
    "halves of a product exchanged": (
        KERNEL, "acc[i][j / 2 + half * 2 + e]", "acc[i][j / 2 + e * 2 + half]", sequence, {WRONG}),
    "a box that goes on in its line": (KERNEL, "    if (++at[a] < count[a]) break;", "    ++at[a];\n    break;",
                                       with_case((9, 7, 6, 24), (2, 3, 24, 24), padding="same"), {WRONG}),
}  # fmt: skip
DEFAULT = {"a stage given back too early", "rows of x as if they lay along memory", "a tap too many is stored"}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    file, right, wrong, run, caught = PLANTS[name]
    with planted(file, right, wrong):
        for seed in (1, 2, 3):  # not every order of threads shows a barrier that is missing
            found = what_catches(run, EmulatedRuntime(H200, mode="trace", seed=seed, timeout=5.0))
            if found:
                break
    assert caught <= found, found


@in_the_emulator
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in {run for *_, run, _ in PLANTS.values()}:
        assert what_catches(run, EmulatedRuntime(H200, mode="trace", seed=1)) == set()


MISTAKEN_MAPS = {
    "no swizzle": (0, lambda x: {"swizzle": 0}, {WRONG}),
    "a place of the next item": (0, lambda x: {"sizes": (72, 8, 63 + 3)}, {"bounds"}),
    "another order": (1, lambda d: {"strides": d.strides[::-1], "sizes": (72, 63, 8), "box": d.box}, {WRONG}),
    "a position less": (0, lambda x: {"box": (*x.box[:-1], x.box[-1] - 1)}, {"deadlock"}),
}


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MISTAKEN_MAPS)
def test_a_mistake_in_a_map_is_caught(name):
    number, changes, caught = MISTAKEN_MAPS[name]

    class Tampered(EmulatedRuntime):
        def launch(self, plan, arrays):
            maps = list(plan.maps)
            maps[number] = replace(maps[number], **changes(maps[number]))
            super().launch(replace(plan, maps=tuple(maps)), arrays)

    found = what_catches(sequence, Tampered(H200, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


# --- Plans -------------------------------------------------------------------------------------------------------

SEQUENCE = conv_shape((8, 16384, 128), (2, 128, 256), padding="causal", dilation_rate=512)
IMAGE = conv_shape((64, 28, 28, 128), (3, 3, 128, 128), padding="same")
VOLUME = conv_shape((2, 12, 30, 50, 64), (3, 3, 3, 64, 48), padding="same", strides=(1, 2, 3))


def modes_of(shape):
    for view in grads.views(shape):
        for taps in (1, 3):
            for reach in grads.reaches(view, min(taps, view.axes[view.halo].taps)):
                yield view, reach


@pytest.mark.parametrize("shape", [SEQUENCE, IMAGE, VOLUME], ids=["sequence", "image", "volume"])
def test_boxes_cover_all_positions(shape):
    """And what taps read of x is in them, where the tap says."""
    positions, seen = shape.batch * math.prod(shape.out_size), set()
    for view, reach in modes_of(shape):
        assert math.prod(axis.sizes[1] for axis in view.axes) == positions
        axis = view.axes[view.halo]
        for rows in grads.ROWS:
            box = grads.choose_box(view, reach.span, rows)
            if box is None:
                continue
            seen.add((view.name, reach.is_halo))
            assert box.rows <= rows and box.rows % grads.STEP == 0
            for each, size, count in zip(view.axes, box.sizes, box.counts):
                assert each.sizes[1] <= size * count < each.sizes[1] + size and size * each.stride <= MAP_BOX
            assert (box.sizes[view.halo] + reach.span) * axis.stride <= MAP_BOX
            for tap, (number, shift) in enumerate(zip(reach.boxes, reach.shifts)):
                assert reach.starts[number] + shift * axis.stride == tap * axis.dilation and 0 <= shift <= reach.span
                assert shift * view.strands % grads.STRANDS == 0
    assert len(seen) >= 3


def test_places_that_nobody_reads_are_not_copied():
    axis = grads.Axis((12, 3), (16, 16), taps=2, dilation=9)
    assert [axis.reads(at) for at in range(13)] == [True] * 3 + [False] * 6 + [True] * 3 + [False]
    assert axis.keeps_out(3) and not axis.keeps_out(4) and axis.read == 12
    assert grads.Axis((41, 13), (16, 16), taps=3, stride=3).read == 39
    assert grads.Axis((5, 9), (16, 16), taps=3, pad=4).read == 5


def test_no_box_where_one_would_copy_what_nobody_reads():
    """Three positions, in products of sixteen: the fourth would meet places between two taps."""
    far = conv_shape((8, 12, 16), (2, 16, 16), dilation_rate=9)
    with pytest.raises(PlanError, match="nobody reads"):
        plan_of(far)
    assert plan_of(conv_shape((8, 13, 16), (2, 16, 16), dilation_rate=9))[1] == 1


def test_splits_respect_the_workspace_and_depend_on_the_shape_and_the_device_only():
    count = math.prod(IMAGE.w_shape)
    for workspace in (0, 8 * count, 80 * count, 1 << 30):
        plan = planning.plan_kernel_grad(IMAGE, "bfloat16", ALIGNED, workspace, H200)
        assert plan.partial * ELEMENTS["bfloat16"].sum_bytes <= workspace
    for most in (1, 2, 7):
        plan, splits = plan_of(IMAGE, most=most)
        steps, chunk = plan.integers[:2]
        assert splits <= most and splits == -(-steps // chunk) and plan.grid[0] % splits == 0
    assert grads.plan_on_warpgroups(IMAGE, "bfloat16", ALIGNED, 99, H200) == plan_of(IMAGE, most=99)


def test_a_plan_says_why():
    plan, splits = plan_of(IMAGE)
    assert f"{splits} parts of" in plan.reason and "taps" in plan.reason and f"{plan.cost.bytes} bytes" in plan.reason
    assert plan.reason.startswith(("warpgroups, halo of", "warpgroups, reload of"))
    other = "reload" if "halo of" in plan.reason else "halo"
    assert any(each.startswith(f"warpgroups, {other}") and "us predicted" in each for each in plan.rejected)


REFUSED = {
    "another GPU": ((2, 50, 64), (3, 64, 64), {}, "bfloat16", ALIGNED, "B200", "9.0 alone"),
    "float32": ((2, 50, 64), (3, 64, 64), {}, "float32", ALIGNED, "H200", "only 16-bit"),
    "channels_first": ((2, 64, 50), (3, 64, 64), {"data_format": "channels_first"}, "float16", ALIGNED, "H200", "last"),
    "odd channels": ((2, 50, 60), (3, 60, 64), {}, "float16", ALIGNED, "H200", "60 channels and 64 filters"),
    "odd filters": ((2, 50, 64), (3, 64, 66), {}, "float16", ALIGNED, "H200", "64 channels and 66 filters"),
    "odd groups": ((2, 50, 24), (3, 12, 64), {"groups": 2}, "float16", ALIGNED, "H200", "12 channels and 32 filters"),
    "anywhere in memory": ((2, 50, 64), (3, 64, 64), {}, "float16", (0, 4, 0), "H200", "16-byte boundary"),
    "long strides": ((2, 50, 64), (3, 64, 64), {"strides": 9}, "float16", ALIGNED, "H200", "strides up to 8"),
    "far away": ((2**31, 4, 64), (3, 64, 64), {}, "float16", ALIGNED, "H200", "32 bits"),
    "padding alone": ((2, 2, 8), (1, 8, 8), {"padding": (20, 0), "strides": 8}, "float16", ALIGNED, "H200", "padding"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_has_a_reason(name):
    x_shape, w_shape, options, dtype, aligned, device, reason = REFUSED[name]
    shape = conv_shape(x_shape, w_shape, **options)
    with pytest.raises(PlanError, match=reason):
        plan_of(shape, dtype, aligned, limits=DEVICES[device])
    plan = planning.plan_kernel_grad(shape, dtype, aligned, 1 << 30, DEVICES[device]).grad
    assert plan.kernel != "kernel_grad_wgmma" and any(reason in each for each in plan.rejected)


def test_it_is_chosen_where_it_is_predicted_to_be_faster():
    for shape in (SEQUENCE, IMAGE):
        plan = planning.plan_kernel_grad(shape, "bfloat16", ALIGNED, 1 << 30, H200)
        assert plan.grad.kernel == "kernel_grad_wgmma"
        assert any(each.startswith("tensor cores") and "us predicted" in each for each in plan.grad.rejected)
        other = planning.plan_kernel_grad(shape, "bfloat16", ALIGNED, 1 << 30, DEVICES["A100"])
        assert other.grad.kernel == "kernel_grad_mma"
    small = planning.plan_kernel_grad(conv_shape((1, 40, 16), (3, 16, 16)), "bfloat16", ALIGNED, 0, H200).grad
    assert any("warpgroups" in each for each in (*small.rejected, small.reason))


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize(
    "tile",
    [(2, 128, "channels"), *(pytest.param(each, marks=pytest.mark.exhaustive) for each in grads.TILES)],
    ids=name,
)
def test_machine_code(tile):
    """No spill with up to 192 sums a thread, products of transposed operands, and few instructions between them."""
    for shape, dtype, most in ((IMAGE, "bfloat16", 1000), (VOLUME, "float16", 1)):
        for taps in grads.tap_counts(3, *tile):
            plan, _ = plan_of(shape, dtype, most=most, tile=tile, taps=taps)
            constants = dict(plan.constants)
            code = compiled(plan, "sm_90")
            assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
            copies = tile[0] * constants["BOXES"] + -(-tile[1] // 64)
            assert code.count("USETMAXREG") == 2 and code.count("UTMALDG") == copies
            loop, shared = code.main_loop("HGMMA"), tile[2]
            made = (
                tile[0] * taps
                if shared == "filters"
                else tile[0] * taps // 2
                if shared == "channels"
                else -(-taps // 2)
            )
            products = constants["BK"] // 16 * made
            columns = tile[1] // 2 if shared == "filters" else tile[1]
            assert loop.count("HGMMA") == loop.count("HGMMA", f"64x{columns}x16") == products, loop.mix()
            assert all("tnspA.tnspB" in each.operands for each in loop.instructions if each.name == "HGMMA")
            assert not loop.count("BAR") and len(loop.instructions) <= 48 + 9 * products, loop.mix()
            # Waiting for the products before, once a step: what the compiler puts between each two would be more.
            assert loop.count("WARPGROUP", "DEPBAR") == 1
