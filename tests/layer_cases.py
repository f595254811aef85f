"""One small configuration of every layer, and the questions that are asked of all of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from compare import assert_close

from cuconv import layers, ops


@dataclass(frozen=True)
class Case:
    """A layer, its arguments and an input shape it takes."""

    layer: str
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    note: str = ""

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.note}" if self.note else self.layer

    def make(self, **more: Any) -> layers.Layer:
        return getattr(layers, self.layer)(**{**self.arguments, **more})

    def input(self, seed: int = 0, dtype: str = "float64") -> np.ndarray:
        return np.random.default_rng(seed).standard_normal(self.shape).astype(dtype)


def outputs_of(y: Any) -> tuple[np.ndarray, ...]:
    return tuple(y) if isinstance(y, tuple | list) else (y,)


PLAIN = [
    Case("Conv1D", {"filters": 4, "kernel_size": 3}, (2, 7, 2)),
    Case("Conv2D", {"filters": 3, "kernel_size": (3, 2)}, (2, 5, 4, 2)),
    Case("Conv3D", {"filters": 2, "kernel_size": 2}, (1, 3, 4, 3, 2)),
    Case("Conv1DTranspose", {"filters": 3, "kernel_size": 3, "strides": 2}, (2, 4, 2)),
    Case("Conv2DTranspose", {"filters": 2, "kernel_size": (2, 3)}, (1, 3, 4, 3)),
    Case("Conv3DTranspose", {"filters": 2, "kernel_size": 2}, (1, 2, 2, 3, 2)),
    Case("SeparableConv1D", {"filters": 3, "kernel_size": 3, "depth_multiplier": 2}, (2, 7, 2)),
    Case("SeparableConv2D", {"filters": 3, "kernel_size": 2}, (1, 4, 4, 2)),
    Case("DepthwiseConv1D", {"kernel_size": 3, "depth_multiplier": 2}, (2, 7, 2)),
    Case("DepthwiseConv2D", {"kernel_size": (2, 3)}, (1, 4, 4, 3)),
    Case("ConvLSTM1D", {"filters": 2, "kernel_size": 3}, (2, 3, 6, 2)),
    Case("ConvLSTM2D", {"filters": 2, "kernel_size": 2}, (1, 2, 4, 4, 2)),
    Case("ConvLSTM3D", {"filters": 1, "kernel_size": 2}, (1, 2, 3, 3, 3, 1)),
    Case("Cropping1D", {"cropping": (1, 2)}, (2, 6, 2)),
    Case("Cropping2D", {"cropping": ((1, 0), (0, 2))}, (2, 4, 5, 2)),
    Case("Cropping3D", {"cropping": 1}, (1, 4, 3, 3, 2)),
    Case("UpSampling1D", {"size": 3}, (2, 4, 2)),
    Case("UpSampling2D", {"size": (2, 3)}, (2, 3, 2, 2)),
    Case("UpSampling3D", {"size": 2}, (1, 2, 2, 2, 1)),
    Case("ZeroPadding1D", {"padding": (1, 2)}, (2, 4, 2)),
    Case("ZeroPadding2D", {"padding": ((1, 0), (0, 2))}, (2, 3, 3, 2)),
    Case("ZeroPadding3D", {"padding": 1}, (1, 2, 2, 2, 1)),
]

FIRST = {"data_format": "channels_first"}

OPTIONS = [
    Case(
        "Conv1D",
        {"filters": 4, "kernel_size": 3, "padding": "causal", "dilation_rate": 2, "groups": 2, "activation": "tanh"},
        (2, 7, 2),
        "causal-dilated-grouped-tanh",
    ),
    Case(
        "Conv1D", {"filters": 4, "kernel_size": 2, "use_bias": False, "activation": "gelu"}, (2, 5, 2), "no-bias-gelu"
    ),
    Case("Conv1D", {"filters": 4, "kernel_size": 2, "activation": "glu"}, (2, 5, 2), "glu-halves-the-channels"),
    Case(
        "Conv2D",
        {"filters": 3, "kernel_size": 3, "strides": 2, "padding": "same", "activation": "softmax", **FIRST},
        (2, 2, 5, 4),
        "strided-same-softmax-first",
    ),
    Case(
        "Conv2DTranspose",
        {
            "filters": 2,
            "kernel_size": 3,
            "strides": 2,
            "padding": "same",
            "output_padding": 1,
            "activation": "elu",
            **FIRST,
        },
        (1, 2, 3, 3),
        "output_padding-elu-first",
    ),
    Case(
        "SeparableConv2D",
        {"filters": 2, "kernel_size": 2, "strides": (2, 1), "dilation_rate": (1, 2), "activation": "sigmoid", **FIRST},
        (1, 2, 5, 4),
        "strided-dilated-sigmoid-first",
    ),
    Case(
        "DepthwiseConv2D",
        {"kernel_size": 2, "strides": 2, "depth_multiplier": 2, "activation": "selu", "padding": "same", **FIRST},
        (1, 2, 5, 4),
        "strided-selu-first",
    ),
    Case(
        "ConvLSTM1D",
        {
            "filters": 2,
            "kernel_size": 3,
            "strides": 2,
            "padding": "same",
            "return_sequences": True,
            "return_state": True,
            "go_backwards": True,
        },
        (2, 3, 5, 2),
        "sequences-states-backwards",
    ),
    Case(
        "ConvLSTM2D",
        {"filters": 2, "kernel_size": 2, "padding": "same", "use_bias": False, "activation": "softsign", **FIRST},
        (1, 2, 2, 3, 4),
        "no-bias-softsign-first",
    ),
    Case("UpSampling2D", {"size": (2, 3), "interpolation": "bicubic", **FIRST}, (1, 2, 3, 3), "bicubic-first"),
    Case("Cropping2D", {"cropping": ((1, 0), (0, 2)), **FIRST}, (1, 2, 4, 5), "first"),
    Case("ZeroPadding3D", {"padding": ((0, 1), (2, 0), (1, 1)), **FIRST}, (1, 2, 2, 3, 2), "first"),
]

CASES = PLAIN + OPTIONS
WEIGHTED = [case for case in CASES if "filters" in case.arguments or "kernel_size" in case.arguments]

STEP = 1e-6  # of central differences: errors of STEP^2 from the third derivative and eps / STEP from rounding
ALLOWED = 1e-7


def numeric_gradient(function, array):
    """d function() / d array, by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + STEP
        above = function()
        array[index] = kept - STEP
        below = function()
        array[index] = kept
        gradient[index] = (above - below) / (2 * STEP)
    return gradient


def check_gradients(layer, x, *, forward=None):
    """backward() against the finite differences of sum(y * dy) + losses, for x and every weight."""
    rng = np.random.default_rng(1)
    forward = forward or layer.forward
    dys = tuple(rng.standard_normal(y.shape) for y in outputs_of(forward(x)))

    def objective():
        return sum(float(np.sum(y * dy)) for y, dy in zip(outputs_of(forward(x)), dys, strict=True)) + sum(layer.losses)

    forward(x)
    dx = layer.backward(dys if len(dys) > 1 else dys[0])
    gradients = layer.gradients
    assert [g.shape for g in gradients] == [w.shape for w in layer.weights]
    assert_close(dx, numeric_gradient(objective, x), dtype="float64", terms=1, slack=ALLOWED, what="dx")
    for name, w, g in zip(layer.weight_names, layer.weights, gradients, strict=True):
        assert_close(g, numeric_gradient(objective, w), dtype="float64", terms=1, slack=ALLOWED, what=name)


def with_random_weights(layer, shape):
    layer.build(shape)
    rng = np.random.default_rng(2)
    for w in layer.weights:
        w[...] = rng.standard_normal(w.shape)
    return layer


# --- A second array library --------------------------------------------------------------------------------------


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """Stands for an array of another library: not an ndarray, reached through NumPy's protocols."""

    def __init__(self, host):
        self.host = np.asarray(host)

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    size = property(lambda self: self.host.size)

    def __array_function__(self, *args, **kwargs):
        return NotImplemented

    def astype(self, dtype, copy=True):
        return DeviceArray(self.host.astype(dtype, copy=copy))

    def get(self):
        return self.host


def second_place(monkeypatch):
    """Gives ops a second place, where `asarray` and `like` move arrays and `conv` computes; gives the shapes moved."""
    moves = []
    plain_like, plain_conv = ops.like, ops.conv

    def like(array, reference):
        if isinstance(reference, DeviceArray):
            moves.append(array.shape)
            return array if isinstance(array, DeviceArray) else DeviceArray(array)
        return plain_like(array, reference)

    def conv(x, w, bias=None, **options):
        kinds = {type(array) for array in (x, w, bias) if array is not None}
        assert len(kinds) == 1, "arrays of two places met"
        if kinds == {DeviceArray}:
            return DeviceArray(plain_conv(x.host, w.host, None if bias is None else bias.host, **options))
        return plain_conv(x, w, bias, **options)

    monkeypatch.setattr(ops, "asarray", DeviceArray)
    monkeypatch.setattr(ops, "like", like)
    monkeypatch.setattr(ops, "conv", conv)
    return moves
