"""Configurations of the 22 layers for the live differential run: random ones from a fixed seed, and directed corners.

A case is plain data: nothing here imports Keras or cuconv, so the same list drives both libraries and a failing case
can print the constructor call that reproduces it in either.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
from compare import LAYOUTS, frozen

Shape: TypeAlias = "tuple[int, ...]"

RANDOM_CASES_PER_LAYER = 64

# torch 2.13 calls the gradient of these kernels not contiguous.
TORCH_FAILS = {"Conv2D-12-1x1x2x2-f1-k4.2-s3.2-same"}

POINTWISE_ACTIVATIONS = (
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu linear log_sigmoid "
    "mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus sparse_sigmoid squareplus swish tanh "
    "tanh_shrink"
).split()
# Their slope or value jumps: the gradient depends on the last bit of a sum that comes to lie on the edge.
KINKED_ACTIVATIONS = (
    "hard_shrink hard_sigmoid hard_silu hard_swish hard_tanh leaky_relu relu relu6 selu soft_shrink sparse_sigmoid"
).split()
# Without sparsemax: on torch, Keras adds up cumulative sums where one of them is meant; its rows do not sum to 1.
LAST_AXIS_ACTIVATIONS = ("softmax", "log_softmax")


@dataclass(frozen=True)
class Obj:
    """A constructor call in one of the libraries' modules, such as `regularizers.L2(l2=0.02)`."""

    module: str
    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments)})"

    def make(self, library: ModuleType) -> Any:
        return getattr(getattr(library, self.module), self.name)(**dict(self.arguments))


def obj(path: str, **arguments: Any) -> Obj:
    module, name = path.split(".")
    return Obj(module, name, tuple(arguments.items()))


@dataclass(frozen=True)
class Case:
    """One layer configuration and the input it is fed.

    `shape` is the full input shape, `calls` how often the layer is called (stateful layers carry something over),
    `seed` feeds input, weights and cotangent, `layout` is the input's place in memory (see `compare.embed`).
    """

    layer: str
    arguments: tuple[tuple[str, Any], ...]
    shape: Shape
    label: str
    seed: int = 0
    calls: int = 1
    input_dtype: str = "float32"
    layout: str = "contiguous"

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", zlib.crc32(f"{self.layer} {self.label}".encode()))

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.arguments)

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.label}"

    def keywords(self, library: ModuleType) -> dict[str, Any]:
        return {key: value.make(library) if isinstance(value, Obj) else value for key, value in self.arguments}

    def construct(self, library: ModuleType) -> Any:
        return getattr(library.layers, self.layer)(**self.keywords(library))

    def call_text(self, library: str) -> str:
        """The constructor call as a user of `library` would type it."""
        words = []
        for key, value in self.arguments:
            words.append(f"{key}={library}.{value!r}" if isinstance(value, Obj) else f"{key}={value!r}")
        return f"{library}.layers.{self.layer}({', '.join(words)})"

    def inputs(self) -> list[np.ndarray]:
        """One array per call. Floats are odd multiples of 1/128 in (-2, 2): never zero, exact in all but bfloat16."""
        rng = np.random.default_rng(self.seed)
        if np.dtype(self.input_dtype).kind in "iu":
            return [rng.integers(0, 9, self.shape).astype(self.input_dtype) for _ in range(self.calls)]
        values = [(rng.integers(-128, 128, self.shape) + 0.5) / 64 for _ in range(self.calls)]
        return [frozen(each.astype(self.input_dtype), self.layout) for each in values]


def case(layer: str, label: str, shape: Shape, **arguments: Any) -> Case:
    special = {key: arguments.pop(key) for key in ("calls", "input_dtype", "layout") if key in arguments}
    return Case(layer, tuple(arguments.items()), tuple(shape), label, **special)


# --- the layers and their families -----------------------------------------------------------------------------------

CONV = ("Conv1D", "Conv2D", "Conv3D")
TRANSPOSE = ("Conv1DTranspose", "Conv2DTranspose", "Conv3DTranspose")
SEPARABLE = ("SeparableConv1D", "SeparableConv2D")
DEPTHWISE = ("DepthwiseConv1D", "DepthwiseConv2D")
CONV_LSTM = ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D")
CROPPING = ("Cropping1D", "Cropping2D", "Cropping3D")
UPSAMPLING = ("UpSampling1D", "UpSampling2D", "UpSampling3D")
ZERO_PADDING = ("ZeroPadding1D", "ZeroPadding2D", "ZeroPadding3D")
WITH_WEIGHTS = CONV + TRANSPOSE + SEPARABLE + DEPTHWISE + CONV_LSTM
LAYERS = WITH_WEIGHTS + CROPPING + UPSAMPLING + ZERO_PADDING
FAMILIES = (CONV, TRANSPOSE, SEPARABLE, DEPTHWISE, CONV_LSTM, CROPPING, UPSAMPLING, ZERO_PADDING)


def rank_of(layer: str) -> int:
    return next(int(letter) for letter in layer if letter.isdigit())


def weight_names(layer: str) -> tuple[str, ...]:
    """The prefixes that the layer's `_initializer`, `_regularizer` and `_constraint` arguments carry."""
    if layer in SEPARABLE:
        return ("depthwise", "pointwise", "bias")
    if layer in DEPTHWISE:
        return ("depthwise", "bias")
    return ("kernel", "recurrent", "bias") if layer in CONV_LSTM else ("kernel", "bias")


def input_shape(batch: int, size: Shape, channels: int, first: bool, time: Shape = ()) -> Shape:
    return (batch, *time, channels, *size) if first else (batch, *time, *size, channels)


def smallest_input(kernel: int, dilation: int) -> int:
    return (kernel - 1) * dilation + 1


def transposed_length(n: int, k: int, s: int, d: int, padding: str, output_padding: int | None) -> int:
    """Length of a transposed convolution's output; the generator leaves out configurations where it is not positive."""
    reach = smallest_input(k, d)
    if output_padding is None:
        return n * s if padding == "same" else (n - 1) * s + max(reach, s)
    return (n - 1) * s + (reach if padding == "valid" else reach % 2) + output_padding


# --- random cases ----------------------------------------------------------------------------------------------------


class Draw:
    """Random choices from one seed, with a few words that keep the generators short."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def one(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def between(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def sizes(self, rank: int, low: int, high: int) -> Shape:
        return tuple(self.between(low, high) for _ in range(rank))

    def spelled(self, sizes: Shape) -> Any:
        """The same sizes as a user might write them: one integer where they agree, a list, or a tuple."""
        if len(set(sizes)) == 1 and self.chance(0.6):
            return sizes[0]
        return list(sizes) if self.chance(0.3) else sizes

    def data_format(self, options: dict[str, Any]) -> bool:
        """Adds a data format (or leaves the default) and says whether channels come first."""
        chosen = self.one(None, "channels_last", "channels_first", "channels_first")
        if chosen is not None or self.chance(0.3):
            options["data_format"] = chosen
        return chosen == "channels_first"

    def regularizer(self) -> Any:
        by_config = {
            "module": "keras.regularizers",
            "class_name": "L2",
            "config": {"l2": 0.125},
            "registered_name": None,
        }
        objects = (
            obj("regularizers.L1", l1=0.03),
            obj("regularizers.L2", l2=0.02),
            obj("regularizers.L1L2", l1=0.01, l2=0.05),
        )
        return self.one("l1", "L2", "l1l2", *objects, by_config)

    def constraint(self, matrix_axes: list[int]) -> Any:
        objects = (
            obj("constraints.MaxNorm", max_value=0.5, axis=0),
            obj("constraints.UnitNorm", axis=matrix_axes),
            obj("constraints.MinMaxNorm", min_value=0.25, max_value=0.75, rate=0.5, axis=matrix_axes),
        )
        return self.one("max_norm", "non_neg", "unit_norm", "min_max_norm", *objects)

    def initializer(self) -> Any:
        names = "ones zeros he_normal GlorotNormal lecun_uniform random_normal truncated_normal orthogonal".split()
        objects = (
            obj("initializers.Constant", value=0.375),
            obj("initializers.RandomUniform", minval=-0.5, maxval=0.25, seed=5),
            obj("initializers.VarianceScaling", scale=2.0, mode="fan_avg", distribution="uniform"),
        )
        return self.one(*names, *objects)

    def common(self, layer: str, options: dict[str, Any], even_last_axis: bool = False) -> None:
        """Adds what every layer with weights takes: activation, bias, initializers, regularizers, constraints."""
        activations = [*POINTWISE_ACTIVATIONS, *LAST_AXIS_ACTIVATIONS * 3]
        if layer in CONV_LSTM:
            activations.remove("exponential")  # overflows after a few steps
        if even_last_axis:
            activations += ["glu", "glu"]
        if self.chance(0.55):
            options["activation"] = self.one(*activations)
        if self.chance(0.2):
            options["use_bias"] = self.one(False, False, True)
        for weight in weight_names(layer):
            axes = [0] if weight == "bias" else list(range(rank_of(layer) + 1))
            if self.chance(0.2):
                for_bias = ("ones", "zeros") if layer in CONV_LSTM else ("ones", "zeros", None)
                options[f"{weight}_initializer"] = self.one(*for_bias) if weight == "bias" else self.initializer()
            if self.chance(0.2):
                options[f"{weight}_regularizer"] = self.regularizer()
            if self.chance(0.15):
                constraint = self.constraint(axes)
                with_axes = weight == "bias" and isinstance(constraint, Obj)
                options[f"{weight}_constraint"] = "non_neg" if with_axes else constraint
        if self.chance(0.2):
            options["activity_regularizer"] = self.regularizer()

    def policy(self, layer: str, options: dict[str, Any]) -> None:
        """Now and then a dtype, a trainable flag, autocast or a name."""
        if self.chance(0.15):
            options["dtype"] = self.one("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
        if layer in CONV_LSTM and options.get("dtype") in ("float16", "bfloat16"):
            options["recurrent_initializer"] = "glorot_uniform"  # torch has no 16-bit orthogonal factorisation
        if options.get("stateful") and options.get("dtype", "").startswith("mixed"):
            del options["dtype"]  # Keras forgets the states of a mixed layer: it assigns to a copy cast for the call
        if options.get("dtype") in ("float16", "bfloat16"):
            for key, value in options.items():
                if value == "orthogonal":
                    options[key] = "he_uniform"
        if options.get("dtype", "").endswith("float16"):
            options |= {key: "silu" for key, value in options.items() if value in KINKED_ACTIVATIONS}
        if self.chance(0.08):
            options["trainable"] = False
        if self.chance(0.5):
            options["name"] = self.one("layer", "front_end", "block1")


def random_conv(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    most = (20, 9, 5)[rank - 1]
    kernel = draw.sizes(rank, 1, (7, 4, 3)[rank - 1])
    strides = draw.sizes(rank, 1, 3) if draw.chance(0.5) else (1,) * rank
    dilation = draw.sizes(rank, 1, 3) if max(strides) == 1 and draw.chance(0.6) else (1,) * rank
    padding = draw.one("valid", "same", "same", *(("causal", "causal") if layer == "Conv1D" else ()))
    low = [smallest_input(k, d) if padding == "valid" else 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw.between(least, max(least, most)) for least in low)
    groups = draw.one(1, 1, 1, 2, 3)
    filters, channels = groups * draw.between(1, 4), groups * draw.between(1, 3)
    options: dict[str, Any] = {"filters": filters, "kernel_size": draw.spelled(kernel)}
    if strides != (1,) * rank or draw.chance(0.2):
        options["strides"] = draw.spelled(strides)
    if padding != "valid" or draw.chance(0.3):
        options["padding"] = padding
    if dilation != (1,) * rank or draw.chance(0.2):
        options["dilation_rate"] = draw.spelled(dilation)
    if groups > 1:
        options["groups"] = groups
    first = draw.data_format(options)
    draw.common(layer, options, even_last_axis=not first and filters % 2 == 0)
    return options, input_shape(draw.between(1, 3), size, channels, first)


def random_transpose(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    while True:
        kernel = draw.sizes(rank, 1, (7, 4, 3)[rank - 1])
        strides = draw.sizes(rank, 1, 4 - (rank == 3)) if draw.chance(0.7) else (1,) * rank
        dilation = draw.sizes(rank, 1, 3) if max(strides) == 1 and draw.chance(0.6) else (1,) * rank
        padding = draw.one("valid", "same")
        output_padding = tuple(draw.between(0, s - 1) for s in strides) if draw.chance(0.5) else None
        size = draw.sizes(rank, 1, (8, 5, 3)[rank - 1])
        pads = output_padding or (None,) * rank
        axes = zip(size, kernel, strides, dilation, pads, strict=True)
        if all(transposed_length(n, k, s, d, padding, pad) > 0 for n, k, s, d, pad in axes):
            break
    options: dict[str, Any] = {"filters": draw.between(1, 5), "kernel_size": draw.spelled(kernel)}
    if strides != (1,) * rank or draw.chance(0.2):
        options["strides"] = draw.spelled(strides)
    if padding != "valid" or draw.chance(0.3):
        options["padding"] = padding
    if output_padding is not None:
        options["output_padding"] = draw.spelled(output_padding)
    if dilation != (1,) * rank:
        options["dilation_rate"] = draw.spelled(dilation)
    first = draw.data_format(options)
    draw.common(layer, options, even_last_axis=not first and options["filters"] % 2 == 0)
    channels = draw.between(2, 5)  # of one channel, torch's kernel gradient often fails
    return options, input_shape(draw.between(1, 3), size, channels, first)


def random_depthwise(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    """Separable and depthwise layers: strides together with dilation are allowed here."""
    rank = rank_of(layer)
    most = (20, 9)[rank - 1]
    kernel = draw.sizes(rank, 1, (7, 4)[rank - 1])
    strides = draw.sizes(rank, 1, 3) if draw.chance(0.5) else (1,) * rank
    dilation = draw.sizes(rank, 1, 3) if draw.chance(0.5) else (1,) * rank
    padding = draw.one("valid", "same")
    low = [smallest_input(k, d) if padding == "valid" else 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw.between(least, max(least, most)) for least in low)
    channels, multiplier = draw.between(1, 5), draw.one(1, 1, 2, 3)
    filters = draw.between(1, 5)
    options: dict[str, Any] = {"filters": filters} if layer in SEPARABLE else {}
    options["kernel_size"] = draw.spelled(kernel)
    if strides != (1,) * rank or draw.chance(0.2):
        options["strides"] = draw.spelled(strides)
    if padding != "valid" or draw.chance(0.3):
        options["padding"] = padding
    if dilation != (1,) * rank:
        options["dilation_rate"] = draw.spelled(dilation)
    if multiplier > 1 or draw.chance(0.2):
        options["depth_multiplier"] = multiplier
    first = draw.data_format(options)
    last = filters if layer in SEPARABLE else channels * multiplier
    draw.common(layer, options, even_last_axis=not first and last % 2 == 0)
    return options, input_shape(draw.between(1, 3), size, channels, first)


def random_conv_lstm(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    most = (10, 6, 4)[rank - 1]
    kernel = draw.sizes(rank, 1, (4, 3, 2)[rank - 1])
    strides = draw.sizes(rank, 1, 3) if draw.chance(0.4) else (1,) * rank
    dilation = draw.sizes(rank, 1, 2) if max(strides) == 1 and draw.chance(0.5) else (1,) * rank
    padding = draw.one("valid", "same")
    low = [smallest_input(k, d) if padding == "valid" else 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(draw.between(least, max(least, most)) for least in low)
    options: dict[str, Any] = {"filters": draw.between(1, 3), "kernel_size": draw.spelled(kernel)}
    if strides != (1,) * rank:
        options["strides"] = draw.spelled(strides)
    if padding != "valid" or draw.chance(0.3):
        options["padding"] = padding
    if dilation != (1,) * rank:
        options["dilation_rate"] = draw.spelled(dilation)
    first = draw.data_format(options)
    draw.common(layer, options)
    if draw.chance(0.3):
        options["recurrent_activation"] = draw.one("hard_sigmoid", "sigmoid", "relu", "softmax", "linear")
    flags = {"return_sequences": 0.5, "return_state": 0.4, "go_backwards": 0.35, "stateful": 0.3}
    for flag, probability in flags.items():
        if draw.chance(probability):
            options[flag] = True
    if draw.chance(0.3):
        options["unit_forget_bias"] = draw.one(True, False)
    if draw.chance(0.15):
        options |= {"dropout": 0.25, "recurrent_dropout": 0.5, "seed": 3}  # inactive outside training
    shape = input_shape(draw.between(1, 2), size, draw.between(1, 3), first, time=(draw.between(1, 4),))
    return options, shape


def spelled_pairs(draw: Draw, pairs: tuple[tuple[int, int], ...]) -> Any:
    """Cropping and padding amounts as Keras accepts them: one integer, symmetric integers, or pairs."""
    flat = {amount for pair in pairs for amount in pair}
    if len(flat) == 1 and draw.chance(0.5):
        return flat.pop()
    if len(pairs) == 1:
        return pairs[0]
    if all(before == after for before, after in pairs) and draw.chance(0.7):
        return tuple(before for before, _ in pairs)
    return [list(pair) for pair in pairs] if draw.chance(0.3) else pairs


def random_pairs(draw: Draw, rank: int, most: int) -> tuple[tuple[int, int], ...]:
    if draw.chance(0.25):
        return ((draw.between(0, most),) * 2,) * rank
    if draw.chance(0.3):
        return tuple((amount, amount) for amount in draw.sizes(rank, 0, most))
    return tuple((draw.between(0, most), draw.between(0, most)) for _ in range(rank))


def random_cropping(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    pairs = random_pairs(draw, rank, 3)
    size = tuple(before + after + draw.between(1, 5) for before, after in pairs)
    options: dict[str, Any] = {"cropping": spelled_pairs(draw, pairs)}
    first = rank > 1 and draw.data_format(options)
    return options, input_shape(draw.between(1, 3), size, draw.between(1, 4), first)


def random_upsampling(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    factors = draw.sizes(rank, 1, 4 if rank < 3 else 3)
    options: dict[str, Any] = {"size": factors[0] if rank == 1 else draw.spelled(factors)}
    first = rank > 1 and draw.data_format(options)
    if rank == 2 and draw.chance(0.7):
        options["interpolation"] = draw.one("nearest", "bilinear", "bilinear", "bicubic", "bicubic")
    sizes = draw.sizes(rank, 1, 6 if rank < 3 else 4)
    return options, input_shape(draw.between(1, 3), sizes, draw.between(1, 4), first)


def random_zero_padding(draw: Draw, layer: str) -> tuple[dict[str, Any], Shape]:
    rank = rank_of(layer)
    options: dict[str, Any] = {"padding": spelled_pairs(draw, random_pairs(draw, rank, 3))}
    first = draw.data_format(options)
    return options, input_shape(draw.between(1, 3), draw.sizes(rank, 1, 5), draw.between(1, 4), first)


def of_family(layer: str, *makers: Any) -> Any:
    """The entry of the layer's family, of the eight in the order of FAMILIES."""
    return next(make for names, make in zip(FAMILIES, makers, strict=True) if layer in names)


def generator_of(layer: str) -> Callable[[Draw, str], tuple[dict[str, Any], Shape]]:
    convolutions = random_conv, random_transpose, random_depthwise, random_depthwise, random_conv_lstm
    return of_family(layer, *convolutions, random_cropping, random_upsampling, random_zero_padding)


def label_of(index: int, options: dict[str, Any], shape: Shape) -> str:
    """A short name for a random case: number, input shape, and the options that shape the arithmetic."""
    shown = {"filters": "f", "kernel_size": "k", "strides": "s", "dilation_rate": "d", "output_padding": "op"}
    shown |= {"groups": "g", "depth_multiplier": "m", "size": "by", "cropping": "crop"}
    shown |= dict.fromkeys(("padding", "interpolation", "activation", "dtype"), "")
    words = [f"{index:02}", "x".join(map(str, shape))]
    for key, short in shown.items():
        if options.get(key) is not None:
            value = str(options[key]).translate(str.maketrans("", "", "()[] "))
            words.append(short + value.replace(",", "."))
    if options.get("data_format") == "channels_first":
        words.append("first")
    words += [word for word in ("return_sequences", "return_state", "go_backwards", "stateful") if options.get(word)]
    return "-".join(words)


def random_cases(layer: str, count: int = RANDOM_CASES_PER_LAYER) -> Iterator[Case]:
    """`count` cases of one layer; the same ones in every run."""
    make = generator_of(layer)
    for index in range(count):
        draw = Draw(zlib.crc32(layer.encode()) + index)
        options, shape = make(draw, layer)
        draw.policy(layer, options)
        calls = 2 if options.get("stateful") else 1
        label = label_of(index, options, shape)
        yield case(layer, label, shape, **options, calls=calls, layout=draw.one("contiguous", *LAYOUTS))


# --- directed cases --------------------------------------------------------------------------------------------------


def size(layer: str, n: int) -> Shape:
    """Input sizes near `n`, different on each axis so that swapped axes show."""
    rank = rank_of(layer)
    return tuple(n + offset for offset in range(rank))


def conv_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    rank = rank_of(layer)
    x = (2, *size(layer, 7), 4)
    first = (2, 4, *size(layer, 7))
    many = 6 if rank < 3 else 4
    for kernel in (2, 4):
        for stride in (1, 2, 3):
            options = {"filters": 3, "kernel_size": kernel, "strides": stride}
            yield row(f"same-even-k{kernel}-s{stride}", x, **options, padding="same")
    for n in (6, 7, 8):
        yield row(f"same-k3-s2-n{n}", (1, *(n,) * rank, 2), filters=2, kernel_size=3, strides=2, padding="same")
    yield row("same-k1-s3", (1, *(8,) * rank, 2), filters=2, kernel_size=1, strides=3, padding="same")
    yield row("same-dilated", x, filters=3, kernel_size=2, dilation_rate=3, padding="same")
    yield row("same-kernel-longer-than-input", (2, *(2,) * rank, 3), filters=4, kernel_size=5, padding="same")
    yield row("upper-case-words", first, filters=2, kernel_size=2, padding="SAME", data_format="Channels_First")
    yield row("valid-exact-fit", (2, *(5,) * rank, 2), filters=3, kernel_size=3, dilation_rate=2)
    yield row("groups", x, filters=many, kernel_size=3, groups=2, padding="same")
    yield row(
        "groups-are-channels-first", first, filters=8, kernel_size=2, groups=4, strides=2, data_format="channels_first"
    )
    yield row(
        "softmax-channels-first", first, filters=3, kernel_size=2, activation="softmax", data_format="channels_first"
    )
    yield row("log-softmax", x, filters=5, kernel_size=2, activation="log_softmax")
    yield row("empty-batch", (0, *size(layer, 6), 3), filters=4, kernel_size=3, activity_regularizer="l2")
    yield row(
        "empty-batch-same-first",
        (0, 3, *size(layer, 6)),
        filters=4,
        kernel_size=3,
        padding="same",
        data_format="channels_first",
        kernel_regularizer="l1",
        activation="relu",
    )
    yield row("size-one", (1, *(1,) * rank, 1), filters=1, kernel_size=1)
    yield row(
        "everything",
        x,
        filters=4,
        kernel_size=3,
        strides=2,
        padding="same",
        groups=2,
        activation="gelu",
        kernel_initializer="he_normal",
        bias_initializer="ones",
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer=obj("regularizers.L1L2", l1=0.01, l2=0.02),
        kernel_constraint="max_norm",
        bias_constraint="non_neg",
        name="all",
        dtype="float64",
    )
    yield row(
        "frozen", x, filters=2, kernel_size=2, trainable=False, kernel_regularizer="l2", activity_regularizer="l1"
    )
    yield row("no-bias-but-bias-options", x, filters=2, kernel_size=2, use_bias=False, bias_regularizer="l2")
    for policy in ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"):
        yield row(policy, x, filters=3, kernel_size=3, dtype=policy, activation="silu", kernel_regularizer="l2")
    for given in ("float64", "float16"):
        yield row(f"{given}-into-float32", x, filters=3, kernel_size=3, input_dtype=given)


def causal_corners() -> Iterator[Case]:
    row = partial(case, "Conv1D")
    for dilation in (1, 2, 5):
        yield row(f"causal-d{dilation}", (2, 9, 3), filters=4, kernel_size=3, dilation_rate=dilation, padding="causal")
    for stride in (2, 3, 4):
        yield row(f"causal-s{stride}", (2, 9, 3), filters=4, kernel_size=3, strides=stride, padding="causal")
    yield row("causal-longer-than-input", (2, 3, 2), filters=4, kernel_size=4, dilation_rate=4, padding="causal")
    yield row(
        "causal-first-groups",
        (2, 4, 9),
        filters=4,
        kernel_size=2,
        padding="causal",
        groups=2,
        data_format="channels_first",
    )
    yield row("causal-empty-batch", (0, 9, 3), filters=4, kernel_size=3, padding="causal")
    yield row("glu", (2, 9, 3), filters=4, kernel_size=3, activation="glu")
    yield row("issue-example", (2, 128, 9), filters=100, kernel_size=10, activation="relu")


def transpose_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    rank = rank_of(layer)
    x = (2, *size(layer, 3), 3)
    first = (2, 3, *size(layer, 3))
    kernels = (1, 2, 3, 4) if rank < 3 else (2, 3)
    for padding in ("valid", "same"):
        for stride in (1, 2, 3) if rank < 3 else (2,):
            for kernel in kernels:
                for output_padding in (None, *range(stride)):
                    label = f"{padding}-k{kernel}-s{stride}-op{output_padding}"
                    options = {"strides": stride, "padding": padding, "output_padding": output_padding}
                    yield row(label, x, filters=2, kernel_size=kernel, **options)
    yield row(
        "mixed-axes",
        x,
        filters=2,
        kernel_size=tuple(range(2, 2 + rank)),
        strides=tuple(range(3, 3 - rank, -1)),
        padding="same",
    )
    yield row("dilated-same", x, filters=2, kernel_size=3, dilation_rate=2, padding="same")
    yield row("dilated-even-valid", x, filters=2, kernel_size=2, dilation_rate=3, output_padding=0)
    yield row("gaps-hold-the-activated-bias", x, filters=2, kernel_size=1, strides=3, activation="sigmoid")
    yield row("first", first, filters=4, kernel_size=3, strides=2, padding="same", data_format="channels_first")
    yield row("softmax-first", first, filters=4, kernel_size=2, data_format="channels_first", activation="softmax")
    yield row("empty-batch", (0, *size(layer, 3), 3), filters=2, kernel_size=3, strides=2)
    yield row("size-one", (1, *(1,) * rank, 1), filters=1, kernel_size=1)
    yield row(
        "regularized",
        x,
        filters=2,
        kernel_size=3,
        strides=2,
        kernel_regularizer="l2",
        bias_regularizer="l1",
        activity_regularizer="l2",
        kernel_constraint="unit_norm",
        bias_constraint="non_neg",
    )
    for policy in ("float16", "bfloat16", "float64", "mixed_float16"):
        yield row(policy, x, filters=3, kernel_size=3, strides=2, dtype=policy, activation="tanh")


def depthwise_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    x = (2, *size(layer, 8), 3)
    first = (2, 3, *size(layer, 8))
    base = {"filters": 4, "kernel_size": 3} if layer in SEPARABLE else {"kernel_size": 3}
    main = weight_names(layer)[0]
    for stride, dilation in ((1, 2), (2, 1), (2, 2), (3, 2)):
        for padding in ("valid", "same"):
            options = {"strides": stride, "dilation_rate": dilation, "padding": padding}
            yield row(f"{padding}-s{stride}-d{dilation}", x, **base, **options)
    for kernel in (2, 4):
        yield row(f"same-even-k{kernel}-s2", x, **base | {"kernel_size": kernel}, strides=2, padding="same")
    yield row("multiplier", x, **base, depth_multiplier=3)
    yield row("multiplier-first", first, **base, depth_multiplier=2, padding="same", data_format="channels_first")
    yield row("first-s2-d2", first, **base, strides=2, dilation_rate=2, padding="same", data_format="channels_first")
    yield row("first-dilated-valid", first, **base, dilation_rate=2, data_format="channels_first")
    yield row("kernel-longer-than-input", (2, *size(layer, 2), 3), **base | {"kernel_size": 5}, padding="same")
    yield row("softmax-first", first, **base, activation="softmax", data_format="channels_first")
    yield row("empty-batch", (0, *size(layer, 8), 3), **base, strides=2)
    yield row("one-channel", (1, *size(layer, 5), 1), **base)
    yield row(
        "regularized",
        x,
        **base,
        **{f"{main}_regularizer": "l2"},
        bias_regularizer="l1",
        activity_regularizer="l1",
        **{f"{main}_constraint": "max_norm"},
        bias_constraint="non_neg",
    )
    for policy in ("float16", "bfloat16", "float64", "mixed_float16"):
        yield row(policy, x, **base, dtype=policy, activation="elu")


def conv_lstm_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    x = (2, 3, *size(layer, 4), 2)
    first = (2, 3, 2, *size(layer, 4))
    base = {"filters": 2, "kernel_size": 2}
    for sequences in (False, True):
        for state in (False, True):
            for backwards in (False, True):
                flags = {"return_sequences": sequences, "return_state": state, "go_backwards": backwards}
                label = "".join("ft"[value] for value in flags.values())
                yield row(f"sequences-state-backwards-{label}", x, **base, **flags)
    yield row("stateful", x, **base, stateful=True, calls=3)
    yield row(
        "stateful-backwards-all",
        x,
        **base,
        stateful=True,
        return_sequences=True,
        return_state=True,
        go_backwards=True,
        calls=2,
    )
    yield row("same-strided", x, **base, strides=2, padding="same", return_sequences=True)
    yield row("valid-strided", x, **base, strides=2)
    yield row("dilated", (2, 2, *size(layer, 5), 2), filters=2, kernel_size=3, dilation_rate=2, return_state=True)
    yield row("first", first, **base, return_sequences=True, data_format="channels_first", strides=2, padding="same")
    yield row("first-state", first, **base, return_state=True, data_format="channels_first")
    for initializer in ("zeros", "ones", "random_normal"):
        yield row(f"unit-forget-bias-{initializer}", x, **base, bias_initializer=initializer)
    yield row("plain-forget-bias", x, **base, unit_forget_bias=False, bias_initializer="ones")
    yield row("no-bias", x, **base, use_bias=False)
    yield row("activations", x, **base, activation="relu", recurrent_activation="hard_sigmoid")
    yield row("softmax-first", first, **base, activation="softmax", data_format="channels_first")
    yield row("empty-batch", (0, 2, *size(layer, 4), 2), **base, return_sequences=True)
    yield row("one-step", (1, 1, *(1,) * rank_of(layer), 1), filters=1, kernel_size=1)
    yield row("dropout-is-off", x, **base, dropout=0.5, recurrent_dropout=0.5, seed=1)
    yield row(
        "regularized",
        x,
        **base,
        kernel_regularizer="l2",
        recurrent_regularizer="l1",
        bias_regularizer="l2",
        activity_regularizer="l1",
        kernel_constraint="max_norm",
        recurrent_constraint="unit_norm",
        bias_constraint="non_neg",
    )
    for policy in ("float16", "bfloat16", "float64", "mixed_float16"):
        yield row(policy, x, **base, dtype=policy, recurrent_initializer="glorot_uniform", return_sequences=True)


def cropping_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    rank = rank_of(layer)
    x = (2, *size(layer, 7), 3)
    yield row("default", x)
    yield row("nothing", x, cropping=0)
    yield row("one-left", (2, *(3,) * rank, 3), cropping=1)
    yield row("empty-batch", (0, *size(layer, 7), 3), cropping=2)
    if rank > 1:
        yield row("asymmetric", x, cropping=((1, 2), (0, 3), (2, 0))[:rank])
        yield row("mixed-spelling", x, cropping=(2, (1, 0), 1)[:rank])
        yield row(
            "first", (2, 3, *size(layer, 7)), cropping=((1, 2), (0, 3), (2, 0))[:rank], data_format="channels_first"
        )
    else:
        yield row("asymmetric", x, cropping=(0, 4))
        yield row("list", x, cropping=[2, 1])
    yield from dtype_corners(layer, x)


def dtype_corners(layer: str, x: Shape, **options: Any) -> Iterator[Case]:
    """Layers without weights: float inputs are cast to the layer's dtype, integers stay."""
    row = partial(case, layer)
    for policy in ("float16", "bfloat16", "float64", "mixed_float16"):
        yield row(policy, x, **options, dtype=policy)
    for given in ("int32", "uint8", "float64", "float16"):
        yield row(f"{given}-input", x, **options, input_dtype=given)
    yield row("no-autocast", x, **options, autocast=False, input_dtype="float64")
    yield row("activity-regularizer", x, **options, activity_regularizer=obj("regularizers.L1L2", l1=0.1, l2=0.2))


def upsampling_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    rank = rank_of(layer)
    x = (2, *size(layer, 3), 2)
    yield row("default", x)
    yield row("by-one", x, size=1)
    yield row("empty-batch", (0, *size(layer, 3), 2), size=2)
    if rank > 1:
        yield row("unequal", x, size=tuple(range(1, rank + 1)))
        yield row("first", (2, 2, *size(layer, 3)), size=tuple(range(rank, 0, -1)), data_format="channels_first")
    if rank == 2:
        for interpolation in ("bilinear", "bicubic", "BiLinear"):
            for factors in (2, 3, (1, 4), (5, 2)):
                label = f"{interpolation}-{factors}".replace("(", "").replace(")", "").replace(", ", "x")
                yield row(label, (2, 3, 4, 2), size=factors, interpolation=interpolation)
            for shape in ((1, 1, 1, 1), (2, 1, 3, 1), (1, 2, 2, 3)):
                label = f"{interpolation}-small-{'x'.join(map(str, shape))}"
                yield row(label, shape, size=2, interpolation=interpolation)
            yield row(
                f"{interpolation}-first",
                (2, 2, 3, 4),
                size=2,
                interpolation=interpolation,
                data_format="channels_first",
            )
            for policy in ("float16", "bfloat16", "float64"):
                yield row(
                    f"{interpolation}-{policy}", (2, 3, 4, 2), size=(2, 3), interpolation=interpolation, dtype=policy
                )
    yield from dtype_corners(layer, x)


def zero_padding_corners(layer: str) -> Iterator[Case]:
    row = partial(case, layer)
    rank = rank_of(layer)
    x = (2, *size(layer, 3), 2)
    first = (2, 2, *size(layer, 3))
    yield row("default", x)
    yield row("default-first", first, data_format="channels_first")
    yield row("nothing", x, padding=0)
    yield row("empty-batch", (0, *size(layer, 3), 2), padding=2)
    pairs = ((1, 2), (0, 3), (2, 0))[:rank]
    yield row("asymmetric", x, padding=pairs if rank > 1 else pairs[0])
    yield row("asymmetric-first", first, padding=pairs if rank > 1 else pairs[0], data_format="channels_first")
    if rank > 1:
        yield row("mixed-spelling", x, padding=(2, (1, 0), 1)[:rank])
    yield from dtype_corners(layer, x)


LARGE: dict[str, list[tuple[str, Shape, dict[str, Any]]]] = {
    "Conv1D": [
        ("k15-128-to-64", (2, 512, 128), {"filters": 64, "kernel_size": 15}),
        ("k80-s4-1-to-32", (1, 2000, 1), {"filters": 32, "kernel_size": 80, "strides": 4}),
        ("d64-causal", (2, 400, 32), {"filters": 32, "kernel_size": 3, "dilation_rate": 64, "padding": "causal"}),
        ("pointwise", (2, 700, 48), {"filters": 96, "kernel_size": 1}),
        ("few-filters", (2, 700, 48), {"filters": 3, "kernel_size": 9, "strides": 2}),
        ("groups-first", (2, 64, 300), {"filters": 64, "kernel_size": 5, "groups": 4, "data_format": "channels_first"}),
    ],
    "Conv2D": [
        ("3x3", (2, 40, 40, 32), {"filters": 48, "kernel_size": 3, "padding": "same"}),
        (
            "3x3-s2-first",
            (2, 32, 40, 40),
            {"filters": 48, "kernel_size": 3, "strides": 2, "data_format": "channels_first"},
        ),
        ("d9", (1, 40, 44, 16), {"filters": 20, "kernel_size": 3, "dilation_rate": 9}),
    ],
    "Conv3D": [("3x3x3", (1, 14, 15, 16, 16), {"filters": 24, "kernel_size": 3, "padding": "same"})],
    "Conv1DTranspose": [
        ("k16-s8", (2, 128, 64), {"filters": 32, "kernel_size": 16, "strides": 8, "padding": "same"}),
        ("k9-s1", (2, 300, 32), {"filters": 24, "kernel_size": 9}),
    ],
    "Conv2DTranspose": [
        ("k4-s2", (1, 24, 25, 32), {"filters": 16, "kernel_size": 4, "strides": 2, "padding": "same"}),
        ("first", (1, 32, 24, 25), {"filters": 16, "kernel_size": 4, "strides": 2, "data_format": "channels_first"}),
    ],
    "SeparableConv1D": [("k31", (2, 500, 48), {"filters": 64, "kernel_size": 31, "padding": "same"})],
    "SeparableConv2D": [
        ("k5-s2", (1, 40, 40, 24), {"filters": 32, "kernel_size": 5, "strides": 2, "depth_multiplier": 2})
    ],
    "DepthwiseConv1D": [
        ("k31", (2, 600, 96), {"kernel_size": 31, "padding": "same"}),
        ("k4-d32-first", (2, 96, 600), {"kernel_size": 4, "dilation_rate": 32, "data_format": "channels_first"}),
    ],
    "DepthwiseConv2D": [("k7", (1, 40, 40, 32), {"kernel_size": 7, "padding": "same"})],
    "ConvLSTM2D": [
        ("k3", (2, 6, 16, 16, 8), {"filters": 12, "kernel_size": 3, "padding": "same", "return_sequences": True})
    ],
}


def large_cases(layer: str) -> Iterator[Case]:
    """Sizes at which the NumPy path takes other ways than with the small ones."""
    row = partial(case, layer)
    for label, shape, options in LARGE.get(layer, []):
        yield row(f"large-{label}", shape, **options)


def directed_cases(layer: str) -> Iterator[Case]:
    convolutions = conv_corners, transpose_corners, depthwise_corners, depthwise_corners, conv_lstm_corners
    yield from of_family(layer, *convolutions, cropping_corners, upsampling_corners, zero_padding_corners)(layer)
    yield from large_cases(layer)
    if layer == "Conv1D":
        yield from causal_corners()


def all_cases() -> list[Case]:
    """Every case that torch can answer; the directed ones take the memory layouts by turns."""
    cases = []
    for layer in LAYERS:
        directed = list(directed_cases(layer))
        cases += [replace(each, layout=LAYOUTS[index % len(LAYOUTS)]) for index, each in enumerate(directed)]
        cases += random_cases(layer)
    return [each for each in cases if each.id not in TORCH_FAILS]


def find(identifier: str) -> Case:
    return next(each for each in all_cases() if each.id == identifier)
