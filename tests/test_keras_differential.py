"""Every layer against Keras 3 on torch: the same configuration, input, weights and cotangent; every answer compared.

What is compared is in keras_harness.py, the configurations are in keras_cases.py. `pytest -m keras` runs this.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from keras_cases import (
    CONV_LSTM,
    DEPTHWISE,
    LAST_AXIS_ACTIVATIONS,
    LAYERS,
    POINTWISE_ACTIVATIONS,
    TORCH_FAILS,
    WITH_WEIGHTS,
    all_cases,
    case,
    find,
    random_cases,
    rank_of,
    weight_names,
)  # fmt: skip
from keras_harness import (
    OURS,
    THEIRS,
    Raised,
    Values,
    answers,
    as_values,
    differences,
    keras,
    plain,
    plain_difference,
    precision_of,
    report,
    torch,
    value_difference,
    without_counter,
)  # fmt: skip

import cuconv
from cuconv import activations

# Our own warnings stay errors; these are about how Keras uses NumPy, and about an argument that it discourages.
pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Do not pass an `input_shape`:UserWarning"),
]

CASES = all_cases()


def as_keras_2_wrote_it(value: Any) -> Any:
    """A config without what Keras 3 added: modules and registered names, and the dict around a dtype."""
    if isinstance(value, dict) and value.get("class_name") == "DTypePolicy":
        return value["config"]["name"]
    if isinstance(value, dict):
        return {
            key: as_keras_2_wrote_it(entry) for key, entry in value.items() if key not in ("module", "registered_name")
        }
    return value


def config_exchange(case: Any) -> list[str]:
    """What goes wrong when either library is built from the other's configuration, or ours from that of Keras 2."""
    found = []
    theirs, ours = (case.construct(library).get_config() for library in (keras, cuconv))
    old = as_keras_2_wrote_it(theirs) | {"batch_input_shape": [None, *case.shape[1:]]}
    if case.layer in DEPTHWISE:
        old |= {"groups": 1, "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}}}
        old |= {"kernel_regularizer": None, "kernel_constraint": None}
    for what, library, config, expected in (
        ("our layer from Keras' config", cuconv, theirs, theirs),
        ("our layer from a config of Keras 2", cuconv, old, theirs),
        ("Keras' layer from our config", keras, ours, ours),
    ):
        try:
            again = getattr(library.layers, case.layer).from_config(config).get_config()
        except Exception as error:
            found.append(f"{what}: {type(error).__name__}: {error}")
        else:
            difference = plain_difference(*(plain(without_counter(each, case)) for each in (expected, again)))
            found += [f"{what}: {difference}"] if difference else []
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda each: each.id)
def test_layer_answers_as_keras_does(case):
    theirs = answers(THEIRS, case)
    broken = {name: fact for name, fact in theirs.items() if isinstance(fact, Raised) and name.endswith("_facts")}
    assert not broken, f"Keras itself does not answer: {broken}\n{report(case, [])}"
    ours = answers(OURS, case)
    found = differences(theirs, ours, precision_of(case)) + config_exchange(case)
    assert not found, report(case, found)


@pytest.mark.parametrize("layer", LAYERS)
def test_there_are_enough_cases(layer):
    mine = [each for each in CASES if each.layer == layer]
    drawn = {each.id for each in random_cases(layer)}
    assert len({each.id for each in mine}) == len(mine)
    assert len(drawn & {each.id for each in mine}) >= 60
    assert find(mine[-1].id) == mine[-1], "the generator is not repeatable"
    assert {each for each in TORCH_FAILS if each.startswith(f"{layer}-")} <= drawn, (
        "an excluded case is not drawn any more"
    )


def test_the_random_cases_reach_every_option():
    """Counts what was drawn, so that a generator that stops drawing something is noticed."""
    options = Counter(key for each in CASES for key in each.options)
    for key in (
        "groups",
        "output_padding",
        "depth_multiplier",
        "dilation_rate",
        "stateful",
        "go_backwards",
        "autocast",
    ):
        assert options[key] >= 2, key
    drawn = {each.options.get("activation") for each in CASES}
    assert drawn >= {*POINTWISE_ACTIVATIONS, *LAST_AXIS_ACTIVATIONS, "glu"}


# --- The comparison can fail -----------------------------------------------------------------------------------------


def with_array(
    name: str, change: Callable[[np.ndarray], np.ndarray], dtype: str | None = None
) -> Callable[[dict], None]:
    """Damage done to the (first) array of one fact."""

    def damage(facts: dict[str, Any]) -> None:
        several = isinstance(facts[name], list)
        old = facts[name][0] if several else facts[name]
        new = Values(dtype or old.dtype, change(old.array.copy()), old.terms)
        facts[name] = [new, *facts[name][1:]] if several else new

    return damage


def one_element(change: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    def changed(array: np.ndarray) -> np.ndarray:
        array.flat[array.size // 2] = change(array.flat[array.size // 2])
        return array

    return changed


DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "output-nan": with_array("call 0: outputs", one_element(lambda value: math.nan)),
    "output-infinite": with_array("call 0: outputs", one_element(lambda value: math.inf)),
    "output-one-element-off": with_array("call 0: outputs", one_element(lambda value: value + 1e-3)),
    "output-relative-1e-4": with_array("call 0: outputs", lambda array: array * (1 + 1e-4)),
    "output-transposed": with_array("call 0: outputs", lambda array: array.swapaxes(1, -1)),
    "output-not-written": with_array("call 0: outputs", lambda array: array * 0),
    "output-dtype": with_array("call 0: outputs", lambda array: array, dtype="float64"),
    "input-gradient-sign": with_array("input gradient 0", lambda array: -array),
    "weight-gradient-scaled": with_array("gradient 0: kernel", lambda array: array * 1.001),
    "weight-gradient-missing": lambda facts: facts.pop("gradient 0: bias"),
    "training-output-off": with_array("forward 0: outputs", one_element(lambda value: value + 1e-3)),
    "output-extra": lambda facts: facts["call 0: outputs"].append(facts["call 0: outputs"][0]),
    "output-missing": lambda facts: facts["call 0: outputs"].pop(),
    "loss-halved": with_array("call 0: losses", lambda array: array / 2),
    "loss-missing": lambda facts: facts["forward 0: losses"].pop(),
    "constraint-forgotten": lambda facts: facts.update({"kernel after constraints": facts["kernel after set_weights"]}),
    "weight-renamed": lambda facts: facts.update(weights=[("w", *weight[1:]) for weight in facts["weights"]]),
    "weights-swapped": lambda facts: facts.update(weights=facts["weights"][::-1]),
    "config-key-missing": lambda facts: facts["config"].pop("groups"),
    "config-value": lambda facts: facts["config"].update(strides=[2]),
    "config-true-is-not-one": lambda facts: facts["config"].update(groups=True),
    "shape": lambda facts: facts.update({"compute_output_shape((None, 9, 4))": [2, 9, 6]}),
    "raised-instead": lambda facts: facts.update(call_facts=Raised("ValueError")),
    "raised-and-not": lambda facts: facts.update({"compute_output_shape((2, 9, 4))": Raised("ValueError")}),
    "fact-missing": lambda facts: facts.pop("another call, of a fresh state or of a larger batch"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_answer_is_reported(damage):
    options = {
        "kernel_size": 3,
        "kernel_regularizer": "l2",
        "activity_regularizer": "l1",
        "kernel_constraint": "unit_norm",
    }
    sample = case("Conv1D", "sample", (2, 9, 4), filters=6, padding="same", groups=2, name="layer", **options)
    sound = answers(THEIRS, sample)
    assert differences(sound, answers(THEIRS, sample), "float32") == []
    damaged = copy.deepcopy(sound)
    damage(damaged)
    assert differences(sound, damaged, "float32")


# --- What layers are given: activations, initializers and callables ---------------------------------------------------


@pytest.mark.parametrize("name", [*POINTWISE_ACTIVATIONS, *LAST_AXIS_ACTIVATIONS, "glu"])
def test_activation_answers_as_keras_does(name):
    """Values and gradients, element by element, from the kinks' neighbourhoods to where exponentials overflow."""
    steep = name in ("exponential", "squareplus")
    x = np.concatenate([np.linspace(-8, 8, 161) + 1e-3, [-60.25, -20.5, 20.5, 60.25, 1e-6, -1e-6]]).astype(np.float32)
    x = x[:160] if steep else np.append(x, np.float32(0.25))
    x = x.reshape(4, -1)
    tensor = torch.from_numpy(x.copy()).requires_grad_()
    y = keras.activations.get(name)(tensor)
    dy = np.random.default_rng(1).uniform(0.5, 1.5, tuple(y.shape)).astype(np.float32)
    y.backward(torch.from_numpy(dy))
    ours = activations.get(name)
    for what, actual, expected in (("value", ours(x), y), ("gradient", ours.gradient(x, dy), tensor.grad)):
        expected = expected.detach().numpy()
        assert actual.dtype == np.float32 and np.isfinite(expected).all(), what
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-6, err_msg=what)


KINKS = np.array([[-4, -3, -1, -0.5, -0.0], [0.0, 0.5, 1, 3, 6]], np.float32)


@pytest.mark.parametrize("name", POINTWISE_ACTIVATIONS)
def test_activation_values_at_kinks(name):
    expected = keras.activations.get(name)(torch.from_numpy(KINKS.copy())).numpy()
    np.testing.assert_allclose(activations.get(name)(KINKS), expected, rtol=2e-6, atol=1e-6)


BIG = {
    "Conv1D": ((1, 9, 48), {"filters": 40, "kernel_size": 5}),
    "Conv2D": ((1, 5, 5, 64), {"filters": 32, "kernel_size": 3, "groups": 4}),
    "Conv2DTranspose": ((1, 4, 4, 50), {"filters": 21, "kernel_size": 3}),
    "SeparableConv2D": ((1, 6, 6, 64), {"filters": 48, "kernel_size": 5, "depth_multiplier": 2}),
    "DepthwiseConv2D": ((1, 6, 6, 96), {"kernel_size": 5, "depth_multiplier": 2}),
    "ConvLSTM2D": ((1, 2, 5, 5, 12), {"filters": 16, "kernel_size": 3}),
}
RANDOM_INITIALIZERS = (
    "glorot_uniform glorot_normal he_uniform he_normal lecun_uniform lecun_normal random_normal random_uniform "
    "truncated_normal variance_scaling"
).split()


@pytest.mark.parametrize("layer", BIG)
@pytest.mark.parametrize("initializer", RANDOM_INITIALIZERS)
def test_random_initializer_has_keras_spread(layer, initializer):
    """Standard deviation and largest element, which give away a wrong fan; from 2400 draws and more of each."""
    shape, options = BIG[layer]
    options = options | {f"{word}_initializer": initializer for word in weight_names(layer) if word != "bias"}
    keras.utils.set_random_seed(1)
    cuconv.set_random_seed(1)
    pair = [getattr(library.layers, layer)(**options) for library in (keras, cuconv)]
    for each in pair:
        each.build(shape)
    for theirs, ours in zip(*(each.get_weights() for each in pair), strict=True):
        if theirs.ndim > 1:
            assert ours.std() == pytest.approx(theirs.std(), rel=0.06)
            assert abs(ours).max() == pytest.approx(abs(theirs).max(), rel=0.02 if "uniform" in initializer else 0.35)
            assert abs(ours.mean()) < 4 * ours.std() / math.sqrt(ours.size)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("layer", BIG)
def test_orthogonal_initializer_makes_orthogonal_columns(layer):
    shape, options = BIG[layer]
    word = "depthwise" if "Depthwise" in layer or "Separable" in layer else "kernel"
    for library in (keras, cuconv):
        made = getattr(library.layers, layer)(**options, **{f"{word}_initializer": "orthogonal"})
        made.build(shape)
        kernel = made.get_weights()[0]
        matrix = kernel.reshape(-1, kernel.shape[-1]).astype(np.float64)
        gram = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)


def halved(x: Any) -> Any:
    return x * 0.5


def of_shape(shape: tuple[int, ...], dtype: Any = None) -> np.ndarray:
    return (np.arange(math.prod(shape)).reshape(shape) / 16).astype("float32")


def squares(w: Any) -> Any:
    return (w * w).sum() * 0.25


@pytest.mark.parametrize(
    "options",
    [
        {"activation": halved},
        {"kernel_initializer": of_shape},
        {"kernel_initializer": of_shape((3, 2, 4))},
        {"kernel_initializer": of_shape, "kernel_regularizer": squares, "activity_regularizer": squares},
        {"kernel_initializer": of_shape, "kernel_constraint": halved},
    ],
    ids=["activation", "initializer", "initializer-array", "regularizers", "constraint"],
)
def test_callables_are_used_as_keras_uses_them(options):
    x = of_shape((2, 7, 2)) - 0.5
    pair = [library.layers.Conv1D(4, 3, **options) for library in (keras, cuconv)]
    for each in pair:
        each.build(x.shape)
    if "kernel_initializer" in options:
        np.testing.assert_array_equal(*(each.get_weights()[0] for each in pair))
    pair[1].set_weights([np.asarray(weight) for weight in pair[0].get_weights()])
    THEIRS.constrain(pair[0])
    OURS.constrain(pair[1])
    for theirs, ours in zip(*(each.get_weights() for each in pair), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    theirs, ours = as_values(THEIRS.call(pair[0], x)[0]), as_values(OURS.call(pair[1], x)[0])
    assert value_difference(theirs, ours, "float32") is None
    losses = [float(loss.detach()) for loss in pair[0].losses]
    assert pair[1].losses == pytest.approx(losses, rel=1e-5)
    assert len(losses) == sum("regularizer" in key for key in options)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_bias_gradient_of_a_long_sum(data_format):
    """Of one sign, so that rounding errors pile up where rows are added one after the other."""
    x = np.ones((2, 96, 96, 2) if data_format == "channels_last" else (2, 2, 96, 96), np.float32)
    theirs, ours = (library.layers.Conv2D(3, 1, data_format=data_format) for library in (keras, cuconv))
    theirs.build(x.shape)
    ours.build(x.shape)
    y = theirs(torch.from_numpy(x))
    (expected,) = torch.autograd.grad(y, [theirs.bias.value], torch.full_like(y, 0.1))
    ours.backward(np.full_like(ours.forward(x), 0.1))
    np.testing.assert_allclose(ours.gradients[1], expected.numpy(), rtol=2e-5)


# --- What only the recurrent layers have -----------------------------------------------------------------------------


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("stateful", [False, True], ids=["stateless", "stateful"])
def test_initial_state_is_used_as_keras_uses_it(data_format, stateful):
    """Outputs, and the gradients of the input and of both states."""
    rng = np.random.default_rng(3)
    x, h, c = (rng.standard_normal(shape).astype(np.float32) for shape in [(2, 3, 4, 5, 2), (2, 4, 5, 2), (2, 4, 5, 2)])
    if data_format == "channels_first":
        x, h, c = np.moveaxis(x, -1, 2).copy(), np.moveaxis(h, -1, 1).copy(), np.moveaxis(c, -1, 1).copy()
    options = {"padding": "same", "data_format": data_format, "stateful": stateful, "return_sequences": True}
    theirs, ours = (library.layers.ConvLSTM2D(2, 3, **options) for library in (keras, cuconv))
    theirs.build(x.shape)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    leaves = [torch.from_numpy(each).requires_grad_() for each in (x, h, c)]
    y = theirs(leaves[0], initial_state=leaves[1:])
    dy = rng.standard_normal(tuple(y.shape)).astype(np.float32)
    np.testing.assert_allclose(ours(x, initial_state=[h, c]), y.detach().numpy(), rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(ours.forward(x, initial_state=[h, c]), y.detach().numpy(), rtol=2e-5, atol=2e-6)
    for actual, expected in zip(ours.backward(dy), torch.autograd.grad(y, leaves, torch.from_numpy(dy)), strict=True):
        np.testing.assert_allclose(actual, expected.numpy(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_dropout_of_none_or_all_changes_nothing_in_training(dropout):
    x = np.random.default_rng(4).standard_normal((2, 3, 6, 2)).astype(np.float32)
    theirs, ours = (
        library.layers.ConvLSTM1D(2, 3, dropout=dropout, recurrent_dropout=dropout) for library in (keras, cuconv)
    )
    theirs.build(x.shape)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    expected = theirs(torch.from_numpy(x), training=True).detach().numpy()
    np.testing.assert_allclose(ours(x, training=True), expected, rtol=2e-5, atol=1e-6)


# --- Other ways to say the same --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16"])
def test_symbolic_output_is_keras_symbolic_output(layer, dtype):
    """Shape and dtype of the output of an `Input` with an open batch."""
    options = {"filters": 2, "kernel_size": 3} if layer in WITH_WEIGHTS else {}
    options = {"kernel_size": 3} if layer in DEPTHWISE else options
    shape = (*((3,) if layer in CONV_LSTM else ()), *(8, 9, 7)[: rank_of(layer)], 4)
    y = [getattr(library.layers, layer)(**options, dtype=dtype)(library.Input(shape)) for library in (keras, cuconv)]
    assert tuple(y[1].shape) == tuple(y[0].shape)
    assert str(y[1].dtype) == str(y[0].dtype)


@pytest.mark.parametrize(
    "spell",
    [
        lambda library: "mixed_float16",
        lambda library: {
            "module": "keras",
            "class_name": "DTypePolicy",
            "config": {"name": "mixed_float16"},
            "registered_name": None,
        },
        lambda library: (
            library.DTypePolicy("mixed_float16") if library is keras else library.layers.DTypePolicy("mixed_float16")
        ),
    ],
    ids=["name", "config", "policy"],
)
def test_dtype_is_spelled_as_in_keras(spell):
    theirs, ours = (library.layers.Conv1D(2, 3, dtype=spell(library)) for library in (keras, cuconv))
    assert (
        (ours.compute_dtype, ours.variable_dtype)
        == (theirs.compute_dtype, theirs.variable_dtype)
        == ("float16", "float32")
    )
    assert ours.get_config()["dtype"] == theirs.get_config()["dtype"]
