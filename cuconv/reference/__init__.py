"""The NumPy engine: what :mod:`cuconv.ops` needs of a place where arrays live, on the CPU.

Every function gets its geometry, checked arrays of one dtype and an output to fill. :mod:`cuconv.cuda.engine` has the
same functions.
"""

from numpy import empty

from cuconv.reference.bias_grad import bias_grad
from cuconv.reference.conv import conv, fuses, kernel_grad
from cuconv.reference.conv_lstm import gates, gates_grad
from cuconv.reference.depthwise import (
    depthwise_conv,
    depthwise_grads,
    depthwise_kernel_grad,
    depthwise_transpose,
)
from cuconv.reference.separable import separable_conv, separable_input_grad, separable_kernel_grad
from cuconv.reference.transpose import conv_transpose
from cuconv.reference.upsample import upsample, upsample_input_grad

__all__ = [
    "bias_grad",
    "conv",
    "conv_transpose",
    "depthwise_conv",
    "depthwise_grads",
    "depthwise_kernel_grad",
    "depthwise_transpose",
    "empty",
    "fuses",
    "gates",
    "gates_grad",
    "kernel_grad",
    "separable_conv",
    "separable_input_grad",
    "separable_kernel_grad",
    "upsample",
    "upsample_input_grad",
]
