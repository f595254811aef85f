"""The depthwise kernels: their real PTX on the CPU against the oracle, their traffic, their machine code, their plans.

Arrays are small, so plans are made for a device of one multiprocessor, which takes the same tiles for them that a whole
GPU takes for large ones. Cases that share a kernel's constants share its compilation; edges are tried on those.
"""

import dataclasses
import math
import re

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, dtype_of, embed, empty_output, poisoned
from disassembly import functions
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform

from cuconv import activations
from cuconv.cuda.depthwise import depthwise_conv, depthwise_grads, depthwise_kernel_grad, depthwise_transpose
from cuconv.cuda.runtime import kernel_directory
from cuconv.cuda.separable import separable_conv, separable_input_grad, separable_kernel_grad
from cuconv.geometry import CHANNELS_LAST, depthwise_shape
from cuconv.plan import depthwise as plans
from cuconv.plan import depthwise_grad, depthwise_problem
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ACTIVATION_CODES, ELEMENTS, INT32_MAX, MAX_GRID_X, PlanError

WORKSPACE = 64 << 20  # bytes of partial sums
emulated = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

ONE = dataclasses.replace(DEVICES["H200"], name="one multiprocessor", multiprocessors=1)
FIRST = "channels_first"
PASSES = ("y", "dx", "dw", "all")


class Case:
    """A depthwise convolution with random arrays, and its passes on a runtime against the oracle."""

    def __init__(self, x_shape, w_shape, dtype="float32", seed=0, **options):
        self.dtype, self.options = dtype, options
        self.shape = depthwise_shape(x_shape, w_shape, **options)
        rng = np.random.default_rng(seed)
        filters = math.prod(w_shape[-2:])
        shapes = (x_shape, w_shape, (filters,), self.shape.y_shape)
        self.x, self.w, self.bias, self.dy = (uniform(rng, shape, dtype) for shape in shapes)
        self.taps = math.prod(w_shape[:-2])
        self.positions = max(1, self.dy.size // filters)

    def __str__(self):
        options = "-".join(str(value) for value in self.options.values())
        return f"{'x'.join(map(str, self.x.shape))}-k{'x'.join(map(str, self.w.shape))}-{options}-{self.dtype}"

    def y(self, runtime, activation=None, bias=True):
        out = poisoned(self.shape.y_shape, self.dtype)
        fused = activations.get(activation) if activation else None
        depthwise_conv(runtime, self.shape, self.x, self.w, self.bias if bias else None, fused, out, 1 << 20)
        return out

    def dx(self, runtime):
        out = poisoned(self.shape.x_shape, self.dtype)
        depthwise_transpose(runtime, self.shape, self.dy, self.w.conj(), out, 1 << 20)
        return out

    def dw(self, runtime):
        out = poisoned(self.w.shape, self.dtype)
        depthwise_kernel_grad(runtime, self.shape, self.x, self.dy, out, 1 << 20)
        return out

    def all(self, runtime):
        outs = [poisoned(array.shape, self.dtype) for array in (self.x, self.w, self.bias)]
        depthwise_grads(runtime, self.shape, self.x, self.w.conj(), self.dy, *outs, 1 << 20)
        return outs

    def compare_dx(self, actual):
        expected = oracle.depthwise_conv_input_grad(self.dy, self.w, self.x.shape, **self.options)
        terms = self.taps * self.w.shape[-1]
        assert_close(actual, expected, dtype=self.dtype, terms=terms, what=f"{self}: dx")

    def compare_dw(self, actual):
        expected = oracle.depthwise_conv_kernel_grad(self.x, self.dy, self.w.shape, **self.options)
        assert_close(actual, expected, dtype=self.dtype, terms=self.positions, what=f"{self}: dw")

    def check(self, runtime, which, **finish):
        """Runs one pass and compares; returns the kernel that did it."""
        before = len(runtime.launches)
        result = getattr(self, which)(runtime, **finish)
        if which == "y":
            bias = self.bias if finish.get("bias", True) else None
            expected = oracle.depthwise_conv(self.x, self.w, bias, activation=finish.get("activation"), **self.options)
            assert_close(result, expected, dtype=self.dtype, terms=self.taps, what=f"{self}: y")
        elif which == "dx":
            self.compare_dx(result)
        elif which == "dw":
            self.compare_dw(result)
        else:
            dx, dw, db = result
            self.compare_dx(dx)
            self.compare_dw(dw)
            expected = oracle.bias_grad(self.dy, data_format=self.options.get("data_format"))
            assert_close(db, expected, dtype=self.dtype, terms=self.positions, what=f"{self}: db")
        return runtime.launches[before].kernel


def trace(seed=1, limits=ONE):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


# --- Parity ------------------------------------------------------------------------------------------------------

# A case, and the kernel of each of its passes.
CARRY, WALK, ROWS, TOEPLITZ = "depthwise_carry", "depthwise", "depthwise_rows", "depthwise_toeplitz"
TILE = "depthwise_tile"
GRAD, GRADS, GRAD_ROWS = "depthwise_grad", "depthwise_grads", "depthwise_grad_rows"
CASES = (
    (Case((2, 45, 8), (4, 8, 1), padding="causal"), {"y": CARRY, "dx": CARRY, "dw": GRAD, "all": GRADS}),
    (Case((2, 21, 16), (4, 16, 1), "bfloat16", padding="causal"), {"y": CARRY, "all": GRADS}),
    (Case((2, 3, 44), (4, 3, 1), padding="causal", data_format=FIRST), {"y": ROWS, "dx": ROWS, "all": GRAD_ROWS}),
    (Case((2, 2, 50), (11, 2, 1), "float16", padding="same", data_format=FIRST), {"y": ROWS, "dw": GRAD_ROWS}),
    (Case((2, 30, 8), (11, 8, 1), "float16", padding="same"), {"y": WALK}),
    (Case((2, 9, 19, 4), (3, 2, 4, 2), strides=(1, 2), padding="same"), {"y": WALK, "dx": WALK, "dw": GRAD}),
    (
        Case((1, 3, 8, 9, 5), (2, 3, 2, 3, 2), "complex64", padding="same", strides=2, data_format=FIRST),
        {"y": WALK, "dx": WALK, "dw": GRAD},
    ),
)


@emulated
@pytest.mark.parametrize("case, kernels", CASES, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_passes_agree_with_the_oracle(case, kernels):
    for which, kernel in kernels.items():
        assert case.check(trace(), which) == kernel, which


def edges(*lengths):
    """Sequences of three channel vectors and four taps, as short as they come and around a loop of 8 inputs."""
    for length in lengths:
        yield Case((1, length, 12), (4, 12, 1), padding="causal")
        yield Case((2, length, 12), (4, 12, 1), padding=((3, 5),), dilation_rate=2)
    yield Case((1, 23, 12), (4, 12, 1), dilation_rate=7)
    yield Case((2, 40, 12), (4, 12, 1), strides=3, dilation_rate=6, padding="same")
    yield Case((2, 4, 12), (4, 12, 1), dilation_rate=9, padding=((20, 11),))  # most outputs read padding only


@emulated
def test_carry_at_the_edges_of_its_loop():
    for case in edges(1, 4, 8, 11, 12, 13):
        assert case.check(trace(), "y") == CARRY
        if case.shape.strides == (1,):
            assert case.check(trace(), "dx") == CARRY
            assert case.check(trace(), "all") == GRADS


@emulated
def test_long_sequences_are_cut_into_walks():
    case = Case((1, 300, 4), (4, 4, 1), padding="causal")
    runtime = trace()
    assert case.check(runtime, "y") == CARRY
    names = ("threads", "vectors", "multiplier", "channels", "filters", "phases", "walks")
    walks = dict(zip(names, runtime.launches[0].integers))["walks"]
    assert walks > 1


@emulated
def test_rows_at_the_edges_of_vectors_and_tiles():
    """Lengths that 16 bytes divide, that 8 do, and odd ones; tiles that end inside a row."""
    for length in (1, 4, 6, 7, 128, 130, 516):
        for options in ({"padding": "causal"}, {"padding": "same"}):
            assert Case((1, 3, length), (4, 3, 1), data_format=FIRST, **options).check(trace(), "y") == ROWS


@emulated
def test_dilated_rows_select_the_right_elements():
    for dilation in (2, 3, 4):
        case = Case((2, 3, 40), (3, 3, 2), data_format=FIRST, dilation_rate=dilation, padding="same")
        assert case.check(trace(), "y") == ROWS
        assert case.check(trace(), "dw") == GRAD_ROWS


@emulated
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_strided_transposes_take_the_taps_of_their_residue(data_format):
    """Strides with and without a common factor with the dilation; more stride than taps leaves positions that none
    reaches."""
    for strides, dilation in ((2, 1), (3, 2), (4, 6), (5, 1)):
        sizes = (1, 4, 20) if data_format == FIRST else (1, 20, 4)
        options = {"strides": strides, "dilation_rate": dilation, "padding": ((4, 3),), "data_format": data_format}
        case = Case(sizes, (3, 4, 1), **options)
        assert case.check(EmulatedRuntime(ONE, seed=2), "dx") == WALK


@emulated
@pytest.mark.parametrize("multiplier", [2, 3, *(pytest.param(m, marks=pytest.mark.exhaustive) for m in (4, 8))])
def test_multipliers_share_inputs(multiplier):
    """Of 4 channels a thread writes, 2, 1, 1 and 1 are read; 3 fits no vector."""
    case = Case((1, 13, 4), (2, 4, multiplier), padding="same")
    for which in ("y", "dx", "dw", "all"):
        case.check(trace(), which)


@emulated
def test_every_fused_activation_by_one_kernel_each():
    for name in ("relu", "sigmoid"):
        Case((1, 9, 8), (4, 8, 1), padding="causal").check(trace(), "y", activation=name)
    Case((1, 2, 8), (4, 2, 1), padding="causal", data_format=FIRST).check(trace(), "y", activation="tanh")
    Case((1, 3, 9, 2), (2, 2, 2, 1), padding="same").check(trace(), "y", activation="relu", bias=False)


LAYOUTS = ("sliced", "reversed", "fortran", "offset", "unaligned")


@emulated
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_any_memory_layout(data_format):
    """Copies where memory is not in one piece, narrower vectors where it is not aligned."""
    shape = (2, 8, 12) if data_format == FIRST else (2, 12, 8)
    case = Case(shape, (3, 8, 1), padding="causal", data_format=data_format)
    expected = oracle.depthwise_conv(case.x, case.w, case.bias, **case.options)
    for layout in LAYOUTS:
        x, w, bias = (embed(array, layout).view for array in (case.x, case.w, case.bias))
        out = empty_output(case.shape.y_shape, case.dtype, layout)
        depthwise_conv(trace(), case.shape, x, w, bias, None, out.view, 1 << 20)
        assert_close(out.view, expected, dtype=case.dtype, terms=3, what=layout)
        if layout != "unaligned":
            out.assert_surroundings_untouched()


@emulated
@pytest.mark.parametrize("behind", [1, 2])
def test_misaligned_arrays_are_read_in_narrower_vectors(behind):
    case = Case((1, 12, 8), (4, 8, 1), padding="causal")
    memory = np.zeros(case.x.size + 4, np.float32)
    x = memory[behind : behind + case.x.size].reshape(case.x.shape)
    x[...] = case.x
    case.x = x
    runtime = trace()
    case.check(runtime, "y")
    assert dict(runtime.launches[0].constants)["VEC"] == math.gcd(behind, 4)


@emulated
def test_gradients_that_are_not_wanted_are_left_out():
    case = Case((2, 12, 8), (4, 8, 1), padding="causal")
    runtime = trace()
    only = poisoned(case.w.shape, case.dtype)
    depthwise_grads(runtime, case.shape, case.x, case.w, case.dy, None, only, None, 1 << 20)
    case.compare_dw(only)
    only = poisoned(case.x.shape, case.dtype)
    depthwise_grads(runtime, case.shape, case.x, case.w, case.dy, only, None, None, 1 << 20)
    case.compare_dx(only)
    only = poisoned(case.bias.shape, case.dtype)
    depthwise_grads(runtime, case.shape, case.x, case.w, case.dy, None, None, only, 1 << 20)
    assert_close(only, oracle.bias_grad(case.dy), dtype=case.dtype, terms=case.positions)


@emulated
def test_empty_arrays():
    case = Case((0, 12, 8), (4, 8, 1), padding="causal")
    runtime = trace()
    assert case.y(runtime).shape == (0, 12, 8) and case.dx(runtime).shape == (0, 12, 8)
    assert not case.dw(runtime).any()
    dx, dw, db = case.all(runtime)
    assert dx.shape == (0, 12, 8) and not dw.any() and not db.any()
    assert not runtime.launches
    padded = Case((1, 0, 4), (2, 4, 1), padding=((2, 1),))
    assert_close(padded.y(trace()), np.broadcast_to(padded.bias, (1, 2, 4)), dtype="float32", terms=1)


# --- Separable convolutions --------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize(
    "data_format, workspace",
    [
        ("channels_last", 200),
        pytest.param("channels_last", 1 << 20, marks=pytest.mark.exhaustive),
        pytest.param(FIRST, 200, marks=pytest.mark.exhaustive),
        pytest.param(FIRST, 1 << 20, marks=pytest.mark.exhaustive),
    ],
)
def test_separable_convolutions(data_format, workspace):
    """Whole, and an item at a time."""
    x_shape = (3, 4, 9) if data_format == FIRST else (3, 9, 4)
    options = {"padding": "same", "strides": 2, "data_format": data_format}
    case = Case(x_shape, (3, 4, 2), **options)
    rng = np.random.default_rng(5)
    mixing, bias = uniform(rng, (1, 8, 6), "float32"), uniform(rng, (6,), "float32")
    y_shape = (3, 6, 5) if data_format == FIRST else (3, 5, 6)
    dy = uniform(rng, y_shape, "float32")
    runtime, shape = trace(), case.shape

    y = poisoned(y_shape, "float32")
    separable_conv(runtime, shape, case.x, case.w, mixing, bias, None, y, workspace)
    assert_close(y, oracle.separable_conv(case.x, case.w, mixing, bias, **options), dtype="float32", terms=24)
    depthwise = sum(launch.kernel.startswith("depthwise") for launch in runtime.launches)
    assert depthwise == (1 if workspace > 200 else 3)

    dx = poisoned(x_shape, "float32")
    separable_input_grad(runtime, shape, dy, case.w, mixing, dx, workspace)
    expected = oracle.separable_conv_input_grad(dy, case.w, mixing, x_shape, **options)
    assert_close(dx, expected, dtype="float32", terms=24)

    outs = [poisoned(array.shape, "float32") for array in (case.w, mixing)]
    separable_kernel_grad(runtime, shape, case.x, dy, case.w, mixing, *outs, workspace)
    for actual, expected in zip(outs, oracle.separable_conv_kernel_grad(case.x, dy, case.w, mixing, **options)):
        assert_close(actual, expected, dtype="float32", terms=90)


# --- What must not matter ----------------------------------------------------------------------------------------

LEAKS = (
    {"padding": ((2, 3),), "dilation_rate": 5},
    {"strides": 3, "padding": "same"},
    {"padding": "causal"},
)


@emulated
@pytest.mark.parametrize("options", LEAKS, ids=str)
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_one_nan_reaches_exactly_what_reads_it(data_format, options):
    """In y the outputs whose window holds it, in dw the taps that meet it."""
    sizes = (1, 4, 14) if data_format == FIRST else (1, 14, 4)
    case = Case(sizes, (3, 4, 1), data_format=data_format, **options)
    for at in (0, 5, 13):
        x = case.x.copy()
        x[(0, 1, at) if data_format == FIRST else (0, at, 1)] = np.nan
        case.x = x
        expected = oracle.depthwise_conv(case.x, case.w, case.bias, **case.options)
        assert np.array_equal(np.isnan(case.y(EmulatedRuntime(ONE))), np.isnan(expected))
        expected = oracle.depthwise_conv_kernel_grad(case.x, case.dy, case.w.shape, **case.options)
        padded = np.isnan(expected)
        assert np.array_equal(np.isnan(case.dw(EmulatedRuntime(ONE))), padded)
        _, dw, _ = case.all(EmulatedRuntime(ONE))
        assert np.array_equal(np.isnan(dw), padded)
        case = Case(sizes, (3, 4, 1), data_format=data_format, **options)


@emulated
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_the_same_bits_in_any_order_of_blocks_and_threads(data_format):
    sizes = (3, 4, 90) if data_format == FIRST else (3, 90, 4)
    case = Case(sizes, (4, 4, 1), padding="causal", data_format=data_format)
    bits = set()
    for seed in range(4):
        runtime = EmulatedRuntime(dataclasses.replace(ONE, multiprocessors=4), seed=seed)
        arrays = [case.y(runtime), case.dx(runtime), case.dw(runtime), *case.all(runtime)]
        bits.add(b"".join(array.tobytes() for array in arrays))
    assert len(bits) == 1


@emulated
def test_an_output_does_not_depend_on_where_its_walk_began():
    """Outputs in the middle of one sequence are, to the last bit, those of a sequence that begins elsewhere."""
    case = Case((1, 120, 4), (4, 4, 1), padding="causal")
    whole = case.y(EmulatedRuntime(ONE))
    later = Case((1, 100, 4), (4, 4, 1))
    later.x, later.w, later.bias = case.x[:, 20:], case.w, case.bias
    assert later.y(EmulatedRuntime(ONE)).tobytes() == whole[:, 23:].tobytes()


# --- Traffic -----------------------------------------------------------------------------------------------------


def counted(runtime, wanted):
    """Requests, bytes and sectors of the global accesses whose instruction matches `wanted`."""
    rows = [row for row in runtime.traffic if row.space == "global" and re.search(wanted, row.instruction)]
    return tuple(sum(getattr(row, name) for row in rows) for name in ("requests", "bytes", "sectors", "least_sectors"))


@emulated
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_four_taps_read_and_write_every_vector_once(data_format, dtype):
    """One load and one store of 16 bytes for each vector of outputs, beside the weights and the K-1 inputs that two
    walks or tiles share; and no sector more than the bytes need."""
    itemsize = dtype_of(dtype).itemsize
    width = 16 // itemsize
    length, channels = 64 * width, 32 * width
    sizes = (1, 8, length) if data_format == FIRST else (1, 61, channels)
    weights = (4, sizes[1] if data_format == FIRST else channels, 1)
    case = Case(sizes, weights, dtype, padding="causal", data_format=data_format)
    runtime = trace()
    case.check(runtime, "y", bias=False)
    plan = runtime.launches[0]
    vectors = case.x.nbytes // 16
    requests, moved, sectors, least = counted(runtime, r"^st\.")
    assert moved == case.x.nbytes and requests == vectors // 32 and sectors == least == moved // 32
    wide = r"ld\.global\.nc\.v4" if data_format == FIRST else r"ld\.global\.nc"
    requests, moved, sectors, least = counted(runtime, wide)
    if data_format == FIRST:
        # Each tile reads one vector before its first one again, or none at the beginning of the row.
        tiles = math.prod(plan.grid) * 4 // 8 - 1
        assert plan.kernel == ROWS
        assert case.x.nbytes <= moved <= case.x.nbytes * 1.1 and sectors == least, tiles
    else:
        integers = plan.integers
        walks = integers[6]
        again = (walks - 1) * 3 * channels * itemsize
        assert plan.kernel == CARRY
        assert moved == case.x.nbytes + again + walks * case.w.nbytes
        assert sectors == least == moved // 32


# --- Machine code ------------------------------------------------------------------------------------------------

ARCHITECTURES = ("sm_75", "sm_90", "sm_120")
needs_nvrtc = pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))


def machine_code(plan, arch):
    cubin = emulator.nvrtc.compile_cubin(kernel_directory() / f"{plan.kernel}.cu", arch, dict(plan.constants))
    return functions(cubin)[plan.kernel]


def limits_of(arch):
    return next(limits for limits in DEVICES.values() if limits.arch == arch)


def large_plans(limits, dtype):
    """Plans of every kernel for large arrays, where threads do the most."""
    last, first = {"padding": "same"}, {"padding": "same", "data_format": FIRST}
    aligned = (0,) * 6
    for taps in (4, 8):
        shape = depthwise_shape((8, 4096, 512), (taps, 512, 1), **last)
        yield plans.plan_depthwise(shape, dtype, "linear", aligned[:3], limits)
        grads = depthwise_grad.plan_depthwise_grads(shape, dtype, aligned, WORKSPACE, limits)
        if not isinstance(grads, str):
            yield grads.launch
        yield depthwise_grad.plan_depthwise_kernel_grad(shape, dtype, aligned[:4], WORKSPACE, limits).launch
        shape = depthwise_shape((8, 512, 4096), (taps, 512, 1), **first)
        yield plans.plan_depthwise(shape, dtype, "linear", aligned[:3], limits)
        yield depthwise_grad.plan_depthwise_grads(shape, dtype, aligned, WORKSPACE, limits).launch
    for sizes, taps in (((32, 2048, 512), (31,)), ((64, 56, 56, 128), (7, 7)), ((64, 56, 56, 128), (3, 3))):
        shape = depthwise_shape(sizes, (*taps, sizes[-1], 1), **last)
        yield plans.plan_depthwise(shape, dtype, "linear", aligned[:3], limits)
        yield depthwise_grad.plan_depthwise_kernel_grad(shape, dtype, aligned[:4], WORKSPACE, limits).launch
    shape = depthwise_shape((64, 128, 56, 56), (3, 3, 128, 1), **first)
    yield plans.plan_depthwise(shape, dtype, "linear", aligned[:3], limits)
    shape = depthwise_shape((64, 56, 56, 128), (3, 3, 128, 1), strides=2, **last)
    yield plans.plan_depthwise(shape, dtype, "linear", aligned[:3], limits)
    yield plans.plan_depthwise_transpose(shape, dtype, aligned[:3], limits)
    if not ELEMENTS[dtype].is_complex:
        for sizes, data_format in (((8, 4096, 512), CHANNELS_LAST), ((8, 512, 4096), FIRST)):
            shape = depthwise_shape(sizes, (4, 512, 1), padding="causal", data_format=data_format)
            yield plans.plan_depthwise(shape, dtype, "silu", aligned[:3], limits)
        shape = depthwise_shape((64, 56, 56, 128), (3, 3, 128, 1), **last)
        yield plans.plan_depthwise(shape, dtype, "silu", aligned[:3], limits)


def assert_no_spill(dtype, arch, most=None):
    for plan in list(dict.fromkeys(large_plans(limits_of(arch), dtype)))[:most]:
        code = machine_code(plan, arch)
        assert code.stack_bytes == 0, f"{plan}: {code.stack_bytes} bytes of stack"
        assert code.shared_bytes == plan.shared_bytes - plan.dynamic_shared_bytes, plan


@needs_nvrtc
def test_large_problems_spill_nothing():
    """The kernels of four taps; the rest of the list is longer than the tests without CI may take."""
    assert_no_spill("bfloat16", "sm_90", 5)


@needs_nvrtc
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", sorted({limits.arch for limits in DEVICES.values()}))
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_spills_anywhere(dtype, arch):
    assert_no_spill(dtype, arch)


@needs_nvrtc
@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_steady_loop_of_four_taps_loads_and_stores_16_bytes_an_output(arch, dtype):
    shape = depthwise_shape((8, 4096, 512), (4, 512, 1), padding="causal")
    plan = plans.plan_depthwise(shape, dtype, "linear", (0, 0, 0), limits_of(arch))
    outputs = dict(plan.constants)["TP"]
    loop = next(loop for loop in machine_code(plan, arch).loops if loop.innermost)
    assert plan.kernel == CARRY
    assert loop.count("LDG") == loop.count("LDG", "128") == outputs
    assert loop.count("STG") == loop.count("STG", "128") == outputs
    if dtype == "float32" or arch != "sm_75":  # which has no instruction that rounds to bfloat16
        assert loop.share("FFMA", "FFMA2") >= 0.5


# --- Plans -------------------------------------------------------------------------------------------------------

SHAPES = (
    # PERFORMANCE.md, rows 20 to 26, 37 and 38
    ((8, 2048, 5120), (4, 5120, 1), {"padding": "causal"}),
    ((1, 16384, 12288), (4, 12288, 1), {"padding": "causal"}),
    ((3072, 202, 128), (3, 128, 1), {}),
    ((32, 1000, 512), (31, 512, 1), {"padding": "same"}),
    ((32, 1024, 512), (7, 512, 1), {"padding": "same", "dilation_rate": 64}),
    ((2, 8192, 4096), (128, 4096, 1), {"padding": "causal"}),
    ((64, 56, 56, 96), (7, 7, 96, 1), {"padding": "same"}),
    ((128, 56, 56, 144), (3, 3, 144, 1), {"padding": "same", "strides": 2}),
    ((2, 9, 10, 11, 3), (3, 3, 3, 3, 2), {"padding": "same", "dilation_rate": 2}),
    ((1, 5, 1), (1, 1, 1), {"strides": 3}),
    ((2, 7, 3), (5, 3, 7), {"padding": "same", "strides": 2, "dilation_rate": 3}),
    # more than 2^31 elements
    ((70000, 4096, 16), (4, 16, 1), {"padding": "causal"}),
    ((40, 4096, 4096, 8), (3, 3, 8, 1), {"padding": "same"}),
    ((1, 2**33, 1), (3, 1, 1), {}),
)
LAYOUT_OF = {CHANNELS_LAST: lambda s: s, FIRST: lambda s: (s[0], s[-1], *s[1:-1])}


def every_plan(limits):
    for data_format, layout in LAYOUT_OF.items():
        for x_shape, w_shape, options in SHAPES:
            shape = depthwise_shape(layout(x_shape), w_shape, data_format=data_format, **options)
            for dtype in ("float32", "bfloat16", "complex128"):
                yield shape, dtype, plans.plan_depthwise(shape, dtype, "linear", (0, 0, 0), limits), "y"
                yield shape, dtype, plans.plan_depthwise_transpose(shape, dtype, (0, 0, 0), limits), "dx"
                yield (
                    shape,
                    dtype,
                    depthwise_grad.plan_depthwise_kernel_grad(shape, dtype, (0,) * 4, WORKSPACE, limits),
                    "dw",
                )
                grads = depthwise_grad.plan_depthwise_grads(shape, dtype, (0,) * 6, WORKSPACE, limits)
                if not isinstance(grads, str):
                    yield shape, dtype, grads, "all"


def covered(plan, target, rows):
    """Outputs that the threads of a plan own, at least as many as there are."""
    constants = dict(plan.constants)
    if plan.kernel == CARRY:
        threads, vectors, _, _, filters, _, _, steps, *_ = plan.integers
        assert vectors * constants["VEC"] == filters
        return threads * constants["VEC"] * steps
    if plan.kernel == ROWS:
        tile = constants["TR"] * constants["TV"] * 16 // ELEMENT_BYTES[constants["ELEMENT"]]
        return plan.grid[0] * 128 // constants["TR"] * tile * plan.integers[2]
    if plan.kernel == TILE:
        return plan.grid[0] * 128 * constants["VEC"] * constants["TP"]
    if plan.kernel == TOEPLITZ:
        return plan.grid[0] * constants["BC"] * 16 * 8 * constants["NB"]
    threads = plan.integers[0]
    return threads * constants["VEC"] * constants["TP"]


ELEMENT_BYTES = {element.c_type: element.bytes for element in ELEMENTS.values()}


@pytest.mark.parametrize("name", DEVICES)
def test_plans_cover_every_output_within_the_limits_of_a_device(name):
    limits = DEVICES[name]
    for shape, dtype, plan, which in every_plan(limits):
        launches = [plan] if which in ("y", "dx") else [plan.launch, plan.reduce, plan.reduce_bias]
        for launch in launches:
            assert 0 < launch.grid[0] <= MAX_GRID_X and launch.grid[1:] == (1, 1), launch
            assert launch.shared_bytes <= limits.shared_bytes
            assert launch.threads <= limits.threads_per_multiprocessor
            assert launch.cost.seconds >= 0.99 * launch.cost.least_bytes / limits.bandwidth, launch
            assert launch.cost.flops >= launch.cost.least_flops * 0.99 or launch.kernel == "reduce_splits", launch
            assert str(launch).startswith(launch.kernel) and launch.reason in str(launch)
            assert launch.index_bytes == 8 or max(map(abs, launch.integers)) <= INT32_MAX
        target = shape.y_shape if which == "y" else shape.x_shape
        if which in ("y", "dx"):
            assert covered(plan, target, shape.batch) >= math.prod(target), plan
            assert 128 * plan.grid[0] >= plan.integers[0] > 128 * (plan.grid[0] - 1) or plan.kernel in (
                ROWS,
                TOEPLITZ,
                TILE,
            )
        else:
            units, share = plan.launch.integers[-2:]
            if plan.launch.kernel == GRAD:
                units, share = plan.launch.integers[6:8]
            assert (plan.splits - 1) * share < units <= plan.splits * share
            assert plan.splits * plan.weights * ELEMENTS[dtype].sum_bytes <= max(
                WORKSPACE, plan.weights * ELEMENTS[dtype].sum_bytes
            )
        wide = max(math.prod(shape.x_shape), math.prod(shape.y_shape)) > INT32_MAX
        assert launches[0].index_bytes == 8 or not wide, plan


def test_indices_are_narrow_where_they_fit():
    shape = depthwise_shape((1, 2**30 // 64, 64), (4, 64, 1), padding="causal")
    plan = plans.plan_depthwise(shape, "bfloat16", "linear", (0, 0, 0), DEVICES["H200"])
    assert plan.index_bytes == 4 and ("INDEX", "int") in plan.constants
    # Few elements, but the taps reach far beyond them.
    shape = depthwise_shape((1, 64, 64), (4, 64, 1), padding="causal", dilation_rate=2**26)
    plan = plans.plan_depthwise(shape, "bfloat16", "linear", (0, 0, 0), DEVICES["H200"])
    assert plan.index_bytes == 8 and ("INDEX", "long long") in plan.constants


def test_plans_say_why():
    shape = depthwise_shape((8, 2048, 512), (31, 512, 1), padding="same")
    plan = plans.plan_depthwise(shape, "float32", "relu", (0, 0, 0), DEVICES["H200"])
    assert plan.kernel == TILE
    assert any("31 taps, at most 8" in reason for reason in plan.rejected)
    assert any("only 16-bit elements" in reason for reason in plan.rejected)
    assert any(reason.startswith("depthwise: ") and "us predicted" in reason for reason in plan.rejected)
    assert "1x128 outputs in shared memory" in str(plan)
    strided = depthwise_shape((8, 512, 2048), (4, 512, 1), padding="same", strides=2, data_format=FIRST)
    plan = plans.plan_depthwise(strided, "float32", "relu", (0, 0, 0), DEVICES["H200"])
    assert any("stride 2, only 1" in reason for reason in plan.rejected)
    grads = depthwise_grad.plan_depthwise_grads(strided, "float32", (0,) * 6, WORKSPACE, DEVICES["H200"])
    assert isinstance(grads, str) and "stride 2" in grads


def test_dilation_decides_the_walk_and_the_halo():
    """Phases are walked apart, and a tile of a row has what its taps reach."""
    for dilation in (1, 16, 512):
        shape = depthwise_shape((8, 16384, 128), (2, 128, 1), padding="causal", dilation_rate=dilation)
        plan = plans.plan_depthwise(shape, "bfloat16", "linear", (0, 0, 0), DEVICES["H200"])
        assert plan.kernel == CARRY and plan.integers[5] == dilation
        shape = depthwise_shape(
            (8, 128, 16384), (2, 128, 1), padding="causal", dilation_rate=dilation, data_format=FIRST
        )
        plan = plans.plan_depthwise(shape, "bfloat16", "linear", (0, 0, 0), DEVICES["H200"])
        constants = dict(plan.constants)
        assert plan.kernel == ROWS and constants["HALO"] * 8 >= dilation and constants["UNIT"] == (dilation == 1)


@pytest.mark.parametrize("stride", range(1, 8))
@pytest.mark.parametrize("dilation", range(1, 8))
def test_the_taps_of_the_transpose_are_those_that_reach_a_position(stride, dilation):
    """line_of of depthwise.cuh, in the same words, against a search."""
    taps, pad, sizes = 5, 4, 30
    shape = depthwise_shape((1, sizes, 1), (taps, 1, 1), strides=stride, dilation_rate=dilation, padding=((pad, 30),))
    axis = depthwise_problem.problem_of(shape, "float32", DEVICES["H200"], transposed=True).walk
    every = axis.stride // axis.common
    for u in range(sizes):
        reach = u + axis.pad
        tap = reach // axis.common % every * axis.inverse % every
        none = reach % axis.common or tap >= axis.taps
        found = [] if none else list(range(tap, axis.taps, every))
        expected = [r for r in range(taps) if (u + pad - r * dilation) % stride == 0]
        assert found == expected


def test_a_kernel_that_does_not_compute_a_problem_says_so():
    limits = DEVICES["H200"]
    shape = depthwise_shape((1, 20, 4), (4, 4, 1), strides=2)
    with pytest.raises(PlanError, match="stride 2 does not divide dilation 1"):
        plans.plan_carry(depthwise_problem.problem_of(shape, "float32", limits), "linear", (0, 0, 0))
    with pytest.raises(PlanError, match="channels first"):
        plans.plan_rows(depthwise_problem.problem_of(shape, "float32", limits), "linear", (0, 0, 0))


# --- Wide indices ------------------------------------------------------------------------------------------------


@emulated
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_the_end_of_an_array_of_more_than_4_gib(data_format):
    """Only the last blocks run, on memory that is not there until it is touched."""
    positions = 2**28 + 64
    sizes = (1, 8, positions) if data_format == FIRST else (1, positions, 8)
    shape = depthwise_shape(sizes, (4, 8, 1), padding="causal", data_format=data_format)
    runtime = EmulatedRuntime(DEVICES["H200"], blocks=lambda plan: range(plan.grid[0] - 2, plan.grid[0]))
    x, out = runtime.empty(sizes, "float16"), runtime.empty(sizes, "float16")
    end = (slice(None), slice(None), slice(-16, None)) if data_format == FIRST else (slice(None), slice(-16, None))
    x[end] = uniform(np.random.default_rng(0), x[end].shape, "float16")
    w = uniform(np.random.default_rng(1), (4, 8, 1), "float16")
    depthwise_conv(runtime, shape, x, w, None, None, out, 1 << 20)
    assert runtime.launches[0].index_bytes == 8
    last = (slice(None), slice(-1, None), slice(-8, None)) if data_format == FIRST else (slice(None), slice(-8, None))
    expected = oracle.depthwise_conv(x[end], w, padding="causal", data_format=data_format)
    assert_close(out[last], expected[last], dtype="float16", terms=4)


# --- Everything --------------------------------------------------------------------------------------------------

EVERY = [
    ((2, 37, 16), (4, 16, 1), {"padding": "causal"}),
    ((2, 37, 16), (7, 16, 1), {"padding": "same", "dilation_rate": 3}),
    ((1, 40, 24), (8, 24, 1), {"padding": "same"}),
    ((2, 37, 6), (3, 6, 2), {"padding": "same", "strides": 2}),
    ((2, 21, 5), (5, 5, 1), {"padding": ((1, 3),), "strides": 2, "dilation_rate": 4}),
    ((2, 33, 16), (31, 16, 1), {"padding": "same"}),
    ((2, 33, 4), (19, 4, 4), {"padding": "same", "strides": 3, "dilation_rate": 2}),
    ((1, 9, 14, 8), (3, 3, 8, 1), {"padding": "same"}),
    ((1, 9, 14, 3), (3, 5, 3, 3), {"strides": (2, 3), "padding": "same"}),
    ((2, 5, 6, 7, 8), (3, 2, 3, 8, 1), {"padding": "same", "dilation_rate": (1, 2, 1)}),
    ((2, 5, 6, 7, 2), (1, 3, 2, 2, 2), {"strides": 2}),
    ((2, 3, 5), (1, 5, 1), {"strides": 2}),
]


def every_case():
    """Every problem in both layouts, in two of the six dtypes each; every dtype meets every kernel."""
    for number, (x_shape, w_shape, options) in enumerate(EVERY):
        for other, (data_format, layout) in enumerate(LAYOUT_OF.items()):
            for dtype in (DTYPES[(number + other) % 6], DTYPES[(number + other + 3) % 6]):
                yield Case(layout(x_shape), w_shape, dtype, data_format=data_format, **options)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("case", list(every_case()), ids=str)
def test_every_pass_in_every_dtype(case):
    for which in PASSES:
        case.check(trace(3), which)


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("case, kernels", CASES, ids=lambda value: str(value) if isinstance(value, Case) else "")
def test_wide_indices_give_the_same_bits(monkeypatch, case, kernels):
    narrow = {which: getattr(case, which)(trace()) for which in kernels}
    monkeypatch.setattr(depthwise_problem, "index_bytes", lambda *_: 8)
    forget_plans()
    try:
        for which, expected in narrow.items():
            runtime = trace()
            actual = getattr(case, which)(runtime)
            assert runtime.launches[0].index_bytes == 8
            for a, b in zip(*([each] if which != "all" else each for each in (actual, expected))):
                assert a.tobytes() == b.tobytes()
    finally:
        forget_plans()


def forget_plans():
    for plan in (
        plans.plan_depthwise,
        plans.plan_depthwise_transpose,
        depthwise_grad.plan_depthwise_kernel_grad,
        depthwise_grad.plan_depthwise_grads,
    ):
        plan.cache_clear()


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ACTIVATION_CODES)
def test_every_activation(name):
    for case in (
        Case((1, 9, 8), (4, 8, 1), "float16", padding="causal"),
        Case((1, 2, 8), (4, 2, 1), padding="causal", data_format=FIRST),
        Case((1, 3, 9, 2), (2, 2, 2, 1), padding="same"),
    ):
        result = case.y(trace(), activation=name)
        sums = oracle.depthwise_conv(case.x, case.w, case.bias, **case.options)
        expected = activations.get(name)(sums)
        assert_close(result, expected, dtype=case.dtype, terms=case.taps, slack=1e-5)


# --- Planted bugs ------------------------------------------------------------------------------------------------

RIGHT = Case((2, 29, 8), (4, 8, 1), padding="causal")
RIGHT_ROWS = Case((1, 5, 44), (4, 5, 1), padding="causal", data_format=FIRST)
RESIDUES = Case((1, 20, 4), (3, 4, 1), strides=3, dilation_rate=2, padding="same")
BFLOAT = Case((2, 21, 16), (4, 16, 1), "bfloat16", padding="causal")
COMPLEX = Case((2, 9, 4), (3, 4, 1), "complex64", padding="same", strides=2)


def ignores(which, unread, *shapes, **options):
    """A kernel gradient where the input is not a number at positions that no output reads."""

    def run(runtime):
        case = Case(*shapes, **options)
        expected = oracle.depthwise_conv_kernel_grad(case.x, case.dy, case.w.shape, **case.options)
        case.x = case.x.copy()
        case.x[:, unread] = np.nan
        result = case.dw(runtime) if which == "dw" else case.all(runtime)[1]
        assert_close(result, expected, dtype="float32", terms=case.positions)

    return run


def of(case, which):
    return lambda runtime: case.check(runtime, which)


WRONG = "wrong values"
PLANTS = {
    "carry: no zero fill": (
        "depthwise_carry.cu", "load_or_zero<XV>(from, inside)", "load<XV>(from)", of(RIGHT, "y"), "bounds",
    ),
    "carry: whole loop one input too far": (
        "depthwise_carry.cu", "(TP - 1) * p.source_step < p.source &&", "(TP - 2) * p.source_step < p.source &&",
        of(Case((2, 28, 8), (4, 8, 1), padding=((3, 4),)), "y"), "bounds",
    ),
    "carry: a walk reads one input less": (
        "depthwise_carry.cu", "            outputs + K - 1};", "            outputs + K - 2};", of(RIGHT, "y"), WRONG,
    ),
    "carry: stores before its first output": (
        "depthwise_carry.cu", "walk.i + t < K - 1 || walk.i + t >=", "walk.i + t < K - 2 || walk.i + t >=",
        of(RIGHT, "y"), "bounds",
    ),
    "carry: sums rotate the wrong way": (
        "depthwise_carry.cu", "acc[(t + K - r) % K]", "acc[(t + r) % K]", of(RIGHT, "y"), WRONG,
    ),
    "rows: no zero fill": (
        "depthwise_rows.cu", "load_or_zero<XV>(from + at, row < p.rows && within(at, p.source))",
        "load<XV>(from + at)", of(RIGHT_ROWS, "y"), "bounds",
    ),
    "rows: rows beyond the last": (
        "depthwise_rows.cu", "row < p.rows && within", "within", of(RIGHT_ROWS, "y"), "bounds",
    ),
    "rows: no barrier": ("depthwise_rows.cu", "  __syncthreads();\n", "", of(RIGHT_ROWS, "y"), "race"),
    "rows: no halo": (
        "depthwise_rows.cu", "constexpr int PIECES = SPAN / XV;", "constexpr int PIECES = (SPAN - HALO * V) / XV;",
        of(RIGHT_ROWS, "y"), "uninitialised",
    ),
    "rows: window one element late": (
        "depthwise_windows.cuh", "all[(AT + r + v) / V].at[(AT + r + v) % V]",
        "all[(AT + r + v + 1) / V].at[(AT + r + v + 1) % V]", of(RIGHT_ROWS, "y"), WRONG,
    ),
    "transpose: wrong residue": (
        "depthwise.cuh", "* a.inverse % every", "% every", of(RESIDUES, "dx"), WRONG,
    ),
    "transpose: taps of the wrong end": (
        "depthwise.cuh", "tap + (count - 1) * every, -every}", "tap, every}",
        of(Case((1, 20, 4), (4, 4, 1), strides=2, padding="same"), "dx"), WRONG,
    ),
    "walk: no bound of the outputs": (
        "depthwise.cu", "if (j >= outputs) break;", "", of(RESIDUES, "y"), "bounds",
    ),
    "bfloat16: halves exchanged": (
        "depthwise.cuh", "to[v] = __uint_as_float(words[v / 2] << 16);",
        "to[v] = __uint_as_float(words[v / 2] & 0xffff0000u);", of(BFLOAT, "y"), WRONG,
    ),
    "gradient: no conjugate": (
        "depthwise_grad.cu", "input[v] = conjugate(input[v]);", "", of(COMPLEX, "dw"), WRONG,
    ),
    "gradient: no barrier between two sums": (
        "depthwise.cuh", "  __syncthreads();  // what was in `sums` has been read\n", "", of(RIGHT, "dw"), "race",
    ),
    "gradient: no barrier in the tree": (
        "depthwise.cuh", "    __syncthreads();\n    if (thread < half)", "    if (thread < half)",
        of(RIGHT, "dw"), "race",
    ),
    "gradients: neighbour's outputs are left out": (
        "depthwise_grads.cu", "unit.i0 + i >= K - 1 && ", "i >= K - 1 && ", of(RIGHT, "all"), WRONG,
    ),
    "gradients: outputs that do not exist have products": (
        "depthwise_grads.cu", "(WHOLE || i - r < unit.outputs)", "true",
        ignores("all", range(3, 9), (1, 12, 4), (2, 4, 1), dilation_rate=9), WRONG,
    ),
    "gradient: outputs that do not exist have products": (
        "depthwise_grad.cu", "(WHOLE || j < outputs)", "true",
        ignores("dw", 11, (1, 12, 4), (3, 4, 1), strides=2), WRONG,
    ),
    "gradient rows: rows beyond their end": (
        "depthwise_grad_rows.cu", "load_or_zero<N>(row + at + q, within(at + q, size))", "load<N>(row + at + q)",
        of(RIGHT_ROWS, "all"), "bounds",
    ),
}  # fmt: skip
QUICK = ("rows: no barrier", "transpose: wrong residue", "carry: no zero fill")


@emulated
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in PLANTS]
)
def test_a_planted_bug_is_caught(name):
    file, right, wrong, run, caught = PLANTS[name]
    run(trace())
    with planted(file, right, wrong), pytest.raises((AssertionError, emulator.EmulationError)) as error:
        run(trace())
    if caught == WRONG:
        assert isinstance(error.value, AssertionError)
    else:
        assert isinstance(error.value, emulator.EmulationError)
        assert caught in {report.kind for report in error.value.reports}, error.value


@emulated
@pytest.mark.exhaustive
@pytest.mark.parametrize("data_format", ["channels_last", FIRST])
def test_narrow_indices_on_a_large_array_are_caught(monkeypatch, data_format):
    monkeypatch.setattr(depthwise_problem, "index_bytes", lambda *_: 4)
    forget_plans()
    try:
        with pytest.raises((AssertionError, emulator.EmulationError)):
            test_the_end_of_an_array_of_more_than_4_gib(data_format)
    finally:
        forget_plans()
