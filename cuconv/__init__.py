"""Convolutions for NumPy and CuPy arrays, on raw CUDA kernels, with Keras' layers on top."""

from cuconv import ops
from cuconv.ops import asarray

__version__ = "0.1.0"

__all__ = ["__version__", "asarray", "ops"]
