"""conv_wgmma for float32 with precision "high": products of TF32, with weights packed along their sums.

The copy engine rounds to the nearest TF32 where a map says so, and products ignore what is left. That the emulator does
the same is tested in test_emulator_hopper.py; here, that all of it reaches results, at every edge of a tile.
"""

from dataclasses import replace
from unittest import mock

import disassembly
import emulator
import numpy as np
import pytest
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_conv_kernels import Case, name, rounded_to_tf32
from test_conv_wgmma import ALIGNED, LIMITS, SMALL, cases, gradients, only, trace
from test_static_gates import compiled

from cuconv import ops
from cuconv.cuda.runtime import CudaRuntime, current, probe
from cuconv.geometry import conv_shape
from cuconv.plan import wgmma
from cuconv.plan.conv import plan_conv, plan_conv_parts
from cuconv.plan.devices import DEVICES
from cuconv.plan.transpose import plan_transpose

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

H200 = DEVICES["H200"]
WORKSPACE = 64 << 20


def case_of(x_shape, w_shape, seed=0, **options):
    """Of numbers that are TF32 already, so that float32's error is allowed and no more."""
    case = Case(x_shape, w_shape, "float32", seed=seed, **options)
    case.precision = "high"
    case.x, case.w, case.dy = map(rounded_to_tf32, (case.x, case.w, case.dy))
    return case


def run_tile(tile, rank, bk=64, make_runtime=trace):
    """Every case of the 16-bit tests; `bk` as there, in units of 16 bits."""
    forwards = [*cases(tile, rank, bk)]
    with only(tile, bk):
        for number, (x_shape, w_shape, options) in enumerate((*forwards, *gradients(tile, rank, bk))):
            runtime, case = make_runtime(seed=number + 1), case_of(x_shape, w_shape, number, **options)
            try:
                case.check_forward(runtime) if number < len(forwards) else case.check_input_grad(runtime)
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
                raise
            if not isinstance(runtime, CudaRuntime):
                assert {plan.kernel for plan in runtime.launches} == {"pack_weights", "conv_wgmma"}
                assert all(plan.tile.startswith(name(tile[:2])) for plan in runtime.launches if plan.maps)


# --- Every tile --------------------------------------------------------------------------------------------------


@in_the_emulator
def test_a_small_tile():
    run_tile(SMALL, 1)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(wgmma.TILES)), ids=lambda number: name(wgmma.TILES[number]))
def test_every_tile(number):
    """Each with another rank; the last ones with steps of 16 channels."""
    run_tile(wgmma.TILES[number], number % 3 + 1, 32 if number >= 7 else 64)


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("tile", wgmma.TILES, ids=name)
def test_every_tile_on_a_gpu(tile):
    if current().limits.capability != wgmma.ONLY:
        pytest.skip(f"wgmma is of compute capability 9.0. Received: {current().limits.name}")
    for rank in (1, 2, 3):
        run_tile(tile, rank, make_runtime=lambda seed: current())


# --- Exactness ---------------------------------------------------------------------------------------------------


def nearest(x: np.ndarray) -> np.ndarray:
    """TF32, ties to even, by arithmetic: 11 significant bits of each."""
    mantissa, exponent = np.frexp(x.astype(np.float64))
    return np.ldexp(np.rint(mantissa * 2.0**11), exponent - 11).astype(np.float32)


def numbers(rng, shape) -> np.ndarray:
    """Of many magnitudes, a third of them in the middle between two TF32."""
    x = (rng.uniform(1, 2, shape) * 2.0 ** rng.integers(-40, 40, shape) * rng.choice([-1, 1], shape)).astype(np.float32)
    middle = np.ascontiguousarray(x).view(np.uint32) & ~np.uint32(0xFFF) | np.uint32(0x1000)
    return np.where(rng.random(shape) < 1 / 3, middle.view(np.float32), x)


def through(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers that meet only ones, as x or as w, and what comes of them."""
    case = case_of((1, 40, 36), (1, 36, 40))
    rng = np.random.default_rng(3)
    case.x, case.w = np.zeros_like(case.x), np.zeros_like(case.w)
    with only(SMALL):
        if side == "x":
            case.x, case.w[0, :, :36] = numbers(rng, case.x.shape), np.eye(36)
            return case.x[0], case.forward(trace(), bias=False)[0, :, :36]
        case.w, case.x[0, :36] = numbers(rng, case.w.shape), np.eye(36)
        return case.w[0], case.forward(trace(), bias=False)[0, :36]


@in_the_emulator
@pytest.mark.parametrize("side", ["x", "w"])
def test_factors_are_the_nearest_tf32(side):
    """Bit for bit: a relative error of 2**-11 at most, as :mod:`cuconv.ops` says of this precision."""
    given, got = through(side)
    assert np.array_equal(got, nearest(given)) and not np.array_equal(got, given)
    assert np.abs(got.astype(np.float64) - given).max() > 0
    assert np.all(np.abs(got.astype(np.float64) - given) <= 2.0**-11 * np.abs(given.astype(np.float64)))


@in_the_emulator
@pytest.mark.parametrize("side", ["x", "w"])
def test_without_rounding_products_cut_off(side):
    """What it would be if maps did not round: twice the error, and all of one sign. The test above sees it."""
    number = {"x": 0, "w": 1}[side]
    maps = wgmma._maps

    def mistaken(*arguments):
        found = list(maps(*arguments))
        found[number] = replace(found[number], rounds=False)
        return tuple(found)

    with mock.patch.object(wgmma, "_maps", mistaken):
        given, got = through(side)
    cut = (np.ascontiguousarray(given).view(np.uint32) & ~np.uint32(0x1FFF)).view(np.float32)
    assert np.array_equal(got, cut) and not np.array_equal(got, nearest(given))


@in_the_emulator
def test_results_are_off_by_the_rounding_of_their_factors():
    """No further than TF32 of other kernels, and than what torch's "high" shows: 2.2e-3 of a mean size at most."""
    case = Case((2, 64, 96), (3, 96, 64), "float32", padding="same")
    case.precision = "high"
    rng = np.random.default_rng(0)
    case.x, case.w = (rng.standard_normal(each.shape).astype(np.float32) for each in (case.x, case.w))
    with only(SMALL):
        actual = case.forward(EmulatedRuntime(LIMITS), bias=False)
    padded = np.pad(case.x.astype(np.float64), ((0, 0), (1, 1), (0, 0)))
    windows = np.stack([padded[:, r : r + 64] for r in range(3)], 2)
    exact, sizes = (np.einsum("bprc,rcf->bpf", f(windows), f(case.w.astype(np.float64))) for f in (np.array, np.abs))
    off = np.abs(actual - exact)
    assert 2.0**-18 < (off / sizes).max() < 2 * 2.0**-11 + 2.0**-22 + 288 * 2.0**-23
    assert off.max() < 2.2e-3 * np.abs(exact).mean()


@in_the_emulator
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_so(value):
    case = case_of((1, 40, 36), (1, 36, 40))
    case.x[0, 7, 21] = value
    with only(SMALL):
        y = case.forward(trace(), bias=False)[0]
    assert np.isfinite(np.delete(y, 7, 0)).all()
    assert np.isnan(y[7]).all() if np.isnan(value) else np.array_equal(y[7], np.sign(case.w[0, 21]) * value)


# --- What tiles do not show --------------------------------------------------------------------------------------


@in_the_emulator
def test_the_bias_is_not_rounded():
    """Nor is what the activation gets."""
    case = case_of((2, 9, 16), (3, 16, 8), padding="same")
    assert not np.array_equal(case.bias, rounded_to_tf32(case.bias))
    with only(SMALL):
        for bias in (True, False):
            case.check_forward(trace(), "hard_sigmoid", bias)


@in_the_emulator
def test_windows_side_by_side():
    """Their taps are channels, also of packed weights."""
    case, runtime = case_of((2, 80, 12), (4, 12, 24), strides=4), trace()
    with only(SMALL):
        case.check_forward(runtime)
    assert [plan.kernel for plan in runtime.launches] == ["pack_weights", "conv_wgmma"]
    assert runtime.launches[1].maps[0].sizes[0] == 48


@in_the_emulator
def test_no_bank_conflicts_and_whole_sectors():
    case, runtime = case_of((2, 128, 64), (1, 64, 64)), trace(seed=0)
    with only(SMALL):
        case.check_forward(runtime)
    # PTX takes a pair of floats apart, which machine code has in one piece again: see below.
    rows = [row for row in runtime.traffic if row.space == "shared" and row.instruction != "st.shared.f32"]
    assert rows and not [row for row in rows if row.bank_conflicts]
    stores = [row for row in runtime.traffic if row.space == "global" and row.instruction.startswith("st")]
    assert stores and all(row.sectors == row.least_sectors and row.bytes == row.requests * 512 for row in stores)


@in_the_emulator
def test_packed_weights_stay_within_the_workspace():
    """Of a convolution; without room it is computed from the weights as they are."""
    case = case_of((2, 40, 36), (3, 36, 24), padding="same")
    bytes_ = case.w.nbytes
    for case.workspace, packed in ((bytes_, True), (bytes_ - 1, False), (0, False)):
        runtime = trace()
        with only(SMALL):
            case.check_forward(runtime)
        assert ("pack_weights" in [plan.kernel for plan in runtime.launches]) == packed


# --- Planted -----------------------------------------------------------------------------------------------------


def sequence(runtime):
    case_of((2, 131, 68), (3, 68, 72), padding="same", dilation_rate=3).check_forward(runtime)


def two_groups(runtime):
    case_of((1, 40, 128), (3, 64, 48), padding="same", groups=2).check_forward(runtime)


def gradient(runtime):
    case_of((2, 65, 12), (5, 12, 36), padding="same", strides=3).check_input_grad(runtime)


PLANTS = {
    "columns 8 rows too far apart": ("conv_wgmma.cu", "K_MAJOR ? X_LAYOUT :", "K_MAJOR ? X_LAYOUT + (64ull << 32) :",
        sequence, {"race"}),
    "values of k as in 16 bits": ("conv_wgmma.cu", "W_K_BYTES = K_MAJOR ? sizeof(E) : 128", "W_K_BYTES = 128",
        sequence, {"race"}),
    "products of 16 values": ("conv_wgmma.cu", "STEP = 32 / sizeof(E)", "STEP = 16", sequence, {WRONG}),
    "axes of w exchanged": ("conv_wgmma.cu", "W_COLUMN = K_MAJOR, W_CHANNEL = !K_MAJOR",
        "W_COLUMN = !K_MAJOR, W_CHANNEL = K_MAJOR", sequence, {WRONG}),
    "weights of the first group": ("conv_wgmma.cu", "Index r = tile.g * p.group_taps;", "Index r = 0;",
        two_groups, {WRONG}),
    "rows of y as wide as in 16 bits": ("conv_wgmma.cu", "lane % 8 * Y_VECTOR;", "lane % 8 * 8;", sequence, {"race"}),
    "packed as for other kernels": ("pack_weights.cu", "if constexpr (FILTERS_LAST)", "if constexpr (false)",
        gradient, {WRONG}),
    "taps packed the other way round": ("pack_weights.cu", "(p.taps[a] - 1 - t) * p.step[a]", "t * p.step[a]",
        sequence, {WRONG}),
    "a phase over the one before": ("pack_weights.cu", "packed[(phase * p.channels + c)", "packed[(c)",
        gradient, {"race"}),
    "filters behind the last": ("pack_weights.cu", "if (f >= p.filters || c >= p.channels) continue;",
        "if (c >= p.channels) continue;", gradient, {"race"}),
}  # fmt: skip
DEFAULT = {"values of k as in 16 bits", "packed as for other kernels"}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    file, right, wrong, run, caught = PLANTS[name]
    with planted(file, right, wrong), only(SMALL):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


@in_the_emulator
def test_without_a_bug_nothing_is_caught():
    for run in (sequence, two_groups, gradient):
        with only(SMALL):
            assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()


# --- Plans -------------------------------------------------------------------------------------------------------

SEQUENCE = conv_shape((64, 2048, 128), (3, 128, 128), padding="causal")
UPSAMPLING = conv_shape((1, 5120, 1024), (20, 1024, 2048), strides=10, padding="same")


def test_it_is_chosen_where_it_is_predicted_to_be_faster():
    parts = plan_conv_parts(SEQUENCE, "float32", "relu", ALIGNED, WORKSPACE, H200, "high")
    assert (parts.pack.kernel, parts.conv.kernel, parts.reduce) == ("pack_weights", "conv_wgmma", None)
    assert parts.packed == 3 * 128 * 128 and parts.seconds > parts.conv.seconds
    whole = plan_conv(SEQUENCE, "float32", "relu", ALIGNED, H200, "high")
    assert whole.seconds > parts.seconds and any(whole.reason in each for each in parts.conv.rejected)
    assert any("need packed weights" in each for each in whole.rejected)
    assert plan_conv_parts(SEQUENCE, "float32", "relu", ALIGNED, 4, H200, "high") is None
    small = conv_shape((1, 40, 32), (3, 32, 32))
    assert plan_conv_parts(small, "float32", "relu", ALIGNED, WORKSPACE, H200, "high") is None
    (part,) = plan_transpose(UPSAMPLING, "float32", "linear", ALIGNED, H200, "high").parts
    assert part.conv.kernel == "conv_wgmma" and dict(part.pack.constants)["FILTERS_LAST"]


@pytest.mark.parametrize("device", ["A100", "H200", "B200"])
def test_float32_as_it_is_stays_with_other_kernels(device):
    parts = plan_conv_parts(SEQUENCE, "float32", "relu", ALIGNED, WORKSPACE, DEVICES[device])
    assert parts is None or parts.pack is None
    whole = plan_conv(SEQUENCE, "float32", "relu", ALIGNED, DEVICES[device])
    assert whole.kernel != "conv_wgmma" and any("warpgroups" in each for each in whole.rejected)
    (part,) = plan_transpose(UPSAMPLING, "float32", "linear", ALIGNED, DEVICES[device]).parts
    assert part.conv.kernel != "conv_wgmma" and not dict(part.pack.constants)["FILTERS_LAST"]


def test_a_prepared_call_has_room_for_packed_weights():
    """And tells of the launch that fills it."""
    steps = ops.explain(
        "conv", SEQUENCE.x_shape, SEQUENCE.w_shape, padding="causal", device="H200", precision="high"
    ).steps
    assert [step.plan.kernel for step in steps if step.plan] == ["pack_weights", "conv_wgmma"]


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize(
    "tile", [wgmma.TILES[0], *(pytest.param(each, marks=pytest.mark.exhaustive) for each in wgmma.TILES[1:])], ids=name
)
def test_machine_code(tile):
    """No spill, products of TF32, one copy of w a step, and few instructions between products."""
    with only(tile):
        plan = plan_conv_parts(SEQUENCE, "float32", "linear", ALIGNED, WORKSPACE, H200, "high").conv
    code = compiled(plan, "sm_90")
    assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
    assert code.count("USETMAXREG") == 2 and code.count("UTMALDG") >= 2
    assert code.count("STG", "128") == code.count("STG") and code.count("LDS", "128") == code.count("LDS")
    assert code.count("STS") == code.count("STS", "64") + code.count("STS", "128")
    loop = code.main_loop("HGMMA")
    products = 4 * tile[2] // 64
    assert loop.count("HGMMA") == loop.count("HGMMA", f"64x{tile[3]}x8") == products
    assert loop.count("HGMMA", "TF32") == products
    assert not loop.count("BAR") and len(loop.instructions) <= 60 + 10 * products, loop.mix()
    assert loop.count("WARPGROUP", "DEPBAR") == 1
