"""The oracle by numbers worked out by hand, its gradients by the adjoint identity, and the comparison by what it must
reject. Keras' answers to the same oracle are in test_golden.py."""

import compare
import ml_dtypes
import numpy as np
import oracle
import pytest
from compare import LAYOUTS, assert_close, embed, frozen

RAMP = np.arange(1.0, 6.0).reshape(1, 5, 1)  # 1 2 3 4 5
DIGITS = np.array([1.0, 10.0, 100.0]).reshape(3, 1, 1)  # a kernel that shows which input met which tap


def line(y):
    return y[0, :, 0].tolist()


# --- By hand -----------------------------------------------------------------------------------------------------

CONVOLUTIONS = [
    ("valid", {}, [321, 432, 543]),
    ("same", {"padding": "same"}, [210, 321, 432, 543, 54]),
    ("causal", {"padding": "causal"}, [100, 210, 321, 432, 543]),
    ("causal-d2", {"padding": "causal", "dilation_rate": 2}, [100, 200, 310, 420, 531]),
    ("valid-s2", {"strides": 2}, [321, 543]),
    ("same-s2", {"padding": "same", "strides": 2}, [210, 432, 54]),
    ("causal-s2", {"padding": "causal", "strides": 2}, [100, 321, 543]),
    ("valid-d2", {"dilation_rate": 2}, [531]),
    ("same-d2", {"padding": "same", "dilation_rate": 2}, [310, 420, 531, 42, 53]),
    ("pairs", {"padding": ((2, 1),)}, [100, 210, 321, 432, 543, 54]),
    ("pairs-s3-d2", {"padding": (2, 3), "strides": 3, "dilation_rate": 2}, [310, 42]),
]


@pytest.mark.parametrize("options, expected", [c[1:] for c in CONVOLUTIONS], ids=[c[0] for c in CONVOLUTIONS])
def test_convolutions_by_hand(options, expected):
    assert line(oracle.conv(RAMP, DIGITS, **options)) == expected
    assert line(oracle.depthwise_conv(RAMP, DIGITS, **options)) == expected
    one = np.ones((1, 1, 1))
    assert line(oracle.separable_conv(RAMP, DIGITS, one, **options)) == expected


def test_even_kernels_pad_more_at_the_end():
    kernel = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(4, 1, 1)
    assert line(oracle.conv(RAMP, kernel, padding="same")) == [3210, 4321, 5432, 543, 54]


APART = [1, 10, 100, 0, 2, 20, 200, 0, 3, 30, 300, 0, 4, 40, 400, 0, 5, 50, 500, 0]
TRANSPOSED = [
    ("valid", {}, [1, 12, 123, 234, 345, 450, 500]),
    ("valid-s2", {"strides": 2}, [1, 10, 102, 20, 203, 30, 304, 40, 405, 50, 500]),
    ("valid-s4", {"strides": 4}, APART),
    ("valid-s4-op0", {"strides": 4, "output_padding": 0}, APART[:-1]),
    ("same", {"padding": "same"}, [12, 123, 234, 345, 450]),
    ("same-s2", {"padding": "same", "strides": 2}, [1, 10, 102, 20, 203, 30, 304, 40, 405, 50]),
    ("same-s2-op0", {"padding": "same", "strides": 2, "output_padding": 0}, [10, 102, 20, 203, 30, 304, 40, 405, 50]),
    ("valid-d2", {"dilation_rate": 2}, [1, 2, 13, 24, 135, 240, 350, 400, 500]),
    ("pairs", {"padding": ((1, 2),)}, [12, 123, 234, 345]),
]  # fmt: skip


@pytest.mark.parametrize("options, expected", [c[1:] for c in TRANSPOSED], ids=[c[0] for c in TRANSPOSED])
def test_transposed_convolutions_by_hand(options, expected):
    assert line(oracle.conv_transpose(RAMP, DIGITS, **options)) == expected


def test_gaps_of_a_transposed_convolution_hold_the_activated_bias():
    y = oracle.conv_transpose(RAMP[:, :2], DIGITS[:1], np.array([-7.0]), strides=3, activation="relu")
    assert line(y) == [0, 0, 0, 0, 0, 0]
    y = oracle.conv_transpose(RAMP[:, :2], DIGITS[:1], np.array([0.5]), strides=3)
    assert line(y) == [1.5, 0.5, 0.5, 2.5, 0.5, 0.5]


def test_groups_are_consecutive_blocks():
    x = np.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 1, 4)
    w = np.ones((1, 2, 2)) * [[[1, 2], [1, 2]]]
    assert oracle.conv(x, np.concatenate([w, w], axis=-1), groups=2).ravel().tolist() == [11, 22, 1100, 2200]
    kernel = np.array([[[1.0, 1, 3, 3]]])  # [1, F/groups, C]
    assert oracle.conv_transpose(x, kernel, groups=2).ravel().tolist() == [11, 3300]


def test_depthwise_channels_are_interleaved():
    x, w = np.array([1.0, 10.0]).reshape(1, 1, 2), np.array([[[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]])
    assert oracle.depthwise_conv(x, w).ravel().tolist() == [1, 2, 3, 10, 20, 30]


def test_two_dimensions_by_hand():
    x = np.arange(1.0, 7.0).reshape(1, 2, 3, 1)
    w = np.array([[1.0, 10.0], [100.0, 1000.0]]).reshape(2, 2, 1, 1)
    assert oracle.conv(x, w)[0, ..., 0].tolist() == [[5421, 6532]]
    full = [[1, 12, 23, 30], [104, 1245, 2356, 3060], [400, 4500, 5600, 6000]]
    assert oracle.conv_transpose(x, w)[0, ..., 0].tolist() == full


def test_upsampling_by_hand():
    square = np.array([[0.0, 1.0], [2.0, 3.0]]).reshape(1, 2, 2, 1)

    def row(**options):
        return oracle.upsample(square, 2, **options)[0, 0, :, 0]

    assert row().tolist() == [0, 0, 1, 1]
    assert row(interpolation="bilinear").tolist() == [0, 0.25, 0.75, 1]
    assert row(interpolation="bicubic").round(4).tolist() == [-0.3164, 0.0156, 0.5625, 0.8945]


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5"])
def test_upsampling_keeps_a_constant(interpolation):
    y = oracle.upsample(np.ones((1, 3, 4, 1)), (2, 3), interpolation=interpolation)
    assert np.abs(y - 1).max() < 1e-15


def test_padding_and_cropping_by_hand():
    assert line(oracle.pad(RAMP, (1, 2))) == [0, 1, 2, 3, 4, 5, 0, 0]
    assert line(oracle.crop(RAMP, ((1, 2),))) == [2, 3]


def test_a_conv_lstm_step_by_hand():
    """One position, one filter, every weight 0 but the bias: the gates are known numbers."""
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1, 4))
    bias = np.array([0.0, np.log(3), np.arctanh(0.5), 100.0])  # i = 1/2, f = 3/4, candidate = 1/2, o = 1
    h, c = oracle.conv_lstm_step(one, one, one, zero, zero, bias)
    assert abs(c.item() - (0.75 * 1 + 0.5 * 0.5)) < 1e-15
    assert abs(h.item() - np.tanh(1.0)) < 1e-15


def test_softmax_sees_the_layout_of_the_output():
    x, w = np.ones((1, 2, 4)), np.ones((1, 2, 3))
    y = oracle.conv(x, w, data_format="channels_first", activation="softmax")
    assert np.abs(y - 1 / 4).max() < 1e-15


# --- Gradients ---------------------------------------------------------------------------------------------------


def random(rng, *shape):
    return rng.standard_normal(shape) + 1j * rng.standard_normal(shape)


def inner(a, b):
    return np.sum(a.conj() * b)


GRADIENTS = {
    "conv": ((2, 7, 6, 4), (3, 2, 2, 6), {"strides": (2, 1), "dilation_rate": (1, 2), "padding": "same", "groups": 2}),
    "conv_transpose": (
        (2, 3, 4, 4),
        (3, 2, 3, 4),
        {"strides": (2, 3), "dilation_rate": (2, 1), "padding": "same", "groups": 2},
    ),
    "depthwise_conv": (
        (2, 7, 6, 3),
        (3, 2, 3, 2),
        {"strides": (2, 1), "dilation_rate": (3, 2), "padding": ((1, 2), (3, 0))},
    ),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_adjoints(name):
    """<dy, A(x, w)> = <A*(dy, w), x> for the conjugating inner product, in x and in w."""
    x_shape, w_shape, options = GRADIENTS[name]
    rng = np.random.default_rng(1)
    x, w = random(rng, *x_shape), random(rng, *w_shape)
    y = getattr(oracle, name)(x, w, **options)
    dy = random(rng, *y.shape)
    dx = getattr(oracle, f"{name}_input_grad")(dy, w, x_shape, **options)
    dw = getattr(oracle, f"{name}_kernel_grad")(x, dy, w_shape, **options)
    assert abs(inner(dy, y) - inner(dx, x)) < 1e-12 * np.linalg.norm(dy) * np.linalg.norm(y)
    assert abs(inner(dy, y) - inner(dw, w)) < 1e-12 * np.linalg.norm(dy) * np.linalg.norm(y)


def test_separable_gradients_are_adjoints():
    rng = np.random.default_rng(2)
    x, a, b = random(rng, 2, 6, 3), random(rng, 3, 3, 2), random(rng, 1, 6, 4)
    options = {"strides": 2, "padding": "causal", "dilation_rate": 2}
    y = oracle.separable_conv(x, a, b, **options)
    dy = random(rng, *y.shape)
    dx = oracle.separable_conv_input_grad(dy, a, b, x.shape, **options)
    da, db = oracle.separable_conv_kernel_grad(x, dy, a, b, **options)
    for gradient, argument in ((dx, x), (da, a), (db, b)):
        assert abs(inner(dy, y) - inner(gradient, argument)) < 1e-12 * np.linalg.norm(dy) * np.linalg.norm(y)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos3", "lanczos5"])
def test_upsampling_gradients_are_adjoints(interpolation):
    rng = np.random.default_rng(3)
    x = random(rng, 2, 3, 4, 2)
    y = oracle.upsample(x, (2, 3), interpolation=interpolation)
    dy = random(rng, *y.shape)
    dx = oracle.upsample_input_grad(dy, (2, 3), interpolation=interpolation)
    assert abs(inner(dy, y) - inner(dx, x)) < 1e-12 * np.linalg.norm(dy) * np.linalg.norm(y)


@pytest.mark.parametrize("activation", sorted(oracle.ACTIVATIONS))
def test_a_complex_step_is_a_derivative(activation):
    """Against central differences, which know nothing of complex numbers."""
    rng = np.random.default_rng(4)
    x, dy = 4 * rng.standard_normal((3, 4)), rng.standard_normal((3, 4))

    def loss(x):
        return np.sum(oracle.activate(activation, x) * dy)

    (gradient,) = oracle.complex_step(loss, x)
    for index in np.ndindex(*x.shape):
        step = np.zeros_like(x)
        step[index] = 1e-6
        assert abs((loss(x + step) - loss(x - step)) / 2e-6 - gradient[index]) < 1e-8


# --- The comparison rejects --------------------------------------------------------------------------------------


def test_equal_values_pass():
    assert_close(np.float32([1, 2]), np.array([1.0, 2.0]), dtype="float32", terms=1)
    assert_close(np.zeros((0, 3), np.float32), np.zeros((0, 3)), dtype="float32", terms=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes(bad):
    with pytest.raises(AssertionError, match=r"1 of 2 elements are not finite; first at \(1,\)"):
        assert_close(np.float32([1, bad]), np.array([1.0, 1.0]), dtype="float32", terms=1)
    with pytest.raises(AssertionError, match="nothing can be compared"):
        assert_close(np.float32([1, bad]), np.array([1.0, bad]), dtype="float32", terms=1)


def test_dtype_and_shape_must_agree():
    with pytest.raises(AssertionError, match="dtype float64, expected float32"):
        assert_close(np.zeros(2), np.zeros(2), dtype="float32", terms=1)
    with pytest.raises(AssertionError, match=r"shape \(2, 1\), expected \(2,\)"):
        assert_close(np.zeros((2, 1), np.float32), np.zeros(2), dtype="float32", terms=1)


def test_a_wrong_imaginary_part_does_not_pass():
    with pytest.raises(AssertionError, match="off by 0.5"):
        assert_close(np.complex64([1 + 0.5j]), np.array([1.0 + 1j]), dtype="complex64", terms=1)
    with pytest.raises(AssertionError, match="off by 1 "):
        assert_close(np.complex64([1 + 1j]), np.array([1.0]), dtype="complex64", terms=1)


def test_the_message_names_the_place_and_both_values():
    with pytest.raises(AssertionError, match=r"\(0, 1\).*3\.0.* instead of .*2\.0.*, off by 1 "):
        assert_close(np.array([[1.0, 3.0]]), np.array([[1.0, 2.0]]), dtype="float64", terms=1)


@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_the_tolerance_is_a_few_units_in_the_last_place(dtype):
    """One unit passes, twenty do not."""
    one = np.ones(1, compare.dtype_of(dtype))
    assert_close(
        (one + compare.eps(dtype)).astype(one.dtype),
        np.ones(1) * (1 + 0j if one.dtype.kind == "c" else 1.0),
        dtype=dtype,
        terms=1,
    )
    with pytest.raises(AssertionError, match="off by"):
        assert_close((one + 20 * compare.eps(dtype)).astype(one.dtype), np.ones(1), dtype=dtype, terms=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", compare.DTYPES)
def test_embedded_arrays_are_surrounded_by_poison(layout, dtype):
    values = np.arange(12).reshape(3, 4).astype(compare.dtype_of(dtype))
    embedded = embed(values, layout)
    assert np.array_equal(embedded.view, values)
    assert np.isnan(embedded.base).sum() == embedded.base.size - 12
    embedded.assert_surroundings_untouched()
    assert np.array_equal(embedded.view, values)
    if layout in ("sliced", "reversed", "offset"):
        embedded.base[0, 0] = 5
        with pytest.raises(AssertionError, match="1 elements outside"):
            embedded.assert_surroundings_untouched()


def test_frozen_inputs_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        frozen(np.ones(3), "sliced")[0] = 2


def test_bfloat16_is_read_exactly():
    third = np.array([1 / 3], ml_dtypes.bfloat16)
    assert oracle.wide(third)[0] == 0.333984375
