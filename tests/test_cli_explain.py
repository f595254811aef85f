"""`cuconv explain`, and the arguments that describe a layer: the call they stand for, what is refused, what is told."""

import json

import numpy as np
import pytest

from cuconv import bench, cli, layers, ops, parity
from cuconv.plan.devices import DEVICES

GATE = "conv1d --shape 8,16384,128 --filters 256 --kernel 2 --dilation 512 --padding causal --dtype bf16".split()

# Layer -> its class, shape of the input, arguments of the layer and the same for `layer_case`.
SAME = {
    "conv1d": (layers.Conv1D, (2, 17, 6), {"strides": 2, "padding": "causal", "groups": 2}),
    "conv2d": (layers.Conv2D, (2, 9, 8, 3), {"dilation_rate": 2, "data_format": "channels_last"}),
    "conv3d": (layers.Conv3D, (1, 2, 6, 5, 7), {"padding": "same", "data_format": "channels_first"}),
    "conv1d_transpose": (layers.Conv1DTranspose, (2, 5, 3), {"strides": 3}),
    "conv2d_transpose": (layers.Conv2DTranspose, (1, 4, 5, 3), {"strides": 2, "padding": "same"}),
    "conv3d_transpose": (layers.Conv3DTranspose, (1, 3, 2, 3, 2), {}),
    "depthwise_conv1d": (layers.DepthwiseConv1D, (2, 11, 3), {"depth_multiplier": 2, "padding": "same"}),
    "depthwise_conv2d": (layers.DepthwiseConv2D, (1, 7, 8, 4), {"strides": 2}),
    "separable_conv1d": (layers.SeparableConv1D, (2, 11, 3), {"depth_multiplier": 2}),
    "separable_conv2d": (layers.SeparableConv2D, (1, 8, 7, 3), {"data_format": "channels_first", "padding": "same"}),
}


def test_every_layer_is_tried():
    assert set(SAME) == set(bench.LAYERS)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", SAME)
def test_the_call_is_that_of_the_layer(name, use_bias, monkeypatch):
    """Operation, shapes and options are those that the layer itself calls `ops` with."""
    kind, shape, options = SAME[name]
    filters = {} if name.startswith("depthwise") else {"filters": 4}
    case = bench.layer_case(name, shape, (3,), **filters, **options, use_bias=use_bias, activation="relu")
    layer = kind(*filters.values(), 3, **options, use_bias=use_bias, activation="relu")
    called = []
    real = getattr(ops, case.operation)

    def spy(*arrays, **keywords):
        called.append((tuple(getattr(array, "shape", None) for array in arrays), keywords))
        return real(*arrays, **keywords)

    monkeypatch.setattr(ops, case.operation, spy)
    expected = layer(np.zeros(shape, np.float32))
    ((shapes, keywords),) = called
    assert case.shapes == shapes
    assert real(*(s and np.zeros(s, np.float32) for s in case.shapes), **case.options).shape == expected.shape
    mine = {"strides": 1, "padding": "valid", "dilation_rate": 1, "groups": 1, "data_format": "channels_last"}
    for option, value in (mine | case.options).items():
        theirs = keywords.get(option, value)
        alike = getattr(theirs, "name", theirs)
        assert np.all(np.asarray(alike) == np.asarray(value)), option


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
@pytest.mark.parametrize("direction", bench.PASSES)
@pytest.mark.parametrize("name", SAME)
def test_every_pass_of_every_layer_can_be_called_and_checked(name, direction, dtype):
    _, shape, options = SAME[name]
    filters = {} if name.startswith("depthwise") else {"filters": 4}
    case = bench.layer_case(name, shape, (3,), **filters, **options, dtype=dtype, direction=direction)
    assert case.operation.endswith("grad") == (direction != "forward")
    outcome = parity.check(case, np.asarray)
    assert outcome.passed, outcome.problem
    assert outcome.share < 1


def test_explain_tells_what_the_call_needs(capsys):
    """FLOPs and bytes by hand: x and y of 16384 positions in batches of 8, 2 taps; two bytes an element."""
    flops = 2 * 8 * 16384 * 2 * 128 * 256
    moved = 2 * (8 * 16384 * 128 + 2 * 128 * 256 + 256 + 8 * 16384 * 256)
    assert cli.main(["explain", *GATE, "--device", "H200", "--json"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert shown.err == "" and (told["flops"], told["bytes"]) == (flops, moved)
    assert (told["operation"], told["dtype"], told["device"]["name"]) == ("conv", "bfloat16", "H200")
    assert told["steps"] and told["steps"][0]["rejected"] and told["predicted_seconds"] > told["roof_seconds"] > 0
    assert [row["device"] for row in told["every_gpu"]] == list(DEVICES)
    here = next(row for row in told["every_gpu"] if row["device"] == "H200")
    assert here["predicted_seconds"] == told["predicted_seconds"] and here["algorithm"] == told["algorithm"]
    assert len({row["predicted_seconds"] for row in told["every_gpu"]}) > 3


def test_explain_in_words(capsys):
    assert cli.main(["explain", *GATE, "--activation", "relu", "--device", "a100"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    for word in ("on A100", "17.18 GFLOP", "100.8 MB", "not measured", "why:", "not:", "other GPUs, predicted"):
        assert word in shown.out, word
    for name in DEVICES:
        assert f"\n  {name} " in shown.out


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_explain_draws(tmp_path, ending):
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"roof.{ending}"
    assert cli.main(["explain", *GATE, "--plot", str(picture)]) == 0
    begins = {"png": b"\x89PNG", "svg": b"<?xml"}[ending]
    assert picture.read_bytes().startswith(begins)


def explain(text):
    return ["explain", *text.split()]


# Arguments that are refused by the parser, and what is said.
USAGE = {
    "no-layer": ("", "LAYER"),
    "unknown-layer": ("conv4d", "conv4d"),
    "shape-word": ("conv1d --shape a,b --kernel 3", "'a,b'"),
    "shape-zero": ("conv1d --shape 8,0,3 --kernel 3", "integers of 1 or more"),
    "shape-float": ("conv1d --shape 8,1.5,3 --kernel 3", "integers of 1 or more"),
    "kernel-negative": ("conv1d --shape 8,9,3 --kernel=-1", "integers of 1 or more"),
    "filters-zero": ("conv1d --shape 8,9,3 --filters 0", "1 or more"),
    "dtype": ("conv1d --dtype int8", "bf16"),
    "padding": ("conv1d --padding full", "valid, same, causal"),
    "padding-triple": ("conv1d --padding 1:2:3", "valid, same, causal"),
    "pass": ("conv1d --pass backward", "kernel_grad"),
    "data-format": ("conv1d --data-format NHWC", "channels_first"),
    "plot": ("conv1d --plot roof.pdf", ".png or .svg"),
}


@pytest.mark.parametrize(("arguments", "text"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_exit_code_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(explain(arguments))
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == "" and text in shown.err


# Arguments that do not fit each other.
UNFIT = {
    "no-shape": ("conv1d --filters 4 --kernel 3", "conv1d needs --shape"),
    "no-kernel": ("conv1d --shape 8,9,3 --filters 4", "conv1d needs --kernel"),
    "two-shapes": ("conv1d --shape 8,9,3 --shape 8,9,3 --filters 4 --kernel 3", "one input"),
    "no-filters": ("conv1d --shape 8,9,3 --kernel 3", "`filters` must be given for conv1d"),
    "depthwise-filters": ("depthwise_conv1d --shape 8,9,3 --kernel 3 --filters 4", "`filters` must not be given"),
    "depthwise-groups": ("depthwise_conv1d --shape 8,9,3 --kernel 3 --groups 3", "`groups` must not be given"),
    "multiplier": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --depth-multiplier 2", "`depth_multiplier` must not"),
    "rank": ("conv2d --shape 8,9,3 --kernel 3 --filters 4", "`shape` must have 4 sizes"),
    "taps": ("conv1d --shape 8,9,3 --kernel 3,3 --filters 4", "kernel"),
    "groups": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --groups 2", "groups"),
    "too-short": ("conv1d --shape 8,9,3 --kernel 10 --filters 4", "Received"),
    "causal-2d": ("conv2d --shape 8,9,9,3 --kernel 3 --filters 4 --padding causal", "causal"),
    "pads": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --padding 1,1", "padding"),
    "strides": ("conv2d --shape 8,9,9,3 --kernel 3 --filters 4 --strides 1,2,3", "strides"),
    "activation": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --activation squash", "squash"),
    "complex-relu": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --activation relu --dtype c64", "complex"),
    "grad-relu": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --activation relu --pass input_grad", "`activation`"),
    "device": ("conv1d --shape 8,9,3 --kernel 3 --filters 4 --device V100", "H200"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(("arguments", "text"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_told_and_exit_code_2(arguments, text, as_json, capsys):
    assert cli.main([*explain(arguments), *["--json"] * as_json]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("cuconv explain: error: ") and text in shown.err and shown.err.count("\n") == 1
    assert text in json.loads(shown.out)["error"] if as_json else shown.out == ""


@pytest.mark.parametrize(
    ("given", "rank", "expected"),
    [("1", 1, ((1, 1),)), ("1", 2, ((1, 1), (1, 1))), ("1,2", 2, ((1, 1), (2, 2))), ("0:3,2", 2, ((0, 3), (2, 2)))],
)
def test_padding_in_numbers(given, rank, expected, capsys):
    shape = ",".join(["2", *["9"] * rank, "3"])
    arguments = ["explain", f"conv{rank}d", "--shape", shape, "--kernel", "2", "--filters", "4", "--padding", given]
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    sizes = tuple(9 + before + after - 1 for before, after in expected)
    assert tuple(tuple(pair) for pair in told["options"]["padding"]) == expected
    assert list(told["arrays"].values())[-1] == [2, *sizes, 4]


def test_the_plot_is_refused_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "explain", lambda *_: pytest.fail("computed"))
    assert cli.main(["explain", *GATE, "--plot", str(tmp_path / "no" / "roof.png")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    assert cli.main(["explain", *GATE, "--plot", str(tmp_path / "roof.png")]) == 1
    assert "cuconv[plot]" in capsys.readouterr().err
