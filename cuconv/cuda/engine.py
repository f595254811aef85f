"""The functions of :mod:`cuconv.reference` on the arrays of a GPU."""

from __future__ import annotations

import functools
from typing import Any

from cuconv.cuda.arrays import Array, Runtime
from cuconv.cuda.bias_grad import bias_grad
from cuconv.cuda.conv import conv, fuses, kernel_grad
from cuconv.cuda.conv_lstm import gates, gates_grad
from cuconv.cuda.depthwise import depthwise_conv, depthwise_grads, depthwise_kernel_grad, depthwise_transpose
from cuconv.cuda.separable import separable_conv, separable_input_grad, separable_kernel_grad
from cuconv.cuda.transpose import conv_transpose
from cuconv.cuda.upsample import upsample, upsample_input_grad


class Engine:
    """What :mod:`cuconv.ops` needs of a place where arrays live, on a runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.fuses = fuses
        bound = functools.partial
        self.bias_grad = bound(bias_grad, runtime)
        self.conv = bound(conv, runtime)
        self.conv_transpose = bound(conv_transpose, runtime)
        self.depthwise_conv = bound(depthwise_conv, runtime)
        self.depthwise_grads = bound(depthwise_grads, runtime)
        self.depthwise_kernel_grad = bound(depthwise_kernel_grad, runtime)
        self.depthwise_transpose = bound(depthwise_transpose, runtime)
        self.gates = bound(gates, runtime)
        self.gates_grad = bound(gates_grad, runtime)
        self.kernel_grad = bound(kernel_grad, runtime)
        self.separable_conv = bound(separable_conv, runtime)
        self.separable_input_grad = bound(separable_input_grad, runtime)
        self.separable_kernel_grad = bound(separable_kernel_grad, runtime)
        self.upsample = bound(upsample, runtime)
        self.upsample_input_grad = bound(upsample_input_grad, runtime)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """A new array in C order, not initialised."""
        return self.runtime.empty(shape, dtype)
