"""The NumPy engine: what :mod:`cuconv.ops` needs of a place where arrays live, on the CPU.

Every function gets its geometry, checked arrays of one dtype and an output to fill. A GPU engine has the same
functions.
"""

from cuconv.reference.conv import conv, kernel_grad
from cuconv.reference.conv_lstm import gates, gates_grad
from cuconv.reference.depthwise import depthwise_conv, depthwise_kernel_grad, depthwise_transpose
from cuconv.reference.separable import separable_conv, separable_input_grad, separable_kernel_grad
from cuconv.reference.transpose import conv_transpose
from cuconv.reference.upsample import upsample, upsample_input_grad

__all__ = [
    "conv",
    "conv_transpose",
    "depthwise_conv",
    "depthwise_kernel_grad",
    "depthwise_transpose",
    "gates",
    "gates_grad",
    "kernel_grad",
    "separable_conv",
    "separable_input_grad",
    "separable_kernel_grad",
    "upsample",
    "upsample_input_grad",
]
