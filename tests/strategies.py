"""What hypothesis draws: convolutions of every kind, small enough for loops, and how their arrays lie in memory.

A drawn problem is plain data with a readable repr; its arrays come from its seed. Sizes shrink toward 1, options toward
their defaults, so a failure arrives as the smallest convolution that shows it.
"""

import os
from dataclasses import dataclass, field
from math import prod

import numpy as np
import oracle
from compare import LAYOUTS, dtype_of, frozen, is_complex
from hypothesis import settings
from hypothesis import strategies as st

DATA_FORMATS = ("channels_last", "channels_first")
FUSED_ACTIVATIONS = (None, "relu", "tanh", "sigmoid", "softmax")

# Kernel rows of 16 and more elements, and 16 and more filters, take other ways through the NumPy path.
WIDTHS = (1, 2, 3, 5, 16, 17)

# Bytes of scratch memory. None is the default; the others are too little for any of these problems at once.
WORKSPACES = (None, 4096, 512, 1)


def examples(count: int) -> settings:
    """How many examples a test draws; the profile "explore" draws twenty times as many."""
    return settings(max_examples=count * (20 if os.environ.get("HYPOTHESIS_PROFILE") == "explore" else 1))


@dataclass(frozen=True)
class Problem:
    """One call of an operation: shapes, keywords, and the memory layout of its arrays."""

    x_shape: tuple[int, ...]
    w_shape: tuple[int, ...]
    options: dict = field(default_factory=dict)
    bias: bool = False
    activation: str | None = None
    layouts: tuple[str, ...] = ("contiguous", "contiguous")
    out_layout: str | None = None
    workspace: int | None = None
    seed: int = 0

    @property
    def rank(self) -> int:
        return len(self.w_shape) - 2

    @property
    def taps(self) -> int:
        return prod(self.w_shape[:-2])

    @property
    def data_format(self) -> str:
        return self.options.get("data_format") or "channels_last"

    def random(self, *shapes, dtype) -> list[np.ndarray]:
        """Arrays of values between -1 and 1 in the drawn layouts, read-only; the last layout serves the rest."""
        rng = np.random.default_rng(self.seed)
        layouts = [*self.layouts, *[self.layouts[-1]] * len(shapes)]
        return [frozen(uniform(rng, shape, dtype), layout) for shape, layout in zip(shapes, layouts)]


def uniform(rng, shape, dtype) -> np.ndarray:
    """Values between -1 and 1, on both axes of the complex plane for the complex types."""
    values = rng.uniform(-1, 1, shape)
    if is_complex(dtype):
        values = values + 1j * rng.uniform(-1, 1, shape)
    return np.asarray(values).astype(dtype_of(dtype))


@st.composite
def axes(draw, rank: int, transposed: bool, paddings: tuple[str, ...]):
    """Sizes, taps, strides, dilation and padding that fit one another; few enough positions for loops."""
    longest = {1: 5, 2: 3, 3: 2}[rank]
    taps, strides, dilation, sizes, pairs = [], [], [], [], []
    padding = draw(st.sampled_from(paddings))
    for _ in range(rank):
        k = draw(st.sampled_from((1, *range(1, longest + 1))))  # a single tap takes ways of its own
        s = draw(st.integers(1, 3))
        d = draw(st.integers(1, 3))
        span = (k - 1) * d + 1
        before, after = (draw(st.integers(0, 3)), draw(st.integers(0, 3))) if padding == "pairs" else (0, 0)
        least = 1
        if not transposed and padding in ("valid", "pairs"):
            least = max(1, span - before - after)
        if transposed and padding == "pairs":
            least = max(1, -((span - before - after) // s) + 1)
        room = {1: 9, 2: 4, 3: 2}[rank]
        taps.append(k)
        strides.append(s)
        dilation.append(d)
        sizes.append(least + draw(st.integers(0, room)))
        pairs.append((before, after))
    return tuple(sizes), tuple(taps), tuple(strides), tuple(dilation), tuple(pairs) if padding == "pairs" else padding


def options_of(draw, rank, strides, dilation, padding) -> dict:
    """The keywords, in the several ways in which the same can be said."""
    options = {"strides": strides, "dilation_rate": dilation, "padding": padding}
    for name in ("strides", "dilation_rate"):
        if len(set(options[name])) == 1 and draw(st.booleans()):
            options[name] = options[name][0]
    if rank == 1 and not isinstance(padding, str) and draw(st.booleans()):
        options["padding"] = padding[0]
    data_format = draw(st.sampled_from((None, *DATA_FORMATS)))
    if data_format is not None or draw(st.booleans()):
        options["data_format"] = data_format
    return options


def memory(draw, out: bool = True) -> dict:
    """Layouts of the two operands and of `out`, and the workspace."""
    layout = st.sampled_from(LAYOUTS)
    return {
        "layouts": (draw(layout), draw(layout)),
        "out_layout": draw(st.none() | layout) if out else None,
        "workspace": draw(st.sampled_from(WORKSPACES)),
        "seed": draw(st.integers(0, 2**16)),
    }


def with_channels(batch: int, sizes: tuple, channels: int, data_format: str | None) -> tuple[int, ...]:
    return (batch, channels, *sizes) if data_format == "channels_first" else (batch, *sizes, channels)


RANKS = st.sampled_from((1, 1, 2, 2, 3))
BATCHES = st.sampled_from((1, 2, 3, 1, 2, 3, 0))
PER_GROUP = st.sampled_from(WIDTHS)
GROUPS = st.sampled_from((1, 1, 1, 2, 3))


def paddings_of(rank: int) -> tuple[str, ...]:
    return ("valid", "same", "causal", "pairs") if rank == 1 else ("valid", "same", "pairs")


@st.composite
def convolutions(draw, ranks=RANKS, paddings=None):
    """A problem of `conv` and its gradients."""
    rank = draw(ranks)
    sizes, taps, strides, dilation, padding = draw(axes(rank, False, paddings or paddings_of(rank)))
    groups, c, f = draw(GROUPS), draw(PER_GROUP), draw(PER_GROUP)
    options = options_of(draw, rank, strides, dilation, padding)
    if groups > 1 or draw(st.booleans()):
        options["groups"] = groups
    x_shape = with_channels(draw(BATCHES), sizes, groups * c, options.get("data_format"))
    return Problem(
        x_shape,
        (*taps, c, groups * f),
        options,
        draw(st.booleans()),
        draw(st.sampled_from(FUSED_ACTIVATIONS)),
        **memory(draw),
    )


@st.composite
def transposed_convolutions(draw):
    """A problem of `conv_transpose` and its gradients."""
    rank = draw(RANKS)
    sizes, taps, strides, dilation, padding = draw(axes(rank, True, ("valid", "same", "pairs")))
    groups, c, f = draw(GROUPS), draw(PER_GROUP), draw(PER_GROUP)
    options = options_of(draw, rank, strides, dilation, padding)
    if draw(st.booleans()):
        options["output_padding"] = tuple(draw(st.integers(0, s - 1)) for s in strides)
    if groups > 1 or draw(st.booleans()):
        options["groups"] = groups
    x_shape = with_channels(draw(BATCHES), sizes, groups * c, options.get("data_format"))
    return Problem(
        x_shape,
        (*taps, f, groups * c),
        options,
        draw(st.booleans()),
        draw(st.sampled_from(FUSED_ACTIVATIONS)),
        **memory(draw),
    )


@st.composite
def depthwise_convolutions(draw):
    """A problem of `depthwise_conv` and its gradients; of `separable_conv` with a matrix added to it."""
    rank = draw(RANKS)
    sizes, taps, strides, dilation, padding = draw(axes(rank, False, paddings_of(rank)))
    channels, multiplier = draw(PER_GROUP), draw(st.sampled_from((1, 1, 2, 3)))
    options = options_of(draw, rank, strides, dilation, padding)
    x_shape = with_channels(draw(BATCHES), sizes, channels, options.get("data_format"))
    return Problem(
        x_shape,
        (*taps, channels, multiplier),
        options,
        draw(st.booleans()),
        draw(st.sampled_from(FUSED_ACTIVATIONS)),
        **memory(draw),
    )


INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos3", "lanczos5")


@dataclass(frozen=True)
class Upsampling(Problem):
    """A problem of `upsample`; there is no kernel, `w_shape` stands for the factors."""

    size: int | tuple[int, ...] = 2
    interpolation: str = "nearest"


@st.composite
def upsamplings(draw, interpolations=INTERPOLATIONS):
    rank = draw(RANKS)
    sizes = tuple(draw(st.integers(1, {1: 9, 2: 5, 3: 3}[rank])) for _ in range(rank))
    factors = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    size = factors[0] if len(set(factors)) == 1 and draw(st.booleans()) else factors
    data_format = draw(st.sampled_from(DATA_FORMATS))
    x_shape = with_channels(draw(BATCHES), sizes, draw(st.integers(1, 4)), data_format)
    return Upsampling(
        x_shape,
        (*factors, 1, 1),
        {"data_format": data_format},
        size=size,
        interpolation=draw(st.sampled_from(interpolations)),
        **memory(draw),
    )


@dataclass(frozen=True)
class Step(Problem):
    """A problem of `conv_lstm_step`: `w_shape` is the input kernel.

    `precomputed` passes the input convolution instead of the input; without `recurrent` it holds the recurrent one too.
    """

    precomputed: bool = False
    recurrent: bool = True
    gates: dict = field(default_factory=dict)

    @property
    def filters(self) -> int:
        return self.w_shape[-1] // 4

    @property
    def recurrent_shape(self) -> tuple[int, ...]:
        return (*self.w_shape[:-2], self.filters, 4 * self.filters)

    @property
    def x_gates_shape(self) -> tuple[int, ...]:
        """Shape of the input convolution."""
        return oracle.conv(np.zeros(self.x_shape), np.zeros(self.w_shape), **self.options).shape

    @property
    def state_shape(self) -> tuple[int, ...]:
        axis = 1 if self.data_format == "channels_first" else -1
        shape = list(self.x_gates_shape)
        shape[axis] //= 4
        return tuple(shape)


@st.composite
def conv_lstm_steps(draw, activations=("tanh", "relu", "linear"), recurrent=("sigmoid", "hard_sigmoid", "softmax")):
    rank = draw(st.sampled_from((1, 1, 2, 3)))
    sizes, taps, strides, dilation, padding = draw(axes(rank, False, ("valid", "same")))
    sizes = tuple(min(n, (k - 1) * d + 2) for n, k, d in zip(sizes, taps, dilation))
    options = options_of(draw, rank, strides, dilation, padding)
    gates = {"activation": draw(st.sampled_from(activations)), "recurrent_activation": draw(st.sampled_from(recurrent))}
    channels, filters = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    x_shape = with_channels(draw(BATCHES), sizes, channels, options.get("data_format"))
    return Step(
        x_shape,
        (*taps, channels, 4 * filters),
        options,
        draw(st.booleans()),
        precomputed=draw(st.booleans()),
        recurrent=draw(st.sampled_from((True, True, False))),
        gates=gates,
        **memory(draw, out=False),
    )
