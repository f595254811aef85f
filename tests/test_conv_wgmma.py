"""conv_wgmma: its PTX for sm_90a on the CPU, copy engine and warpgroups included, against the oracle; and its plan.

Every case runs under the detector. Sizes are chosen around the edges of a tile and of a step: channels that are no
multiple of 64, filters and positions more than a tile has, boxes across batch items, taps that lie outside. Modes that
share inputs have cases of their own: for these there must be 8 rows from a tap to the next.
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


RELOAD, HALO, PHASE = "reload", "halo", "phase"


@contextmanager
def only(tile, bk=64, mode=RELOAD, axis=None, stays=False):
    """Plans are conv_wgmma's wherever it computes this, and find no other tile and no other mode."""
    walks, weigh = wgmma.views, wgmma._candidates

    def views(shape):
        return [each for each in walks(shape) if each.mode == mode and axis in (None, each.axis)]

    def candidates(*arguments):
        return [each for each in weigh(*arguments) if each.stays == stays]

    with (
        mock.patch.object(wgmma, "views", views),
        mock.patch.object(wgmma, "_candidates", candidates),
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
    for function in (planning.plan_conv, planning.plan_conv_parts, transpose.plan_transpose, wgmma.plan_wgmma):
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
    with only(tile, bk):
        for number, case in enumerate(cases(tile, rank, bk)):
            run_case(Case.check_forward, case, dtype, number, tile, make_runtime)
        for number, case in enumerate(gradients(tile, rank, bk)):
            run_case(Case.check_input_grad, case, dtype, number, tile, make_runtime)


def run_case(check, case, dtype, number, tile, make_runtime=trace):
    """A pass of a case, by conv_wgmma alone; its runtime, None on a GPU."""
    x_shape, w_shape, options = case
    runtime = make_runtime(seed=number + 1)
    try:
        check(Case(x_shape, w_shape, dtype, seed=number, **options), runtime)
    except (AssertionError, emulator.EmulationError) as error:
        error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
        raise
    if isinstance(runtime, CudaRuntime):
        return None
    assert {plan.kernel for plan in runtime.launches} - {"pack_weights"} == {"conv_wgmma"}
    assert all(plan.tile.startswith(name(tile[:2])) for plan in runtime.launches if plan.maps)
    return runtime


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


# --- Modes -------------------------------------------------------------------------------------------------------


def shared_inputs(mode, rank, rows):
    """(axis, x_shape, w_shape, options) whose taps of `axis` share boxes, for tiles of `rows` rows.

    What lies 8 rows apart: batch items, positions of another axis, strands of a dilation, a dilation of 8, and products
    of these. Positions, strands and channels end inside a box; strides have classes of taps; padding is on each side.
    """
    long = rows // 8 + 5
    if (mode, rank) == (HALO, 1):
        yield 0, (8, long, 72), (3, 72, 72), {"padding": "same"}
        yield 0, (9, 2 * long, 8), (4, 8, 8), {"padding": "causal"}
        yield 0, (8, 3 * long, 8), (5, 8, 8), {"padding": "same", "strides": 2}
        yield 0, (8, 3 * long, 8), (7, 8, 8), {"padding": (2, 0), "strides": 3}
        yield 0, (2, rows + 22, 128), (3, 64, 128), {"padding": "same", "groups": 2, "dilation_rate": 4}
        # Rows in their own order; the second one in pieces, with more of them than a box may have.
        yield 0, (1, rows + 50, 8), (3, 8, 8), {"padding": "same", "dilation_rate": 8}
        yield 0, (1, rows + 172, 8), (4, 8, 8), {"padding": "same", "dilation_rate": 64}
        yield 0, (16, long, 8), (3, 8, 8), {"padding": (5, 3), "dilation_rate": 3}
    if (mode, rank) == (PHASE, 1):
        # Strands of one length; of two; of one input, most of them; more strands than positions.
        yield 0, (2, rows + 32, 72), (3, 72, 72), {"padding": "same", "dilation_rate": 16}
        yield 0, (1, rows + 37, 8), (3, 8, 8), {"padding": "causal", "dilation_rate": 19}
        yield 0, (2, rows // 2 + 26, 8), (2, 8, 8), {"padding": (13, 4), "dilation_rate": 12}
        yield 0, (1, 51, 8), (3, 8, 8), {"padding": "same", "dilation_rate": 40}
        yield 0, (3, 31, 8), (3, 8, 8), {"padding": "valid", "dilation_rate": 9}
        yield 0, (1, rows + 37, 128), (5, 64, 128), {"padding": "same", "groups": 2, "dilation_rate": 8}
    if (mode, rank) == (HALO, 2):
        for axis in range(2):
            yield axis, (2, 11, 13, 72), (3, 3, 72, 72), {"padding": "same"}
            yield axis, (3, 9, 17, 8), (3, 3, 8, 8), {"padding": "same", "strides": (2, 1)[:: 2 * axis - 1]}
        yield 1, (2, 12, 19, 128), (2, 3, 64, 128), {"groups": 2, "dilation_rate": (2, 4)}
    if (mode, rank) == (PHASE, 2):
        for axis in range(2):
            yield axis, (2, 20, 17, 8), (3, 2, 8, 8), {"padding": "same", "dilation_rate": (8, 3)[:: 1 - 2 * axis]}
    if (mode, rank) == (HALO, 3):
        for axis in range(3):
            yield axis, (2, 4, 5, 9, 8), (3, 2, 3, 8, 8), {"padding": "same"}


SHARING = [(HALO, 1), (HALO, 2), (HALO, 3), (PHASE, 1), (PHASE, 2)]


BOTH = (Case.check_forward, Case.check_input_grad)


def run_mode(dtype, tile, mode, rank, bk=64, make_runtime=trace, passes=BOTH):
    """`passes` of every case, with weights that are streamed; of those where weights can stay too, the count."""
    stayed = 0
    for number, (axis, *case) in enumerate(shared_inputs(mode, rank, tile[0])):
        for check in passes:
            with only(tile, bk, mode, axis):
                runtime = run_case(check, case, dtype, number, tile, make_runtime)
            if runtime:
                constants = dict(runtime.launches[-1].constants)
                assert (constants["HALO"], constants["PHASE"]) == (axis + 1, mode == PHASE)
        x_shape, w_shape, options = case
        with only(tile, bk, mode, axis, stays=True):
            try:
                plan_of(conv_shape(x_shape, w_shape, **options), limits=LIMITS)
            except PlanError:
                continue
            run_case(Case.check_forward, case, dtype, number, tile, make_runtime)
            stayed += 1
    return stayed


@in_the_emulator
@pytest.mark.parametrize(
    "mode, rank",
    [
        each if each[1] == 1 or each == (HALO, 2) else pytest.param(*each, marks=pytest.mark.exhaustive)
        for each in SHARING
    ],
)
def test_inputs_that_taps_share(mode, rank):
    assert run_mode("bfloat16" if rank == 1 else "float16", SMALL, mode, rank)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(wgmma.TILES)), ids=lambda number: name(wgmma.TILES[number]))
def test_inputs_that_taps_share_in_every_tile(number):
    """A halo of a sequence, and of the other modes and ranks each in turn; gradients in every second one."""
    tile, passes = wgmma.TILES[number], BOTH[: 1 + number % 2]
    run_mode("float16", tile, *SHARING[0], passes=BOTH[:1])
    run_mode("bfloat16", tile, *SHARING[1 + number % (len(SHARING) - 1)], passes=passes)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("mode, rank", [(HALO, 1), (PHASE, 2)])
def test_inputs_that_taps_share_in_steps_of_32_channels(mode, rank):
    assert run_mode("bfloat16", SMALL, mode, rank, bk=32)


@in_the_emulator
@pytest.mark.parametrize("tile", [SMALL, pytest.param((256, 96, 128, 96), marks=pytest.mark.exhaustive)], ids=name)
def test_weights_that_stay(tile):
    """Without a halo; of groups, and of more tiles of columns than there are multiprocessors."""
    bm, bn, *_ = tile
    with only(tile, stays=True):
        for number, case in enumerate(
            [
                ((2, 3 * bm + 5, 72), (3, 72, bn + 8), {"padding": "same"}),
                ((1, 2 * bm, 128), (1, 64, 4 * bn), {"groups": 2}),
                ((1, bm + 3, 8), (1, 8, 3 * bn + 8), {}),
            ]
        ):
            runtime = run_case(Case.check_forward, case, "bfloat16", number, tile)
            assert dict(runtime.launches[-1].constants)["STATIONARY"]


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("mode, rank", SHARING)
@pytest.mark.parametrize("tile", wgmma.TILES, ids=name)
def test_every_mode_on_a_gpu(tile, mode, rank):
    if current().limits.capability != wgmma.ONLY:
        pytest.skip(f"wgmma is of compute capability 9.0. Received: {current().limits.name}")
    run_mode("bfloat16", tile, mode, rank, make_runtime=lambda seed: current())


# --- Bytes -------------------------------------------------------------------------------------------------------

COUNTED = {
    "reload": (RELOAD, -1, False, (2, 133, 72), (3, 72, 136), {"padding": "same"}),
    "reload, strides": (RELOAD, -1, False, (2, 19, 26, 8), (4, 3, 8, 8), {"padding": "same", "strides": (3, 2)}),
    "reload, groups": (RELOAD, -1, False, (1, 125, 128), (3, 64, 48), {"padding": (7, 0), "groups": 2}),
    "reload, weights stay": (RELOAD, -1, True, (2, 533, 72), (3, 72, 136), {"padding": "same"}),
    "halo": (HALO, 0, False, (8, 133, 72), (3, 72, 136), {"padding": "same"}),
    "halo, in pieces": (HALO, 0, False, (1, 600, 16), (4, 16, 16), {"padding": "same", "dilation_rate": 64}),
    "halo, classes": (HALO, 0, False, (8, 101, 8), (7, 8, 8), {"padding": "same", "strides": 3}),
    "halo of an image": (HALO, 1, False, (3, 9, 17, 8), (3, 3, 8, 8), {"padding": "same", "strides": (2, 1)}),
    "halo of a volume": (HALO, 2, False, (2, 5, 6, 9, 72), (3, 3, 3, 72, 72), {"padding": "same"}),
    "halo, weights stay": (HALO, 0, True, (9, 170, 8), (4, 8, 72), {"padding": "causal"}),
    "phase": (PHASE, 0, False, (2, 160, 72), (3, 72, 136), {"padding": "same", "dilation_rate": 16}),
    "phase, two lengths": (PHASE, 0, False, (2, 170, 16), (2, 16, 16), {"padding": (13, 4), "dilation_rate": 12}),
    "phase of an image": (PHASE, 1, False, (1, 21, 17, 8), (2, 3, 8, 8), {"padding": "same", "dilation_rate": 8}),
    "phase, weights stay": (PHASE, 0, True, (1, 465, 128), (5, 64, 48), {"groups": 2, "dilation_rate": 8}),
}  # fmt: skip


@in_the_emulator
@pytest.mark.parametrize("name", COUNTED)
def test_bytes_are_those_of_the_model(name):
    """What copies fetch, zeros apart; and what is touched at all, which memory brings or takes once at least."""
    mode, axis, stays, x_shape, w_shape, options = COUNTED[name]
    runtime, case = trace(), Case(x_shape, w_shape, "bfloat16", **options)
    with only(SMALL, mode=mode, axis=axis, stays=stays):
        case.check_forward(runtime, bias=False)
    (plan,), (result,) = runtime.launches, runtime.results
    copies = [row for row in runtime.traffic if row.space == "global" and "complete_tx" in row.instruction]
    assert sum(row.bytes for row in copies) == pytest.approx(plan.cost.bytes, rel=0.05)
    assert result.touched == pytest.approx(plan.cost.least_bytes, rel=0.05)
    assert f"{plan.cost.bytes} bytes" in plan.reason


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
@pytest.mark.parametrize("mode, dilation", [(HALO, 1), (HALO, 3), (PHASE, 12)])
def test_nan_stays_among_inputs_that_taps_share(mode, dilation):
    """The last input of an item and the first of another: no tap of an item in between has them."""
    case = Case((8, 50, 8), (3, 8, 8), "bfloat16", padding="same", dilation_rate=dilation)
    case.x[2, -1] = case.x[4, 0] = np.nan
    with only(SMALL, mode=mode):
        y = case.forward(trace())
    lost = {(2, 49), (2, 49 - dilation), (4, 0), (4, dilation)}
    assert set(map(tuple, np.argwhere(np.isnan(y.astype(np.float32)).any(axis=-1)))) == lost
    assert not np.isnan(y[3].astype(np.float32)).any()


@in_the_emulator
@pytest.mark.parametrize("mode, dilation", [(RELOAD, 1), pytest.param(HALO, 8, marks=pytest.mark.exhaustive)])
def test_indices_beyond_32_bits(mode, dilation):
    """y has more than 2**32 elements; only the last block runs, on memory that exists where it is touched."""
    n, c = 2**29 + 77, 8
    shape = conv_shape((1, n, c), (3, c, c), padding="same", dilation_rate=dilation)
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    rng = np.random.default_rng(0)
    w, x[:, -300:] = uniform(rng, (3, c, c), "float16"), uniform(rng, (1, 300, c), "float16")
    limits = replace(LIMITS, multiprocessors=1 << 24)  # a tile each
    runtime = EmulatedRuntime(limits, blocks=last_blocks)
    with only(SMALL, mode=mode):
        launching.conv(runtime, shape, x, w, None, None, y, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8
    rows = n % integers_of(plan)["rows"]
    expected = oracle.conv(x[:, -300:], w, padding="same", dilation_rate=dilation)
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


def many_tiles(runtime):
    """Nine for each block, of more steps than stages, so that warpgroups that take turns have several."""
    Case((9, 120, 72), (4, 72, 136), "bfloat16", padding="same").check_forward(runtime)


def bands(runtime):
    """Of two column tiles and of one."""
    Case((1, 140, 64), (1, 64, 136), "bfloat16", padding="same").check_forward(runtime)


def halo(runtime):
    """Eight items, so that a tap is 8 rows from the next; more boxes than blocks, and stages than a ring has."""
    Case((8, 60, 200), (3, 200, 24), "bfloat16", padding="same").check_forward(runtime)


def classes(runtime):
    """Taps of two classes, three of one and two of the other."""
    Case((8, 41, 72), (5, 72, 24), "bfloat16", padding="same", strides=2).check_forward(runtime)


def pieces(runtime):
    """A stage of 320 rows."""
    Case((1, 300, 8), (4, 8, 8), "bfloat16", padding="same", dilation_rate=64).check_forward(runtime)


def strands(runtime):
    """Eleven of eight inputs and one of seven; padding that is no multiple of them."""
    Case((2, 95, 8), (3, 8, 8), "bfloat16", padding=(17, 3), dilation_rate=12).check_forward(runtime)


def staying(runtime):
    """Weights of two tiles of columns, more boxes than blocks."""
    Case((2, 400, 72), (3, 72, 136), "bfloat16", padding="same").check_forward(runtime)


def staying_halo(runtime):
    """Nothing but x is waited for, by which the copies are six stages ahead."""
    Case((8, 100, 200), (3, 200, 24), "bfloat16", padding="same").check_forward(runtime)


MODES = {
    halo: {"mode": HALO}, classes: {"mode": HALO}, pieces: {"mode": HALO}, strands: {"mode": PHASE},
    staying: {"stays": True}, staying_halo: {"mode": HALO, "stays": True},
}  # fmt: skip
PLANTS = {
    "the producer waits for the wrong round of x": (
        "xs.empty(), xs.parity ^ 1", "xs.empty(), xs.parity",
        sequence, {"deadlock"}),
    "the producer waits for the wrong round of w": (
        "ws.empty(), ws.parity ^ 1", "ws.empty(), ws.parity",
        halo, {"deadlock"}),
    "the consumers wait for the wrong round of x": (
        "barrier_wait(xs.full(), xs.parity)", "barrier_wait(xs.full(), xs.parity ^ 1)",
        sequence, {"race"}),
    "the consumers wait for the wrong round of w": (
        "barrier_wait(ws.full(), ws.parity)", "barrier_wait(ws.full(), ws.parity ^ 1)",
        halo, {"deadlock"}),
    "weights that stay and come in rounds": (
        "unsigned(p.w_stages), !STATIONARY}", "unsigned(p.w_stages), true}",
        staying, {"deadlock"}),
    "weights of another tile's columns": ("if constexpr (STATIONARY) {", "if constexpr (false) {", staying, {WRONG}),
    "weights that stay of one block alone": ("number == blockIdx.x)", "number == 0)", staying, {"deadlock"}),
    "weights that stay and come again": ("|| number == blockIdx.x)", "|| true)", staying, {"deadlock"}),
    "a tap a row too near": ("x += p.tap_rows *", "x += (p.tap_rows - 1) *", halo, {WRONG}),
    "one tap for all": ("        x += p.tap_rows * (ROW_BYTES / 16);\n", "", halo, {WRONG}),
    "weights of the first tap": ("r + (t - tap[0]) * p.tap_pitch[0]", "r", halo, {WRONG}),
    "weights of the other class": ("r + (t - tap[0]) * p.tap_pitch[0]", "t - tap[0]", classes, {WRONG}),
    "taps of all classes": ("tap += HALO ? p.taps[0] : 1", "++tap", classes, {"deadlock"}),
    "classes of equal length": ("Index tap = first;", "Index tap = 0;", classes, {"deadlock"}),
    "items and positions exchanged": ("b = in[HALO > 0];", "b = in[0];", halo, {"race"}),
    "boxes in another order": ("at[0] = at[1], at[1] = item;", "", halo, {WRONG}),
    "a piece twice": ("from[AXES] += p.piece * p.stride[0]", "from[AXES] += 0", pieces, {WRONG}),
    "pieces on each other": ("xs.memory() + i * p.piece_rows * ROW_BYTES", "xs.memory()", pieces, {"race"}),
    "strands of the other length": ("[at[RANK + 1] >= p.ragged]", "[0]", strands, {WRONG}),
    "strands that are too long": ("[at[RANK + 1] >= p.ragged]", "[1]", strands, {WRONG}),
    "strands from the first on": ("= p.ragged + behind *", "= behind *", strands, {WRONG}),
    "strands behind the last": (
        "inside = inside && r < (at[RANK + 1] < p.ragged ? p.ragged : p.strands);", "",
        strands, {"race"}),
    "the residue of another strand": (" + r - p.offset;", " + r;", strands, {WRONG}),
    "positions as neighbours": ("to[HALO - 1] * p.strands + r", "to[HALO - 1] + r", strands, {"race"}),
    "fewer bytes than come": (
        "expect(xs.full(), p.pieces * p.piece_rows", "expect(xs.full(), p.rows",
        halo, {"deadlock"}),
    "more bytes than come": (
        "expect(xs.full(), p.pieces * p.piece_rows", "expect(xs.full(), p.stage_rows",
        few_positions, {"deadlock"}),
    "more weights than come": ("expect(ws.full(), W_BYTES)", "expect(ws.full(), 2 * W_BYTES)", sequence, {"deadlock"}),
    "no wait for x": ("      ptx::barrier_wait(xs.full(), xs.parity);\n", "", sequence, {"race"}),
    "no wait for w": ("        ptx::barrier_wait(ws.full(), ws.parity);\n", "", sequence, {"race"}),
    "a stage of w given back too early": (
        "give_back();\n        x_before = 0, w_before = STATIONARY ? 0 : ws.empty();",
        "w_before = ws.empty();\n        give_back();\n        x_before = w_before = 0;",
        halo, {"race"}),
    "a stage of x given back too early": (
        "x_before = xs.empty();", "if (lane == 0) ptx::barrier_arrive(xs.empty());",
        sequence, {"race"}),
    "a stage of x given back each tap": (
        "x_before = 0, w_before = STATIONARY", "x_before = xs.empty(), w_before = STATIONARY",
        staying_halo, {"race"}),
    "a stage given back by one warpgroup": ("xs.init(SHARERS);", "xs.init(1);", sequence, {"deadlock"}),
    "products that are not waited for": ("products_wait<1>(acc);", "products_wait<2>(acc);", sequence, {"race"}),
    "sums before they are there": ("products_wait<0>(acc);", "products_wait<1>(acc);", sequence, {"pending"}),
    "no fence before products": ("        ptx::products_fence();\n", "", sequence, {"fence"}),
    "no barrier before the roles part": ("  __syncthreads();\n", "", sequence, {"barrier"}),
    "rows that nobody fills": ("at < p.stages * spare", "at < 0", few_positions, {"uninitialised"}),
    "zeros that products may not see": ("  ptx::fence_async();\n", "", few_positions, {"fence"}),
    "dilation forgotten": ("tap[a] * p.dilation[a]", "tap[a]", sequence, {WRONG}),
    "padding forgotten": (" - p.pad[a];", ";", sequence, {WRONG}),
    "the tap before": ("r += tap[a] * p.tap_pitch[a];", "r += 0;", sequence, {WRONG}),
    "channels of the step before": (
        "from[0] = tile.g * p.channels + w_from[W_CHANNEL];", "from[0] = tile.g * p.channels;",
        sequence, {WRONG}),
    "channels of the first group": ("from[0] = tile.g * p.channels", "from[0] = 0", two_groups, {WRONG}),
    "filters of the first group": ("= tile.g * p.group_columns", "= 0", two_groups, {WRONG}),
    "filters of the next group": ("n0 + GN - q : p.columns;", "n0 + GN - q : p.columns + 8;", two_groups, {"race"}),
    "columns that no warpgroup has": ("GN - q < Y_COLUMNS && ", "false && ", bands, {"race"}),
    "items behind the last": (" && b < p.batch", "", few_positions, {"bounds"}),
    "positions behind the last": ("inside = inside && within(to[a], p.out[a]);", "", sequence, {"race"}),
    "rows 8 too far apart": (
        "SWIZZLE_64, 8 * ROW_BYTES", "SWIZZLE_64, 16 * ROW_BYTES",
        sequence, {"uninitialised"}),
    "columns too close": ("8 * 128, SLICE_BYTES)", "8 * 128, SLICE_BYTES / 2)", bands, {WRONG}),
    "the k of the step before": ("w + k * W_K_BYTES / 16", "w + k / 2 * W_K_BYTES / 16", sequence, {WRONG}),
    "y before it is there": (
        "          __syncwarp();\n          const Index n", "          const Index n",
        sequence, {"race"}),
    "y over what is still read": (
        "lane % 8 * Y_VECTOR));\n          __syncwarp();", "lane % 8 * Y_VECTOR));",
        bands, {"race"}),
    "halves of a product exchanged": (
        "acc[i][(q + j) / 2 + half * 2 + e]", "acc[i][(q + j) / 2 + e * 2 + half]",
        sequence, {WRONG}),
    "columns of the first band": ("n0 = (first + tile % wide)", "n0 = (tile % wide)", bands, {"race"}),
    "both warpgroups in one turn": (
        "if constexpr (IN_TURNS) ptx::barrier_wait(turns + group * 8, turn_parity);", "",
        many_tiles, {"race"}),
    "one's own turn again": ("turns + (1 - group) * 8", "turns + group * 8", many_tiles, {"deadlock"}),
    "the second warpgroup first": ("turn_parity = !group", "turn_parity = group", many_tiles, {"race"}),
    "stages of the other's tile": ("turn_parity ^= 1, pass()", "turn_parity ^= 1", many_tiles, {"deadlock"}),
    "one's own tile in the other's stages": ("if (begin > 0) pass();", "", many_tiles, {"deadlock"}),
    "weights of the other's tile": ("ws.skip(p.halo_taps * p.loads)", "ws.skip(p.loads)", halo, {"deadlock"}),
    "a stage that both must leave": ("ws.init(SHARERS);", "ws.init();", many_tiles, {"deadlock"}),
    "every tile twice": ("Index begin = IN_TURNS ? group : 0", "Index begin = 0", many_tiles, {"deadlock"}),
}  # fmt: skip
IN_TURNS = (128, 64, 128, 64)
OTHER_TILES = {
    "both warpgroups in one turn": IN_TURNS,
    "one's own turn again": IN_TURNS,
    "the second warpgroup first": IN_TURNS,
    "stages of the other's tile": IN_TURNS,
    "one's own tile in the other's stages": IN_TURNS,
    "weights of the other's tile": IN_TURNS,
    "a stage that both must leave": IN_TURNS,
    "every tile twice": IN_TURNS,
    "columns too close": (128, 128, 64, 128),
    "y over what is still read": (128, 128, 64, 128),
    "columns that no warpgroup has": (256, 96, 128, 96),
}
DEFAULT = {
    "a stage of w given back too early",
    "rows that nobody fills",
    "a tap a row too near",
    "strands of the other length",
}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    right, wrong, run, caught = PLANTS[name]
    with planted("conv_wgmma.cu", right, wrong), only(OTHER_TILES.get(name, SMALL), **MODES.get(run, {})):
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
        with only(SMALL, **MODES.get(run, {})):
            assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()


# --- Plans -------------------------------------------------------------------------------------------------------

SEQUENCE = conv_shape((8, 16384, 128), (2, 128, 256), padding="causal", dilation_rate=512)
IMAGE = conv_shape((64, 7, 7, 512), (3, 3, 512, 512), padding="same")
VOLUME = conv_shape((2, 12, 30, 50, 64), (3, 3, 3, 64, 48), padding="same", strides=(1, 2, 3))


def integers_of(plan):
    """Those of the kernel by their names; of each axis of y or of a view, a tuple."""
    constants, left = dict(plan.constants), list(plan.integers)
    rank, axes = constants["RANK"], constants["RANK"] + 1 + constants["PHASE"]

    def take(count):
        taken = left[:count]
        del left[:count]
        return taken

    names = (
        "tiles tiles_m tiles_n band groups channels columns group_columns group_taps stages w_stages stage_rows "
        "pieces piece piece_rows chunks loads part_loads part_tiles total halo_taps tap_rows batch rows"
    ).split()
    found = dict(zip(names, take(len(names))))
    found["out"] = take(rank)
    found |= {each: take(axes) for each in "box boxes taps tap_pitch stride dilation pad".split()}
    found["sets"] = prod(found["taps"])
    if constants["PHASE"]:
        found |= dict(zip("strands offset ragged ragged_boxes".split(), take(4)))
    assert not left or constants["UPSAMPLED"]
    return found


@pytest.mark.parametrize("shape", [SEQUENCE, IMAGE, VOLUME], ids=["sequence", "image", "volume"])
@pytest.mark.parametrize("tile", wgmma.TILES, ids=name)
def test_boxes_cover_all_positions(shape, tile):
    with only(tile):
        plan = plan_of(shape)
    (x_map, w_map), bk, n = plan.maps, dict(plan.constants)["BK"], integers_of(plan)
    assert n["tiles"] == n["tiles_m"] * n["tiles_n"] * n["groups"] and n["tiles_m"] == prod(n["boxes"])
    assert n["tiles_n"] == -(-n["columns"] // tile[1]) and 1 <= n["band"] <= n["tiles_n"]
    assert n["rows"] == prod(n["box"]) <= tile[0] and max(x_map.box) <= MAP_BOX
    sizes = (n["batch"], *n["out"])
    assert all(size <= each * count < size + each for size, each, count in zip(sizes, n["box"], n["boxes"]))
    assert x_map.box_bytes == n["rows"] * bk * 2 and w_map.box_bytes == bk * 128
    assert not x_map.problem() + w_map.problem() and plan.grid == (min(n["tiles"], 132), 1, 1)
    assert n["sets"] == prod(shape.kernel_size) and n["loads"] == n["sets"] * -(-n["channels"] // bk)
    assert plan.shared_bytes <= DEVICES["H200"].shared_bytes
    assert 0 < plan.cost.least_flops <= plan.cost.flops and plan.cost.bound


HALVES = conv_shape((2, 12000, 128), (3, 128, 256), padding="causal", dilation_rate=4)
STRIDES = conv_shape((8, 30001, 64), (7, 64, 64), strides=2)
DILATED = conv_shape((8, 65, 65, 256), (3, 3, 256, 256), padding="same", dilation_rate=(6, 9))
SHARED = {
    "sequence": (SEQUENCE, HALO, 0), "strands": (SEQUENCE, PHASE, 0), "items and rows": (HALVES, HALO, 0),
    "classes": (STRIDES, HALO, 0), "image": (IMAGE, HALO, 1), "volume": (VOLUME, HALO, 0),
    "dilated image": (DILATED, PHASE, 1), "dilated rows": (DILATED, HALO, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("stays", [False, True])
def test_a_tap_begins_where_the_swizzle_does(name, stays):
    """Of every tile that is weighed. A stage has the rows of all taps, and every piece of it begins there too."""
    shape, mode, axis = SHARED[name]
    found = 0
    for tile in wgmma.TILES:
        with only(tile, mode=mode, axis=axis, stays=stays):
            try:
                plan = plan_of(shape)
            except PlanError:
                continue
        found += 1
        n, constants = integers_of(plan), dict(plan.constants)
        reach = (-(-n["halo_taps"] // n["taps"][0]) - 1) * n["tap_rows"]
        assert n["tap_rows"] % 8 == 0 and n["stage_rows"] % 8 == 0
        assert n["pieces"] == 1 or n["piece_rows"] % 8 == 0
        assert n["stage_rows"] >= max(tile[0] + reach, n["pieces"] * n["piece_rows"])
        assert n["pieces"] * n["piece_rows"] >= n["rows"] + reach
        assert all(each.box_bytes == n["piece_rows"] * 128 and not each.problem() for each in plan.maps[:-1])
        assert n["stages"] >= 2 and plan.shared_bytes <= DEVICES["H200"].shared_bytes
        if stays:
            assert constants["STATIONARY"] and n["w_stages"] == prod(shape.kernel_size) * n["loads"] // (
                n["sets"] // n["taps"][0]
            )
            assert plan.grid[0] % (n["tiles_n"] * n["groups"]) == 0
    assert found or stays


def test_plans_weigh_all_modes():
    """With the bytes and the time of the best of each; what may not be is named."""
    plan = planning.plan_conv(SEQUENCE, "bfloat16", "linear", ALIGNED, DEVICES["H200"])
    told = [plan.reason, *plan.rejected]
    for mode in ("reload", "halo of axis 0", "phase of axis 0"):
        for stays in ("", ", weight-stationary"):
            (line,) = (each for each in told if each.startswith(f"warpgroups, {mode}{stays}, tile"))
            assert "bytes to shared memory" in line
    alone = plan_of(conv_shape((1, 4000, 128), (3, 128, 128), padding="same"))
    assert "reload" in alone.reason and any("halo of axis 0: no box" in each for each in alone.rejected)


def test_of_modes_that_take_as_long_the_one_that_moves_least():
    tile, others = (128, 128, 64, 128), {}
    with mock.patch.object(wgmma, "TILES", (tile,)):
        plan = plan_of(SEQUENCE)
    for mode, stays in ((RELOAD, False), (RELOAD, True), (HALO, False), (PHASE, False), (PHASE, True)):
        with only(tile, mode=mode, stays=stays):
            others[mode, stays] = plan_of(SEQUENCE).cost
    assert plan.cost.seconds <= 1.02 * min(each.seconds for each in others.values())
    assert plan.cost.bytes <= min(each.bytes for each in others.values())
    # A tap less of two, and the weights of 132 blocks instead of 2048.
    assert others[PHASE, False].bytes < 0.8 * others[RELOAD, False].bytes
    assert others[RELOAD, True].bytes < 0.6 * others[RELOAD, False].bytes


def test_a_short_halo_is_caught():
    """A mistake in the plan: the rows of the last tap are not there."""
    with only(SMALL, **MODES[halo]), mock.patch.object(wgmma.View, "beyond", 1):
        assert "uninitialised" in what_catches(halo, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))


def test_large_images_have_boxes():
    """Of more positions on two axes than a box has, whatever divides them."""
    for size in (257, 300, 512, 1021):
        for rows in (64, 128, 256):
            box = wgmma.choose_box(2, (size, size + 2), (1, 1), rows)
            assert 2 * size * (size + 2) / (box.tiles * rows) >= 0.9, (size, box)


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


OF_MODES = {
    "reload": (SEQUENCE, RELOAD, None), "halo": (SEQUENCE, HALO, 0), "phase": (SEQUENCE, PHASE, 0),
    "halo of an image": (IMAGE, HALO, 0), "phase of an image": (DILATED, PHASE, 1),
    "halo of a volume": (VOLUME, HALO, 0),
}  # fmt: skip


def check_machine_code(plan, tile):
    """No spill, products and copies that belong to sm_90 alone, and few instructions between products."""
    code, stays = compiled(plan, "sm_90"), dict(plan.constants)["STATIONARY"]
    assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
    # Where weights stay, the first tile of a block has copies of its own.
    assert code.count("USETMAXREG") == 2 and code.count("UTMALDG") == 1 + stays + -(-tile[1] // 64)
    assert code.count("STG", "128") == code.count("STG") and code.count("LDS", "128") == code.count("LDS")
    loop = code.main_loop("HGMMA")
    products = 4 * tile[2] // 64
    assert loop.count("HGMMA") == products and loop.count("HGMMA", f"64x{tile[3]}x16") == products
    assert not loop.count("BAR") and len(loop.instructions) <= 40 + 10 * products, loop.mix()
    # Waiting for the products before, once a step: what the compiler puts between each two would be more.
    assert loop.count("WARPGROUP", "DEPBAR") == 1


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("activation", ["linear", pytest.param("gelu", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "tile", [wgmma.TILES[0], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in wgmma.TILES[1:])], ids=name
)
def test_machine_code(tile, activation):
    shape = VOLUME if tile[0] == 256 else IMAGE if tile[1] == 128 else SEQUENCE
    with only(tile):
        check_machine_code(plan_of(shape, activation=activation), tile)


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("stays", [False, True])
@pytest.mark.parametrize(
    "name",
    [each if each in ("halo", "phase") else pytest.param(each, marks=pytest.mark.exhaustive) for each in OF_MODES],
)
def test_machine_code_of_every_mode(name, stays):
    """In the largest tile that fits."""
    shape, mode, axis = OF_MODES[name]
    plan = None
    for tile in wgmma.TILES:
        with only(tile, mode=mode, axis=axis, stays=stays):
            try:
                plan = plan_of(shape)
                break
            except PlanError:
                continue
    if plan is None:
        assert stays and name not in ("reload", "halo", "phase")  # too many weights
        return
    check_machine_code(plan, tile)
