"""Host data streamed through a GPU, on a CuPy whose streams run in any order that events allow (tests/fake_cupy.py)."""

import contextlib

import fake_cupy
import ml_dtypes
import numpy as np
import pytest

from cuconv import layers, models
from cuconv.cuda import runtime
from cuconv.models import Input, Model, Sequential

SEEDS = range(40)


@pytest.fixture
def install(monkeypatch):
    yield lambda **options: fake_cupy.install(monkeypatch, **options)
    fake_cupy.forget()


def batches_of(arrays, size):
    count = len(arrays[0])
    return [tuple(each[start : start + size] for each in arrays) for start in range(0, count, size)]


def streamed(run, arrays, size, device=None, dtypes=None):
    """All outputs, each batch copied before the next is asked for."""
    dtypes = [each.dtype for each in arrays] if dtypes is None else dtypes
    results = runtime.stream_batches(run, batches_of(arrays, size), list(map(np.dtype, dtypes)), device)
    with contextlib.closing(results):
        return [np.concatenate(parts) for parts in zip(*([y.copy() for y in ys] for ys in results), strict=True)]


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


# --- The stream --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_streamed_batches_are_the_batches(install, seed):
    """Several kernels a batch, scratch memory that is freed and handed out again, a smaller batch at the end."""
    fake = install(seed=seed)
    x, y = random(23, 5), random(23, 3, dtype=np.float64)

    def run(batch):
        a, b = batch
        middle = fake.compute(lambda a: 2 * a, a)
        middle = fake.compute(lambda a: a + 1, middle)
        return fake.compute(lambda a, b: a[:, :3] * b, middle, b), fake.compute(lambda a: a.sum(axis=1), middle)

    first, second = streamed(run, [x, y], 4)
    np.testing.assert_array_equal(first, (2 * x + 1)[:, :3] * y)
    np.testing.assert_array_equal(second, (2 * x + 1).sum(axis=1))
    assert fake.idle()


@pytest.mark.parametrize("seed", SEEDS)
def test_outputs_may_be_views_of_inputs(install, seed):
    fake = install(seed=seed)
    x = random(21, 4, 6)
    whole, part = streamed(lambda batch: (batch[0], batch[0][:, 1:3, ::2]), [x], 2)
    np.testing.assert_array_equal(whole, x)
    np.testing.assert_array_equal(part, x[:, 1:3, ::2])
    assert fake.idle()


@pytest.mark.parametrize("seed", SEEDS)
def test_memory_freed_by_earlier_work_is_not_overwritten_too_early(install, seed):
    """A block is handed out again at once, while kernels of the same stream still read it."""
    fake = install(seed=seed)
    scratch = runtime.device_array(random(4, 5, seed=1))
    expected = scratch.get().sum()
    total = fake.compute(lambda a: a.sum(keepdims=True), scratch)
    del scratch
    x = random(16, 5)
    (y,) = streamed(lambda batch: [fake.compute(lambda a: -a, batch[0])], [x], 4)
    np.testing.assert_array_equal(y, -x)
    assert total.get().item() == expected


@pytest.mark.parametrize("seed", range(10))
def test_computing_stays_on_the_current_stream_of_the_device(install, seed):
    fake = install(seed=seed, capabilities=[(9, 0), (9, 0)])
    with fake.cupy.cuda.Device(1):
        stream = fake.cupy.cuda.Stream()
        stream.__enter__()
    seen = []
    kept = []

    def run(batch):
        seen.append((fake.device, fake.cupy.cuda.get_current_stream(), batch[0].device.id))
        if not kept:  # as packed kernels are: made by the first batch, used by all
            kept.append(fake.compute(lambda a: a[:1] * 0 + 3, batch[0]))
        return [fake.compute(lambda a, b: a * b, batch[0], kept[0])]

    x = random(9, 2)
    (y,) = streamed(run, [x], 2, device=1)
    np.testing.assert_array_equal(y, 3 * x)
    assert set(seen) == {(1, stream, 1)} and fake.device == 0


def test_the_host_prepares_a_batch_while_another_is_computed(install):
    fake = install()
    pinned = []
    allocate = fake.cupy.cuda.alloc_pinned_memory
    fake.cupy.cuda.alloc_pinned_memory = lambda nbytes: pinned.append(nbytes) or allocate(nbytes)
    started = []

    def run(batch):
        started.append(fake.waits)
        return [fake.compute(lambda a: a + 1, batch[0])]

    results = runtime.stream_batches(run, batches_of([random(10, 4)], 2), [np.dtype("f4")])
    for number, _ in enumerate(results):
        assert len(started) == min(number + 2, 5), "the next batch is under way before this one is handed over"
    assert started == [0, 0, 1, 2, 3], "no batch waits for the one before it"
    assert fake.waits == 5
    assert len(pinned) == 4, "two of the input, two of the output, for any number of batches"


HOST = {
    "contiguous": lambda x, folder: x,
    "strided": lambda x, folder: np.repeat(x, 2, axis=1)[:, ::2],
    "reversed": lambda x, folder: x[::-1].copy()[::-1],
    "fortran": lambda x, folder: np.asfortranarray(x),
    "read-only": lambda x, folder: np.broadcast_to(x, x.shape),
    "big-endian": lambda x, folder: x.astype(">f4"),
    "float64": lambda x, folder: x.astype(np.float64),
    "unaligned": lambda x, folder: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
    "mapped": lambda x, folder: np.save(folder / "x.npy", x) or np.load(folder / "x.npy", mmap_mode="r"),
}


@pytest.mark.parametrize("store", HOST.values(), ids=HOST)
def test_host_arrays_of_every_kind(install, tmp_path, store):
    fake = install(seed=3)
    x = random(7, 5, 2)
    given = store(x, tmp_path)
    (y,) = streamed(lambda batch: [fake.compute(lambda a: a * 2, batch[0])], [given], 3, dtypes=["float32"])
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, 2 * x)


def test_bfloat16_and_empty_batches(install):
    fake = install(seed=3)
    x = random(5, 4, dtype=ml_dtypes.bfloat16)
    (y,) = streamed(lambda batch: [fake.compute(lambda a: a + a, batch[0])], [x], 2)
    assert y.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(y.astype("f4"), (x + x).astype("f4"))
    results = list(runtime.stream_batches(lambda batch: batch, [(np.zeros((0, 3)),)], [np.dtype("f4")]))
    assert [y.shape for ys in results for y in ys] == [(0, 3)]
    assert list(runtime.stream_batches(lambda batch: batch, [], [])) == []


def test_batches_may_grow(install):
    fake = install(seed=5)
    parts = [(random(n, w),) for n, w in ((2, 3), (2, 3), (5, 3), (1, 3), (4, 7), (4, 7), (2, 7))]
    results = runtime.stream_batches(lambda batch: [fake.compute(lambda a: -a, batch[0])], parts, [np.dtype("f4")])
    for (x,), (y,) in zip(parts, results, strict=True):
        np.testing.assert_array_equal(y, -x)


# --- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", range(5))
@pytest.mark.parametrize("seed", range(6))
def test_an_error_leaves_nothing_running(install, where, seed):
    fake = install(seed=seed)
    calls = []

    def run(batch):
        calls.append(None)
        y = fake.compute(lambda a: a + 1, batch[0])
        if len(calls) == where + 1:
            raise FloatingPointError("in the middle")
        return [y]

    with pytest.raises(FloatingPointError, match="in the middle"):
        streamed(run, [random(10, 4)], 2)
    assert fake.idle() and len(calls) == where + 1


@pytest.mark.parametrize("taken", range(4))
def test_a_caller_who_stops_leaves_nothing_running(install, taken):
    fake = install(seed=taken)
    results = runtime.stream_batches(
        lambda batch: [fake.compute(lambda a: a, batch[0])], batches_of([random(10, 4)], 2), [np.dtype("f4")]
    )
    for _ in range(taken):
        next(results)
    results.close()
    assert fake.idle() and fake.device == 0


def test_host_data_that_fails_leaves_nothing_running(install):
    fake = install()

    def failing():
        yield (random(2, 4),)
        yield (random(2, 4),)
        raise OSError("the file is gone")

    results = runtime.stream_batches(lambda b: [fake.compute(lambda a: a, b[0])], failing(), [np.dtype("f4")])
    with pytest.raises(OSError, match="gone"):
        list(results)
    assert fake.idle()


def test_a_gpu_that_fails_is_told_by_its_first_error(install):
    fake = install()

    def broken(self):
        raise fake_cupy.CUDARuntimeError(700, "cudaErrorIllegalAddress")

    def run(batch):
        fake.cupy.cuda.Stream.synchronize = broken
        raise fake_cupy.CUDADriverError("first")

    with pytest.raises(fake_cupy.CUDADriverError, match="first"):
        streamed(run, [random(4, 4)], 2)


# --- Model.predict -----------------------------------------------------------------------------------------------


def pointwise(fake, monkeypatch, **options):
    """A model of one layer that computes on the fake's arrays, and what NumPy makes of the same."""
    model = Sequential([Input((6, 3), **options), layers.Conv1D(2, 1, dtype=options.get("dtype"))])
    kernel, bias = model.get_weights()
    bias[...] = [1, -2]
    model.set_weights([kernel, bias])
    plain = model._apply

    def apply(inputs, training):
        (x,) = inputs
        if not runtime.is_device_array(x):
            return plain(inputs, training)
        (x,) = model._accept((x,))
        for layer in model.layers:
            if layer._weights and layer._home is not type(x):
                layer._move(x)
        return fake.compute(lambda x, w, b: x @ w[0] + b, x, *model.weights)

    monkeypatch.setattr(model, "_apply", apply)
    return model, lambda x: x.astype(kernel.dtype) @ kernel[0] + bias


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_predict_streams_through_the_gpu(install, monkeypatch, count, seed):
    fake = install(seed=seed)
    model, expected = pointwise(fake, monkeypatch)
    x = random(count, 6, 3)
    y = model.predict(x, batch_size=4, verbose=0)
    assert type(y) is np.ndarray and y.shape == (count, 6, 2) and y.dtype == np.float32
    np.testing.assert_allclose(y, expected(x), rtol=1e-6)
    assert all(runtime.is_device_array(weight) for weight in model.weights), "the weights moved once, and stay"
    again = model.predict(x, batch_size=7, verbose=0)
    np.testing.assert_allclose(again, expected(x), rtol=1e-6)
    assert fake.idle()


def test_predict_goes_where_it_is_told(install, monkeypatch):
    fake = install(capabilities=[(9, 0), (9, 0)])
    model, expected = pointwise(fake, monkeypatch)
    x = random(9, 6, 3)
    for device, on_gpu in (("cpu", False), (None, False), ("gpu", True), (None, True), ("cpu", False)):
        np.testing.assert_allclose(model.predict(x, 4, 0, device), expected(x), rtol=1e-6)
        assert all(runtime.is_device_array(weight) == on_gpu for weight in model.weights)
    with fake.cupy.cuda.Device(1):
        model.predict(x, 4, 0, "gpu")
    assert {weight.device.id for weight in model.weights} == {1}
    np.testing.assert_allclose(model.predict(x, 4, 0), expected(x), rtol=1e-6)
    assert {weight.device.id for weight in model.weights} == {1}, "and not to the current device"


def test_predict_takes_arrays_that_are_on_the_gpu_already(install, monkeypatch):
    fake = install()
    model, expected = pointwise(fake, monkeypatch)
    x = random(9, 6, 3)
    y = model.predict(runtime.device_array(x), batch_size=4, verbose=0)
    assert type(y) is np.ndarray
    np.testing.assert_allclose(y, expected(x), rtol=1e-6)


GIVEN = {
    "float32": "float32",
    "float64": "float32",
    "int64": "float32",
    ">f8": "float32",
    "float16": "float16",
    "uint8": "uint8",
    "bool": "bool",
    "bfloat16": "float32",
}


@pytest.mark.parametrize("given", GIVEN)
def test_samples_are_uploaded_in_the_smaller_dtype(install, monkeypatch, given):
    fake = install()
    model, expected = pointwise(fake, monkeypatch)
    x = (9 * random(5, 6, 3)).round().astype(ml_dtypes.bfloat16 if given == "bfloat16" else given)
    seen = []
    stream = runtime.stream_batches
    monkeypatch.setattr(
        runtime, "stream_batches", lambda run, b, dtypes, device: seen.append(dtypes) or stream(run, b, dtypes, device)
    )
    np.testing.assert_allclose(model.predict(x, 2, 0), expected(x), rtol=1e-5, atol=1e-5)
    assert seen == [[np.dtype(GIVEN[given])]] and seen[0][0].isnative


@pytest.mark.parametrize("place", ["cpu", "gpu"])
def test_what_is_no_number_is_refused_on_both(install, monkeypatch, place):
    fake = install()
    model, _ = pointwise(fake, monkeypatch)
    with pytest.raises(TypeError, match="complex64"):
        model.predict(random(5, 6, 3).astype("complex64"), 2, 0, place)
    with pytest.raises((TypeError, ValueError)):
        model.predict(np.full((5, 6, 3), "a"), 2, 0, place)
    assert fake.idle()


def test_several_inputs_and_outputs(install, monkeypatch):
    fake = install(seed=2)
    a, b = Input((4, 2)), Input((4, 2), dtype="float64")
    model = Model([a, b], [layers.Conv1D(1, 1)(a), layers.Conv1D(1, 1, dtype="float64")(b)])

    def apply(inputs, training):
        return tuple(fake.compute(lambda x: x[..., :1] + 1, x) for x in inputs)

    monkeypatch.setattr(model, "_apply", apply)
    x, y = random(5, 4, 2), random(5, 4, 2, dtype="float64")
    first, second = model.predict([x, y], 2, 0)
    np.testing.assert_array_equal(first, x[..., :1] + 1)
    np.testing.assert_array_equal(second, y[..., :1] + 1)
    assert (first.dtype, second.dtype) == (np.float32, np.float64)


def test_an_error_of_the_model_comes_through(install, monkeypatch):
    fake = install()
    model, _ = pointwise(fake, monkeypatch)
    with pytest.raises(ValueError, match="has shape"):
        model.predict(random(9, 7, 3), 2, 0)
    assert fake.idle()


def test_there_is_no_gpu(install):
    install(driver=0)
    model = Sequential([Input((6, 3)), layers.Conv1D(2, 1)])
    assert isinstance(model, models.Model)
    assert model.predict(random(5, 6, 3), 2, 0).shape == (5, 6, 2)
    with pytest.raises(ValueError, match="no usable GPU"):
        model.predict(random(5, 6, 3), 2, 0, "gpu")
