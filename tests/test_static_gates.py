"""What ptxas makes of the kernels, for every architecture and without a GPU: registers, spills, shared memory, and the
instructions that a kernel was written for.

A line of GATES is a plan and what must hold for the machine code of its kernel. Every line also fails on a spill, on a
local array, on a kernel that does not fit a multiprocessor, and on a plan that counts shared memory wrongly.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import disassembly
import emulator
import pytest
from disassembly import ARCHITECTURES, Function

from cuconv.cuda.runtime import kernel_directory
from cuconv.geometry import conv_shape, depthwise_shape
from cuconv.plan.bias_grad import plan_bias_grad
from cuconv.plan.conv import form_of, plan_by_warps, plan_conv, plan_kernel_grad
from cuconv.plan.conv_lstm import plan_gates, plan_gates_grad
from cuconv.plan.depthwise import plan_carry, plan_depthwise
from cuconv.plan.depthwise_grad import plan_grad_tile
from cuconv.plan.depthwise_problem import problem_of
from cuconv.plan.devices import DEVICES
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.transpose import plan_transpose
from cuconv.plan.types import REGISTERS_PER_MULTIPROCESSOR, WARP, DeviceLimits, LaunchPlan, compiled_for

pytestmark = pytest.mark.skipif(emulator.nvrtc.missing() is not None, reason=str(emulator.nvrtc.missing()))

# One device for each architecture; the others run in the full list.
LIMITS = {arch: next(d for d in DEVICES.values() if d.arch == arch.rstrip("a")) for arch in ARCHITECTURES}
DEFAULT = ("sm_75", "sm_80", "sm_90")

REGISTER_UNIT = 256  # registers of a warp are given out in multiples of this


@dataclass(frozen=True)
class Gate:
    """What must hold for the kernel of a plan.

    Attributes:
        plan: makes it for a device.
        registers: a thread may have.
        needs: instructions that must occur, an opcode and its modifiers: "LDG.128".
        lacks: instructions that must not.
        loop: opcodes, and the share of the main loop's instructions that they must have.
        loop_needs: instructions that must occur in that loop.
        integers: share of that loop's instructions that may be on integers and addresses.
        paired: that loop loads and stores 16 bytes at a time, one load for each store, and nothing else.
        since, until: the first and the last compute capability that it holds for.
    """

    name: str
    plan: Callable[[DeviceLimits], LaunchPlan]
    registers: int
    needs: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    loop: tuple[tuple[str, ...], float] = ((), 0.0)
    loop_needs: tuple[str, ...] = ()
    integers: float = 1.0
    paired: bool = False
    since: tuple[int, int] = (7, 5)
    until: tuple[int, int] = (99, 9)


ALIGNED = (0, 0, 0)
WORKSPACE = 1 << 30  # bytes

# 3 x 3, 256 channels to 256 filters: compute-bound, and everything a multiple of every tile.
LAST = conv_shape((32, 64, 64, 256), (3, 3, 256, 256), padding="same")
FIRST = conv_shape((32, 256, 64, 64), (3, 3, 256, 256), padding="same", data_format="channels_first")
CUBES = conv_shape((8, 16, 32, 32, 256), (3, 3, 3, 256, 256), padding="same")
SEQUENCE = conv_shape((8, 16384, 128), (2, 128, 256), padding="causal", dilation_rate=512)
# No input has two taps: the kernel that loads inputs once a tap.
PATCHES = conv_shape((32, 64, 64, 256), (2, 2, 256, 512), strides=2)
STRIDED = conv_shape((32, 128, 128, 256), (4, 4, 256, 256), strides=2, padding="same")


def _ordinary(limits):
    """A device whose tensor cores have 16-bit products only."""
    return dataclasses.replace(limits, tf32_rate=0.0, dmma_rate=0.0)


def _tensor(limits):
    """One whose tensor cores are the fastest choice, whatever the real one's are."""
    rates = {"tf32_rate": 100 * limits.fp32_rate, "dmma_rate": 100 * limits.fp64_rate}
    return dataclasses.replace(limits, bandwidth=100 * limits.bandwidth, **rates)


def _conv(shape, dtype, device=_ordinary, precision="highest"):
    return lambda limits: plan_conv(shape, dtype, "linear", ALIGNED, device(limits), precision)


def _conv_by_warps(shape, dtype):
    return lambda limits: plan_by_warps(form_of(shape), dtype, "linear", ALIGNED, limits)


def _kernel_grad(shape, dtype, device=_ordinary, precision="highest"):
    return lambda limits: plan_kernel_grad(shape, dtype, ALIGNED, WORKSPACE, device(limits), precision).grad


def _transposed(limits):
    return plan_transpose(STRIDED, "float32", "linear", ALIGNED, _ordinary(limits)).parts[0].conv


def _packing(limits):
    return plan_transpose(STRIDED, "float32", "linear", ALIGNED, limits).parts[0].pack


def _depthwise(taps, dtype):
    shape = depthwise_shape((8, 2048, 512), (taps, 512, 1), padding="causal")
    return lambda limits: plan_depthwise(shape, dtype, "linear", ALIGNED, limits)


def _depthwise_grad(taps, dtype):
    shape = depthwise_shape((32, 1000, 512), (taps, 512, 1), padding="same")
    return lambda limits: plan_grad_tile(problem_of(shape, dtype, limits), ALIGNED[:2], WORKSPACE)[0]


def _depthwise_carry(taps, dtype, activation="linear", transposed=False):
    shape = depthwise_shape((8, 2048, 512), (taps, 512, 1), padding="causal")
    return lambda limits: plan_carry(problem_of(shape, dtype, limits, transposed=transposed), activation, ALIGNED)


def _depthwise_first(taps, dtype):
    shape = depthwise_shape((8, 512, 2048), (taps, 512, 1), padding="causal", data_format="channels_first")
    return lambda limits: plan_depthwise(shape, dtype, "linear", ALIGNED, limits)


def _bias_grad(dtype):
    return lambda limits: plan_bias_grad(32 * 64 * 64, 256, 1, dtype, ALIGNED, WORKSPACE, limits)[0][0]


def _lstm(plan, dtype):
    return lambda limits: plan(32 * 64 * 64, 64, "tanh", "sigmoid", dtype, ALIGNED, limits)


FP32 = ("FFMA", "FFMA2")
WIDE = ("LDG.128", "STG.128")
STAGED = ("LDS.128",)

GATES = (
    Gate("conv float32", _conv(LAST, "float32"), 128, WIDE, loop=(FP32, 0.80), loop_needs=STAGED),
    Gate(
        "conv float16",
        _conv(LAST, "float16"),
        144,
        ("LDG.128", "STG.64"),
        loop=(FP32, 0.78),
        loop_needs=STAGED,
        until=(7, 5),
    ),
    *(
        Gate(
            f"conv {name} on tensor cores",
            _conv_by_warps(shape, dtype),
            255,
            ("STG.128",),
            loop=(("HMMA",), share),
            loop_needs=("LDSM", *copies),
            integers=integers,
            since=(8, 0),
        )
        for name, shape, dtype, share, copies, integers in (
            ("float16", LAST, "float16", 0.30, ("LDGSTS.128",), 0.25),
            ("bfloat16 sequences", SEQUENCE, "bfloat16", 0.30, ("LDGSTS.128",), 0.25),
            ("bfloat16 of a stride", PATCHES, "bfloat16", 0.26, ("LDGSTS.128",), 0.25),
            ("bfloat16 channels_first", FIRST, "bfloat16", 0.07, ("LDGSTS.128", "STS"), 1.0),
        )
    ),
    *(
        Gate(
            f"conv {name} on tensor cores",
            _conv(shape, dtype, _tensor, precision),
            255,
            loop=((unit,), share),
            loop_needs=needs,
            since=(8, 0),
            until=until,
        )
        for name, shape, dtype, precision, unit, share, needs, until in (
            ("TF32", LAST, "float32", "high", "HMMA", 0.14, ("LDSM", "LDS", "LDGSTS.128"), (99, 9)),
            ("3xTF32", LAST, "float32", "highest", "HMMA", 0.18, ("LDSM", "LDS", "LDGSTS.128"), (99, 9)),
            ("3xTF32 three axes", CUBES, "float32", "highest", "HMMA", 0.18, ("LDSM", "LDGSTS.128"), (99, 9)),
            ("3xTF32 channels_first", FIRST, "float32", "highest", "HMMA", 0.13, ("LDSM", "LDGSTS"), (99, 9)),
            # Later ones have no such unit.
            ("float64", LAST, "float64", "highest", "DMMA", 0.08, ("LDS.64", "LDGSTS.128"), (10, 0)),
        )
    ),
    *(
        Gate(
            f"conv {name} by warpgroups",
            _conv(shape, dtype),
            168,
            ("UTMALDG", "USETMAXREG", "STG.128"),
            loop=(("HGMMA",), 0.05),
            loop_needs=("SYNCS", "WARPGROUP.DEPBAR"),
            since=(9, 0),
            until=(9, 0),
        )
        for name, shape, dtype in (("float16", LAST, "float16"), ("bfloat16 sequences", SEQUENCE, "bfloat16"))
    ),
    Gate("conv float64", _conv(LAST, "float64"), 160, WIDE, loop=(("DFMA",), 0.50), loop_needs=STAGED),
    Gate("conv complex64", _conv(LAST, "complex64"), 128, WIDE, loop=(FP32, 0.80), loop_needs=STAGED),
    Gate("conv complex128", _conv(LAST, "complex128"), 160, WIDE, loop=(("DFMA",), 0.60), loop_needs=STAGED),
    Gate("conv float32 channels_first", _conv(FIRST, "float32"), 168, WIDE, loop=(FP32, 0.74), loop_needs=STAGED),
    Gate("conv float64 channels_first", _conv(FIRST, "float64"), 144, WIDE, loop=(("DFMA",), 0.50), loop_needs=STAGED),
    Gate("kernel_grad float32", _kernel_grad(LAST, "float32"), 168, WIDE, loop=(FP32, 0.70), loop_needs=STAGED),
    Gate("kernel_grad float64", _kernel_grad(LAST, "float64"), 160, WIDE, loop=(("DFMA",), 0.46), loop_needs=STAGED),
    Gate("transposed float32", _transposed, 136, WIDE, loop=(FP32, 0.80), loop_needs=STAGED),
    Gate("pack_weights", _packing, 64),
    Gate("reduce_splits float32", lambda d: plan_reduce("float32", 16, 1 << 20, 0, d), 64, WIDE),
    Gate("depthwise_carry float32", _depthwise_carry(4, "float32"), 96, loop=(FP32, 0.40), paired=True),
    Gate("depthwise_carry bfloat16", _depthwise_carry(4, "bfloat16"), 128, loop=(FP32, 0.28), paired=True),
    Gate("depthwise_carry silu", _depthwise_carry(4, "float32", "silu"), 168, loop=(FP32, 0.30), paired=True),
    Gate("depthwise_carry bfloat16 silu", _depthwise_carry(4, "bfloat16", "silu"), 168, paired=True),
    Gate("depthwise_carry transposed", _depthwise_carry(4, "float32", transposed=True), 96, paired=True),
    Gate(
        "depthwise_tile k=31 float32",
        _depthwise(31, "float32"),
        168,
        ("LDG.128",),
        loop=(FP32, 0.8),
        loop_needs=("LDS.64",),
    ),
    Gate(
        "depthwise_grad_tile k=31 bfloat16",
        _depthwise_grad(31, "bfloat16"),
        144,
        ("LDG.128",),
        loop=(FP32, 0.5),
        loop_needs=("LDS",),
    ),
    Gate(
        "depthwise_toeplitz k=31 bfloat16",
        _depthwise(31, "bfloat16"),
        96,
        WIDE,
        loop=(("HMMA",), 0.03),  # beside the epilogue; the memory leaves room for it
        loop_needs=("LDSM", "LDS", "STS"),
        since=(8, 0),
    ),
    Gate("depthwise_rows float32", _depthwise_first(4, "float32"), 80, WIDE),
    Gate("depthwise_rows bfloat16", _depthwise_first(4, "bfloat16"), 64, WIDE),
    Gate("bias_grad float32", _bias_grad("float32"), 64, ("LDG.128",), loop=(("FADD",), 0.15), loop_needs=("LDG.128",)),
    Gate("bias_grad float16", _bias_grad("float16"), 64, ("LDG.128",), loop=(("FADD",), 0.15), loop_needs=("LDG.128",)),
    Gate("conv_lstm float32", _lstm(plan_gates, "float32"), 80, WIDE),
    Gate("conv_lstm float16", _lstm(plan_gates, "float16"), 80, WIDE),
    Gate("conv_lstm_grad float32", _lstm(plan_gates_grad, "float32"), 80, WIDE),
)

# What a kernel is known to miss on an architecture, with the reason; a gate that holds again must leave this list.
MISSED: dict[tuple[str, str], str] = {
    **{
        (f"conv {name} on tensor cores", "sm_120"): "0.4 of a step of 16 products of a warp is on integers"
        for name in ("float16", "bfloat16 sequences", "bfloat16 of a stride")
    },
    ("conv bfloat16 of a stride on tensor cores", "sm_86"): "0.42 of a step of 16 products of a warp is on integers",
    ("conv bfloat16 of a stride on tensor cores", "sm_100"): "0.254 of the loop is on integers",
    (
        "conv bfloat16 of a stride on tensor cores",
        "sm_90",
    ): "0.28 of the loop is on integers: addresses are computed anew",
    ("conv bfloat16 of a stride on tensor cores", "sm_90a"): "as sm_90",
}


def _cases():
    for gate in GATES:
        for arch in (each for each in ARCHITECTURES if gate.since <= LIMITS[each].capability <= gate.until):
            marks = [] if arch in DEFAULT else [pytest.mark.exhaustive]
            if reason := MISSED.get((gate.name, arch)):
                marks.append(pytest.mark.xfail(strict=True, reason=reason))
            yield pytest.param(gate, arch, id=f"{gate.name} {arch}", marks=marks)


def compiled(plan: LaunchPlan, arch: str) -> Function:
    """The machine code of a plan's kernel."""
    path = kernel_directory() / f"{plan.kernel}.cu"
    arch = compiled_for(plan.kernel, arch)
    return disassembly.functions(emulator.compile_cubin(path, arch, dict(plan.constants)))[plan.kernel]


def complaints(gate: Gate, plan: LaunchPlan, function: Function) -> list[str]:
    """What does not hold, each with what was found."""
    found = []
    if function.registers > gate.registers:
        found.append(f"{function.registers} registers, {gate.registers} are allowed")
    of_a_warp = math.ceil(function.registers * WARP / REGISTER_UNIT) * REGISTER_UNIT
    if math.ceil(plan.threads / WARP) * of_a_warp > REGISTERS_PER_MULTIPROCESSOR:
        found.append(f"{plan.threads} threads of {function.registers} registers do not fit a multiprocessor")
    if function.stack_bytes:
        found.append(f"{function.stack_bytes} bytes of stack a thread: spilled registers or a local array")
    shared = plan.shared_bytes - plan.dynamic_shared_bytes
    if function.shared_bytes != shared:
        found.append(f"{function.shared_bytes} bytes of static shared memory, the plan says {shared}")
    if function.instructions:
        found += _complaints_about_instructions(gate, function)
    return found


def _complaints_about_instructions(gate: Gate, function: Function) -> list[str]:
    found = []
    if function.spills:
        found.append(f"{function.spills} accesses to the stack")
    found += [f"no {what}" for what in gate.needs if not function.count(*what.split("."))]
    found += [f"{function.count(*what.split('.'))} {what}" for what in gate.lacks if function.count(*what.split("."))]
    names, share = gate.loop
    if names or gate.paired:
        loop = function.main_loop(*(names or FP32))
        if loop.share(*names) < share:
            found.append(f"{loop.share(*names):.3f} of the main loop is {' or '.join(names)}, of {loop.mix()}")
        found += [f"no {what} in the main loop" for what in gate.loop_needs if not loop.count(*what.split("."))]
        if loop.share(*disassembly.INTEGER) > gate.integers:
            found.append(f"{loop.share(*disassembly.INTEGER):.3f} of the main loop is on integers, of {loop.mix()}")
        counts = [loop.count(*what) for what in (("LDG",), ("LDG", "128"), ("STG",), ("STG", "128"))]
        if gate.paired and (counts[0] == 0 or len(set(counts)) > 1):
            found.append("the main loop has {} loads, {} of 16 bytes, and {} stores, {} of 16 bytes".format(*counts))
    return found


@pytest.mark.parametrize("gate, arch", list(_cases()))
def test_gate(gate, arch):
    plan = gate.plan(dataclasses.replace(LIMITS[arch], arch=arch))
    found = complaints(gate, plan, compiled(plan, arch))
    assert not found, f"{plan}\n" + "\n".join(found)


def test_instructions_can_be_listed():
    if disassembly.missing():
        pytest.skip(disassembly.missing())
    plan = plan_reduce("float32", 16, 1 << 20, 0, LIMITS["sm_90"])
    assert compiled(plan, "sm_90").instructions


# --- Planted -----------------------------------------------------------------------------------------------------

TILE = """
extern "C" __global__ void __launch_bounds__(256, BLOCKS) tile(const float4* x, float4* y, int n) {
  __shared__ float4 xs[2][256];
  float acc[64] = {};
  for (int k = 0; k < n; k++) {
    xs[k % 2][threadIdx.x] = x[k * 256 + threadIdx.x];
    __syncthreads();
    for (int j = 0; j < 8; j++) {
      const float4 a = xs[k % 2][(threadIdx.x + j) % 256], b = xs[k % 2][j];
      const float p[2] = {a.x * a.z, a.y * a.w}, q[2] = {b.z - b.x, b.w - b.y};
      for (int i = 0; i < 64; i++) acc[i] = acc[i] * p[i % 2] + q[i / 2 % 2];
    }
  }
#ifdef INDEXED
  for (int i = 0; i < n % 64; i++) acc[i] += acc[n % 7];
#endif
  for (int i = 0; i < 16; i++) {
#ifdef NARROW
    for (int j = 0; j < 4; j++) ((float*)y)[(i * 256 + threadIdx.x) * 5 + j] = acc[4 * i + j];
#else
    y[i * 256 + threadIdx.x] = make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]);
#endif
  }
}
"""
PLANTED = {
    "none": ({"BLOCKS": 1}, {}, None),
    "registers": ({"BLOCKS": 1}, {"registers": 40}, "registers, 40 are allowed"),
    "spill": ({"BLOCKS": 4}, {}, "bytes of stack a thread"),
    "local array": ({"BLOCKS": 1, "INDEXED": None}, {}, "bytes of stack a thread"),
    "narrow stores": ({"BLOCKS": 1, "NARROW": None}, {}, "no STG.128"),
    "loop": ({"BLOCKS": 1}, {"loop": (("FFMA",), 0.999)}, "of the main loop is FFMA"),
    "loop needs": ({"BLOCKS": 1}, {"loop_needs": ("SHFL",)}, "no SHFL in the main loop"),
    "integers": ({"BLOCKS": 1}, {"integers": 0.001}, "of the main loop is on integers"),
    "not paired": ({"BLOCKS": 1}, {"paired": True}, "and 0 stores, 0 of 16 bytes"),
    "unwanted": ({"BLOCKS": 1}, {"lacks": ("BAR",)}, "1 BAR"),
}


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
@pytest.mark.parametrize("name", PLANTED)
def test_planted(name, arch):
    defines, changes, expected = PLANTED[name]
    plan = LaunchPlan("tile", (), (), (1, 1, 1), (256, 1, 1), shared_bytes=8192)
    gate = Gate("tile", lambda _: plan, 128, WIDE, loop=(("FFMA",), 0.7), loop_needs=("LDS.128",))
    code = disassembly.functions(emulator.compile_cubin(TILE, arch, defines))["tile"]
    found = complaints(dataclasses.replace(gate, **changes), plan, code)
    assert (found == []) if expected is None else any(expected in each for each in found), found


def test_planted_in_plan():
    plan = LaunchPlan("tile", (), (), (1, 1, 1), (256, 1, 1), shared_bytes=4096)
    code = disassembly.functions(emulator.compile_cubin(TILE, "sm_80", {"BLOCKS": 1}))["tile"]
    gate = Gate("tile", lambda _: plan, 255)
    assert complaints(gate, plan, code) == ["8192 bytes of static shared memory, the plan says 4096"]
    large = dataclasses.replace(plan, shared_bytes=8192, block=(1024, 1, 1))
    assert any("do not fit a multiprocessor" in each for each in complaints(gate, large, code))
