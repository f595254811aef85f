"""The tests can fail: mistakes that people make in kernels, planted one at a time, and what catches each.

A plant changes the text of one kernel file in a copy of kernels/. The same parity case that passes on the real kernels
must then end in the report or the failure that the plant names.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import emulator
import numpy as np
import pytest
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_conv_kernels import LIMITS, Case, last_blocks, only

from cuconv import geometry
from cuconv.cuda.conv import conv
from cuconv.plan import conv as conv_plans

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

SMALL = (32, 32, 4, 4)


@dataclass(frozen=True)
class Plant:
    """One mistake: in `file` the text `old`, which stands there once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    run: Callable[[EmulatedRuntime], None]
    caught: tuple[str, ...]  # kinds of detector reports, or WRONG; each must show

    def __str__(self) -> str:
        return f"{self.file.partition('.')[0]}-{self.name}"


def forward(runtime):
    Case((2, 19, 4), (3, 4, 8), padding="same").check_forward(runtime)


def ragged(runtime):
    Case((1, 33, 3), (3, 3, 33), padding="same").check_forward(runtime)


def input_grad(runtime):
    Case((2, 19, 4), (3, 4, 8), padding="same", strides=2).check_input_grad(runtime)


def kernel_grad(runtime):
    Case((3, 201, 4), (3, 4, 8), padding="same").check_kernel_grad(runtime)


def complex_kernel_grad(runtime):
    Case((2, 19, 4), (3, 4, 8), "complex64", padding="same").check_kernel_grad(runtime)


def every_seed(runtime):
    """The kernel gradient under several orders of blocks, from workspaces of zeros."""
    case = Case((2, 300, 4), (3, 4, 8), padding="same")
    bits = set()
    for seed in range(4):
        each = EmulatedRuntime(LIMITS, seed=seed)
        each.empty = np.zeros
        bits.add(case.kernel_grad(each).tobytes())
    assert len(bits) == 1


LOOP = """    fetch();
    multiply(acc, xs[buffer], ws[buffer], own);
    buffer ^= 1;
    stage(buffer);
    __syncthreads();
"""

PLANTS = [
    Plant("no barrier in the loop", "conv_simt.cu", LOOP, LOOP.replace("    __syncthreads();\n", ""), forward,
          ("race",)),
    Plant("one buffer for both stages", "conv_simt.cu", LOOP, LOOP.replace("    buffer ^= 1;\n", ""), forward,
          ("race",)),
    Plant("no barrier before the loop", "conv_simt.cu", "  stage(0);\n  __syncthreads();", "  stage(0);", forward,
          ("race",)),
    Plant("a barrier for some", "conv_simt.cu", "    stage(buffer);\n    __syncthreads();",
          "    stage(buffer);\n    if (m0 + thread < 48) __syncthreads();", ragged, ("divergence",)),
    Plant("nothing staged at first", "conv_simt.cu", "  stage(0);\n", "", forward, ("uninitialised",)),
    Plant("no zero fill of x", "conv_simt.cu", "(origin[i] + offset), inside)", "(origin[i] + offset), true)", forward,
          ("bounds",)),
    Plant("no zero fill of w", "conv_simt.cu", "at < BK * VECTORS_N && k < end && n < p.columns",
          "at < BK * VECTORS_N && n < p.columns", forward, ("bounds",)),
    Plant("one input too many", "common.cuh", "{ return unsigned(at) < unsigned(size); }",
          "{ return unsigned(at) <= unsigned(size); }", forward, ("bounds",)),
    Plant("one input too few", "common.cuh", "{ return unsigned(at) < unsigned(size); }",
          "{ return unsigned(at) < unsigned(size - 1); }", forward, (WRONG,)),
    Plant("one result too many", "conv_simt.cu", "if (m0 + own.row(i) >= p.positions) continue;",
          "if (m0 + own.row(i) > p.positions) continue;",
          ragged, ("bounds",)),
    Plant("one filter too many", "conv_simt.cu", "n0 + own.column(j) >= p.columns ||",
          "n0 + own.column(j) > p.columns ||", ragged, ("bounds",)),
    Plant("the stride forgotten", "conv_simt.cu", "window[i][a] * p.stride[a] - p.pad[a]", "window[i][a] - p.pad[a]",
          lambda runtime: Case((2, 19, 4), (3, 4, 8), strides=2).check_forward(runtime), (WRONG,)),
    Plant("one bias for a vector", "conv_simt.cu", "widen(p.bias[f])", "widen(p.bias[f / 4 * 4])", forward, (WRONG,)),
    Plant("a tap that never ends", "conv.cuh", "    d.channel -= p.channels;\n", "", forward, ("hang",)),
    Plant("taps not reversed", "pack_weights.cu", "(p.taps[a] - 1 - t) * p.step[a]", "t * p.step[a]", input_grad,
          (WRONG,)),
    Plant("no barrier in a transposition", "pack_weights.cu", "  __syncthreads();\n", "", input_grad, ("race",)),
    Plant("no taps but the kernel's", "pack_weights.cu", "exists = exists && tap[a] < p.kernel[a];", "",
          input_grad, ("bounds",)),
    Plant("no crop", "conv.cuh", "inside = inside && within(row.at[a] + column.at[a], p.full[a]);", "",
          input_grad, ("bounds",)),
    Plant("positions of the next split", "kernel_grad_simt.cu", "bool inside = position < end;", "bool inside = true;",
          kernel_grad, ("bounds",)),
    Plant("not conjugated", "kernel_grad_simt.cu", "xr[i].at[v] = conjugate(xr[i].at[v]);", "",
          complex_kernel_grad, (WRONG,)),
    Plant("no barrier in the loop", "kernel_grad_simt.cu", LOOP, LOOP.replace("    __syncthreads();\n", ""),
          kernel_grad, ("race",)),
    Plant("the last split forgotten", "parts.cuh", "s < splits", "s < splits - 1", kernel_grad, (WRONG,)),
    Plant("splits added as they come", "kernel_grad_simt.cu", "      store(dw + m * filters + n, v);",
          "for (int q = 0; q < VECW; ++q) atomicAdd(p.dw + g * p.columns + m * filters + n + q, v.at[q]);",
          every_seed, (WRONG,)),
]  # fmt: skip


# On tensor cores: five and seven steps of 32, the last one not full and, of five, where y goes; edges on every side.
SMALL_TENSOR = (32, 32, 16, 16, 64, 4)


def tensor(runtime):
    Case((2, 41, 24), (6, 24, 40), "bfloat16", padding="same").check_forward(runtime)


def tensor_steps(runtime):
    Case((2, 41, 72), (2, 72, 40), "bfloat16").check_forward(runtime)


def tensor_whole(runtime):
    Case((2, 41, 64), (3, 64, 40), "bfloat16", padding="same").check_forward(runtime)


def odd_tensor(runtime):
    Case((2, 41, 13), (15, 13, 39), "float16", padding="same").check_forward(runtime)


TENSOR_PLANTS = [
    Plant("a group too early", "conv_mma.cu", "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", tensor,
          ("pending",)),
    Plant("no barrier in the loop", "conv_mma.cu", "wait<STAGES - 2>();\n      __syncthreads();",
          "wait<STAGES - 2>();", tensor, ("race",)),
    Plant("a stage that is still read", "conv_mma.cu", "if (more) fetch(ahead);", "if (more) fetch(stage);", tensor,
          ("race",)),
    Plant("copies without zeros", "conv_mma.cu", "inside[j][i]);", "true);", tensor, ("bounds",)),
    Plant("rows behind the last", "conv_mma.cu", "WHOLE ? w_inside : i * W_STEP < w_left);", "w_inside);", tensor,
          ("bounds",)),
    Plant("columns behind the last", "conv_mma.cu", "const bool w_inside = n0 + w_column < p.columns;",
          "const bool w_inside = true;", tensor, ("bounds",)),
    Plant("a tap for too long", "conv_mma.cu", "    same = p.channels / BK;\n", "", tensor_whole, ("hang",)),
    Plant("the next tap without its channels", "conv_mma.cu", "depth[j].channel = p.channels + slot_k(j);",
          "depth[j].channel = slot_k(j);", tensor_whole, (WRONG,)),
    Plant("the channels of the step before", "conv_mma.cu", "offset[j] += BK * step_c;", "", tensor_steps, (WRONG,)),
    Plant("another swizzle to read", "mma.cuh", "swizzle<X_ROW>(warp.m + lane % 16, lane / 16 * 16)",
          "swizzle<X_ROW>(warp.m + lane % 16 + 2, lane / 16 * 16) - 2 * X_ROW", tensor, (WRONG,)),
    Plant("halves of b exchanged", "mma.cuh", "b[j][1] = two[1], b[j + 1][0] = two[2]",
          "b[j][1] = two[2], b[j + 1][0] = two[1]", tensor, (WRONG,)),
    Plant("y over what is still read", "conv_mma.cuh", "copy_async_wait<0>();\n  __syncthreads();",
          "copy_async_wait<0>();", tensor, ("race",)),
    Plant("y before it is there", "conv_mma.cuh", "  __syncthreads();\n  Y* y = p.y;", "  Y* y = p.y;", tensor,
          ("race",)),
    Plant("stored before the product", "conv_mma.cu", "    if (more) put(ahead);\n", "    if (more) put(stage);\n",
          odd_tensor, ("race",)),
]  # fmt: skip


# Double, whose fragments are read element by element.
SMALL_DOUBLE = (32, 32, 16, 16, 128, 3)


def double(runtime):
    Case((2, 41, 24), (2, 24, 40), "float64", padding="same").check_forward(runtime)


DOUBLE_PLANTS = [
    Plant("words as chunks", "conv_mma.cu", "swizzle<X_ROW, X_WORDS>(row0", "swizzle<X_ROW>(row0", double, (WRONG,)),
    Plant("halves of a in each other's place", "mma.cuh", "^ r / 2 * 32)", "^ (1 - r / 2) * 32)", double, (WRONG,)),
    Plant("halves of w in one place", "mma.cuh", "(k + r * 4) * W_ROW", "k * W_ROW", double, (WRONG,)),
    Plant("operands rounded to float", "fragments.cuh", "ptx::multiply_double(acc, a, b);",
          "ptx::multiply_double(acc, a, {float(b[0]), float(b[1])});", double, (WRONG,)),
]  # fmt: skip


@pytest.mark.parametrize(
    "bug, dtype, tile",
    [
        *((bug, "float32", SMALL) for bug in PLANTS),
        *((bug, "bfloat16", SMALL_TENSOR) for bug in TENSOR_PLANTS),
        *((bug, "float64", SMALL_DOUBLE) for bug in DOUBLE_PLANTS),
    ],
    ids=str,
)
def test_planted_bug_is_caught(bug, dtype, tile):
    with planted(bug.file, bug.old, bug.new), only(dtype, tile):
        caught = what_catches(bug.run, EmulatedRuntime(LIMITS, mode="trace", seed=1, timeout=3.0))
    assert set(bug.caught) <= caught, caught


def test_without_a_bug_nothing_is_caught():
    all_plants = (PLANTS, "float32", SMALL), (TENSOR_PLANTS, "bfloat16", SMALL_TENSOR)
    for plants, dtype, tile in (*all_plants, (DOUBLE_PLANTS, "float64", SMALL_DOUBLE)):
        with only(dtype, tile):
            for run in {bug.run for bug in plants}:
                assert what_catches(run, EmulatedRuntime(LIMITS, mode="trace", seed=1)) == set()


# --- Mistakes in plans -------------------------------------------------------------------------------------------


class Tampered(EmulatedRuntime):
    """Runs other plans than it is given."""

    change = staticmethod(lambda plan: plan)

    def launch(self, plan, arrays):
        super().launch(self.change(plan), arrays)


def test_a_block_that_is_not_launched():
    runtime = Tampered(LIMITS, mode="trace")
    runtime.change = lambda plan: replace(plan, grid=(plan.grid[0] - 1, 1, 1))
    with only("float32", SMALL):
        assert what_catches(ragged, runtime) == {WRONG}


def test_an_access_wider_than_memory_allows():
    runtime = Tampered(LIMITS, mode="trace")

    def wider(plan):
        return replace(plan, constants=tuple((k, 4 if k == "VECX" else v) for k, v in plan.constants))

    runtime.change = wider
    with only("float32", SMALL):
        assert "alignment" in what_catches(lambda r: Case((1, 33, 6), (3, 6, 8)).check_forward(r), runtime)


def test_indices_of_32_bits_where_64_are_needed(monkeypatch):
    """On a sparse array of 4 GiB and more; only its last block runs."""
    monkeypatch.setattr(conv_plans, "index_bytes", lambda *extents: 4)
    shape = geometry.conv_shape((1, 2**29 + 77, 4), (3, 4, 4), padding="same")
    x, y = np.zeros(shape.x_shape, np.float16), np.zeros(shape.y_shape, np.float16)

    def run(runtime):
        conv(runtime, shape, x, np.ones((3, 4, 4), np.float16), None, None, y, 0)

    for tile in (SMALL, SMALL_TENSOR):
        with only("float16", tile):
            assert "bounds" in what_catches(run, EmulatedRuntime(LIMITS, blocks=last_blocks))
