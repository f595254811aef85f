"""`cuconv profile`: a row for every call of a layer, what is measured and what is predicted, what is told."""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cuconv import cli, layers, models, ops, profiling, timing
from cuconv.cuda import runtime
from cuconv.cuda.tape import UnknownValueError
from cuconv.plan.devices import DEVICES
from cuconv.timing import Timing

H200 = DEVICES["H200"]
NONE = runtime.Probe(False, "no GPU here")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, in an empty folder."""
    monkeypatch.setattr(runtime, "probe", lambda: NONE)
    monkeypatch.chdir(tmp_path)


def nested():
    """An inner model that is called twice, in it a layer that is called twice."""
    inner_input = models.Input((None, 4), name="inner_input")
    twice = layers.Conv1D(4, 3, padding="same", name="twice")
    inner = models.Model(inner_input, twice(twice(inner_input)), name="inner")
    x = models.Input((20, 4), name="x")
    y = layers.ZeroPadding1D(1, name="pad")(inner(x))
    return models.Model(x, layers.DepthwiseConv1D(3, name="depthwise")(inner(y)), name="nested")


def two_ends():
    a, b = models.Input((16, 4), name="a"), models.Input((None, 3), dtype="float16", name="b")
    long = layers.Conv1DTranspose(5, 4, strides=2, dtype="float16", name="long")
    return models.Model([a, b], [layers.Conv1D(6, 3, name="short")(a), long(b)], name="two_ends")


def profile(*arguments, code=0):
    assert cli.main(["profile", *arguments]) == code


def report(capsys, *arguments):
    profile(*arguments, "--json")
    shown = capsys.readouterr()
    assert shown.err == ""
    return json.loads(shown.out)


# --- Rows --------------------------------------------------------------------------------------------------------


def test_a_row_for_every_call_of_every_layer_in_the_order_of_computing():
    rows = profiling.predicted(nested(), [(8, 20, 4)], H200)
    assert [(row.name, row.kind, row.inputs, row.outputs) for row in rows] == [
        ("inner/twice", "Conv1D", ((8, 20, 4),), ((8, 20, 4),)),
        ("inner/twice (2)", "Conv1D", ((8, 20, 4),), ((8, 20, 4),)),
        ("pad", "ZeroPadding1D", ((8, 20, 4),), ((8, 22, 4),)),
        ("inner/twice (3)", "Conv1D", ((8, 22, 4),), ((8, 22, 4),)),
        ("inner/twice (4)", "Conv1D", ((8, 22, 4),), ((8, 22, 4),)),
        ("depthwise", "DepthwiseConv1D", ((8, 22, 4),), ((8, 20, 4),)),
    ]


def test_work_and_data_are_those_of_the_definition():
    """By hand: a product and a sum are two operations; every input, weight and output counts once."""
    conv, _, pad, *_, depthwise = (row.cost for row in profiling.predicted(nested(), [(8, 20, 4)], H200))
    assert conv.flops == 2 * 8 * 20 * 3 * 4 * 4
    assert conv.bytes == 4 * (8 * 20 * 4 + 3 * 4 * 4 + 4 + 8 * 20 * 4)
    assert (pad.flops, pad.bytes) == (0, 4 * (8 * 20 * 4 + 8 * 22 * 4))
    assert depthwise.flops == 2 * 8 * 20 * 3 * 4
    assert conv.side == "memory" and conv.roof_seconds == conv.bytes / H200.bandwidth


@pytest.mark.parametrize(
    ("dtype", "kind", "device", "peak"),
    [
        ("bfloat16", layers.Conv1D, "H200", "fp16_rate"),
        ("mixed_float16", layers.Conv1D, "T4", "fp16_rate"),
        ("bfloat16", layers.DepthwiseConv1D, "H200", "fp16_rate"),
        ("mixed_float16", layers.DepthwiseConv1D, "T4", "fp32_rate"),
        ("float32", layers.Conv1D, "L4", "fp32_rate"),
        ("float64", layers.Conv1D, "A100", "dmma_rate"),
        ("float64", layers.DepthwiseConv1D, "A100", "fp64_rate"),
    ],
)
def test_the_roof_is_that_of_the_unit_that_computes(dtype, kind, device, peak):
    filters = () if kind is layers.DepthwiseConv1D else (256,)
    model = models.Sequential([models.Input((512, 256)), kind(*filters, 9, dtype=dtype)])
    limits = DEVICES[device]
    (row,) = profiling.predicted(model, [(4, 512, 256)], limits)
    assert row.cost.peak == getattr(limits, peak)
    assert row.cost.roof_seconds == max(row.cost.flops / row.cost.peak, row.cost.bytes / limits.bandwidth)


def test_16_bit_layers_move_half_the_bytes():
    cost = {}
    for dtype in ("float32", "mixed_bfloat16"):
        conv = layers.Conv1D(8, 3, dtype=dtype)
        (row,) = profiling.predicted(models.Sequential([models.Input((32, 8)), conv]), [(2, 32, 8)], H200)
        cost[dtype] = row.cost
    assert cost["float32"].bytes == 2 * cost["mixed_bfloat16"].bytes
    assert cost["float32"].flops == cost["mixed_bfloat16"].flops


def test_a_prediction_is_the_explanation_of_the_same_call():
    model = models.Sequential([models.Input((500, 16)), layers.Conv1D(32, 5, activation="relu", padding="causal")])
    (row,) = profiling.predicted(model, [(4, 500, 16)], H200)
    told = ops.explain("conv", (4, 500, 16), (5, 16, 32), (32,), padding="causal", activation="relu", device="H200")
    ours = (row.cost.seconds, row.cost.flops, row.cost.bytes, row.cost.roof_seconds, row.cost.side, row.cost.kernel)
    assert ours == (told.seconds, told.flops, told.bytes, told.roof_seconds, told.side, told.algorithm)


def test_predicting_changes_nothing_and_computes_nothing(monkeypatch):
    model = two_ends()
    inputs = profiling.random_inputs(model, profiling.input_shapes(model, [(2, 16, 4), (2, 9, 3)]))
    before, weights = model(inputs), model.get_weights()
    with monkeypatch.context() as patched:
        patched.setattr(np, "matmul", lambda *_, **__: pytest.fail("computed"))
        profiling.predicted(model, [(1 << 20, 16, 4), (1 << 20, 4096, 3)], H200)  # 50 GB
    assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before, model(inputs), strict=True))


def test_walking_gives_what_the_model_gives():
    for model, shapes in ((nested(), [(3, 20, 4)]), (two_ends(), [(3, 16, 4), (3, 7, 3)])):
        inputs = profiling.random_inputs(model, shapes)
        visited = []

        def visit(name, layer, arrays):
            visited.append(name)  # noqa: B023
            outputs = layer._run(*arrays, training=False)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        expected = model(inputs if len(inputs) > 1 else inputs[0])
        found = profiling.walk(model, inputs, visit)
        assert all(map(np.array_equal, found, expected if isinstance(expected, list) else [expected]))
        assert len(visited) == len(set(visited))


# --- Shapes ------------------------------------------------------------------------------------------------------


def test_input_shapes():
    model = two_ends()
    assert profiling.input_shapes(nested()) == [(32, 20, 4)]
    assert profiling.input_shapes(nested(), None, 5) == [(5, 20, 4)]
    assert profiling.input_shapes(model, [(2, 16, 4), (2, 9, 3)]) == [(2, 16, 4), (2, 9, 3)]
    fixed = models.Input(batch_shape=(6, 9, 2))
    fixed = models.Model(fixed, layers.Conv1D(2, 3)(fixed))
    assert profiling.input_shapes(fixed) == [(6, 9, 2)]
    for given in ({"batch_size": 5}, {"shapes": [(5, 9, 2)]}):
        with pytest.raises(ValueError, match="takes batches of 6"):
            profiling.input_shapes(fixed, **given)
    with pytest.raises(ValueError, match=r"'b' of model 'two_ends' has \(None, None, 3\)"):
        profiling.input_shapes(model)
    with pytest.raises(ValueError, match="one for each of 2 inputs"):
        profiling.input_shapes(model, [(2, 16, 4)])
    for wrong in ((2, 16, 5), (2, 16), (2, 17, 4)):
        with pytest.raises(ValueError, match="has shape"):
            profiling.input_shapes(model, [wrong, (2, 9, 3)])


# --- Measuring ---------------------------------------------------------------------------------------------------


def test_on_the_cpu_every_layer_is_measured_and_a_gpu_predicted(capsys):
    nested().save("nested.npz")
    told = report(capsys, "nested.npz", "--batch-size", "4", "--samples", "10")
    assert told["timing"] == "measured" and "NumPy" in told["device"] and told["on_gpu"] is False
    assert told["roof"]["name"] == "H200" and told["call_seconds"] > 0
    for row in told["layers"]:
        assert row["seconds"] > 0 and row["p10"] <= row["seconds"] <= row["p90"] and row["predicted_seconds"] > 0
        assert row["share_of_roof"] is None, "the roof is that of a GPU"
    assert told["seconds"] == pytest.approx(sum(row["seconds"] for row in told["layers"]))
    assert sum(row["share"] for row in told["layers"]) == pytest.approx(1)


def test_a_named_gpu_is_predicted_for_and_nothing_is_run(capsys, monkeypatch):
    nested().save("nested.npz")
    monkeypatch.setattr(timing, "host_times", lambda *_, **__: pytest.fail("run"))
    told = report(capsys, "nested.npz", "--device", "rtx 4090")
    assert (told["timing"], told["device"], told["on_gpu"]) == ("predicted", "RTX 4090", True)
    assert told["call_seconds"] is None and told["batch"] == 32 and told["parameters"] == nested().count_params()
    for row in told["layers"]:
        assert row["seconds"] == row["predicted_seconds"] and row["p10"] is None
        assert row["share_of_roof"] == pytest.approx(row["roof_seconds"] / row["seconds"])
        assert row["steps"] and all(step["seconds"] > 0 for step in row["steps"])
    other = report(capsys, "nested.npz", "--device", "T4")
    assert other["seconds"] != told["seconds"]


def test_each_layer_is_timed_on_its_own_input(monkeypatch):
    """The call of a row is that of its layer, on the arrays that reach it."""
    model, taken = nested(), {}

    def host_times(calls, samples, finish, seconds):
        taken.update(calls)
        return {name: Timing(1.0, 1.0, 1.0, samples) for name in calls}

    monkeypatch.setattr(timing, "host_times", host_times)
    rows = profiling.predicted(model, [(2, 20, 4)], H200)
    rows, whole = profiling.measured(model, [(2, 20, 4)], rows, None)
    assert whole.median == 1 and all(row.timing.median == 1 for row in rows) and set(taken) == {-1, *range(6)}
    outputs = {name: call() for name, call in taken.items()}
    for i, row in enumerate(rows):
        assert outputs[i].shape == row.outputs[0]
    np.testing.assert_array_equal(outputs[5], outputs[-1])


def test_on_a_gpu_layers_have_device_times(monkeypatch, capsys):
    nested().save("nested.npz")
    device = runtime.Device(0, "NVIDIA Test", "9.0", 80 << 30, DEVICES["H100"], runtime.Target("sm_90"))
    events = []

    @contextlib.contextmanager
    def time_range(name):
        events.append(name)
        yield

    def device_times(calls, samples, seconds):
        for call in calls.values():
            call.calls[0]()
        return {i: Timing((1 + i) * 1e-6, 1e-6, 9e-6, samples) for i in calls}

    cuda = SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=lambda: events.append("synchronize")))
    monkeypatch.setattr(runtime, "probe", lambda: runtime.Probe(True, "GPU NVIDIA Test", [device], "14", "13", "13"))
    monkeypatch.setattr(runtime, "library", lambda: SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(runtime, "device_array", lambda array, device=None: np.array(array))
    monkeypatch.setattr(runtime, "on", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(runtime, "time_range", time_range)
    monkeypatch.setattr(timing, "device_times", device_times)
    told = report(capsys, "nested.npz", "--samples", "10")
    assert events == ["synchronize"] * 11 + ["cuconv.profile[nested]"]
    assert (told["timing"], told["device"], told["on_gpu"]) == ("measured", "GPU 0 (NVIDIA Test)", True)
    assert [row["seconds"] for row in told["layers"]] == [(1 + i) * 1e-6 for i in range(6)]
    assert told["roof"]["name"] == "H100", "the GPU at hand"
    for row in told["layers"]:
        assert row["share_of_roof"] == pytest.approx(row["roof_seconds"] / row["seconds"])
    assert report(capsys, "nested.npz", "--device", "L4")["timing"] == "predicted"
    profile("nested.npz", "--samples", "10")
    shown = capsys.readouterr().out
    assert "times are measured, GPU 0 (NVIDIA Test)" in shown and "predicted for H100, not measured" in shown


def test_a_view_takes_no_time():
    """Where nothing is launched there is nothing to time."""
    x = models.Input((9, 3))
    model = models.Model(x, layers.Activation("linear", name="linear")(x))
    (row,) = profiling.predicted(model, [(2, 9, 3)], H200)
    assert (row.cost.steps, row.cost.bytes, row.cost.seconds, row.cost.kernel) == ((), 0, 0, "")
    told = profiling.profile(model, [(2, 9, 3)], H200, "cpu", 10)
    assert told["layers"][0]["seconds"] == 0 and told["call_seconds"] > 0
    json.dumps(told, allow_nan=False)


# --- Words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "H200"])
@pytest.mark.parametrize("columns", ["80", "200"])
def test_words_label_every_time(columns, device, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    nested().save("nested.npz")
    profile("nested.npz", "--batch-size", "4", "--samples", "10", "--device", device)
    shown = capsys.readouterr().out
    word = "measured" if device == "cpu" else "predicted"
    assert f"times are {word}" in shown and f"samples a second, {word}" in shown
    assert ("predicted for H200, not measured" in shown) == (device == "cpu")
    for name in ("inner/twice", "(4)", "depthwise", "pad", "conv_simt", "%"):
        assert name in shown, name
    assert all(len(line.rstrip()) <= int(columns) for line in shown.splitlines() if "NumPy" not in line)
    assert ("MFLOP" in shown or "kFLOP" in shown) == (columns == "200")


def test_markup_in_names_stays_text(capsys):
    inputs = models.Input((9, 2), name="x")
    models.Model(inputs, layers.Conv1D(2, 3, name="[red]a")(inputs), name="[bold]m").save("m.npz")
    profile("m.npz", "--device", "H200", "--html", "[i].html")
    shown = capsys.readouterr().out
    assert "[red]a" in shown and "[bold]m" in shown and "[i].html" in shown


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.1, 0.33, 0.5, 0.999, 1])
def test_bars_are_as_long_as_the_share(share):
    bar = cli.profile._bar(share)
    length = sum((1.0 if each == "█" else " ▏▎▍▌▋▊▉".index(each) / 8) for each in bar.strip())
    assert len(bar) == 8 and length / 8 == pytest.approx(share, abs=1 / 128)


def test_a_picture(capsys):
    pytest.importorskip("matplotlib")
    nested().save("nested.npz")
    profile("nested.npz", "--device", "H200", "--plot", "layers.svg")
    assert b"inner/twice" in Path("layers.svg").read_bytes() or Path("layers.svg").stat().st_size > 1000
    profile("nested.npz", "--device", "cpu", "--samples", "10", "--plot", "layers.png")
    assert Path("layers.png").read_bytes().startswith(b"\x89PNG")


# --- Wrong usage -------------------------------------------------------------------------------------------------

UNFIT = {
    "no-such-file": ("missing.npz", "No such file", 1),
    "not-a-model": ("text.npz", "not an intact cuconv file", 1),
    "unknown-device": ("two.npz --device V100", "`--device` must be gpu, cpu or one of T4", 2),
    "no-gpu": ("two.npz --device gpu", "no GPU here", 2),
    "unknown-size": ("two.npz", "`shapes` must give every size", 2),
    "one-shape-of-two": ("two.npz --shape 2,16,4", "one for each of 2 inputs", 2),
    "both": ("two.npz --shape 2,16,4 --batch-size 3", "must not be given", 2),
    "no-folder": ("two.npz --html no/page.html", "the folder no does not exist", 1),
    "html-onto-the-model": ("two.npz --html two.npz", "is read by this command", 1),
    "html-onto-a-folder": ("two.npz --html .", "is a folder; --html names the file", 1),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(("arguments", "text", "code"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_told_and_nothing_is_written(arguments, text, code, as_json, capsys):
    two_ends().save("two.npz")
    Path("text.npz").write_text("hello")
    before = {path: Path(path).read_bytes() for path in os.listdir()}
    profile(*arguments.split(), *["--json"] * as_json, code=code)
    shown = capsys.readouterr()
    assert shown.err.startswith("cuconv profile: error: ") and text in shown.err and shown.err.count("\n") == 1
    assert text in json.loads(shown.out)["error"] if as_json else shown.out == ""
    assert {path: Path(path).read_bytes() for path in os.listdir()} == before


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "out of memory"),
        (UnknownValueError("no numbers"), "cannot be profiled: no numbers"),
    ],
)
def test_a_model_that_cannot_be_profiled(error, text, monkeypatch, capsys):
    def fails(*_, **__):
        raise error

    two_ends().save("two.npz")
    monkeypatch.setattr(profiling, "predicted", fails)
    profile("two.npz", "--shape", "2,16,4", "--shape", "2,9,3", code=1)
    assert text in capsys.readouterr().err
