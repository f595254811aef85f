"""Wrong arguments of every kind, and names: the same exception at the same moment as in Keras, asked live.

A row runs through four moments in both libraries: the constructor, then `build`, `compute_output_shape` and a call,
each on a fresh layer. Where Keras notices in the call what the shape alone tells, cuconv may refuse in `build` and in
`compute_output_shape` too. DEVIATIONS lists where it answers otherwise on purpose, with what it answers and why.
"""

from __future__ import annotations

import functools
import inspect
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from keras_cases import (
    CONV,
    CONV_LSTM,
    CROPPING,
    DEPTHWISE,
    LAYERS,
    SEPARABLE,
    TRANSPOSE,
    UPSAMPLING,
    WITH_WEIGHTS,
    rank_of,
    weight_names,
)  # fmt: skip
from keras_harness import keras, plain, plain_difference, torch

import cuconv
from cuconv import layers

# Our own warnings stay errors; these are about how Keras uses NumPy, and about an argument that it discourages.
pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`:UserWarning"),
]

MOMENTS = ("init", "build", "compute_output_shape", "call")


@dataclass(frozen=True)
class Row:
    """A layer, its arguments, and the shape of the input it is built for and called with."""

    layer: str
    what: str
    arguments: dict[str, Any]
    shape: tuple[int | None, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.what}"

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        return self.shape or usual_shape(self.layer)


def usual_shape(layer: str) -> tuple[int, ...]:
    time = (3,) if layer in CONV_LSTM else ()
    return (2, *time, *(8, 9, 7)[: rank_of(layer)], 4)


def usual_arguments(layer: str) -> dict[str, Any]:
    if layer in DEPTHWISE:
        return {"kernel_size": 3}
    return {"filters": 2, "kernel_size": 3} if layer in WITH_WEIGHTS else {}


def outcome(library: Any, row: Row) -> dict[str, str]:
    """Moment -> name of the exception, for the moments that raise one; a failed constructor has no others behind it."""

    def construct() -> Any:
        return getattr(library.layers, row.layer)(**row.arguments)

    def call() -> None:
        x = np.ones([2 if size is None else size for size in row.input_shape], np.float32)
        construct()(torch.from_numpy(x) if library is keras else x)

    steps: dict[str, Callable[[], Any]] = {
        "init": construct,
        "build": lambda: construct().build(row.input_shape),
        "compute_output_shape": lambda: construct().compute_output_shape(row.input_shape),
        "call": call,
    }
    raised = {}
    for moment, step in steps.items():
        try:
            step()
        except Exception as error:
            raised[moment] = type(error).__name__
            if library is cuconv and isinstance(error, ValueError):
                text = str(error)
                assert "Received" in text, f"{row.id}: a message that does not say what it received: {text}"
        if "init" in raised:
            break
    return raised


BAD_SIZES: dict[str, Any] = {
    "0": 0, "negative": -1, "None": None, "2.5": 2.5, "numpy-int": np.int64(2), "string": "3", "too-long": (1, 1, 1, 1),
    "empty": (), "with-None": (None, 2, 2), "with-0": (0, 1, 1), "with-negative": (2, 2, -1), "with-string": ("a",
    "b", "c"),
    "with-float": (2.5, 2, 2), "bool": True,
}  # fmt: skip


def bad_sizes(layer: str, name: str) -> list[Row]:
    base = usual_arguments(layer)
    rows = []
    for what, value in BAD_SIZES.items():
        if isinstance(value, tuple) and len(value) == 3:
            value = value[-rank_of(layer) :] if what == "with-negative" else value[: rank_of(layer)]
        rows.append(Row(layer, f"{name}-{what}", base | {name: value}))
    return rows


def window_rows(layer: str) -> list[Row]:
    """Everything a layer with a kernel can be told wrongly."""
    base = usual_arguments(layer)
    words = weight_names(layer)
    rows = [row for name in ("kernel_size", "strides", "dilation_rate") for row in bad_sizes(layer, name)]

    def add(what: str, shape: tuple[int | None, ...] = (), **changes: Any) -> None:
        rows.append(Row(layer, what, base | changes, shape))

    if "filters" in base:
        for what, value in {
            "0": 0,
            "negative": -3,
            "string": "8",
            "2.5": 2.5,
            "None": None,
            "tuple": (2,),
            "bool": True,
        }.items():
            add(f"filters-{what}", filters=value)
    for what, value in {
        "unknown": "full", "None": None, "number": 1, "causal": "causal", "pair": (1, 1), "list": [1, 1],
        "upper": "SAME",
    }.items():  # fmt: skip
        if not (what == "causal" and layer == "Conv1D"):
            add(f"padding-{what}", padding=value)
    for what, value in {"unknown": "channels_middle", "number": 1, "upper": "CHANNELS_LAST", "None": None}.items():
        add(f"data_format-{what}", data_format=value)
    for what, value in {
        "unknown": "relux",
        "case": "ReLU",
        "number": 3,
        "dict": {"class_name": "nothing", "config": {}},
    }.items():
        add(f"activation-{what}", activation=value)
    add("activation-threshold", activation="threshold")
    for word in words:
        for kind in ("initializer", "regularizer", "constraint"):
            for what, value in {"unknown": "nothing", "number": 0.5}.items():
                add(f"{word}_{kind}-{what}", **{f"{word}_{kind}": value})
    add("kernel_initializer-constant-without-value", **{f"{words[0]}_initializer": "constant"})
    add("initializer-wrong-shape", **{f"{words[0]}_initializer": np.ones((2, 2), np.float32)})
    for old in ("l1_l2", "L1l2"):
        add(f"regularizer-{old}", **{f"{words[0]}_regularizer": old})
    for old in ("maxnorm", "nonneg", "unitnorm"):
        add(f"constraint-{old}", **{f"{words[0]}_constraint": old})
    add("activity_regularizer-unknown", activity_regularizer="nothing")
    for what, value in {"None": None, "string": "yes", "0": 0}.items():
        add(f"use_bias-{what}", use_bias=value)
    add("strides-and-dilation", strides=2, dilation_rate=2)
    rank = rank_of(layer)
    if rank > 1:
        add(
            "strides-and-dilation-on-other-axes", strides=(2, *(1,) * (rank - 1)), dilation_rate=(*(1,) * (rank - 1), 2)
        )
    usual = usual_shape(layer)
    add("rank-too-small", usual[:1] + usual[2:])
    add("rank-too-large", (1, *usual))
    add("rank-one", (4,))
    add("channels-None", (*usual[:-1], None))
    spatial = slice(len(usual) - 1 - rank, len(usual) - 1)
    short = list(usual)
    short[spatial] = [2] * rank
    add("kernel-longer-than-input", tuple(short))
    add("kernel-longer-than-input-same", tuple(short), padding="same")
    short[spatial] = [8] * (rank - 1) + [4]
    add("kernel-longer-on-one-axis-by-dilation", tuple(short), dilation_rate=2)
    unknown = list(usual)
    unknown[spatial] = [None] * rank
    add("spatial-None", tuple(unknown))
    rows.append(Row(layer, "missing-required", {key: value for key, value in base.items() if key != "kernel_size"}))
    rows.append(Row(layer, "nothing-at-all", {}))
    if layer in CONV:
        for what, value in {"0": 0, "negative": -1, "not-of-filters": 4, "None": None, "string": "2"}.items():
            add(f"groups-{what}", filters=6, groups=value)
        add("groups-not-of-channels", filters=6, groups=3)
    elif layer in TRANSPOSE:
        add("output_padding-negative", strides=2, output_padding=-1)
        add("output_padding-too-long", strides=2, output_padding=(1, 1, 1, 1))
        add("output_padding-equals-stride", strides=2, output_padding=2)
        add("output_padding-1-with-stride-1", output_padding=1)
        add("output_padding-float", strides=2, output_padding=0.5)
        add("output_padding-string", strides=2, output_padding="1")
    else:
        add("groups-is-unknown-here", groups=1)
    if layer in SEPARABLE + DEPTHWISE:
        for what, value in {"0": 0, "negative": -1, "None": None, "string": "2", "float": 1.5}.items():
            add(f"depth_multiplier-{what}", depth_multiplier=value)
    if layer in CONV_LSTM:
        add("recurrent_activation-unknown", recurrent_activation="nothing")
        add("stateful-open-batch", (None, *usual[1:]), stateful=True)
        add("no-steps", (2, 0, *usual[2:]))
        for what, value in {"above-one": 1.5, "negative": -0.5, "string": "a"}.items():
            add(f"dropout-{what}", dropout=value)
    return rows


def common_rows(layer: str) -> list[Row]:
    """Wrong keywords that every layer shares."""
    base = usual_arguments(layer)
    options: dict[str, Any] = {
        "unknown-keyword": {"kernels": 3}, "name-with-slash": {"name": "a/b"}, "name-number": {"name": 3},
        "name-empty": {"name": ""},
        "trainable-number": {"trainable": 1}, "trainable-string": {"trainable": "yes"},
        "trainable-None": {"trainable": None},
        "dtype-unknown": {"dtype": "float31"}, "dtype-number": {"dtype": 32}, "dtype-list": {"dtype": ["float32"]},
        "activity_regularizer-number": {"activity_regularizer": 0.1},
        "input_shape": {"input_shape": usual_shape(layer)[1:]},
        "batch_shape-is-no-keyword": {"batch_shape": (1, 2, 3)}, "autocast-off": {"autocast": False},
        "input_dim": {"input_dim": 4},
        "of-keras-2-batch_input_shape": {"batch_input_shape": (None, *usual_shape(layer)[1:])},
        "of-keras-2-batch_size": {"batch_size": 2, "input_shape": usual_shape(layer)[1:]},
        "of-keras-2-weights": {"weights": None},
    }  # fmt: skip
    return [Row(layer, what, base | changes) for what, changes in options.items()]


def reshaping_rows(layer: str) -> list[Row]:
    name = "cropping" if layer in CROPPING else "size" if layer in UPSAMPLING else "padding"
    rank = rank_of(layer)
    values: dict[str, Any] = dict(BAD_SIZES) | {
        "pair": (1, 2), "first-float": (1.5, 1), "list": [1] * rank, "pairs": ((1, 1),) * rank,
        "pair-negative": ((1, -1),) * rank,
        "pair-too-long": ((1, 1, 1),) * rank, "pair-float": ((1.5, 1),) * rank, "pair-of-None": ((None, 1),) * rank,
        "too-few": (1,) * (rank - 1), "too-many": (1,) * (rank + 1), "negative-tuple": (-1,) * rank, "dict": {"a": 1},
    }  # fmt: skip
    rows = [Row(layer, f"{name}-{what}", {name: value}) for what, value in values.items()]
    usual = usual_shape(layer)
    rows += [
        Row(layer, "rank-too-small", {}, usual[:1] + usual[2:]), Row(layer, "rank-too-large", {}, (1, *usual)),
        Row(layer, "rank-one", {}, (4,)),
    ]  # fmt: skip
    if layer not in ("Cropping1D", "UpSampling1D"):
        for what, value in {"unknown": "last", "number": 1, "upper": "Channels_First"}.items():
            rows.append(Row(layer, f"data_format-{what}", {"data_format": value}))
    if layer in CROPPING:
        small = (2, *(3,) * rank, 4)
        rows += [Row(layer, f"crops-{crop}-of-3", {"cropping": crop}, small) for crop in (1, 2, 5)]
        exact = (1, 2) if rank == 1 else ((1, 2),) * rank
        rows.append(Row(layer, "crops-exactly-everything", {"cropping": exact}, small))
    if layer == "UpSampling2D":
        words = {"unknown": "cubic", "None": None, "number": 1, "upper": "BILINEAR", "mitchell": "mitchellcubic"}
        for what, value in words.items():
            rows.append(Row(layer, f"interpolation-{what}", {"interpolation": value}))
    return rows


def rows_of(layer: str) -> list[Row]:
    return (window_rows(layer) if layer in WITH_WEIGHTS else reshaping_rows(layer)) + common_rows(layer)


ROWS = [row for layer in LAYERS for row in rows_of(layer)]


ACCEPTED: dict[str, str] = {}
AT_ONCE = {"init": "ValueError"}
BY_SHAPE = dict.fromkeys(("build", "compute_output_shape", "call"), "ValueError")

# (pattern of ids, what cuconv answers, why)
DEVIATIONS: list[tuple[str, dict[str, str], str]] = [
    (
        r".*-(kernel_size|strides|dilation_rate|size)-(with-float|first-float|bool)",
        AT_ONCE,
        "no sizes; Keras notices late or never",
    ),
    (
        r"(?!ConvLSTM).*-filters-bool|.*-use_bias-(None|string)",
        AT_ONCE,
        "no number of filters, no flag; Keras takes what is true or false",
    ),
    (
        r"Cropping.*-cropping-(bool|.*float)|ZeroPadding.*-padding-(bool|.*float)",
        AT_ONCE,
        "no amounts; Keras notices late or never",
    ),
    (r"ZeroPadding.*-padding-negative", AT_ONCE, "a padding that crops is an accident of the bare integer"),
    (r"(Conv\dDTranspose|Separable.*)-filters-2\.5", AT_ONCE, "as in Conv1D"),
    (r".*-depth_multiplier-float", AT_ONCE, "as for `filters`"),
    (r".*-depth_multiplier-None", {"init": "TypeError"}, "the same TypeError, at once"),
    (r".*-(padding|interpolation)-(None|number)", AT_ONCE, "Keras: AttributeError, for it has no `lower`"),
    (r".*-activation-dict", AT_ONCE, "as for an unknown name; Keras: TypeError"),
    (r".*-kernel_initializer-constant-without-value", AT_ONCE, "Keras: KeyError from inside of a config"),
    (r"Conv\dDTranspose-padding-(pair|list)", BY_SHAPE, "as in Conv1D; Keras: AttributeError"),
    (
        r"ConvLSTM.*-(filters-(0|None|bool)|strides-(0|with-0))",
        BY_SHAPE,
        "Keras: RuntimeError, TypeError and OverflowError from its insides",
    ),
    (r".*-of-keras-2-.*", ACCEPTED, "keywords of Keras 2 and R, which Keras 3 has dropped"),
    (r".*-rank-(one|too-small|too-large)", BY_SHAPE, "Keras: IndexError from compute_output_shape"),
]


def refused_earlier(theirs: dict[str, str], ours: dict[str, str]) -> bool:
    """Whether ours raises what theirs does where theirs does, and besides only in moments before the call."""
    one_type = len({*theirs.values(), *ours.values()}) == 1
    return one_type and "init" not in ours and "call" in theirs and theirs.keys() <= ours.keys()


@functools.cache
def outcomes(identifier: str) -> tuple[dict[str, str], dict[str, str]]:
    """What Keras and what cuconv answers to a row."""
    row = next(row for row in ROWS if row.id == identifier)
    return outcome(keras, row), outcome(cuconv, row)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_error_is_keras_error(row):
    theirs, ours = outcomes(row.id)
    chosen = [answer for pattern, answer, _ in DEVIATIONS if re.fullmatch(pattern, row.id)]
    if theirs != ours and not refused_earlier(theirs, ours):
        assert ours in chosen, f"Keras raises {theirs or 'nothing'}"


def test_every_deviation_is_met():
    """A deviation that no row shows any more is struck from the list."""
    shown = {row.id for row in ROWS if operator.ne(*outcomes(row.id))}
    for pattern, _, _ in DEVIATIONS:
        assert any(re.fullmatch(pattern, each) for each in shown), pattern


# --- After the constructor -------------------------------------------------------------------------------------------


def array(library: Any, *shape: int, dtype: str = "float32") -> Any:
    x = np.ones(shape, dtype)
    return torch.from_numpy(x) if library is keras else x


def conv(library: Any, *shape: int, **options: Any) -> Any:
    """A Conv1D, built if there is a shape."""
    layer = library.layers.Conv1D(**{"filters": 2, "kernel_size": 3} | options)
    if shape:
        layer.build(shape)
    return layer


def recurrent(library: Any, *shape: int, **options: Any) -> Any:
    layer = library.layers.ConvLSTM1D(2, 3, **options)
    layer.build(shape)
    return layer


LATER: dict[str, Callable[[Any], Any]] = {
    "call-other-channels": lambda lib: conv(lib, 2, 8, 4)(array(lib, 2, 8, 5)),
    "call-other-channels-depthwise": lambda lib: [
        each(array(lib, 2, 8, c)) for each in [lib.layers.DepthwiseConv1D(3)] for c in (4, 5)
    ],
    "call-other-channels-transpose": lambda lib: [
        each(array(lib, 2, 8, c)) for each in [lib.layers.Conv1DTranspose(2, 3)] for c in (4, 5)
    ],
    "call-other-rank": lambda lib: conv(lib, 2, 8, 4)(array(lib, 2, 8, 8, 4)),
    "call-too-short": lambda lib: conv(lib, 2, 8, 4)(array(lib, 2, 2, 4)),
    "call-a-list": lambda lib: conv(lib, 2, 8, 4)([[[1.0, 2.0, 3.0, 4.0]] * 8]),
    "call-a-list-of-arrays": lambda lib: conv(lib, 2, 8, 4)([array(lib, 2, 8, 4)]),
    "call-nothing": lambda lib: conv(lib, 2, 8, 4)(None),
    "call-a-string": lambda lib: conv(lib, 2, 8, 4)("signal"),
    "call-without-argument": lambda lib: conv(lib, 2, 8, 4)(),
    "call-integers": lambda lib: conv(lib, 2, 8, 4)(array(lib, 2, 8, 4, dtype="int32")),
    "call-bilinear-other-rank": lambda lib: lib.layers.UpSampling2D(2, interpolation="bilinear")(array(lib, 2, 3, 4)),
    "build-twice": lambda lib: conv(lib, 2, 8, 4).build((2, 8, 4)),
    "set-too-few-weights": lambda lib: conv(lib, 2, 8, 4).set_weights([np.ones((3, 4, 2))]),
    "set-too-many-weights": lambda lib: conv(lib, 2, 8, 4).set_weights([np.ones((3, 4, 2)), np.ones(2), np.ones(2)]),
    "set-weights-of-another-shape": lambda lib: conv(lib, 2, 8, 4).set_weights([np.ones((3, 2, 4)), np.ones(2)]),
    "set-weights-unbuilt": lambda lib: conv(lib).set_weights([np.ones((3, 4, 2)), np.ones(2)]),
    "set-weights-a-list": lambda lib: conv(lib, 2, 8, 4).set_weights([np.ones((3, 4, 2)), [1.0, 2.0]]),
    "set-no-weights-unbuilt": lambda lib: conv(lib).set_weights([]),
    "count-params-unbuilt": lambda lib: conv(lib).count_params(),
    "losses-of-an-orthogonal-kernel": lambda lib: (
        conv(lib, 2, 8, 4, kernel_regularizer="orthogonal_regularizer").losses
    ),
    "losses-unbuilt": lambda lib: conv(lib, kernel_regularizer="l2").losses,
    "trainable-set-to-a-number": lambda lib: setattr(conv(lib), "trainable", 2),
    "from-config-unknown-key": lambda lib: lib.layers.Conv1D.from_config(
        {"filters": 2, "kernel_size": 3, "kernels": 4}
    ),
    "from-config-missing-key": lambda lib: lib.layers.Conv1D.from_config({"filters": 2}),
    "from-config-unknown-initializer": lambda lib: lib.layers.Conv1D.from_config(
        conv(lib).get_config()
        | {"kernel_initializer": {"module": "mine", "class_name": "Mine", "config": {}, "registered_name": None}}
    ),
    "recurrent-other-space": lambda lib: recurrent(lib, 2, 3, 8, 4)(array(lib, 2, 3, 9, 4)),
    "recurrent-other-batch-and-time": lambda lib: recurrent(lib, 2, 3, 8, 4)(array(lib, 5, 4, 8, 4)),
    "recurrent-stateful-other-batch": lambda lib: recurrent(lib, 2, 3, 8, 4, stateful=True)(array(lib, 3, 3, 8, 4)),
    "recurrent-open-space": lambda lib: recurrent(lib, 2, 3, None, 4),
    "recurrent-one-state": lambda lib: recurrent(lib, 2, 3, 8, 4)(
        array(lib, 2, 3, 8, 4), initial_state=[array(lib, 2, 6, 2)]
    ),
    "recurrent-state-of-another-shape": lambda lib: recurrent(lib, 2, 3, 8, 4)(
        array(lib, 2, 3, 8, 4), initial_state=[array(lib, 2, 5, 2), array(lib, 2, 5, 2)]
    ),
}

LATER_DEVIATIONS = {
    "call-too-short": ("ValueError", "Keras lets torch's RuntimeError through"),
    "call-integers": ("TypeError", "wrong dtype; Keras lets torch's RuntimeError through"),
    "set-weights-a-list": (None, "a list of numbers is as good as an array; Keras: AttributeError"),
    "trainable-set-to-a-number": ("ValueError", "as in the constructor; Keras takes what is true"),
    "from-config-unknown-key": ("ValueError", "as in the constructor; Keras wraps it into a TypeError"),
    "from-config-unknown-initializer": ("ValueError", "as for an unknown name; Keras: TypeError"),
    "recurrent-one-state": ("ValueError", "Keras: IndexError from its insides"),
    "recurrent-state-of-another-shape": ("ValueError", "Keras lets torch's RuntimeError through"),
}


def exception_of(step: Callable[[Any], Any], library: Any) -> str | None:
    try:
        step(library)
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("what", LATER)
def test_later_error_is_keras_error(what):
    theirs, ours = (exception_of(LATER[what], library) for library in (keras, cuconv))
    if what in LATER_DEVIATIONS:
        assert ours == LATER_DEVIATIONS[what][0] != theirs
    else:
        assert ours == theirs


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_signature_is_keras_signature(layer):
    """Names, order and defaults of the arguments, as a caller and an editor see them."""
    theirs, ours = (
        inspect.signature(getattr(library.layers, layer)).parameters.values() for library in (keras, cuconv)
    )
    assert [(each.name, each.default, each.kind) for each in ours] == [
        (each.name, each.default, each.kind) for each in theirs
    ]


@pytest.mark.parametrize("layer", LAYERS)
def test_arguments_can_be_positional(layer):
    """All of them in Keras' order; a swap of two arguments of one type would not show in an error."""
    parameters = inspect.signature(getattr(keras.layers, layer)).parameters.values()
    values = dict(usual_arguments(layer))
    positional = [values.get(each.name, each.default) for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    theirs, ours = (getattr(library.layers, layer)(*positional).get_config() for library in (keras, cuconv))
    assert plain_difference(plain(theirs | {"name": ""}), plain(ours | {"name": ""})) is None


def test_aliases_are_keras_aliases():
    names = [name for name in dir(keras.layers) if inspect.isclass(getattr(keras.layers, name))]
    aliases = {
        name: layer for layer in LAYERS for name in names if getattr(keras.layers, name) is getattr(keras.layers, layer)
    }
    assert len(aliases) > len(LAYERS)
    for alias, layer in aliases.items():
        assert getattr(layers, alias) is getattr(layers, layer)


KINDS = ("activations", "initializers", "regularizers", "constraints")
# Functions of the modules, base classes that compute nothing, and the one name that Keras answers with a KeyError.
NO_NAMES = {"get", "serialize", "deserialize", "Initializer", "Regularizer", "Constraint", "Constant", "constant"}
NAMES = [
    (kind, name)
    for kind in KINDS
    for name in dir(getattr(keras, kind))
    if not name.startswith("_") and name not in NO_NAMES
]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=lambda value: value)
def test_name_means_what_it_means_to_keras(kind, name):
    """Every public name, and its usual misspellings, stands for the same thing or raises the same exception."""
    for spelling in (name, name.upper(), name.lower(), name.replace("_", "")):
        found = {}
        for library in (keras, cuconv):
            module = getattr(library, kind)
            try:
                each = module.get(spelling)
            except Exception as error:
                found[library] = type(error).__name__
            else:
                found[library] = module.serialize(each) if kind == "activations" else plain(module.serialize(each))
        assert plain_difference(found[keras], found[cuconv]) is None, spelling
