"""Convolutions for NumPy and CuPy arrays, on raw CUDA kernels, with Keras' layers on top."""

from cuconv import activations, constraints, initializers, layers, models, ops, regularizers
from cuconv.models import Input, Model, Sequential, load_model
from cuconv.ops import asarray, halo
from cuconv.seeding import set_random_seed
from cuconv.weights import load_weights, save_weights

__version__ = "0.1.0"

__all__ = [
    "Input",
    "Model",
    "Sequential",
    "__version__",
    "activations",
    "asarray",
    "constraints",
    "halo",
    "initializers",
    "layers",
    "load_model",
    "load_weights",
    "models",
    "ops",
    "regularizers",
    "save_weights",
    "set_random_seed",
]
