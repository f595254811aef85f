"""Outlines of arrays, tapes, and calls that are played: on a CuPy without CUDA (tests/fake_cupy.py).

What a played call computes is checked in tests/test_engine.py; here it is whether it starts the same kernels on the
same memory as the call itself, and whether it is played only where that is so.
"""

import gc
import json
import threading

import fake_cupy
import ml_dtypes
import numpy as np
import pytest

from cuconv import activations, ops
from cuconv.cuda import conv as cuda_conv
from cuconv.cuda import cubins, prepared, runtime
from cuconv.cuda.tape import ALIGNMENT, Launch, Outline, Recorder, Tape, UnknownValueError, record
from cuconv.plan.devices import DEVICES

H200 = DEVICES["H200"]


@pytest.fixture
def recorder():
    return Recorder(H200)


# --- Outlines ----------------------------------------------------------------------------------------------------

VIEWS = {
    "transpose": lambda a: a.transpose(2, 0, 1),
    "T": lambda a: a.T,
    "swapaxes": lambda a: a.swapaxes(0, 2),
    "slice": lambda a: a[1:, ::2],
    "integer": lambda a: a[1],
    "scalar": lambda a: a[1, 2, 3][...],
    "newaxis": lambda a: a[:, None, ..., 1:],
    "reshape": lambda a: a.reshape(-1, 2),
    "reshape strided": lambda a: a[:, ::2].reshape(2, -1),
    "view": lambda a: a.view(np.uint16),
    "astype": lambda a: a.astype(np.float64),
    "copy": lambda a: a.T.copy(),
    "exp": lambda a: np.exp(a),
    "add": lambda a: a + 1,
    "compare": lambda a: a[:1] > a,
    "like": lambda a: np.zeros_like(a, shape=(3, 1)),
    "full": lambda a: np.full_like(a, 2.0),
    "sum": lambda a: np.sum(a, axis=-1, keepdims=True),
    "max": lambda a: np.max(a, axis=(0, 1)),
    "cumsum": lambda a: np.cumsum(a, axis=1),
    "where": lambda a: np.where(a > 0, a, 0),
    "clip": lambda a: np.clip(a, 0, 1),
    "concatenate": lambda a: np.concatenate([a, a[:, :1]], axis=1),
    "rows": lambda a: list(a)[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_an_outline_changes_as_an_array_does(recorder, name):
    array = np.ones((2, 4, 6), np.float32)
    expected, found = VIEWS[name](array), VIEWS[name](recorder.argument(array.shape, array.dtype))
    assert type(found) is Outline
    described = [
        (a.shape, a.dtype, a.strides, a.ndim, a.size, a.nbytes, len(a) if a.ndim else 0) for a in (found, expected)
    ]
    assert described[0] == described[1]


def test_an_outline_knows_where_its_parts_lie(recorder):
    x = recorder.argument((4, 8), "float32", misaligned=4)
    assert x.address % ALIGNMENT == 4 and x[1:, 2:].address == x.address + 4 * (8 + 2)
    y = recorder.argument((4, 8), "float32")
    assert y.address >= x.address + x.nbytes and not np.shares_memory(x.layout, y.layout)
    assert x.is_whole and x.reshape(-1).is_whole and not x[1:].is_whole and not x.T.is_whole


@pytest.mark.parametrize(
    "ask",
    [float, bool, int, np.asarray, lambda x: x.tolist(), lambda x: x[np.arange(2)], lambda x: x[x > 0]],
    ids=["float", "bool", "int", "asarray", "tolist", "indices", "mask"],
)
def test_nobody_reads_the_numbers_of_an_outline(recorder, ask):
    with pytest.raises(UnknownValueError):
        ask(recorder.argument((2,), "float32"))


def test_what_the_array_library_does_is_noted_with_its_traffic(recorder):
    x, y = (recorder.argument((10, 4), dtype) for dtype in (np.float32, ml_dtypes.bfloat16))
    np.add(x, y.astype(np.float32), out=x)
    x[:5] = 0
    assert [(step.name, step.bytes_read, step.bytes_written) for step in recorder.steps] == [
        ("astype", 80, 160),
        ("add", 160, 160),
        ("fill", 0, 80),
    ]


def test_memory_that_is_gone_is_used_again(recorder):
    first = recorder.empty((100,), "float32")
    number, view = first.buffer.number, first[10:]
    del first
    assert recorder.empty((100,), "float32").buffer.number != number, "a view keeps its memory"
    del view
    assert recorder.empty((50,), "float64").buffer.number == number
    given = recorder.argument((7,), "float32").buffer.number
    gc.collect()
    assert recorder.empty((7,), "float32").buffer.number != given, "what the caller gave is not ours"


def test_slabs_of_a_separable_convolution_share_one_array():
    def call(x, d, p):
        return ops.separable_conv(x, d, p, workspace=4 * 98 * 16)

    tape = record(H200, call, [((10, 100, 16), "float32", 0), ((3, 16, 1), "float32", 0), ((1, 16, 8), "float32", 0)])
    # Two of them: one slab's is given back when the next one's is there.
    assert len(tape.steps) == 20 and tape.scratch == (4 * 98 * 16,) * 2 and tape.outputs == (((10, 98, 8), np.float32),)


# --- Played calls ------------------------------------------------------------------------------------------------


@pytest.fixture
def install(monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path))

    def forget():
        prepared._in_one_piece.clear()
        ops._device_engine.cache_clear()
        for known in knowns():
            known._tapes.clear()

    def install(**options):
        forget()
        return fake_cupy.install(monkeypatch, **options)

    yield install
    fake_cupy.forget()
    forget()


@pytest.fixture
def fake(install):
    return install()


def knowns():
    for operation in ops._OPERATIONS.values():
        yield from (c.cell_contents for c in operation.__closure__ if isinstance(c.cell_contents, prepared.Known))


def remembered():
    return [found for known in knowns() for found in known._tapes.values()]


def described(launches):
    """Kernels with their parameters, memory named in the order in which it occurs: it differs from call to call."""
    names, found = {}, []
    for launch in launches:
        words = np.frombuffer(launch.parameters, np.uint64).tolist()
        words = [names.setdefault(word, f"array {len(names)}") if word > 1 << 40 else word for word in words]
        found.append((launch.path, launch.grid, launch.block, words))
    return found


SHAPES = {
    "conv": ((2, 50, 16), (3, 16, 24), (24,)),
    "conv_transpose": ((2, 50, 16), (3, 24, 16), (24,)),
    "conv_input_grad": ((2, 48, 24), (3, 16, 24), (2, 50, 16)),
    "conv_kernel_grad": ((200, 48, 24), (200, 48, 24), (1, 24, 24)),
    "depthwise_conv": ((2, 50, 16), (3, 16, 2), (32,)),
    "depthwise_conv_grad": ((2, 50, 16), (3, 16, 1), (2, 48, 16)),
    "separable_conv": ((2, 50, 16), (3, 16, 1), (1, 16, 8)),
    "separable_conv_kernel_grad": ((2, 50, 16), (2, 48, 8), (3, 16, 1), (1, 16, 8)),
    "bias_grad": ((900, 50, 16),),
    "upsample": ((2, 50, 16), 3),
}
OPTIONS = {"upsample": {"interpolation": "bilinear"}, "separable_conv": {"workspace": 4 * 48 * 16}}  # a slab an item
PLAIN = {"conv_input_grad": 1, "conv_kernel_grad": 1, "upsample": 1}  # last arguments that are no arrays


def arguments_of(cupy, operation):
    shapes = SHAPES[operation]
    arrays = len(shapes) - PLAIN.get(operation, 0)
    return [*(cupy.empty(shape, np.float32) for shape in shapes[:arrays]), *shapes[arrays:]]


@pytest.mark.parametrize("operation", SHAPES)
def test_a_played_call_starts_what_the_call_itself_starts(fake, monkeypatch, operation):
    arguments, function = arguments_of(fake.cupy, operation), getattr(ops, operation)
    options = OPTIONS.get(operation, {})
    (known,) = (c.cell_contents for c in function.__closure__ if isinstance(c.cell_contents, prepared.Known))
    directly = known._directly(arguments, options)
    expected, fake.launches[:] = described(fake.launches), []
    played = function(*arguments, **options)
    assert described(fake.launches) == expected and expected
    fake.launches.clear()
    monkeypatch.setattr(known, "_function", None)  # nobody asks it again
    again = function(*arguments, **options)
    assert described(fake.launches) == expected
    for mine, theirs, last in zip(*(y if isinstance(y, tuple) else (y,) for y in (played, directly, again))):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype and mine is not last


@pytest.mark.parametrize("operation", SHAPES)
def test_a_prepared_call_starts_what_the_call_itself_starts(fake, monkeypatch, operation):
    arguments = arguments_of(fake.cupy, operation)
    arrays = [each for each in arguments if hasattr(each, "host")]
    options = OPTIONS.get(operation, {})
    call = ops.prepare(operation, *SHAPES[operation], **options)
    results = call(*arrays)
    ready, fake.launches[:] = described(fake.launches), []
    getattr(ops, operation)(*arguments, **options)
    assert described(fake.launches) == ready and ready
    monkeypatch.setattr(fake.cupy, "empty", None)  # now it has all it needs
    given = results if isinstance(results, tuple) else (results,)
    assert call(*arrays, out=results) is results or all(a is b for a, b in zip(call(*arrays, out=results), given))


def test_a_new_pointer_has_a_new_tensor_map(fake, monkeypatch):
    """In played and in prepared calls."""
    monkeypatch.setattr(runtime, "tensor_map", lambda given, address: address.to_bytes(8, "little").ljust(128, b"m"))
    x, other, w = (fake.cupy.empty(shape, np.float16) for shape in ((8, 2048, 128), (8, 2048, 128), (3, 128, 256)))
    call = ops.prepare("conv", x.shape, w.shape, dtype="float16")
    for given in (x, x, other):
        y = ops.conv(given, w)
        call(given, w, out=y)
        mine, its = fake.launches[-2:]
        assert mine.kernel == "conv_wgmma" and mine.parameters == its.parameters
        pointers = [int.from_bytes(mine.parameters[at : at + 8], "little") for at in (0, 128, 256, 264, 280)]
        assert pointers == [each.data.ptr for each in (given, w, given, w, y)]


def test_results_go_to_out(fake):
    x, w, out = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8), (1, 8, 8)))
    for _ in range(2):
        assert ops.conv(x, w, out=out) is out
    assert [launch.parameters[24:32] for launch in fake.launches] == [out.data.ptr.to_bytes(8, "little")] * 2


def test_equal_options_of_another_kind_are_not_taken_for_plain_ones(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
    ops.conv(x, w, strides=1, groups=1)
    for wrong in (1.0, True):
        with pytest.raises(ValueError, match="strides"):
            ops.conv(x, w, strides=wrong, groups=1)
    assert len(fake.launches) == 1


def test_arrays_of_another_kind_have_a_tape_of_their_own(fake):
    memory = fake.cupy.empty((73,), np.float32)
    x, w = memory[:36], fake.cupy.empty((2, 4, 8), np.float32)
    x, shifted = (fake_view(fake, memory, start) for start in (0, 1))
    for array in (x, shifted, x, shifted):
        ops.conv(array, w)
    paths = [launch.path for launch in fake.launches]
    assert paths[0] == paths[2] != paths[1] == paths[3], "what is off a boundary is not read 16 bytes at a time"
    ops.conv(fake.cupy.empty((1, 9, 4), np.float16), fake.cupy.empty((2, 4, 8), np.float16))
    assert len(remembered()) == 3


def fake_view(fake, memory, start):
    """[1, 9, 4] elements of `memory` from one on."""
    return type(memory)(memory.host[start : start + 36].reshape(1, 9, 4), memory.block, 0)


def test_each_gpu_has_tapes_of_its_own(install):
    fake = install(capabilities=[(9, 0), (8, 0)])
    for device in (0, 1, 0, 1):
        with fake.cupy.cuda.Device(device):
            x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
        y = ops.conv(x, w)  # while GPU 0 is current
        assert y.device.id == device
    assert [launch.device for launch in fake.launches] == [0, 1, 0, 1] and len(remembered()) == 2
    assert len({launch.path for launch in fake.launches}) == 2, "compiled for each architecture"


def test_out_in_the_memory_of_an_input_is_refused_again(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (1, 4, 4)))
    ops.conv(x, w, out=fake.cupy.empty((1, 9, 4), np.float32))
    call = ops.prepare("conv", x.shape, w.shape)
    for out in (x[:], x):
        with pytest.raises(ValueError, match="share memory"):
            ops.conv(x, w, out=out)
        with pytest.raises(ValueError, match="share memory"):
            call(x, w, out=out)
    assert len(fake.launches) == 1


def test_arrays_in_several_pieces_go_the_direct_way(fake):
    x, w = fake.cupy.empty((1, 18, 4), np.float32)[:, ::2], fake.cupy.empty((2, 4, 8), np.float32)
    ops.conv(x, w)
    assert not remembered() and len(fake.launches) == 1


def test_a_function_of_the_user_is_asked_every_time(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
    asked = []
    for _ in range(3):
        ops.conv(x, w, activation=lambda y, out=None: asked.append(y) or y)
    assert len(asked) == 3 and not remembered()


def test_wrong_calls_are_wrong_every_time(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 5, 8)))
    for _ in range(2):
        with pytest.raises(ValueError, match="channels"):
            ops.conv(x, w)
        with pytest.raises(TypeError, match=r"ndarray, .*ndarray"):
            ops.conv(x, np.ones((2, 4, 8), np.float32))
    assert not fake.launches


def test_calls_beyond_the_limit_are_forgotten(fake, monkeypatch):
    monkeypatch.setattr(prepared, "REMEMBERED_CALLS", 3)
    w = fake.cupy.empty((2, 4, 8), np.float32)
    for length in (*range(2, 12), *range(2, 12)):
        ops.conv(fake.cupy.empty((1, length, 4), np.float32), w)
    assert len(fake.launches) == 20 and len(remembered()) <= 3


def test_threads_play_the_same_tape(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
    threads = [threading.Thread(target=lambda: [ops.conv(x, w) for _ in range(50)]) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(fake.launches) == 200 and len({launch.path for launch in fake.launches}) == 1


def test_what_kernels_fuse_is_remembered_by_object_too(fake):
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
    for activation in (activations.relu, "relu", activations.relu):
        ops.conv(x, w, activation=activation)
    assert len(remembered()) == 2 and cuda_conv.fuses(activations.relu)


# --- Prepared calls ----------------------------------------------------------------------------------------------


def test_a_prepared_call_refuses_what_it_was_not_prepared_for(install):
    fake = install(capabilities=[(9, 0), (9, 0)])
    call = ops.prepare("conv", (1, 9, 4), (2, 4, 8), padding="valid")
    x, w, y = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8), (1, 8, 8)))
    with fake.cupy.cuda.Device(1):
        elsewhere = fake.cupy.empty((1, 9, 4), np.float32)
    wrong = {
        "shape": fake.cupy.empty((1, 10, 4), np.float32),
        "dtype": fake.cupy.empty((1, 9, 4), np.float64),
        "pieces": fake.cupy.empty((1, 18, 4), np.float32)[:, ::2],
        "boundary": fake_view(fake, fake.cupy.empty((73,), np.float32), 1),
        "GPU": elsewhere,
        "NumPy": np.ones((1, 9, 4), np.float32),
        "None": None,
    }
    for each in wrong.values():
        with pytest.raises(ValueError, match=r"prepared for x float32\(1, 9, 4\).*Received"):
            call(each, w, out=y)
    with pytest.raises(ValueError, match=r"out\[0\] float32\(1, 8, 8\)"):
        call(x, w, out=x)
    for arrays in ((), (x,), (x, w, y)):
        with pytest.raises(ValueError, match=r"prepared for x .*, w .*Received"):
            call(*arrays)
    with pytest.raises(ValueError, match="prepared for"):
        call(x, w, out=(y, y))
    assert not fake.launches
    assert call(x, w, out=y) is y and call(x, w, out=y) is y and len(fake.launches) == 2


def test_a_prepared_call_keeps_nobodys_arrays(fake):
    call = ops.prepare("conv", (1, 9, 4), (2, 4, 8))
    x, w = (fake.cupy.empty(shape, np.float32) for shape in ((1, 9, 4), (2, 4, 8)))
    call(x, w)
    last = call._last[0][0]
    assert last() is x
    del x
    gc.collect()
    assert last() is None


def test_what_cannot_be_prepared_is_said(fake):
    with pytest.raises(ValueError, match=r"Received: conv, which needs .*max.*exp"):
        ops.prepare("conv", (1, 9, 4), (2, 4, 8), activation="softmax")


def test_preparing_needs_a_gpu():
    with pytest.raises(runtime.DriverError):
        ops.prepare("conv", (1, 9, 4), (2, 4, 8))


def test_a_tape_that_returns_a_part_is_not_played(recorder):
    x = recorder.argument((4, 4), "float32")
    assert not Tape(recorder, [x], x[1:]).playable and Tape(recorder, [x], (x, None)).playable


def test_a_tape_is_made_of_launches(recorder):
    x, w = recorder.argument((1, 9, 4), "float32"), recorder.argument((2, 4, 8), "float32")
    ops.conv(x, w)
    assert [type(step) for step in recorder.steps] == [Launch]
    assert json.dumps(ops.explain("conv", (1, 9, 4), (2, 4, 8), device="T4").to_dict())
