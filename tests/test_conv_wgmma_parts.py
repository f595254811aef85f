"""conv_wgmma in parts of K, whose sums another launch adds up: parity, planted bugs, and when plans take it."""

from contextlib import contextmanager
from math import prod
from unittest import mock

import disassembly
import emulator
import pytest
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_conv_kernels import Case
from test_conv_wgmma import ALIGNED, HALO, LIMITS, PHASE, RELOAD, SMALL, only, trace
from test_conv_wgmma_tf32 import case_of
from test_static_gates import compiled

from cuconv.geometry import conv_shape
from cuconv.plan import conv as planning
from cuconv.plan import wgmma
from cuconv.plan.conv import plan_conv, plan_conv_parts
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

H200 = DEVICES["H200"]
WORKSPACE = 64 << 20


@contextmanager
def parts(most, tile=SMALL, **which):
    """K is cut into at most so many, whatever that takes, by warpgroups alone."""
    by_warps = planning.plan_by_warps

    def whole(*arguments):
        if len(arguments) > 6:
            raise PlanError("warpgroups alone")
        return by_warps(*arguments)

    with (
        mock.patch.object(planning, "PARTS", (most,)),
        mock.patch.object(planning, "FEW_BLOCKS", 1 << 20),
        mock.patch.object(planning, "_gains", return_value=True),
        mock.patch.object(planning, "plan_by_warps", whole),
        only(tile, **which),
    ):
        yield


def kernels(runtime):
    return [plan.kernel for plan in runtime.launches]


def split_of(runtime):
    (reduce,) = (plan for plan in runtime.launches if plan.kernel == "conv_reduce")
    return reduce.integers[0]


# --- Parity ------------------------------------------------------------------------------------------------------

# x, w, options, parts, and how x is walked: parts that end inside a tap, with an axis, in another class of taps, after
# stages of x that serve several; the last part is shorter. Tiles that overlap y's end on both sides.
CASES = {
    "reload": ((2, 131, 136), (3, 136, 72), {"padding": "same", "dilation_rate": 3}, 5, {}),
    "more than there are": ((5, 40, 24), (2, 24, 16), {"padding": "same"}, 9, {}),
    "halo": ((9, 21, 136), (5, 136, 72), {"padding": "same"}, 2, {"mode": HALO, "axis": 0}),
    "classes": ((9, 41, 136), (5, 136, 24), {"padding": "same", "strides": 2}, 3, {"mode": HALO, "axis": 0}),
    "phase": ((2, 70, 136), (3, 136, 24), {"padding": "same", "dilation_rate": 8}, 3, {"mode": PHASE, "axis": 0}),
    "image": ((1, 9, 11, 72), (3, 3, 72, 24), {"padding": "same"}, 4, {}),
    "groups": ((2, 40, 256), (3, 128, 48), {"padding": "same", "groups": 2}, 4, {}),
}


@in_the_emulator
@pytest.mark.parametrize(
    "number", [pytest.param(i, marks=[] if i in (0, 3) else [pytest.mark.exhaustive]) for i in range(len(CASES))]
)
def test_parts_and_their_end(number):
    """With a bias and an activation that come once, behind the sum of all parts."""
    x, w, options, most, which = [*CASES.values()][number]
    with parts(most, **which):
        runtime = trace()
        Case(x, w, "bfloat16", **options).check_forward(runtime, "relu")
        assert kernels(runtime) == ["conv_wgmma", "conv_reduce"] and 1 < split_of(runtime) <= most
        Case(x, w, "float16", **options).check_forward(trace(), bias=False)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("tile", [each for each in wgmma.TILES[:-1] if not wgmma.in_turns(each)], ids=str)
def test_every_tile(tile):
    bm, bn, *_ = tile
    with parts(3, tile):
        runtime = trace()
        Case((1, bm + 5, 136), (2, 136, bn + 8), "bfloat16", padding="same").check_forward(runtime)
    assert kernels(runtime) == ["conv_wgmma", "conv_reduce"] and split_of(runtime) == 3


@in_the_emulator
def test_input_gradients_and_tf32():
    """Phases in the columns; and packed weights besides partial sums."""
    with parts(3):
        runtime = trace()
        Case((3, 65, 12 * 2), (5, 24, 136), "bfloat16", padding="same", strides=3).check_input_grad(runtime)
        assert kernels(runtime) == ["pack_weights", "conv_wgmma", "conv_reduce"]
        for passes in ("check_forward", "check_input_grad"):
            runtime = trace()
            getattr(case_of((2, 65, 68), (3, 68, 72), padding="same"), passes)(runtime)
            assert kernels(runtime) == ["pack_weights", "conv_wgmma", "conv_reduce"] and split_of(runtime) > 1


@in_the_emulator
def test_the_same_bits_in_any_order_of_threads():
    case = Case((2, 131, 136), (3, 136, 24), "bfloat16", padding="same")
    with parts(4):
        results = {case.forward(trace(seed)).tobytes() for seed in range(3)}
    assert len(results) == 1


@in_the_emulator
@pytest.mark.parametrize("dtype, packed", [("bfloat16", 0), ("float32", 3 * 136 * 24 * 4)])
def test_scratch_memory_stays_within_the_workspace(dtype, packed):
    shape, size = conv_shape((2, 131, 136), (3, 136, 24), padding="same"), 2 * 131 * 24 * 4
    with parts(4):
        for room, splits in ((4 * size, 4), (4 * size - 4, 1)):
            planned = plan_conv_parts(shape, dtype, "linear", ALIGNED, packed + room, LIMITS, "high")
            taken = 0 if planned is None else 4 * (planned.partial + planned.packed)
            assert taken <= packed + room and (planned is not None and planned.partial > 0) == (splits > 1)


# --- Planted -----------------------------------------------------------------------------------------------------


def sequence(runtime):
    x, w, options, most, which = CASES["reload"]
    with parts(most, **which):
        Case(x, w, "bfloat16", **options).check_forward(runtime, "relu")


def classes(runtime):
    x, w, options, most, which = CASES["classes"]
    with parts(most, **which):
        Case(x, w, "bfloat16", **options).check_forward(runtime)


PLANTS = {
    "every part from the first tap on": ("load = part * loads;", "load = 0;", sequence, {WRONG}),
    "a last part as long as the others": ("if (left < loads) loads = left;", "", sequence, {WRONG}),
    "the sums of another part": ("y = p.y + tile.part * p.total;", "y = p.y;", sequence, {"uninitialised"}),
    "tiles of the next part": ("tile %= p.part_tiles;", "", sequence, {"bounds"}),
    "taps from the first on": ("split(tile.load / p.chunks, p.taps, tap);", "split(Index(0), p.taps, tap);",
        sequence, {WRONG}),
    "channels from the first on": ("= tile.load % p.chunks * BK;", "= 0;", sequence, {WRONG}),
    "taps of the first class": ("first = load / p.loads, load %= p.loads;", "load %= p.loads;", classes, {"deadlock"}),
    "a class that begins anew": ("first = load / p.loads, load %= p.loads;", "first = load / p.loads, load = 0;",
        classes, {"deadlock"}),
}  # fmt: skip
DEFAULT = {"a last part as long as the others", "taps from the first on"}


@in_the_emulator
@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in DEFAULT else [pytest.mark.exhaustive]) for each in PLANTS]
)
def test_planted_bug_is_caught(name):
    right, wrong, run, caught = PLANTS[name]
    with planted("conv_wgmma.cu", right, wrong):
        found = what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=5.0))
    assert caught <= found, found


@in_the_emulator
@pytest.mark.exhaustive
def test_without_a_bug_nothing_is_caught():
    for run in (sequence, classes):
        assert what_catches(run, trace()) == set()


# --- When --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, dtype, precision", [(1, "bfloat16", "highest"), (4, "float32", "high")], ids=["16 bits", "TF32"]
)
def test_few_tiles_are_split(batch, dtype, precision):
    """Predicted to be faster with all launches counted, and said so."""
    shape = conv_shape((batch, 512, 2048), (3, 2048, 512), padding="same")
    whole = plan_conv(shape, dtype, "relu", ALIGNED, H200, precision)
    split = plan_conv_parts(shape, dtype, "relu", ALIGNED, WORKSPACE, H200, precision)
    splits, count = split.reduce.integers[:2]
    assert split.conv.kernel == "conv_wgmma" and split.seconds < whole.seconds
    assert (split.pack is not None) == (dtype == "float32")
    assert split.partial == splits * count == splits * prod(shape.y_shape)
    assert f"{splits} parts of k" in split.conv.reason and "in one part" in " ".join(split.conv.rejected)
    assert split.conv.grid[0] <= H200.multiprocessors


def test_a_full_device_is_left_alone():
    shape = conv_shape((64, 2048, 128), (3, 128, 128), padding="same")
    assert plan_conv(shape, "bfloat16", "relu", ALIGNED, H200).kernel == "conv_wgmma"
    assert plan_conv_parts(shape, "bfloat16", "relu", ALIGNED, WORKSPACE, H200) is None


# --- Machine code ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("mode", [pytest.param(RELOAD, marks=pytest.mark.exhaustive), HALO])
def test_machine_code(mode):
    """As in one part: no spill, whole vectors of sums, and the same main loop."""
    shape = conv_shape((8, 64, 2048), (3, 2048, 512), padding="same")
    with parts(4, wgmma.TILES[0], mode=mode):
        plan = wgmma.plan_wgmma(planning.form_of(shape), "bfloat16", "linear", ALIGNED, H200, "highest", 4)
    code = compiled(plan, "sm_90")
    assert dict(plan.constants)["SPLIT"] == 1
    assert (code.registers, code.stack_bytes, code.spills, code.shared_bytes) == (plan.registers, 0, 0, 0)
    assert code.count("STG", "128") == code.count("STG") and code.count("LDS", "128") == code.count("LDS")
    loop = code.main_loop("HGMMA")
    assert loop.count("HGMMA") == 4 and loop.count("WARPGROUP", "DEPBAR") == 1 and not loop.count("BAR")
