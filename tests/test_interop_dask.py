"""Dask arrays: convolutions in any chunks against the whole answer and the oracle, graphs, models, schedulers."""

import inspect
import itertools
import subprocess
import sys
from math import prod

import numpy as np
import oracle
import pytest
from compare import DTYPES, assert_close, dtype_of, eps, is_complex, is_half
from hypothesis import example, given
from hypothesis import strategies as st
from rich.console import Console
from strategies import Problem, convolutions, depthwise_convolutions, examples, uniform

from cuconv import geometry, layers, ops
from cuconv.models import Input, Model, Sequential

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")
cloudpickle = pytest.importorskip("cloudpickle")
bridge = pytest.importorskip("cuconv.interop.dask")

pytestmark = pytest.mark.bridges

PROBLEMS = {"conv": convolutions(), "depthwise_conv": depthwise_convolutions()}


def random(*shape, dtype="float32", seed=0):
    return uniform(np.random.default_rng(seed), shape, dtype)


def computed(y):
    """The value of a Dask array."""
    value = y.compute(scheduler="synchronous")
    check_metadata(y, value)
    return value


def check_metadata(y, value):
    """The value is what the Dask array has said it would be."""
    assert type(value) is type(y._meta) and value.dtype == y.dtype == y._meta.dtype
    assert value.shape == y.shape == tuple(map(sum, y.chunks)) and value.ndim == y._meta.ndim


# --- Any chunks are the whole ------------------------------------------------------------------------------------


def lengths(n, cuts):
    """The chunks of an axis that is cut there."""
    return tuple(b - a for a, b in itertools.pairwise((0, *sorted(cuts), n)))


def most_cuts(problem):
    """How many cuts an axis of x may have: along space more than elsewhere, and more the fewer axes there are."""
    return geometry.join_shape(1, {1: (4,), 2: (3, 3), 3: (2, 2, 2)}[problem.rank], 1, problem.data_format)


@st.composite
def cases(draw, operation):
    """A problem, a dtype, and the lengths of chunks: uneven, shorter than any kernel, now and then 0."""
    problem = draw(PROBLEMS[operation])
    axes = zip(problem.x_shape, most_cuts(problem))
    chunks = tuple(lengths(n, draw(st.lists(st.integers(0, n), max_size=most))) for n, most in axes)
    return problem, chunks, draw(st.sampled_from(DTYPES))


def shapes_of(operation, problem):
    """Shapes of x, w and bias."""
    filters = problem.w_shape[-1] * (problem.w_shape[-2] if operation == "depthwise_conv" else 1)
    return (problem.x_shape, problem.w_shape, (filters,))[: 2 + problem.bias]


def chunked(operation, problem, chunks, arrays, **options):
    x, *kernels = arrays
    return getattr(bridge, operation)(da.from_array(x, chunks=chunks), *kernels, **problem.options, **options)


def check_exactly(operation, problem, chunks, dtype):
    """With numbers whose sums are exact in every order and dtype, so that one bit counts; in three more chunkings."""
    rng = np.random.default_rng(problem.seed)
    arrays = [rng.integers(-1, 2, shape).astype(dtype_of(dtype)) for shape in shapes_of(operation, problem)]
    activation = None if is_complex(dtype) or problem.seed % 2 else "relu"
    expected = getattr(ops, operation)(*arrays, **problem.options, activation=activation)
    chunkings = [chunks]
    for _ in range(3):
        axes = zip(problem.x_shape, most_cuts(problem))
        chunkings.append(tuple(lengths(n, rng.integers(0, n + 1, rng.integers(0, most + 1))) for n, most in axes))
    lazy = [chunked(operation, problem, each, arrays, activation=activation) for each in chunkings]
    for each, y, actual in zip(chunkings, lazy, dask.compute(*lazy, scheduler="synchronous"), strict=True):
        check_metadata(y, actual)
        assert actual.dtype == expected.dtype
        np.testing.assert_array_equal(actual, expected, err_msg=str(each))


def check_with_the_oracle(operation, problem, chunks, dtype):
    arrays = [uniform(np.random.default_rng(problem.seed), shape, dtype) for shape in shapes_of(operation, problem)]
    activation = None if is_complex(dtype) else problem.activation
    terms = prod(problem.w_shape[:-2]) * (1 if operation == "depthwise_conv" else problem.w_shape[-2])
    expected = getattr(oracle, operation)(*arrays, **problem.options)
    slack = eps(dtype) * np.max(np.abs(expected), initial=0.0) if activation == "softmax" and is_half(dtype) else 0.0
    expected = getattr(oracle, operation)(*arrays, **problem.options, activation=activation)
    actual = computed(chunked(operation, problem, chunks, arrays, activation=activation))
    assert_close(actual, expected, dtype=dtype, terms=terms, slack=slack, what=operation)


LONG = ((2,), (0, 3, 1, 1, 9, 0, 6), (1, 2))


@examples(500)
@given(cases("conv"))
@example((Problem((2, 20, 3), (5, 3, 4), {"strides": 2, "padding": "same", "dilation_rate": 3}), LONG, "float16"))
@example((Problem((2, 20, 3), (1, 3, 4), {"strides": 4, "padding": ((30, 40),)}), LONG, "bfloat16"))
@example((Problem((2, 0, 3), (2, 3, 4), {"padding": "causal"}, True), ((1, 1), (0, 0), (3,)), "float32"))
@example((Problem((2, 0, 3), (2, 3, 4), {"padding": ((3, 1),)}, True), ((1, 1), (0, 0), (3,)), "float32"))
@example((Problem((0, 9, 1), (2, 1, 1)), ((0, 0), (4, 5), (1,)), "float64"))
def test_conv_of_whole_numbers_is_exact(case):
    check_exactly("conv", *case)


@examples(300)
@given(cases("depthwise_conv"))
@example((Problem((2, 20, 3), (5, 3, 2), {"strides": 3, "padding": "causal"}, True), LONG, "float32"))
def test_depthwise_conv_of_whole_numbers_is_exact(case):
    check_exactly("depthwise_conv", *case)


@examples(250)
@given(cases("conv"))
@example(
    (Problem((2, 3, 20), (2, 3, 4), {"data_format": "channels_first"}, activation="softmax"), (2, 3, 4), "float32")
)
def test_conv(case):
    check_with_the_oracle("conv", *case)


@examples(150)
@given(cases("depthwise_conv"))
@example((Problem((2, 20, 3), (2, 3, 2), {}, True, "softmax"), (2, 4, 1), "float32"))
@example((Problem((2, 3, 20), (2, 3, 2), {"data_format": "channels_first"}, True, "softmax"), (2, 1, 4), "float32"))
def test_depthwise_conv(case):
    check_with_the_oracle("depthwise_conv", *case)


# --- Chunks, metadata, laziness ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks, options, expected",
    [
        ((4, 3, 5), {"padding": "same"}, (4, 3, 5)),
        ((4, 3, 5), {"padding": "causal"}, (4, 3, 5)),
        ((4, 3, 5), {}, (4, 3, 3)),
        ((4, 6, 2), {}, (4, 6)),  # nothing starts in the last chunk
        ((4, 6, 2), {"padding": "same", "strides": 2}, (2, 3, 1)),
        ((4, 3, 5), {"padding": "same", "strides": 5}, (1, 1, 1)),
        ((2, 1, 1, 8), {"padding": "same", "strides": 4}, (1, 2)),
        ((4, 8), {"padding": ((2, 9),)}, (4, 17)),
    ],
)
def test_chunks_of_the_result(chunks, options, expected):
    y = bridge.conv(da.zeros((3, 12, 2), chunks=((2, 1), chunks, (1, 1))), np.ones((3, 2, 5)), **options)
    assert y.chunks == ((2, 1), expected, (5,))
    z = bridge.depthwise_conv(da.zeros((3, 12, 2), chunks=((2, 1), chunks, (1, 1))), np.ones((3, 2, 5)), **options)
    assert z.chunks == ((2, 1), expected, (5, 5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data_format, chunks", [("channels_last", (2, 3, 3, 1)), ("channels_first", (2, 1, 3, 3))])
def test_metadata_by_dasks_own_rules(dtype, data_format, chunks):
    x = random(3, 7, 7, 7, dtype=dtype)
    w, d = random(3, 2, 7, 4, dtype=dtype), random(3, 2, 7, 2, dtype=dtype)
    lazy = da.from_array(x, chunks=chunks)
    for operation, kernel in (("conv", w), ("depthwise_conv", d)):
        y = getattr(bridge, operation)(lazy, kernel, data_format=data_format, padding="same")
        assert type(y) is da.Array and y.dtype == x.dtype
        da.utils.assert_eq(y, y.compute(scheduler="synchronous"), scheduler="synchronous")  # every chunk, its shape


class Source:
    """An array on disk, so to speak: it writes down what is read of it."""

    def __init__(self, values):
        self.values, self.read = values, []
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, at):
        if any(part.start != part.stop for part in at):
            self.read.append(at)
        return self.values[at]


@pytest.mark.parametrize("padding", ["valid", "same", ((7, 5), (2, 9))], ids=str)
def test_nothing_is_read_before_its_time_nor_without_need(padding):
    source = Source(random(2, 23, 19, 3))
    x = da.from_array(source, chunks=((1, 1), (4, 2, 1, 9, 7), (10, 9), (2, 1)))
    options = {"strides": (2, 1), "dilation_rate": (3, 2), "padding": padding}
    y = bridge.conv(x, random(3, 2, 3, 4), random(4), activation="relu", **options)
    model = Sequential([Input((23, 19, 3)), layers.Conv2D(2, 3), layers.Conv2D(1, 2)])
    model.predict(x)
    part = y[1:, 2:4, 5:6]
    assert not source.read
    part.compute(scheduler="synchronous")
    # A chunk of outputs is computed as a whole, so what it takes are the chunks that this chunk reads.
    starts = [oracle.window_starts(23, 3, 2, 3, pair(padding, 0)), oracle.window_starts(19, 2, 1, 2, pair(padding, 1))]
    wanted = []
    for n, lengths, starts_of, (first, last), reach in zip(
        (23, 19), x.chunks[1:3], starts, ((2, 4), (5, 6)), ((0, 3, 6), (0, 2)), strict=True
    ):
        owner = np.repeat(range(len(lengths)), lengths)
        stride = starts_of.step
        outputs = [
            p
            for p in range(len(starts_of))
            if owner[min(p * stride, n - 1)] in {owner[min(q * stride, n - 1)] for q in range(first, last)}
        ]
        wanted.append({owner[starts_of[p] + r] for p in outputs for r in reach if 0 <= starts_of[p] + r < n})
    read = {tuple(slice_.start for slice_ in at) for at in source.read}
    corners = [np.cumsum((0, *lengths)) for lengths in x.chunks]
    assert read == {
        (1, int(corners[1][i]), int(corners[2][j]), c) for i in wanted[0] for j in wanted[1] for c in (0, 2)
    }
    assert len(source.read) == len(read)


def pair(padding, axis):
    return padding if isinstance(padding, str) else padding[axis]


def test_a_batch_of_unknown_length():
    x = random(9, 8, 2)
    lazy = da.from_array(x, chunks=(2, 3, 1))[da.from_array(x[:, 0, 0] > 0, chunks=2)]
    w = random(3, 2, 4)
    for padding in ("same", "valid"):
        y = bridge.conv(lazy, w, padding=padding, activation="relu")
        assert np.isnan(y.shape[0])
        expected = ops.conv(x[x[:, 0, 0] > 0], w, padding=padding, activation="relu")
        np.testing.assert_allclose(y.compute(scheduler="synchronous"), expected, rtol=1e-5, atol=1e-6)


# --- The graph ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tasks_are_few(rank):
    """One for each chunk of outputs, and one for each piece of halo beside it, behind it and at its corners."""
    x = da.zeros((3, *(24,) * rank, 4), chunks=(1, *(6,) * rank, 4))
    y = bridge.conv(x, np.ones((*(3,) * rank, 4, 2)), padding="same")
    own = y.dask.layers[y.name]
    inner, chunks = 3 * 2**rank, 3 * 4**rank
    pieces = sum(prod(c) for c in itertools.product((2, 3, 3, 2), repeat=rank)) * 3 - chunks
    assert len(own) == chunks + pieces <= 3**rank * chunks and inner <= chunks
    assert len(bridge.conv(x, np.ones((*(1,) * rank, 4, 2))).dask) == len(x.dask) + 1 + chunks


def test_kernels_are_in_the_graph_once():
    x = da.zeros((64, 40, 512), chunks=(1, 10, 512), dtype="float32")
    w = random(3, 512, 512)
    y = bridge.conv(x, w, random(512), padding="same")
    (optimized,) = dask.optimize(y)
    assert w.nbytes < len(cloudpickle.dumps(optimized.__dask_graph__())) < 1.5 * w.nbytes
    assert len(dict(y.__dask_graph__())) > 256


def test_names_tell_what_is_computed():
    x, w = da.zeros((2, 8, 3), chunks=(1, 4, 3)), random(3, 3, 4, dtype="float64")
    calls = [
        {}, {"padding": "same"}, {"padding": "causal"}, {"strides": 2}, {"dilation_rate": 2}, {"activation": "relu"},
        {"precision": "high"}, {"bias": np.ones(4)}, {"bias": np.zeros(4)}, {"activation": np.tanh},
    ]  # fmt: skip
    names = [bridge.conv(x, w, **options).name for options in calls]
    assert names == [bridge.conv(x, w.copy(), **options).name for options in calls]
    assert all(name.startswith("conv-") for name in names)
    others = [bridge.conv(x, -w).name, bridge.conv(x + 1, w).name, bridge.depthwise_conv(x, w).name]
    assert len({*names, *others}) == len(calls) + 3 and others[2].startswith("depthwise-conv-")


def test_annotations_are_kept():
    x = da.zeros((2, 8, 3), chunks=(1, 4, 3))
    with dask.annotate(resources={"GPU": 1}):
        y = bridge.conv(x, np.ones((3, 3, 4)))
        p = small_model().predict(da.zeros((2, 8, 3), chunks=(1, 8, 3)))
    assert y.dask.layers[y.name].annotations == {"resources": {"GPU": 1}}
    assert [layer.annotations for name, layer in p.dask.layers.items() if name.startswith("predict")] == 2 * [
        {"resources": {"GPU": 1}}
    ]


@pytest.mark.parametrize("chunks", [(2, 3, 4), ((2, 1), (2, 1), (4,))], ids=str)
def test_kernels_may_be_dask_arrays(chunks):
    x, w, bias = random(2, 9, 3, dtype="float64"), random(3, 3, 4, dtype="float64"), random(4, dtype="float64")
    lazy = da.from_array(w, chunks=chunks)
    y = bridge.conv(da.from_array(x, chunks=(1, 4, 2)), lazy, da.from_array(bias, chunks=1))
    np.testing.assert_allclose(computed(y), ops.conv(x, w, bias), rtol=1e-12)
    z = bridge.depthwise_conv(
        da.from_array(x, chunks=(1, 4, 2)), lazy, da.from_array(random(12, dtype="float64"), chunks=5)
    )
    expected = ops.depthwise_conv(x, w, random(12, dtype="float64"))
    np.testing.assert_allclose(computed(z), expected, rtol=1e-12)


def test_a_large_block_is_not_kept_for_its_halo():
    block = random(4, 100, 8)
    assert bridge._cut(block, (slice(None), slice(0, 2), slice(None))).base is None
    assert bridge._cut(block, (slice(None), slice(0, 98), slice(None))).base is block


# --- Errors ------------------------------------------------------------------------------------------------------

X, W = da.zeros((2, 8, 3), chunks=(1, 4, 3), dtype="float32"), np.ones((3, 3, 4), "float32")
UNKNOWN, UNKNOWN_TAPS = X[:, X[0, :, 0] > 0], da.zeros(3, chunks=1) > 0


CONV_ERRORS = [
    (np.ones((1, 8, 3)), W, {}, TypeError, r"`x` must be a Dask array. Received: x of type numpy.ndarray"),
    (X, [[[1.0]]], {}, TypeError, r"`w` must be a NumPy, CuPy or Dask array. Received: w of type builtins.list"),
    (X, W, {"bias": 1.0}, TypeError, r"`bias` must be .* Received: bias of type builtins.float"),
    (X, W.astype("float64"), {}, TypeError, r"one dtype of .* Received: float32, float64"),
    (X.astype(int), W.astype(int), {}, TypeError, r"one dtype of .* Received: int64, int64"),
    (X.astype("F"), W.astype("F"), {"activation": "relu"}, TypeError, r"complex arrays have no activation"),
    (UNKNOWN, W, {}, ValueError, r"of `x` except .* `x.compute_chunk_sizes\(\)` .*Received: x.chunks="),
    (X, da.from_array(W, chunks=1)[UNKNOWN_TAPS], {}, ValueError, r"chunks of `w` must"),
    (X, W[:, :2], {}, ValueError, r"must have 2 channels.*Received: input shape=\(2, 8, 3\)"),
    (da.zeros(()), W, {}, ValueError, r"input must have 3 axes"),
    (X, W, {"dilation_rate": 4}, ValueError, r"output size would be zero or negative"),
    (X, W, {"strides": 0}, ValueError, r"`strides` must be"),
    (X, W, {"padding": "full"}, ValueError, r"`padding` must be"),
    (X, W, {"bias": np.ones(3, "float32")}, ValueError, r"`bias` must have the shape \(4,\)"),
    (X, W, {"precision": "low"}, ValueError, r"`precision` must be"),
    (X, W, {"activation": "softplump"}, ValueError, r"softplump"),
]


@pytest.mark.parametrize("x, w, options, error, match", CONV_ERRORS, ids=[row[-1] for row in CONV_ERRORS])
def test_errors_come_when_the_graph_is_built(x, w, options, error, match):
    with pytest.raises(error, match=match):
        bridge.conv(x, w, **options)


def test_dask_is_asked_for_where_it_is_needed_and_nowhere_else():
    code = "import sys, cuconv.models; assert 'dask' not in sys.modules; sys.modules['dask'] = None; import %s"
    done = subprocess.run([sys.executable, "-c", code % "cuconv.interop.dask"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith('ImportError: cuconv.interop.dask needs Dask: pip install "cuconv[dask]"\n')


def test_the_example_of_the_docstring():
    lines = iter(inspect.getdoc(bridge).splitlines())
    scope = {"dask": dask, "np": np, "conv": bridge.conv}
    code = [line.removeprefix(">>> ") for line in lines if line.startswith((">>> ", "dask.array<"))]
    exec(code[0], scope)
    assert repr(eval(code[1], scope)) == code[2]


# --- Another array library ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation, w_shape", [("conv", (3, 3, 4)), ("depthwise_conv", (3, 3, 2))])
def test_asking_for_metadata_starts_nothing_on_a_gpu(operation, w_shape):
    assert ops.explain(operation, (0, 8, 3), w_shape, device="H200", activation="relu").steps == ()


class Elsewhere(np.ndarray):
    """Stands for CuPy's class: of one kind throughout, or it is not computed with."""


@pytest.mark.parametrize("operation, w_shape", [("conv", (3, 2, 4)), ("depthwise_conv", (3, 2, 2))])
def test_chunks_stay_what_they_are(monkeypatch, operation, w_shape):
    plain = getattr(ops, operation)

    def elsewhere(*arrays, **options):
        assert {type(array) for array in arrays} == {Elsewhere}
        return plain(*(np.asarray(array) for array in arrays), **options).view(Elsewhere)

    monkeypatch.setattr(ops, operation, elsewhere)
    x, w, bias = random(3, 14, 2), random(*w_shape), random(4)
    lazy = da.from_array(x.view(Elsewhere), chunks=(2, (3, 1, 10), 1), asarray=False)
    w_there, bias_there = w.view(Elsewhere), bias.view(Elsewhere)
    y = getattr(bridge, operation)(lazy, w_there, bias_there, padding="same")
    assert type(y._meta) is Elsewhere
    chunks = dask.compute(*y.to_delayed().ravel(), scheduler="synchronous")
    assert {type(chunk) for chunk in chunks} == {Elsewhere}
    value = y.compute(scheduler="synchronous")
    np.testing.assert_allclose(value, plain(x, w, bias, padding="same"), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("operation, w_shape", [("conv", (3, 3, 8, 16)), ("depthwise_conv", (3, 3, 8, 2))])
def test_chunks_on_a_gpu(operation, w_shape):
    cupy = pytest.importorskip("cupy")
    x, w, bias = random(4, 33, 29, 8), random(*w_shape), random(16)
    lazy = da.from_array(x, chunks=(2, (5, 1, 20, 7), 10, 3)).map_blocks(cupy.asarray)
    y = getattr(bridge, operation)(lazy, cupy.asarray(w), cupy.asarray(bias), strides=(2, 1), padding="same")
    assert isinstance(y._meta, cupy.ndarray)
    value = y.compute(scheduler="synchronous")
    assert isinstance(value, cupy.ndarray)
    expected = getattr(oracle, operation)(x, w, bias, strides=(2, 1), padding="same")
    assert_close(value.get(), expected, dtype="float32", terms=72)


# --- Models ------------------------------------------------------------------------------------------------------


def small_model():
    return Sequential([Input((8, 3)), layers.Conv1D(4, 3, activation="tanh"), layers.Conv1D(2, 2)])


def two_by_two():
    a, b = Input((8, 2), name="a"), Input((6, 1), name="b")
    shared = layers.Conv1D(2, 3, activation="tanh")
    first = shared(a)
    return Model([a, b], [layers.Conv1D(3, 2)(first), layers.Conv1D(4, 2, dtype="float16")(b)])


def test_predict():
    model, x = small_model(), random(11, 8, 3)
    y = model.predict(da.from_array(x, chunks=((4, 1, 6), 5, 2)), batch_size=3)
    assert y.chunks == ((4, 1, 6), (5,), (2,))
    np.testing.assert_allclose(computed(y), model.predict(x), rtol=1e-5, atol=1e-6)
    da.utils.assert_eq(y, model.predict(x), scheduler="synchronous")


def test_predict_of_several_inputs_and_outputs():
    model, a, b = two_by_two(), random(7, 8, 2), random(7, 6, 1)
    lazy_a = da.from_array(a, chunks=((3, 0, 4), 4, 2))
    for inputs in (
        [lazy_a, da.from_array(b, chunks=(2, 3, 1))],
        {"b": b, "a": lazy_a},
        [a, da.from_array(b, chunks=((3, 0, 4), 6, 1))],
    ):
        outputs = model.predict(inputs)
        assert [y.chunks for y in outputs] == [((3, 0, 4), (5,), (3,)), ((3, 0, 4), (5,), (4,))]
        assert [y.dtype for y in outputs] == ["float32", "float16"]
        for y, expected in zip(outputs, model.predict([a, b])):
            np.testing.assert_allclose(computed(y), expected, rtol=2e-3, atol=2e-3)
        together = dask.compute(*outputs, scheduler="synchronous")
        assert [y.shape for y in together] == [(7, 5, 3), (7, 5, 4)]


def test_predict_of_an_unknown_number_of_samples():
    model, x = small_model(), random(11, 8, 3)
    lazy = da.from_array(x, chunks=(4, 8, 3))[da.from_array(x[:, 0, 0] > 0, chunks=4)]
    y = model.predict(lazy)
    expected = model.predict(x[x[:, 0, 0] > 0])
    np.testing.assert_allclose(y.compute(scheduler="synchronous"), expected, rtol=1e-5, atol=1e-6)


def test_predict_of_a_model_that_has_no_input_shape_yet():
    model, x = Sequential([layers.Conv1D(4, 3)]), random(5, 8, 3)
    np.testing.assert_array_equal(computed(model.predict(da.from_array(x, chunks=(5, 4, 3)))), model.predict(x))


def test_predict_takes_the_model_as_it_is():
    model, x = small_model(), random(6, 8, 3)
    nodes = [len(layer._nodes) for layer in model.layers]
    expected, y = model.predict(x), model.predict(da.from_array(x, chunks=(6, 8, 3)))
    assert y.name == model.predict(da.from_array(x, chunks=(6, 8, 3))).name
    for weight in model.weights:
        weight += 1
    assert y.name != model.predict(da.from_array(x, chunks=(6, 8, 3))).name
    np.testing.assert_array_equal(computed(y), expected)
    assert [len(layer._nodes) for layer in model.layers] == nodes


def test_the_weights_are_in_the_graph_once():
    model = Sequential([Input((4, 256)), layers.Conv1D(512, 3, name="wide")])
    nbytes = sum(w.nbytes for w in model.weights)
    y = model.predict(da.zeros((300, 4, 256), chunks=(1, 4, 256), dtype="float32"))
    (optimized,) = dask.optimize(y)
    assert nbytes < len(cloudpickle.dumps(optimized.__dask_graph__())) < 1.5 * nbytes


PREDICT_ERRORS = [
    (X[..., :2], {}, ValueError, r"has shape \(None, 8, 3\). Received: inputs.shape=\(0, 8, 2\)"),
    (X.astype(complex), {}, TypeError, r"is float32. Received: inputs.dtype=complex128"),
    (X, {"batch_size": 0}, ValueError, r"`batch_size` must be"),
    (X, {"device": "tpu"}, ValueError, r"`device` must be"),
    (da.zeros(()), {}, ValueError, r"same number of samples.*Received: an input of shape \(\)"),
    (UNKNOWN, {}, ValueError, r"must have known lengths"),
]


@pytest.mark.parametrize("x, options, error, match", PREDICT_ERRORS, ids=[row[-1] for row in PREDICT_ERRORS])
def test_errors_of_predict_come_when_the_graph_is_built(x, options, error, match):
    with pytest.raises(error, match=match):
        small_model().predict(x, **options)


def test_chunks_have_no_order_and_one_number_of_samples():
    memory = layers.ConvLSTM1D(2, 3, stateful=True, name="memory")
    with pytest.raises(ValueError, match=r"no layer may be stateful. Received: stateful layers \['memory'\]"):
        Sequential([Input((4, 8, 3), 2), memory]).predict(da.zeros((2, 4, 8, 3)))
    with pytest.raises(ValueError, match=r"same number of samples.*Received: an input of shape \(3, 6, 1\)"):
        two_by_two().predict([da.zeros((2, 8, 2)), da.zeros((3, 6, 1))])


# --- Schedulers --------------------------------------------------------------------------------------------------


def a_bit_of_everything():
    x = da.from_array(random(6, 60, 4), chunks=(1, (1, 30, 3, 26), 3))
    y = bridge.conv(x, random(5, 4, 3, seed=1), random(3), strides=2, padding="same", activation="gelu")
    z = bridge.depthwise_conv(y, random(3, 3, 2), dilation_rate=2, padding="causal")
    model = Sequential([Input((30, 6)), layers.Conv1D(4, 3, activation=squared), layers.Conv1D(2, 1)])
    return [y, z, model.predict(z), (z**2).sum()]


def squared(x):
    return x * x


def test_threads_give_the_same_bits():
    arrays = a_bit_of_everything()
    expected = dask.compute(*arrays, scheduler="synchronous")
    for _ in range(20):
        for value, other in zip(dask.compute(*arrays, scheduler="threads", num_workers=8), expected, strict=True):
            assert value.tobytes() == other.tobytes()


def test_processes_give_the_same_bits():
    """Those of a cluster, whose workers get kernels and models by pickle."""
    distributed = pytest.importorskip("distributed")
    arrays = a_bit_of_everything()
    expected = dask.compute(*arrays, scheduler="synchronous")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as client:
        values = [future.result() for future in client.compute(arrays)]
        for value, other in zip(values, expected, strict=True):
            assert value.tobytes() == other.tobytes()


def test_more_data_than_memory(capfd):
    """The example, with less of both: every figure is there, and the outputs at borders are right."""
    pytest.importorskip("distributed")
    from cuconv.demo import larger_than_memory

    sizes = {"gigabytes": 0.005, "memory": 0.4, "workers": 1, "chunk": 1 << 13}
    report = larger_than_memory.demonstrate(Console(), **sizes)
    assert report["right"] is True and 0 <= report["off"] <= 1e-5 * report["largest"]
    assert report["gigabytes"] == pytest.approx(0.005, rel=0.01) and report["limit_gigabytes"] == 0.4
    assert 0.02 < report["peak_gigabytes"] < 0.4 and 0.1 < report["mean"] < report["largest"]
    shown = capfd.readouterr().out
    assert "100% Completed" in shown and "GB went through" in shown
