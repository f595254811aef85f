"""conv_halo: its real PTX on the CPU against the oracle, its traffic, its mistakes, and the choice between its orders.

Cases are chosen around what differs: runs that end inside a tile, rows of a stride, strands that are no multiple of the
axis, channels that are no whole steps, taps of other axes, and the edges of tiles.
"""

import math
from contextlib import contextmanager
from unittest import mock

import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from strategies import uniform
from test_conv_kernels import Case, forget_plans, last_blocks, name

from cuconv.cuda.conv import conv
from cuconv.geometry import conv_shape
from cuconv.plan import conv as conv_plans
from cuconv.plan import halo, mma
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

LIMITS = DEVICES["H200"]
ALIGNED = (0, 0, 0)
TILES = [(tile, step) for tile in mma.TILES for step, _ in mma.STEPS]
SMALL = ((32, 32, 16, 16), 64)


@contextmanager
def only(tile, step, order=None):
    """Plans find no other kernel, tile and order of the last axis than these."""
    found = halo.orders
    orders = mock.patch.object(
        halo, "orders", lambda form: [each for each in found(form) if order in (None, each.name)]
    )
    with (
        orders,
        mock.patch.object(mma, "TILES", (tile,)),
        mock.patch.object(mma, "STEPS", ((step, 4),)),
        mock.patch.object(conv_plans, "_is_better", return_value=True),
        mock.patch.object(conv_plans, "PARTS", ()),
        mock.patch.object(conv_plans, "plan_narrow", side_effect=PlanError("only that tile")),
        mock.patch.object(conv_plans, "plan_taps", side_effect=PlanError("only that tile")),
        mock.patch.object(conv_plans, "plan_wgmma", side_effect=PlanError("only that tile")),
    ):
        forget_plans()
        yield
    forget_plans()


def trace(seed=1):
    return EmulatedRuntime(LIMITS, mode="trace", seed=seed)


# --- Every tile --------------------------------------------------------------------------------------------------


def cases(bm, bn):
    """(x_shape, w_shape, order, options), each with an edge of its own."""
    # Two runs, the first of which ends inside a tile; channels end inside a step, filters inside a tile.
    yield (2, bm // 2 + 5, 40), (3, 40, bn + 8), "halo", {"padding": "same"}
    # Rows of a stride, more taps than it, whole steps.
    yield (1, 2 * bm + 9, 64), (5, 64, 16), "halo", {"strides": 2, "padding": (3, 1)}
    # Strands shorter than a tile, some of them a position shorter than others; groups.
    yield (1, bm + 3, 32), (2, 16, 32), "phase", {"padding": "causal", "dilation_rate": 7, "groups": 2}
    # A stride and a dilation with a common factor, and without; more strands than positions.
    yield (1, 2 * bm - 5, 8), (3, 8, 8), "phase", {"strides": 4, "dilation_rate": 6, "padding": "same"}
    yield (2, 70, 8), (3, 8, 24), "halo", {"strides": 2, "dilation_rate": 3, "padding": "same"}
    yield (1, 9, 8), (3, 8, 8), "phase", {"dilation_rate": 11, "padding": "same"}
    # Taps of other axes.
    yield (2, 5, bm // 4 + 3, 24), (3, 3, 24, 8), "halo", {"padding": "same", "strides": (2, 1)}
    yield (1, 5, 23, 8), (2, 4, 8, 8), "phase", {"padding": "same", "dilation_rate": (2, 5)}
    yield (1, 4, 3, 17, 8), (2, 1, 3, 8, 16), "halo", {"padding": "same", "strides": (1, 1, 2)}


def check(case, order, runtime):
    case.check_forward(runtime)
    case.check_input_grad(runtime)
    kernels = [plan.kernel for plan in runtime.launches]
    assert kernels[0] == "conv_halo" and runtime.launches[0].reason.startswith(order), runtime.launches[0]
    return kernels


def run_tile(tile, step, dtype, numbers=range(99)):
    for number, (x_shape, w_shape, order, options) in enumerate(cases(*tile[:2])):
        if number not in numbers:
            continue
        with only(tile, step, order):
            case = Case(x_shape, w_shape, dtype, seed=number, **options)
            runtime = trace(number + 1)
            try:
                check(case, order, runtime)
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {runtime.launches[-1:]}")
                raise


@emulated
@pytest.mark.parametrize("number", [0, 6])
def test_small_tile(number):
    run_tile(*SMALL, ("float16", "bfloat16")[number % 2], [number])


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 7, 8])
def test_every_case(number):
    run_tile(*SMALL, ("float16", "bfloat16")[number % 2], [number])


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(TILES)), ids=lambda number: name(TILES[number][0]))
def test_every_tile(number):
    run_tile(*TILES[number], ("float16", "bfloat16")[number % 2], (0, 1 + number % 4))


@emulated
def test_sub_pixel_form_of_transposed_convolutions():
    """Strides that merge into columns, and phases that are launches of their own."""
    for options, expected in (
        ({"strides": 4, "padding": "same"}, ["pack_weights", "conv_halo"]),
        ({"strides": 2, "dilation_rate": 3, "padding": "same"}, ["pack_weights", "conv_halo"] * 2),
    ):
        with only(*SMALL):
            runtime = trace()
            Case((2, 37, 8), (9, 8, 16), "float16", **options).check_input_grad(runtime)
        assert [plan.kernel for plan in runtime.launches] == expected


@emulated
def test_fused_activation():
    with only(*SMALL):
        case = Case((2, 37, 8), (3, 8, 16), "bfloat16", padding="same")
        case.check_forward(trace(), "relu")


@emulated
def test_the_same_bits_in_any_order_of_threads():
    case = Case((2, 61, 24), (3, 24, 16), "bfloat16", padding="same", dilation_rate=3)
    with only(*SMALL):
        results = {case.forward(EmulatedRuntime(LIMITS, seed=seed)).tobytes() for seed in range(4)}
    assert len(results) == 1


@emulated
def test_what_no_output_reads_does_not_matter():
    """Inputs behind the last window; and an input that is no number reaches the outputs that read it, and no others."""
    case = Case((1, 86, 8), (5, 8, 8), "float16", strides=4)
    expected = oracle.conv(case.x, case.w, case.bias, strides=4)
    case.x[:, 85:] = np.nan
    with only(*SMALL):
        assert_close(case.forward(trace()), expected, dtype="float16", terms=40)

    for order in ("halo", "phase"):
        case = Case((2, 50, 8), (3, 8, 16), "float16", padding="same", dilation_rate=3)
        case.x[0, 49] = np.nan
        with only(*SMALL, order):
            y = case.forward(trace())
        assert sorted(set(np.argwhere(np.isnan(y))[:, 1])) == [46, 49] and not np.isnan(y[1]).any()


@emulated
@pytest.mark.exhaustive
def test_indices_beyond_32_bits():
    """x and y have 2**31 elements and more; only the last block runs, on memory that exists where it is touched."""
    n, c = 2**28 + 77, 8
    shape = conv_shape((1, n, c), (3, c, c), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    rng = np.random.default_rng(0)
    w = uniform(rng, (3, c, c), "float16")
    x[:, n - 300 :] = uniform(rng, (1, 300, c), "float16")
    runtime = EmulatedRuntime(LIMITS, blocks=last_blocks)
    with only(*SMALL):
        conv(runtime, shape, x, w, None, None, y, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8 and plan.kernel == "conv_halo"
    rows = n % 32
    expected = oracle.conv(x[:, n - 300 :], w, padding="same")
    assert_close(y[:, n - rows :], expected[:, -rows:], dtype="float16", terms=24)
    assert not y[:, n - 300 : n - rows].any()


# --- Traffic -----------------------------------------------------------------------------------------------------


def copied(runtime):
    """Bytes that asynchronous copies of the last launch fetched."""
    return sum(row.bytes for row in runtime.traffic if row.space == "global" and row.instruction.startswith("cp.async"))


@emulated
@pytest.mark.parametrize("dilation_rate, order", [(1, "halo"), (32, "phase")])
def test_bytes_are_those_of_the_model(dilation_rate, order):
    """Every input once a tile, however many taps: what the plan says, but for padding, which is not fetched."""
    case = Case((2, 512, 64), (3, 64, 64), "float16", padding="same", dilation_rate=dilation_rate)
    with only((64, 64, 32, 32), 128, order):
        runtime = trace(0)
        case.check_forward(runtime)
    (plan,) = runtime.launches
    assert 0.95 * plan.cost.bytes < copied(runtime) <= plan.cost.bytes
    blocks = math.prod(plan.grid)
    weights = case.w.nbytes * blocks
    assert copied(runtime) - weights < 1.25 * case.x.nbytes
    with mock.patch.object(conv_plans, "plan_halo", side_effect=PlanError("reload")):
        forget_plans()
        reload = conv_plans.plan_conv(case.shape, "float16", "linear", ALIGNED, LIMITS)
    forget_plans()
    assert reload.kernel == "conv_mma" and reload.cost.bytes > plan.cost.bytes


@emulated
@pytest.mark.parametrize(
    "options", [{}, {"strides": 2}, {"dilation_rate": 5}, {"strides": 2, "dilation_rate": 3}], ids=str
)
@pytest.mark.parametrize("step", [64, 128])
def test_no_bank_conflicts(step, options):
    """Also across the ends of runs, on either side."""
    case = Case((4, 64, 64), (3, 64, 64), "bfloat16", padding="same", **options)
    with only((64, 64, 32, 32), step):
        runtime = trace(0)
        case.check_forward(runtime)
    assert runtime.launches[0].kernel == "conv_halo"
    shared = [row for row in runtime.traffic if row.space == "shared"]
    assert shared and not [row for row in shared if row.bank_conflicts]
    wide = [row for row in runtime.traffic if row.space == "global" and row.instruction.startswith(("cp.async", "st"))]
    assert wide and all(row.sectors == row.least_sectors for row in wide)


# --- Planted -----------------------------------------------------------------------------------------------------


def sequences(runtime):
    with only(*SMALL, "halo"):
        Case((2, 21, 40), (3, 40, 40), "float16", padding="same").check_forward(runtime)


def strides(runtime):
    with only(*SMALL, "halo"):
        Case((1, 70, 32), (5, 32, 8), "float16", padding="same", strides=2).check_forward(runtime)


def strands(runtime):
    with only(*SMALL, "phase"):
        Case((1, 40, 8), (2, 8, 8), "float16", padding="same", dilation_rate=7).check_forward(runtime)


def images(runtime):
    with only(*SMALL, "halo"):
        Case((1, 5, 20, 16), (3, 3, 16, 8), "float16", padding="same").check_forward(runtime)


# name, the text, what becomes of it, a run that must fail, what catches it.
PLANTS = [
    ("runs without a gap", "const Index place = m + (m0 % p.run + m) / p.run * p.gap;", "const Index place = m;",
     sequences, WRONG),
    ("padding not zeroed", "if (read && within(first[LAST], p.in[LAST])) {", "if (read) {", sequences, "bounds"),
    ("padding of another axis not zeroed", "inside &= within(first[a] + rest % taps_of[a] * p.dilation[a], p.in[a]);",
     "", images, "bounds"),
    ("the sources of the first tap", "inside && source.taps >> x_tap & 1", "inside && source.taps & 1", images,
     "bounds"),
    ("taps of another axis not advanced", "if (++x_tap == outer) x_tap = 0, x_channel += BK;", "x_channel += BK;",
     images, WRONG),
    ("the last row missing", "j <= last * ROWS_P + (p.taps - 1) * p.rows_t",
     "j < last * ROWS_P + (p.taps - 1) * p.rows_t", sequences, WRONG),
    ("a stride without its residues", "        shift += turn;\n", "", strides, "uninitialised"),
    ("rows of a stride as neighbours", "* ROWS_P + residue;", "+ residue;", strides, WRONG),
    ("positions that do not exist", " && at[LAST] < p.out[LAST];", ";", strands, "bounds"),
    ("strands in the order of positions", "at[LAST] += q * p.strands;", "at[LAST] += q;", strands, "race"),
    ("channels of the next position", "const bool inside = WHOLE || x_channel < p.channels;",
     "const bool inside = true;", sequences, "bounds"),
    ("weights of the next tap", "WHOLE ? w_inside : i * W_STEP < w_left", "w_inside", sequences, "bounds"),
    ("weights not taken back", "w_from += last ? back_t : step_t;", "w_from += step_t;", sequences, "bounds"),
    ("one buffer for both panels", "    buffer = x_bytes - buffer;\n", "", sequences, "race"),
    ("no barrier", "    ptx::copy_async_wait<STAGES - 2>();\n    __syncthreads();\n",
     "    ptx::copy_async_wait<STAGES - 2>();\n", sequences, "race"),
    ("no barrier behind the sources", "  __syncthreads();\n  if (panels > 0)", "  if (panels > 0)", sequences, "race"),
    ("a wait that waits for too little", "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", sequences,
     "pending"),
    ("weights a step too far ahead", "ahead = (STAGES - 1) * W_BYTES;  //", "ahead = 0;  //", sequences, "race"),
    ("rows without padding", "constexpr int PITCH = X_ROW + 16;", "constexpr int PITCH = X_ROW;", sequences, None),
]  # fmt: skip


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("what, right, wrong, run, caught", PLANTS, ids=[plant[0] for plant in PLANTS])
def test_planted_bug_is_caught(what, right, wrong, run, caught):
    with planted("conv_halo.cu", right, wrong):
        runtime = EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=10.0)
        found = what_catches(run, runtime)
    if caught is None:  # what only the counters show
        loads = [row for row in runtime.traffic if row.instruction.startswith("ldmatrix")]
        assert sum(row.bank_conflicts for row in loads), "conflicts expected"
    else:
        assert caught in found, found


@emulated
def test_planted_runs_that_begin_anywhere():
    """Runs whose rows are not aligned meet banks twice at their ends."""
    with mock.patch.object(halo, "ALIGNMENT", 1):
        runtime = trace(0)
        sequences(runtime)
    assert sum(row.bank_conflicts for row in runtime.traffic if row.instruction.startswith("ldmatrix"))


# --- Plans -------------------------------------------------------------------------------------------------------


def plan(x_shape, w_shape, device="A100", dtype="bfloat16", aligned=ALIGNED, **options):
    return conv_plans.plan_conv(conv_shape(x_shape, w_shape, **options), dtype, "linear", aligned, DEVICES[device])


def test_the_byte_model_chooses():
    """A halo where taps are near, phase order where they are far, and once a tap where nothing is gained."""
    chosen = {}
    for power in range(11):
        made = plan((8, 16384, 128), (3, 128, 64), "RTX 4090", padding="causal", dilation_rate=2**power)
        assert made.kernel == "conv_halo"
        chosen[2**power] = made
        others = " ".join(made.rejected)
        assert "bytes to shared memory" in made.reason and "tensor cores" in others and "bytes" in others
        assert ("phase" in others + made.reason) == (power > 0) and "halo" in others + made.reason
    assert chosen[1].reason.startswith("halo") and chosen[1024].reason.startswith("phase")
    assert max(made.cost.seconds for made in chosen.values()) < 1.02 * chosen[1].cost.seconds
    assert max(made.cost.bytes for made in chosen.values()) < 1.1 * chosen[1].cost.bytes


def test_what_it_does_not_compute_is_said():
    """The kernel that loads once a tap is taken, and why."""
    for shapes, options, reason in (
        (((8, 2048, 100), (3, 100, 128)), {}, "no whole vectors"),
        (((8, 2048, 128), (3, 128, 100)), {}, "no whole vectors"),
        (((8, 2048, 128), (1, 128, 128)), {}, "one tap"),
        (((8, 2048, 128), (3, 128, 128)), {"strides": 4}, "no input has two taps"),
        (((8, 128, 2048), (3, 128, 128)), {"data_format": "channels_first"}, "channels_last"),
        (((8, 2048, 128), (3, 128, 128)), {"aligned": (1, 0, 0)}, "16-byte boundary"),
        (((2, 64, 64, 64), (33, 3, 64, 64)), {"padding": "same"}, "taps on the other axes"),
    ):
        made = plan(*shapes, **options)
        assert made.kernel != "conv_halo" and any(f"halo: {reason}" in each or reason in each for each in made.rejected)


def test_orders_cover_every_position_and_tap():
    """For every stride and dilation: a position and a tap read the input that the definition says."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        k, s, d, n = (int(rng.integers(1, high)) for high in (6, 8, 13, 60))
        if (k - 1) * d + 1 > n:
            continue
        shape = conv_shape((1, n, 8), (k, 8, 8), strides=s, dilation_rate=d)
        form = conv_plans.Form(shape, 8, 8 * k, 8, 8, (k * d,), 1)
        for order in halo.orders(form):
            found = {}
            for r in range(order.strands):
                for q in range(order.run):
                    p = q * order.strands + r
                    rows = [q * order.rows_p + t * order.rows_t for t in range(k)]
                    assert max(rows) // order.rows_p <= order.run - 1 + order.gap
                    if p < shape.out_size[0]:
                        found[p] = [r * s + row * order.unit for row in rows]
            assert found == {p: [p * s + t * d for t in range(k)] for p in range(shape.out_size[0])}
            assert order.name == "halo" or order.rows_t == 1


def test_rows_of_tiles():
    """What the model says all tiles load, against the tiles one by one."""
    rng = np.random.default_rng(1)
    for _ in range(300):
        taps, run, rows_p, rows_t, runs = (int(rng.integers(1, high)) for high in (6, 90, 4, 4, 9))
        order = halo.Order("halo", taps, 1, run, 1, rows_p, rows_t)
        total = 0
        for m0 in range(0, runs * run, 32):
            ms = range(m0, min(m0 + 32, runs * run))
            for each in {m // run for m in ms}:
                qs = [m % run for m in ms if m // run == each]
                total += (max(qs) - min(qs)) * rows_p + max((taps - 1) * rows_t + 1, rows_p)
            places = max(m - m0 + (m0 % run + m - m0) // run * order.gap for m in ms)
            assert places + (taps - 1) * rows_t // rows_p < order.places(32)
        assert order.rows(runs, 32) == total
