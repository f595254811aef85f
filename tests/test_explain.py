"""`ops.explain`: FLOPs, bytes and occupancy against counts by hand, and that it says what will be launched."""

import json
import math

import numpy as np
import pytest

import cuconv
from cuconv import explain, layers, ops
from cuconv.cuda.tape import Outline
from cuconv.plan.devices import DEVICES
from cuconv.plan.occupancy import occupancy
from cuconv.plan.types import PlanError

H200, T4 = DEVICES["H200"], DEVICES["T4"]

# A call, and by hand: FLOPs, elements of all arrays, kernels.
B, L, C, F, K = 8, 1024, 64, 96, 3
P = L - K + 1
BY_HAND = {
    "conv": (("conv", (B, L, C), (K, C, F), (F,)), {}, 2 * B * P * K * C * F, B * L * C + K * C * F + F + B * P * F),
    "groups": (
        ("conv", (B, L, C), (K, C // 4, F)),
        {"groups": 4},
        2 * B * P * K * C // 4 * F,
        B * L * C + K * C // 4 * F + B * P * F,
    ),
    "same": (
        ("conv", (B, L, C), (K, C, F)),
        {"padding": "same"},
        2 * B * L * K * C * F,
        B * L * C + K * C * F + B * L * F,
    ),
    "strided": (
        ("conv", (B, L, C), (K, C, F)),
        {"strides": 2},
        2 * B * 511 * K * C * F,
        B * L * C + K * C * F + B * 511 * F,
    ),
    "first": (
        ("conv", (B, C, L), (K, C, F)),
        {"data_format": "channels_first"},
        2 * B * P * K * C * F,
        B * L * C + K * C * F + B * P * F,
    ),
    "input_grad": (
        ("conv_input_grad", (B, P, F), (K, C, F), (B, L, C)),
        {},
        2 * B * P * K * C * F,
        B * P * F + K * C * F + B * L * C,
    ),
    "kernel_grad": (
        ("conv_kernel_grad", (B, L, C), (B, P, F), (K, C, F)),
        {},
        2 * B * P * K * C * F,
        B * L * C + B * P * F + K * C * F,
    ),
    "depthwise": (
        ("depthwise_conv", (B, L, C), (K, C, 2)),
        {"padding": "causal"},
        2 * B * L * K * C * 2,
        B * L * C + K * C * 2 + 2 * B * L * C,
    ),
    "separable": (
        ("separable_conv", (B, L, C), (K, C, 1), (1, C, F)),
        {},
        2 * B * P * C * (K + F),
        B * L * C + K * C + C * F + B * P * F,
    ),
    "conv2d": (
        ("conv", (2, 32, 32, C), (3, 3, C, F)),
        {},
        2 * 2 * 30 * 30 * 9 * C * F,
        2 * 32 * 32 * C + 9 * C * F + 2 * 900 * F,
    ),
    "upsample": (("upsample", (2, 50, 16), 3), {}, 0, 2 * 50 * 16 * 4),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_flops_and_bytes_are_those_of_a_count_by_hand(name, dtype):
    call, options, flops, elements = BY_HAND[name]
    found = ops.explain(*call, dtype=dtype, device="H200", **options)
    assert (found.flops, found.bytes) == (flops, elements * (2 if dtype == "bfloat16" else 4))
    assert found.intensity == pytest.approx(found.flops / found.bytes)
    product = not name.startswith(("depthwise", "upsample"))
    half = 67e12 if name.startswith("upsample") else 989.5e12
    peak = half if dtype == "bfloat16" else 494.7e12 / 3 if product else 67e12
    assert found.peak == peak
    assert found.roof_seconds == pytest.approx(max(flops / peak, found.bytes / 4.8e12))
    assert found.side == ("compute" if flops / peak > found.bytes / 4.8e12 else "memory")
    assert 0 < found.share < 1 and math.isclose(found.seconds, sum(step.seconds for step in found.steps))


def test_complex_products_take_four_multiplications():
    real = ops.explain("conv", (B, L, C), (K, C, F), device="A100")
    twofold = ops.explain("conv", (B, L, C), (K, C, F), dtype="complex64", device="A100")
    assert twofold.flops == 4 * real.flops and twofold.bytes == 2 * real.bytes


@pytest.mark.parametrize(
    ("dtype", "precision", "device", "peak"),
    [
        ("float32", "highest", "A100", 52e12),
        ("float32", "highest", "RTX 4090", 82.6e12),
        ("float32", "high", "A100", 156e12),
        ("float32", "high", "T4", 8.1e12),
        ("float64", "highest", "H200", 67e12),
        ("float64", "highest", "L4", 0.47e12),
        ("complex64", "highest", "H200", 67e12),
        ("complex128", "highest", "H200", 34e12),
        ("float16", "highest", "T4", 65e12),
        ("bfloat16", "highest", "T4", 8.1e12),
        ("bfloat16", "highest", "L4", 121e12),
    ],
)
def test_the_roof_is_that_of_the_fastest_unit(dtype, precision, device, peak):
    assert ops.explain(
        "conv", (1, 9, 4), (2, 4, 8), dtype=dtype, precision=precision, device=device
    ).peak == pytest.approx(peak)


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_an_explanation(name):
    found = ops.explain(
        "conv", (8, 16384, 128), (2, 128, 256), (256,), padding="causal", dilation_rate=512, device=name.lower()
    )
    (step,) = found.steps
    # Three products on tensor cores, where these are more than three times as fast as the ordinary units.
    kernel = "conv_mma" if name in ("A100", "H100", "H200", "B200") else "conv_simt"
    assert found.device.name == name and step.kernel == found.algorithm == kernel
    assert step.blocks == math.prod(step.grid) and step.plan.threads == step.threads
    assert step.waves == pytest.approx(step.blocks / (step.resident * found.device.multiprocessors))
    assert any("predicted" in each for each in step.rejected) and any("tensor cores" in each for each in step.rejected)


# Registers, shared memory and threads of a block; what the CUDA guide's rules give, by hand.
OCCUPANCY = [
    (H200, 256, 128, 16 << 10, 2, 512 / 2048, "registers"),  # 65536 / (128 * 256)
    (H200, 256, 33, 0, 6, 1536 / 2048, "registers"),  # 33 are given as 40
    (H200, 128, 32, 100 << 10, 2, 256 / 2048, "shared memory"),  # 228 / 101
    (H200, 1024, 32, 0, 2, 1.0, "threads"),
    (H200, 32, 16, 0, 32, 1024 / 2048, "blocks"),
    (T4, 64, 32, 0, 16, 1.0, "threads"),
    (T4, 32, 32, 0, 16, 0.5, "blocks"),
    (T4, 256, 32, 32 << 10, 2, 0.5, "shared memory"),  # all 64 KiB: the driver takes none here
    (DEVICES["L4"], 48, 16, 0, 24, 1.0, "threads"),  # 48 threads are two warps
    (T4, 1024, 128, 0, 0, 0.0, "registers"),
]


@pytest.mark.parametrize(("device", "threads", "registers", "shared", "blocks", "share", "limiter"), OCCUPANCY)
def test_occupancy(device, threads, registers, shared, blocks, share, limiter):
    found = occupancy(device, threads, registers, shared)
    assert (found.blocks, found.share, found.limiter) == (blocks, share, limiter)


def test_the_text_says_what_is_predicted_and_why():
    text = str(
        ops.explain(
            "conv_kernel_grad", (8, 16384, 128), (8, 16384, 256), (2, 128, 256), padding="causal", device="H100"
        )
    )
    for words in (
        "on H100",
        "17.18 GFLOP",
        "201.6 MB",
        "bound by compute",
        "not measured",
        "waves",
        "limited by registers",
    ):
        assert words in text, words
    assert text.count("predicted") > 3 and "1. kernel_grad_mma, tile" in text and "2. reduce_splits" in text
    assert "     not: tile" in text


def test_it_is_json_and_html():
    found = ops.explain("conv", (1, 9, 4), (2, 4, 8), device="H200", activation="relu")
    told = json.loads(json.dumps(found.to_dict()))
    assert told["arrays"] == {"x": [1, 9, 4], "w": [2, 4, 8], "result": [1, 8, 8]}
    assert told["options"] == {"activation": "relu"} and told["predicted_seconds"] == found.seconds
    assert told["steps"][0]["constants"]["BM"] and "plan" not in told["steps"][0]
    assert found._repr_html_().startswith("<pre>conv float32")


def test_what_the_array_library_does_is_counted():
    found = ops.explain("conv", (8, 100, 16), (3, 16, 32), activation="softmax", device="H200")
    assert [step.kernel for step in found.steps] == [
        "conv_simt",
        "cupy.max",
        "cupy.subtract",
        "cupy.exp",
        "cupy.sum",
        "cupy.divide",
    ]
    assert found.steps[3].bytes == 2 * 8 * 98 * 32 * 4 and found.steps[3].plan is None


def test_nothing_to_do_has_no_steps():
    found = ops.explain("conv", (0, 9, 4), (2, 4, 8), device="H200")
    assert not found.steps and found.share == 0 and found.algorithm == "" and str(found)


WRONG = {
    "operation": (("convolve", (1, 9, 4), (2, 4, 8)), {}, ValueError, '`operation` must be one of .*"conv"'),
    "private": (("asarray", (1, 9, 4)), {}, ValueError, "`operation` must be one of"),
    "too few": (("conv", (1, 9, 4)), {}, ValueError, "`shapes` of conv are those of x, w, bias, 2 of them at least"),
    "too many": (("conv", (1,), (1,), (1,), (1,)), {}, ValueError, "`shapes` of conv"),
    "out": (("conv", (1, 9, 4), (2, 4, 8)), {"out": 1}, ValueError, "`out` is none of its options"),
    "no shape": (("conv", (1, 9, 4), None), {}, ValueError, "`w` must be given as a shape.*Received: None"),
    "sizes": (("conv", (1, 9.5, 4), (2, 4, 8)), {}, ValueError, "`x` must be given as a shape.*9.5"),
    "negative": (("conv", (1, -9, 4), (2, 4, 8)), {}, ValueError, "`x` must be given as a shape"),
    "text": (("conv", "1,9,4", (2, 4, 8)), {}, ValueError, "`x` must be given as a shape"),
    "dtype": (
        ("conv", (1, 9, 4), (2, 4, 8)),
        {"dtype": "int32"},
        TypeError,
        "`dtype` must be one of .*Received: dtype='int32'",
    ),
    "no dtype": (("conv", (1, 9, 4), (2, 4, 8)), {"dtype": "tf32"}, TypeError, "`dtype` must be one of"),
    "device": (("conv", (1, 9, 4), (2, 4, 8)), {"device": "H300"}, PlanError, "one of T4, .*H200.*Received: 'H300'"),
    "shapes": (("conv", (1, 9, 4), (2, 5, 8)), {}, ValueError, "channels"),
    "option": (("conv", (1, 9, 4), (2, 4, 8)), {"strides": 0}, ValueError, "strides"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_questions(name):
    call, options, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        ops.explain(*call, **options)


def test_without_a_gpu_it_is_said_for_which_one():
    assert ops.explain("conv", (1, 9, 4), (2, 4, 8)).device is H200


# --- Layers and models -------------------------------------------------------------------------------------------


def test_a_layer_is_explained_and_stays_as_it_was():
    layer = layers.Conv1D(32, 3, activation="relu", padding="same")
    x = np.random.default_rng(0).standard_normal((2, 50, 16)).astype(np.float32)
    y, weights, state = layer(x), layer.get_weights(), dict(vars(layer))
    steps, outputs = explain.of_call(layer, [((64, 5000, 16), "float32")], H200)
    assert [step.kernel for step in steps] == ["conv_simt"] and steps[0].least_flops == 2 * 64 * 5000 * 48 * 32
    assert type(outputs) is Outline and outputs.shape == (64, 5000, 32)
    assert vars(layer) == state and all(map(np.array_equal, layer.get_weights(), weights))
    np.testing.assert_array_equal(layer(x), y)


def test_a_new_layer_stays_new():
    layer = layers.SeparableConv2D(8, 3)
    steps, _ = explain.of_call(layer, [((2, 20, 20, 16), "float32")], T4)
    assert len(steps) == 2 and not layer.built and layer._home is None


@pytest.mark.parametrize("stateful", [False, True])
def test_a_recurrent_layer_keeps_its_states(stateful):
    layer = layers.ConvLSTM1D(4, 3, stateful=stateful, batch_input_shape=(2, 5, 20, 6))
    steps, outputs = explain.of_call(layer, [((2, 5, 20, 6), "float32")], H200)
    assert layer.states is None and [step.kernel for step in steps].count("conv_lstm") == 5
    assert outputs.shape == (2, 18, 4)


def test_a_model_is_explained():
    model = cuconv.Sequential(
        [
            cuconv.Input((100, 8)),
            layers.Conv1D(16, 5, activation="relu"),
            layers.DepthwiseConv1D(3, padding="same"),
            layers.UpSampling1D(2),
            layers.Activation("softmax"),
        ]
    )
    steps, outputs = explain.of_call(model, [((32, 100, 8), "float32")], H200)
    assert [step.kernel.partition("_")[0] for step in steps[:3]] == ["conv", "depthwise", "upsample"]
    assert outputs.shape == (32, 192, 16)
    assert model.predict(np.zeros((2, 100, 8), np.float32), verbose=0).shape == (2, 192, 16)


def test_a_call_that_fails_gives_the_weights_back():
    layer = layers.Conv1D(4, 3)
    layer.build((None, 10, 2))
    weights = layer.get_weights()
    with pytest.raises(ValueError, match="shape|axes|channels"):
        explain.of_call(layer, [((1, 10, 3), "float32")], H200)
    assert all(map(np.array_equal, layer.get_weights(), weights)) and layer._home is None
