"""What the operations refuse: the type of the error, its words, and that `out` was not touched."""

from typing import ClassVar

import ml_dtypes
import numpy as np
import pytest
from compare import poisoned

from cuconv import ops
from cuconv.plan.types import PlanError

RNG = np.random.default_rng(0)


def array(*shape, dtype="float32"):
    return RNG.standard_normal(shape).astype(dtype)


X, W = array(2, 6, 4), array(3, 4, 8)  # [B, L, C], [R, C, F]
Y_SHAPE = (2, 4, 8)
DY, WT, WD, WP = array(*Y_SHAPE), array(3, 8, 4), array(3, 4, 2), array(1, 8, 5)

# Each operation with arguments that it accepts, by name. The first is the one that is spoiled below.
CALLS = {
    "conv": {"x": X, "w": W},
    "conv_input_grad": {"dy": DY, "w": W, "input_shape": X.shape},
    "conv_kernel_grad": {"x": X, "dy": DY, "kernel_shape": W.shape},
    "conv_transpose": {"x": X, "w": WT},
    "conv_transpose_input_grad": {"dy": array(2, 8, 8), "w": WT, "input_shape": X.shape},
    "conv_transpose_kernel_grad": {"x": X, "dy": array(2, 8, 8), "kernel_shape": WT.shape},
    "depthwise_conv": {"x": X, "w": WD},
    "depthwise_conv_input_grad": {"dy": DY, "w": WD, "input_shape": X.shape},
    "depthwise_conv_kernel_grad": {"x": X, "dy": DY, "kernel_shape": WD.shape},
    "separable_conv": {"x": X, "depthwise_w": WD, "pointwise_w": WP},
    "separable_conv_input_grad": {"dy": array(2, 4, 5), "depthwise_w": WD, "pointwise_w": WP, "input_shape": X.shape},
    "separable_conv_kernel_grad": {"x": X, "dy": array(2, 4, 5), "depthwise_w": WD, "pointwise_w": WP},
}
every_call = pytest.mark.parametrize("name", CALLS)
FORWARD = ("conv", "conv_transpose", "depthwise_conv", "separable_conv")
every_forward = pytest.mark.parametrize("name", FORWARD)


def call(name, **changed):
    return getattr(ops, name)(**{**CALLS[name], **changed})


def result_shape(name):
    result = call(name)
    return result[0].shape if isinstance(result, tuple) else result.shape


def refuses(error, text, name, **changed):
    """The call raises `error` with `text` and with what was received, and leaves a poisoned `out` alone."""
    out = poisoned(result_shape(name), "float32")
    if name != "separable_conv_kernel_grad" and "out" not in changed:
        changed["out"] = out
    with pytest.raises(error) as caught:
        call(name, **changed)
    message = str(caught.value)
    assert text in message, message
    assert "Received: " in message, message
    assert np.isnan(out).all(), "an error must come before the first write"


# --- Arrays ------------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("dtype", ["float64", "float16", "complex64", ml_dtypes.bfloat16], ids=str)
def test_arrays_of_two_dtypes(name, dtype):
    """No array is converted silently: every array but the first is given another dtype in turn."""
    arrays = [key for key, value in CALLS[name].items() if isinstance(value, np.ndarray)]
    for key in arrays[1:]:
        refuses(TypeError, "dtype", name, **{key: CALLS[name][key].astype(dtype)})


@every_forward
def test_a_bias_of_another_dtype(name):
    channels = result_shape(name)[-1]
    refuses(TypeError, "dtype", name, bias=np.zeros(channels))


@every_call
@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "int64"])
def test_dtypes_that_are_no_floats(name, dtype):
    changed = {key: value.astype(dtype) for key, value in CALLS[name].items() if isinstance(value, np.ndarray)}
    refuses(TypeError, "dtype", name, **changed)


@every_call
def test_lists_are_not_arrays(name):
    first = next(iter(CALLS[name]))
    refuses(TypeError, "array", name, **{first: CALLS[name][first].tolist()})


@every_call
def test_an_input_of_another_rank(name):
    first = next(iter(CALLS[name]))
    text = "`dy` must have the shape" if first == "dy" else "axes"
    refuses(ValueError, text, name, **{first: CALLS[name][first][0]})
    refuses(ValueError, text, name, **{first: CALLS[name][first][:, None]})


@every_call
def test_channels_that_do_not_fit(name):
    first = next(iter(CALLS[name]))
    refuses(ValueError, "shape" if first == "dy" else "channels", name, **{first: CALLS[name][first][..., :-1]})


@pytest.mark.parametrize("name", [n for n in CALLS if n.endswith("grad")])
def test_a_dy_of_another_shape(name):
    """One position more than the forward pass gives, or another batch."""
    dy = CALLS[name]["dy"]
    longer = np.concatenate([dy, dy[:, :1]], axis=1)
    refuses(ValueError, "`dy`", name, dy=longer)
    refuses(ValueError, "`dy`", name, dy=dy[:1])


@every_forward
@pytest.mark.parametrize("shape", ["wrong-length", "rank-2", "scalar"])
def test_a_bias_of_another_shape(name, shape):
    channels = result_shape(name)[-1]
    bias = {"wrong-length": array(channels + 1), "rank-2": array(1, channels), "scalar": array()}[shape]
    refuses(ValueError, "`bias`", name, bias=bias)


@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 8, 5), (8, 5), (1, 8, 0), (1, 1, 8, 5)], ids=str)
@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("separable")])
def test_a_pointwise_kernel_that_does_not_fit(name, shape):
    refuses(ValueError, "`pointwise_w` must have the shape", name, pointwise_w=array(*shape))


@pytest.mark.parametrize("name", [n for n in CALLS if "input_shape" in CALLS[n]])
def test_an_input_shape_with_an_unknown_size(name):
    refuses(ValueError, "every size must be known", name, input_shape=(None, *CALLS[name]["input_shape"][1:]))


def test_a_bias_gradient_needs_channels():
    with pytest.raises(ValueError, match=r"`dy` must have at least 2 axes. Received: "):
        ops.bias_grad(array(3))
    with pytest.raises(ValueError, match="`data_format` must be"):
        ops.bias_grad(array(3, 2, 2), data_format="NCW")


class OnTheGpu:
    """What an array of a GPU library looks like from here."""

    dtype, shape, ndim = np.dtype("float32"), X.shape, 3
    __cuda_array_interface__: ClassVar = {"shape": X.shape, "typestr": "<f4", "data": (0, False), "version": 3}


@every_call
def test_an_array_on_a_gpu_is_not_moved_silently(name):
    """Where there is no engine for it; the message says why and what to do."""
    if ops.runtime.probe().usable:
        pytest.skip("this machine computes with such arrays")
    first = next(iter(CALLS[name]))
    with pytest.raises(PlanError, match="cupy.asnumpy"):
        call(name, **{first: OnTheGpu()})


# --- Options -----------------------------------------------------------------------------------------------------


@every_call
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, "1", (1, 1), ()], ids=repr)
@pytest.mark.parametrize("option", ["strides", "dilation_rate"])
def test_what_is_no_stride_and_no_dilation(name, option, value):
    refuses(ValueError, f"`{option}` must be", name, **{option: value})


@every_call
@pytest.mark.parametrize("value", ["full", "", None, 1, ((1, 1), (1, 1)), (-1, 0), ((1,),), (1.0, 1)], ids=repr)
def test_what_is_no_padding(name, value):
    refuses(ValueError, "`padding`", name, padding=value)


@pytest.mark.parametrize("name", [n for n in CALLS if "transpose" in n])
def test_a_transposed_convolution_is_not_causal(name):
    refuses(ValueError, "`padding`", name, padding="causal")


def test_causal_needs_one_axis():
    with pytest.raises(ValueError, match=r"`padding`.*Received: padding='causal'"):
        ops.conv(array(1, 5, 5, 2), array(3, 3, 2, 2), padding="causal")


@every_call
@pytest.mark.parametrize("value", ["NWC", "last", 1], ids=repr)
def test_an_unknown_data_format(name, value):
    refuses(ValueError, "`data_format` must be", name, data_format=value)


@pytest.mark.parametrize("name", [n for n in CALLS if n.startswith("conv")])
@pytest.mark.parametrize("value", [0, -2, 1.0, None, True, (1,)], ids=repr)
def test_what_is_no_number_of_groups(name, value):
    refuses(ValueError, "`groups` must be an integer >= 1", name, groups=value)


def test_groups_that_do_not_divide():
    """3 groups of 4 channels are 12 channels but 8 filters; of the transposed kernel, 4 channels."""
    refuses(ValueError, "`groups` must divide", "conv", x=array(2, 6, 12), groups=3)
    refuses(ValueError, "`groups` must divide", "conv_transpose", groups=3)
    refuses(ValueError, "16 channels", "conv", x=array(2, 6, 12), groups=4)


@pytest.mark.parametrize("name", [n for n in CALLS if "transpose" in n])
@pytest.mark.parametrize("value", [1, 2, -1, 0.5, (0, 0), True], ids=repr)
def test_an_output_padding_that_the_stride_does_not_allow(name, value):
    refuses(ValueError, "`output_padding`", name, output_padding=value)


@every_forward
def test_an_unknown_activation(name):
    refuses(ValueError, "activation", name, activation="ReLU")


@every_call
@pytest.mark.parametrize("value", ["low", "HIGHEST ", None, 1], ids=repr)
def test_an_unknown_precision(name, value):
    refuses(ValueError, "`precision`", name, precision=value)


@every_call
@pytest.mark.parametrize("value", [-1, 1.5, "64MB", True], ids=repr)
def test_a_workspace_is_a_number_of_bytes(name, value):
    refuses(ValueError, "`workspace`", name, workspace=value)


@pytest.mark.parametrize("name", ["conv", "depthwise_conv", "separable_conv"])
def test_a_kernel_longer_than_the_input(name):
    refuses(ValueError, "zero or negative", name, x=X[:, :2])
    refuses(ValueError, "zero or negative", name, dilation_rate=3)


def test_complex_numbers_have_no_activation_but_linear():
    x, w = array(1, 5, 2, dtype="complex64"), array(3, 2, 2, dtype="complex64")
    with pytest.raises(TypeError, match="complex"):
        ops.conv(x, w, activation="relu")
    assert ops.conv(x, w, activation="linear").dtype == np.complex64


# --- out ---------------------------------------------------------------------------------------------------------

with_out = pytest.mark.parametrize("name", [n for n in CALLS if n != "separable_conv_kernel_grad"])


@with_out
def test_out_of_another_shape(name):
    shape = result_shape(name)
    for wrong in (shape[1:], (*shape, 1), (shape[0] + 1, *shape[1:]), (shape[0], shape[1] - 1, *shape[2:])):
        out = poisoned(wrong, "float32")
        refuses(ValueError, "`out`", name, out=out)
        assert np.isnan(out).all()


@with_out
@pytest.mark.parametrize("dtype", ["float64", "float16", "int32"])
def test_out_of_another_dtype(name, dtype):
    out = np.full(result_shape(name), 77, dtype)
    refuses(TypeError, "`out`", name, out=out)
    assert np.all(out == 77)


@with_out
def test_out_that_cannot_be_written(name):
    out = poisoned(result_shape(name), "float32")
    out.flags.writeable = False
    refuses(ValueError, "`out`", name, out=out)
    assert np.isnan(out).all()


@with_out
def test_out_that_is_no_array(name):
    refuses(TypeError, "`out`", name, out=np.zeros(result_shape(name), "float32").tolist())


@with_out
def test_out_that_shares_memory_with_an_operand(name):
    """Same start, a shift, and interleaved with it; the operand keeps its values."""
    shape = result_shape(name)
    for key, operand in CALLS[name].items():
        if not isinstance(operand, np.ndarray):
            continue
        memory = np.zeros(4 * max(operand.size, int(np.prod(shape))), "float32")
        overlapping = memory[: operand.size].reshape(operand.shape)
        overlapping[...] = operand
        for start in (0, operand.size - 1):
            out = memory[start : start + int(np.prod(shape))].reshape(shape)
            refuses(ValueError, "`out`", name, **{key: overlapping, "out": out})
        assert np.array_equal(overlapping, operand)


def test_out_that_only_interleaves_with_an_operand_is_fine():
    """Two arrays may lie in each other's gaps: no element is shared."""
    memory, ones = np.zeros((2, 6, 8), "float32"), np.ones((1, 4, 4), "float32")
    memory[..., ::2] = X
    expected = ops.conv(X, ones)
    assert np.array_equal(ops.conv(memory[..., ::2], ones, out=memory[..., 1::2]), expected)
    assert np.array_equal(memory[..., ::2], X)


def test_out_that_takes_too_long_to_tell_from_an_operand(monkeypatch):
    """Whether arrays of odd strides overlap can be a hard problem; then they count as overlapping."""

    def give_up(*arrays, max_work):
        raise np.exceptions.TooHardError

    monkeypatch.setattr(np, "shares_memory", give_up)
    refuses(ValueError, "`out` must not share memory", "conv")


@every_forward
def test_out_needs_an_activation_that_works_element_by_element(name):
    refuses(ValueError, "`out`", name, activation="softmax")


# --- Upsampling --------------------------------------------------------------------------------------------------

UP = array(1, 3, 4, 2)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "2", (2,), (2, 2, 2), (2, 0)], ids=repr)
def test_what_is_no_upsampling_size(size):
    for function in (ops.upsample, ops.upsample_input_grad):
        with pytest.raises(ValueError, match=r"`size` must be.*Received: size="):
            function(UP, size)


@pytest.mark.parametrize("interpolation", ["linear", "", None, 3, "lanczos4"], ids=repr)
def test_an_unknown_interpolation(interpolation):
    for function in (ops.upsample, ops.upsample_input_grad):
        with pytest.raises(ValueError, match=r"`interpolation` must be.*Received: interpolation="):
            function(array(1, 4, 4, 2), 2, interpolation=interpolation)


def test_upsampling_errors_about_arrays():
    with pytest.raises(ValueError, match="Received"):
        ops.upsample(array(3, 4), 2)
    with pytest.raises(ValueError, match=r"Received.*"):
        ops.upsample_input_grad(array(1, 5, 8, 2), 2)  # 5 is not twice anything
    with pytest.raises(TypeError, match="dtype"):
        ops.upsample(UP.astype("int32"), 2, interpolation="bilinear")
    with pytest.raises(ValueError, match="`out`"):
        ops.upsample(UP, 2, out=poisoned((1, 6, 8, 3), "float32"))
    with pytest.raises(TypeError, match="`out`"):
        ops.upsample(UP, 2, out=np.zeros((1, 6, 8, 2)))
    with pytest.raises(ValueError, match="`data_format` must be"):
        ops.upsample(UP, 2, data_format="NHWC")


# --- Convolutional LSTM ------------------------------------------------------------------------------------------

STEP = {
    "x": array(1, 6, 3),
    "h": array(1, 4, 2),
    "c": array(1, 4, 2),
    "w": array(3, 3, 8),
    "recurrent_w": array(3, 2, 8),
    "bias": array(8),
}


@pytest.mark.parametrize(
    "changed, error",
    [
        ({"h": array(1, 5, 2)}, ValueError),
        ({"c": array(2, 4, 2)}, ValueError),
        ({"h": array(1, 4, 3)}, ValueError),
        ({"recurrent_w": array(3, 3, 8)}, ValueError),
        ({"recurrent_w": array(3, 2, 4)}, ValueError),
        ({"recurrent_w": array(3, 2, 1)}, ValueError),  # which NumPy would broadcast
        ({"w": None, "x": array(1, 4, 8), "bias": array(5)}, ValueError),  # the precomputed convolution has its bias
        ({"w": array(3, 3, 6)}, ValueError),
        ({"bias": array(2)}, ValueError),
        ({"w": None}, ValueError),  # x is then the precomputed convolution, which has 8 channels
        ({"h": array(1, 4, 2, dtype="float64")}, TypeError),
        ({"recurrent_w": array(3, 2, 8, dtype="float16")}, TypeError),
        ({"activation": "Tanh"}, ValueError),
        ({"strides": 0}, ValueError),
        ({"x": array(1, 6, 3).tolist()}, TypeError),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__,
)
def test_conv_lstm_steps_that_do_not_fit(changed, error):
    with pytest.raises(error, match="Received"):
        ops.conv_lstm_step(**{**STEP, **changed})
    states = {"dh": array(1, 4, 2), "dc": array(1, 4, 2)}
    with pytest.raises(error, match="Received"):
        ops.conv_lstm_step_grad(**{**STEP, **states, **changed})


@pytest.mark.parametrize("name", ["dh", "dc"])
def test_conv_lstm_state_gradients_that_do_not_fit(name):
    states = {"dh": array(1, 4, 2), "dc": array(1, 4, 2)}
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape.*Received: {name}"):
        ops.conv_lstm_step_grad(**{**STEP, **states, name: array(1, 5, 2)})
