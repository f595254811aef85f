"""tf.layers.conv1d: TensorFlow 1's rules of names, scopes and reuse, and its convolutions against the oracle."""

import inspect
import threading

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, dtype_of
from hypothesis import given
from hypothesis import strategies as st

from cuconv import activations, constraints, initializers, models, regularizers
from cuconv.compat import tf_layers as tf


@pytest.fixture(autouse=True)
def graph():
    with tf.Graph().as_default() as graph:
        yield graph


def signal(*shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    return (x + 1j * rng.standard_normal(shape) if dtype_of(dtype).kind == "c" else x).astype(dtype_of(dtype))


X = signal(2, 11, 3)


def names(variables=None):
    return [each.name for each in (tf.global_variables() if variables is None else variables)]


# --- Names, scopes, reuse ----------------------------------------------------------------------------------------


def test_the_signature_is_that_of_tensorflow():
    arguments = (
        "inputs filters kernel_size strides padding data_format dilation_rate activation use_bias kernel_initializer "
        "bias_initializer kernel_regularizer bias_regularizer activity_regularizer kernel_constraint bias_constraint "
        "trainable name reuse"
    )
    assert list(inspect.signature(tf.conv1d).parameters) == arguments.split()
    defaults = {key: each.default for key, each in list(inspect.signature(tf.conv1d).parameters.items())[3:]}
    special = {"strides": 1, "padding": "valid", "data_format": "channels_last", "dilation_rate": 1}
    special |= {"use_bias": True, "bias_initializer": "zeros", "trainable": True}
    assert defaults == dict.fromkeys(defaults) | special


def test_calls_without_a_name_are_counted():
    for _ in range(3):
        tf.conv1d(X, 4, 3, use_bias=False)
    assert names() == ["conv1d/kernel", "conv1d_1/kernel", "conv1d_2/kernel"]


def test_a_name_that_was_given_is_counted_too():
    tf.conv1d(X, 4, 3, name="conv1d", use_bias=False)
    tf.conv1d(X, 4, 3, use_bias=False)
    tf.conv1d(X, 4, 3, name="own")
    assert names() == ["conv1d/kernel", "conv1d_1/kernel", "own/kernel", "own/bias"]


def test_counting_is_by_scope_and_starts_again_when_one_is_entered_again():
    with tf.variable_scope("a"):
        first = tf.conv1d(X, 4, 3), tf.conv1d(X, 4, 3)
    with tf.variable_scope("b"):
        tf.conv1d(X, 4, 3)
    assert names() == [f"{p}/{w}" for p in ("a/conv1d", "a/conv1d_1", "b/conv1d") for w in ("kernel", "bias")]
    with tf.variable_scope("a", reuse=True):
        again = tf.conv1d(X, 4, 3), tf.conv1d(X, 4, 3)
    assert len(names()) == 6
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)
    with tf.variable_scope("a"), pytest.raises(ValueError, match=r"Variable a/conv1d/kernel already exists"):
        tf.conv1d(X, 4, 3)


def test_a_scope_that_is_opened_again_goes_back_to_its_place():
    with tf.variable_scope("a") as scope:
        tf.conv1d(X, 4, 3)
    with tf.variable_scope("elsewhere"), tf.variable_scope(scope) as again:
        assert again.name == tf.get_variable_scope().name == "a"
        tf.conv1d(X, 4, 3, name="second")
    assert tf.get_variable_scope().name == ""
    assert names()[2:] == ["a/second/kernel", "a/second/bias"]
    tf.conv1d(X, 4, 3, name=scope, reuse=tf.AUTO_REUSE)
    assert names()[4:] == ["a/kernel", "a/bias"]


def test_opening_a_scope_object_leaves_the_count_inside_alone():
    with tf.variable_scope("a") as scope:
        tf.conv1d(X, 4, 3, use_bias=False)
        with tf.variable_scope(scope):
            tf.conv1d(X, 4, 3, use_bias=False)
        assert names() == ["a/conv1d/kernel", "a/conv1d_1/kernel"]
        with pytest.raises(ValueError, match=r"Variable a/conv1d_1/kernel already exists"):
            tf.conv1d(X, 4, 3, use_bias=False)


def test_default_names_of_scopes_are_made_unique():
    seen = []
    for _ in range(3):
        with tf.variable_scope(None, default_name="block") as scope:
            seen.append(scope.name)
    assert seen == ["block", "block_1", "block_2"]
    with tf.variable_scope("outer"), tf.variable_scope(None, "block") as scope:
        assert scope.name == "outer/block"


def test_reuse_shares_the_very_arrays():
    y = tf.conv1d(X, 4, 3, name="c")
    z = tf.conv1d(X, 4, 3, name="c", reuse=True)
    np.testing.assert_array_equal(y, z)
    tf.global_variables()[0].value[...] = 0
    tf.global_variables()[1].value[...] = 2
    np.testing.assert_array_equal(tf.conv1d(X, 4, 3, name="c", reuse=True), np.full((2, 9, 4), 2, "float32"))


def test_other_options_share_the_same_variables():
    wide = tf.conv1d(X, 4, 3, name="c", strides=2, padding="same")
    dilated = tf.conv1d(X, 4, 3, name="c", dilation_rate=2, reuse=True)
    assert (wide.shape, dilated.shape, len(names())) == ((2, 6, 4), (2, 7, 4), 2)


@pytest.mark.parametrize("reuse", [None, False])
def test_a_second_call_of_that_name_is_refused(reuse):
    tf.conv1d(X, 4, 3, name="c")
    with pytest.raises(ValueError, match=r"Variable c/kernel already exists, disallowed.*reuse=True or reuse=AUTO_REU"):
        tf.conv1d(X, 4, 3, name="c", reuse=reuse)


def test_reuse_needs_what_it_reuses():
    with pytest.raises(ValueError, match=r"Variable c/kernel does not exist.*AUTO_REUSE"):
        tf.conv1d(X, 4, 3, name="c", reuse=True)
    tf.conv1d(X, 4, 3, name="c", use_bias=False)
    with pytest.raises(ValueError, match=r"Variable c/bias does not exist"):
        tf.conv1d(X, 4, 3, name="c", reuse=True)


def test_auto_reuse_makes_then_finds():
    y = [tf.conv1d(X, 4, 3, name="c", reuse=tf.AUTO_REUSE) for _ in range(2)]
    np.testing.assert_array_equal(*y)
    assert names() == ["c/kernel", "c/bias"]
    with tf.variable_scope("s", reuse=tf.AUTO_REUSE), tf.variable_scope("inner"):
        for _ in range(2):
            tf.conv1d(X, 4, 3, name="d")
    assert names()[2:] == ["s/inner/d/kernel", "s/inner/d/bias"]


def test_reuse_without_a_name_is_conv1d():
    for _ in range(2):
        tf.conv1d(X, 4, 3, reuse=tf.AUTO_REUSE)
    tf.conv1d(X, 4, 3, reuse=True)
    assert names() == ["conv1d/kernel", "conv1d/bias"]


def test_false_does_not_end_what_a_scope_says():
    tf.conv1d(X, 4, 3, name="c")
    with (
        tf.variable_scope(tf.get_variable_scope(), reuse=True),
        tf.variable_scope(tf.get_variable_scope(), reuse=False),
    ):
        tf.conv1d(X, 4, 3, name="c", reuse=False)
    tf.get_variable_scope().reuse_variables()
    tf.conv1d(X, 4, 3, name="c")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"filters": 5}, r"Trying to share variable c/kernel, whose shape is \(3, 3, 4\). Received: shape=\(3, 3, 5"),
        ({"kernel_size": 2}, r"shape is \(3, 3, 4\)"),
        ({"inputs": signal(2, 11, 2)}, r"shape is \(3, 3, 4\)"),
        ({"inputs": X.astype("float64")}, r"whose dtype is float32. Received: dtype=float64"),
    ],
)
def test_what_is_shared_must_fit(change, message):
    arguments = {"inputs": X, "filters": 4, "kernel_size": 3, "name": "c"}
    tf.conv1d(**arguments)
    for reuse in (True, tf.AUTO_REUSE):
        with pytest.raises(ValueError, match=message):
            tf.conv1d(**(arguments | change), reuse=reuse)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"filters": 0}, ValueError, "filters"),
        ({"padding": "causal"}, ValueError, "padding"),
        ({"strides": 2, "dilation_rate": 2}, ValueError, "strides"),
        ({"kernel_size": 12}, ValueError, "12"),
        ({"inputs": X[0]}, ValueError, "axes"),
        ({"inputs": X.astype("int32")}, TypeError, "int32"),
        ({"inputs": X.tolist()}, ValueError, "list"),
        ({"activation": "nonsense"}, ValueError, "nonsense"),
        ({"kernel_initializer": np.zeros((3, 3, 5))}, ValueError, r"\(3, 3, 4\)"),
        ({"bias_initializer": lambda shape, dtype=None: np.zeros(7)}, ValueError, r"\(4,\)"),
        ({"kernel_regularizer": "nonsense"}, ValueError, "nonsense"),
        ({"trainable": 1}, ValueError, "trainable"),
        ({"reuse": "yes"}, ValueError, "reuse"),
        ({"reuse": True}, ValueError, "does not exist"),
        ({"name": "two words"}, ValueError, "two words"),
        ({"name": "/c"}, ValueError, "/c"),
    ],
)
def test_a_refused_call_leaves_nothing_behind(graph, change, error, message):
    with pytest.raises(error, match=message):
        tf.conv1d(**({"inputs": X, "filters": 4, "kernel_size": 3} | change))
    assert not graph.variables and tf.get_variable_scope().name == ""
    tf.conv1d(X, 4, 3)
    assert names() == ["conv1d/kernel", "conv1d/bias"]


def test_scopes_are_closed_by_exceptions():
    with pytest.raises(KeyError), tf.variable_scope("a", reuse=True):
        raise KeyError
    assert tf.get_variable_scope() == tf.VariableScope()
    with pytest.raises(TypeError), tf.variable_scope(None):
        pass
    with pytest.raises(ValueError, match="name_or_scope"), tf.variable_scope(None, "a", reuse=True):
        pass


# --- What scopes hand down, and collections ----------------------------------------------------------------------


def test_a_scope_hands_down_its_initializer():
    with tf.variable_scope("s", initializer="ones"):
        tf.conv1d(X, 4, 3)
        tf.conv1d(X, 4, 3, kernel_initializer=initializers.Constant(3.0), bias_initializer=None)
        with tf.variable_scope("inner", initializer=initializers.Constant(5.0)):
            tf.conv1d(X, 4, 3)
    values = [float(each.value.flat[0]) for each in tf.global_variables()]
    assert values == [1, 0, 3, 1, 5, 0]


def test_without_an_initializer_kernels_are_glorot_uniform():
    tf.conv1d(signal(1, 70, 50), 30, 64)
    kernel, bias = (each.value for each in tf.global_variables())
    limit = np.sqrt(6 / (64 * (50 + 30)))
    assert 0.99 * limit < np.abs(kernel).max() <= limit and abs(kernel.std() - limit / np.sqrt(3)) < 0.01 * limit
    assert not bias.any()


def test_trainable_is_as_the_variable_was_made():
    tf.conv1d(X, 4, 3, name="frozen", trainable=False)
    tf.conv1d(X, 4, 3, name="free")
    tf.conv1d(X, 4, 3, name="frozen", trainable=True, reuse=True)
    tf.conv1d(X, 4, 3, name="free", trainable=False, reuse=True)
    assert names(tf.trainable_variables()) == ["free/kernel", "free/bias"]
    assert names(tf.global_variables("fro")) == ["frozen/kernel", "frozen/bias"]
    assert names(tf.global_variables("ozen")) == []  # from the start of the name


def test_penalties_count_once_for_each_variable():
    options = {"kernel_regularizer": regularizers.L2(0.5), "bias_regularizer": lambda w: 7.0}
    for reuse in (None, True, True):
        tf.conv1d(X, 4, 3, name="c", reuse=reuse, **options)
    kernel = tf.global_variables()[0].value.astype("float64")
    assert tf.get_regularization_losses() == pytest.approx([0.5 * np.sum(kernel**2), 7.0], rel=1e-6)
    assert tf.get_regularization_loss() == pytest.approx(0.5 * np.sum(kernel**2) + 7.0, rel=1e-6)
    assert tf.get_regularization_losses("d") == []


def test_a_scope_hands_down_its_regularizer():
    with tf.variable_scope("s", regularizer=regularizers.L1(1.0)):
        tf.conv1d(X, 4, 3, kernel_initializer="ones", bias_initializer="ones")
        tf.conv1d(X, 4, 3, kernel_initializer="ones", use_bias=False, kernel_regularizer=regularizers.L1(0.25))
    assert tf.get_regularization_losses() == pytest.approx([36, 4, 9])


def test_the_activity_of_the_last_call_counts():
    for factor in (3, 1):
        y = tf.conv1d(factor * X, 4, 3, name="c", activity_regularizer=regularizers.L1(1.0), reuse=tf.AUTO_REUSE)
    assert tf.get_regularization_losses() == pytest.approx([np.abs(y.astype("float64")).sum() / 2], rel=1e-5)


def test_constraints_are_applied_on_request():
    tf.conv1d(X, 4, 3, kernel_constraint=constraints.NonNeg(), name="c")
    tf.conv1d(X, 4, 3, kernel_constraint=constraints.NonNeg(), name="frozen", trainable=False)
    tf.apply_constraints()
    c, _, frozen, _ = (each.value for each in tf.global_variables())
    assert c.min() == 0 < c.max() and frozen.min() < 0


def test_variables_without_a_layer():
    with tf.variable_scope("s"):
        made = tf.get_variable("w", (2, 3), initializer="ones", regularizer=regularizers.L1(1.0))
    with tf.variable_scope("s", reuse=True):
        assert tf.get_variable("w") is tf.get_variable("w", (2, 3)) is made
        with pytest.raises(ValueError, match="shape"):
            tf.get_variable("w", (3, 2))
    with pytest.raises(ValueError, match="`shape`"):
        tf.get_variable("v")
    np.testing.assert_array_equal(tf.get_variable("v", initializer=np.eye(2)).value, np.eye(2, dtype="float32"))
    assert (made.name, made.value.dtype, tf.get_regularization_loss()) == ("s/w", np.float32, 6.0)


# --- Graphs and threads ------------------------------------------------------------------------------------------


def test_graphs_share_nothing(graph):
    tf.conv1d(X, 4, 3)
    with tf.Graph().as_default() as other:
        assert tf.get_default_graph() is other
        tf.conv1d(X, 4, 3)
        assert names() == ["conv1d/kernel", "conv1d/bias"]
        with pytest.raises(AssertionError), tf.variable_scope("a"):
            tf.reset_default_graph()
    assert tf.get_default_graph() is graph
    assert graph.variables["conv1d/kernel"].value is not other.variables["conv1d/kernel"].value


def run_in_threads(work, count=8):
    results, barrier = [None] * count, threading.Barrier(count)

    def run(index):
        barrier.wait()
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def test_a_thread_has_its_own_default_graph_and_scope(graph):
    def work(index):
        assert tf.get_default_graph() is not graph
        tf.reset_default_graph()
        with tf.variable_scope(f"t{index}"):
            tf.conv1d(X, 4, 3)
        return names()

    with tf.variable_scope("main"):
        assert run_in_threads(work) == [[f"t{i}/conv1d/kernel", f"t{i}/conv1d/bias"] for i in range(8)]
    assert not graph.variables


def test_threads_in_one_graph_make_a_variable_once(graph):
    def work(index):
        with graph.as_default():
            return [tf.conv1d(X, 4, 3, reuse=tf.AUTO_REUSE) for _ in range(20)]

    results = run_in_threads(work)
    assert list(graph.variables) == ["conv1d/kernel", "conv1d/bias"]
    for each in results:
        for y in each:
            np.testing.assert_array_equal(y, results[0][0])


# --- Numbers -----------------------------------------------------------------------------------------------------


def weights_of(scope):
    found = {each.name.rpartition("/")[2]: each.value for each in tf.global_variables(scope + "/")}
    return found["kernel"], found.get("bias")


@given(data=st.data())
def test_convolutions_agree_with_the_oracle(data):
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    channels, filters, taps = (draw(st.integers(1, 4)) for _ in range(3))
    strides, dilation = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (1, 3)]))
    options = {
        "strides": strides,
        "dilation_rate": dilation,
        "padding": draw(st.sampled_from(["valid", "same", "SAME"])),
        "data_format": draw(st.sampled_from(["channels_last", "channels_first"])),
    }
    steps = draw(st.integers(1 + (taps - 1) * dilation, 14))
    shape = (2, steps, channels) if options["data_format"] == "channels_last" else (2, channels, steps)
    x = signal(*shape, dtype=dtype, seed=draw(st.integers(0, 99)))
    use_bias = draw(st.booleans())
    with tf.Graph().as_default():
        y = tf.conv1d(x, filters, [taps], use_bias=use_bias, bias_initializer="ones", name="a/b", **options)
        w, bias = weights_of("a/b")
    assert (bias is not None) == use_bias and w.dtype == dtype_of(dtype)
    expected = oracle.conv(x, w, bias, **options | {"padding": options["padding"].lower()})
    assert_close(y, expected, dtype=dtype, terms=taps * channels + 1)


def test_the_activation_comes_last():
    y = tf.conv1d(X, 4, 3, activation=activations.relu, bias_initializer="ones", name="c")
    w, bias = weights_of("c")
    assert_close(y, np.maximum(oracle.conv(X, w, bias), 0), dtype="float32", terms=10)


def test_recorded_calls_give_the_gradients_of_shared_variables():
    x, other = signal(2, 9, 3, dtype="float64"), signal(1, 12, 3, dtype="float64", seed=1)
    l2 = regularizers.L2(0.5)
    with tf.recording() as calls:
        y = tf.conv1d(x, 4, 3, name="c", reuse=tf.AUTO_REUSE, kernel_regularizer=l2)
        z = tf.conv1d(other, 4, 3, strides=2, name="c", reuse=tf.AUTO_REUSE, kernel_regularizer=l2)
        tf.conv1d(x, 4, 3, name="frozen", trainable=False)
    tf.conv1d(x, 4, 3, name="unrecorded")
    dy, dz = signal(*y.shape, dtype="float64", seed=2), signal(*z.shape, dtype="float64", seed=3)
    first, second, frozen = calls.layers
    w, _ = weights_of("c")
    assert_close(first.backward(dy), oracle.conv_input_grad(dy, w, x.shape), dtype="float64", terms=12)
    second.backward(dz)
    frozen.backward(dy)
    found = calls.gradients()
    assert list(found) == ["c/kernel", "c/bias"]
    expected = oracle.conv_kernel_grad(x, dy, w.shape) + oracle.conv_kernel_grad(other, dz, w.shape, strides=2) + w
    assert_close(found["c/kernel"], expected, dtype="float64", terms=40)
    assert_close(found["c/bias"], dy.sum((0, 1)) + dz.sum((0, 1)), dtype="float64", terms=40)


def test_training_in_place_lowers_the_loss():
    x, target = signal(8, 16, 3), signal(8, 14, 4, seed=5)
    losses = []
    for _ in range(30):
        with tf.recording() as calls:
            y = tf.conv1d(x, 4, 3, reuse=tf.AUTO_REUSE)
        losses.append(float(np.mean((y - target) ** 2)))
        calls.layers[0].backward(2 * (y - target) / np.float32(y.size))
        for name, gradient in calls.gradients().items():
            tf.get_default_graph().variables[name].value[...] -= 0.5 * gradient
    assert losses[-1] < losses[1] < losses[0] and losses[-1] < 0.99 * losses[0]


def test_symbolic_calls_make_a_model_that_shares():
    x = models.Input((11, 3))
    with tf.variable_scope("m", reuse=tf.AUTO_REUSE):
        y = tf.conv1d(x, 3, 3, padding="same", name="c", kernel_regularizer=regularizers.L2(1.0))
        y = tf.conv1d(y, 3, 3, padding="same", name="c", kernel_regularizer=regularizers.L2(1.0))
        y = tf.conv1d(y, 2, 1, name="d")
    model = models.Model(x, y)
    assert [layer.name for layer in model.layers][1:] == ["m.c", "m.d"]
    assert all(a is b.value for a, b in zip(model.weights, tf.global_variables(), strict=True))
    assert len(model.losses) == len(tf.get_regularization_losses()) == 1
    w, bias = weights_of("m/c")
    h = oracle.conv(oracle.conv(X, w, bias, padding="same"), w, bias, padding="same")
    assert_close(model(X), oracle.conv(h, *weights_of("m/d")), dtype="float32", terms=30)
    np.testing.assert_array_equal(tf.conv1d(X, 3, 3, padding="same", name="m/c", reuse=True).shape, (2, 11, 3))
    with pytest.raises(ValueError, match="already exists"):
        tf.conv1d(x, 3, 3, padding="same", name="m/c", kernel_regularizer=regularizers.L2(1.0))
    assert models.model_from_json(model.to_json()).output_shape == (None, 11, 2)


@pytest.mark.parametrize(
    "change, shared",
    [
        ({}, True),
        ({"activation": lambda x: x}, False),
        ({"strides": 2}, False),
        ({"kernel_regularizer": lambda w: 0.0}, True),
        ({"activity_regularizer": "l2"}, False),
    ],
)
def test_symbolic_calls_are_of_one_layer_where_they_are_equal(change, shared):
    x = models.Input((11, 3))
    one = tf.conv1d(x, 3, 3, name="c", activation="relu")
    other = tf.conv1d(x, **({"filters": 3, "kernel_size": 3, "activation": "relu"} | change), name="c", reuse=True)
    assert (one.node.layer is other.node.layer) == shared
    assert other.node.layer.kernel is one.node.layer.kernel


def test_variables_follow_their_first_input_once():
    class Elsewhere(np.ndarray):
        pass

    tf.conv1d(X, 4, 3, name="c")
    kernel = tf.global_variables()[0]
    with pytest.raises(ValueError, match="does not move silently"):
        kernel._follow(X.view(Elsewhere))
