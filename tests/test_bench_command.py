"""`cuconv bench`: the result is checked before it is timed, what is measured and what is predicted, two reports."""

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cuconv import bench, cli, layers, models, ops, profiling, timing
from cuconv.cuda import runtime
from cuconv.plan.devices import DEVICES
from cuconv.timing import Timing

ROOT = Path(__file__).parents[1]
LAYER = "conv1d --shape 2,64,8 --filters 8 --kernel 3 --padding same --samples 12".split()
NONE = runtime.Probe(False, "no GPU here")


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A machine without a GPU, in an empty folder."""
    monkeypatch.setattr(runtime, "probe", lambda: NONE)
    monkeypatch.chdir(tmp_path)


def net(dtype="float32"):
    """Two inputs, an inner model that is called twice."""
    inner = models.Sequential(
        [models.Input((None, 4), dtype=dtype), layers.SeparableConv1D(4, 3, padding="same", dtype=dtype, name="sep")],
        name="inner",
    )
    a, b = (models.Input((None, 4), dtype=dtype, name=name) for name in "ab")
    y = layers.Conv1D(4, 3, dtype=dtype, activation="gelu", name="first")(inner(a))
    return models.Model([a, b], [inner(y), layers.Activation("softmax", dtype=dtype, name="soft")(b)], name="net")


def run(*arguments, code=0):
    assert cli.main(["bench", *arguments]) == code


def report(capsys, *arguments, code=0):
    run(*arguments, "--json", code=code)
    return json.loads(capsys.readouterr().out)


# --- On the CPU --------------------------------------------------------------------------------------------------


def test_a_layer_without_a_gpu_is_timed_on_the_numpy_path_and_predicted(capsys):
    told = report(capsys, *LAYER)
    assert told["name"] == "conv1d" and "NumPy" in told["measured_on"] and set(told["timings"]) == {"call"}
    times = told["timings"]["call"]
    assert 0 < times["p10"] <= times["median"] <= times["p90"] and times["count"] == 12
    assert told["flops"] == 2 * 2 * 64 * 3 * 8 * 8
    assert told["flops_per_second"] == pytest.approx(told["flops"] / times["median"])
    assert 0 < told["check"]["error"] < 1 and "double precision" in told["check"]["against"]
    assert told["share_of_roof"] is None, "a CPU has no roof here"
    assert told["predicted"]["device"] == "H200" and told["predicted"]["seconds"] > 0
    assert told["work"]["shapes"] == [[2, 64, 8], [3, 8, 8], [8]] and told["work"]["options"] == {"padding": "same"}


def test_words_say_what_is_measured_and_what_is_predicted(capsys):
    run(*LAYER, "--predict", "l4")
    shown = capsys.readouterr()
    assert shown.err == "", "no progress bar where stderr is no terminal"
    for words in ("NumPy path", "no GPU here", "of what is allowed", "measured (", "12 samples", "on L4, not measured"):
        assert words in shown.out, words
    assert "[" not in shown.out.replace("[]", ""), "no markup is left"


def test_double_precision_on_the_cpu_has_nothing_to_be_compared_with(capsys):
    told = report(capsys, *LAYER, "--dtype", "f64")
    assert told["check"] == {"error": None, "against": None}
    run(*LAYER, "--dtype", "f64")
    assert "checked    not" in capsys.readouterr().out


def test_a_model_file(capsys):
    net().save("net.npz")
    told = report(capsys, "net.npz", "--shape", "3,16,4", "--shape", "3,5,4", "--samples", "10")
    assert told["work"]["shapes"] == [[3, 16, 4], [3, 5, 4]] and told["timings"]["call"]["count"] == 10
    rows = profiling.predicted(net(), [(3, 16, 4), (3, 5, 4)], DEVICES["H200"])
    assert told["flops"] == sum(row.cost.flops for row in rows) > 0
    assert told["predicted"]["seconds"] == pytest.approx(sum(row.cost.seconds for row in rows))


def test_the_call_that_is_timed_is_the_one_that_was_asked_for(monkeypatch):
    """On the arrays of the case, with its options."""
    case = bench.layer_case("conv1d", (2, 9, 4), (3,), filters=6, dilation_rate=2, activation="relu", dtype="float16")
    called, real = [], ops.conv

    def spy(*arrays, **options):
        called.append(([(array.shape, array.dtype.name) for array in arrays], options))
        return real(*arrays, **options)

    monkeypatch.setattr(ops, "conv", spy)
    y = bench.layer_work("conv1d", case).call(np.asarray)()
    assert called == [
        (
            [((2, 9, 4), "float16"), ((3, 4, 6), "float16"), ((6,), "float16")],
            {"dilation_rate": 2, "activation": "relu"},
        )
    ]
    assert y.shape == (2, 5, 6) and np.isfinite(y).all() and y.any()


def test_a_picture(capsys):
    pytest.importorskip("matplotlib")
    run(*LAYER, "--plot", "roof.png")
    assert Path("roof.png").read_bytes().startswith(b"\x89PNG")


def test_a_progress_bar_goes_to_a_terminal_only(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cuconv", "bench", *LAYER]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "timing the NumPy path" in done.stderr
    assert "timing the NumPy path" not in done.stdout and "measured" in done.stdout
    done = subprocess.run([*command, "--json"], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"") and json.loads(done.stdout)


# --- A wrong result is not timed ---------------------------------------------------------------------------------


def only_narrow(change):
    """`real`, with `change` in what is not double precision."""

    def wrong(real):
        def operation(x, *arrays, **options):
            y = real(x, *arrays, **options)
            return y if x.dtype == np.float64 else change(y)

        return operation

    return wrong


WRONG = {
    "shifted": only_narrow(lambda y: np.roll(y, 1, axis=1)),
    "one-element": only_narrow(
        lambda y: np.where(np.arange(y.size).reshape(y.shape) == 5, y + 0.01, y).astype(y.dtype)
    ),
    "nan": only_narrow(lambda y: y * np.float32(np.nan)),
    "cut": only_narrow(lambda y: y[:, 1:]),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_layer_is_not_timed(wrong, as_json, monkeypatch, capsys):
    monkeypatch.setattr(timing, "host_times", lambda *_, **__: pytest.fail("timed"))
    real = ops.conv
    monkeypatch.setattr(ops, "conv", wrong(real))
    run(*LAYER, "--save", "base.json", *["--json"] * as_json, code=1)
    shown = capsys.readouterr()
    assert "not timed" in shown.err and not os.listdir()
    assert "not timed" in json.loads(shown.out)["error"] if as_json else shown.out == ""


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "complex64"])
@pytest.mark.parametrize("name", ["inner/sep", "first", "inner/sep (2)"])
def test_a_model_with_one_wrong_layer_is_not_timed(name, dtype, monkeypatch):
    """Every layer is compared, in every call, and the outcome names it."""
    model = net(dtype) if dtype != "complex64" else complex_net()
    inputs = profiling.random_inputs(model, [(2, 12, 4), (2, 6, 4)])
    assert bench.check_model(model, inputs, np.asarray).passed
    calls, real = [], layers.Layer._run

    def run_layer(self, *arrays, training):
        y = real(self, *arrays, training=training)
        if isinstance(self, models.Model) or self.compute_dtype != dtype:
            return y
        calls.append(self.name)
        path = {"sep": "inner/sep", "first": "first"}.get(self.name)
        again = f"{path} ({calls.count(self.name)})" if calls.count(self.name) > 1 else path
        return np.roll(y, 1, axis=1) if again == name else y

    monkeypatch.setattr(layers.Layer, "_run", run_layer)
    outcome = bench.check_model(model, inputs, np.asarray)
    assert not outcome.passed and f"layer {name}: " in outcome.problem


def complex_net():
    inner = models.Sequential(
        [models.Input((None, 4), dtype="complex64"), layers.SeparableConv1D(4, 3, dtype="complex64", name="sep")],
        name="inner",
    )
    a, b = (models.Input((None, 4), dtype="complex64", name=name) for name in "ab")
    y = layers.Conv1D(4, 3, dtype="complex64", name="first")(inner(a))
    return models.Model([a, b], [inner(y), layers.Cropping1D(1, dtype="complex64")(b)])


CORRECT = {
    "lstm": [models.Input((4, 9, 9, 2)), layers.ConvLSTM2D(3, 3, return_sequences=True), layers.ConvLSTM2D(2, 3)],
    "lstm-16": [models.Input((4, 9, 9, 2)), layers.ConvLSTM2D(3, 3, dtype="mixed_bfloat16")],
    "mixed": [models.Input((30, 4)), layers.Conv1D(8, 3, dtype="mixed_float16", activation="silu")],
    "lanczos": [models.Input((9, 9, 4)), layers.UpSampling2D(3, interpolation="lanczos5", dtype="bfloat16")],
    "double": [models.Input((30, 4), dtype="float64"), layers.Conv1D(8, 3, dtype="float64")],
    "transposed": [models.Input((7, 7, 4)), layers.Conv2DTranspose(8, 3, strides=2, activation="relu")],
}  # fmt: skip


@pytest.mark.parametrize("parts", CORRECT.values(), ids=CORRECT)
def test_correct_models_of_all_kinds_pass(parts):
    model = models.Sequential(parts)
    before = model.get_weights()
    outcome = bench.check_model(
        model, profiling.random_inputs(model, profiling.input_shapes(model, None, 2)), np.asarray
    )
    assert outcome.passed, outcome.problem
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_a_sum_that_is_rounded_across_a_jump_is_no_mistake(dtype, monkeypatch):
    """The activation is still applied, and what reaches the next layer is its result."""
    jump = layers.SeparableConv1D(8, 5, activation="hard_shrink", dtype=dtype, name="jump")
    model = models.Sequential([models.Input((64, 16)), jump, layers.Cropping1D(1, name="next")])
    seen = []
    monkeypatch.setattr(layers.Cropping1D, "_infer", lambda self, x, training: seen.append(x) or x[:, 1:-1])
    for seed in range(20):
        inputs = [np.random.default_rng(seed).normal(size=(8, 64, 16)).astype(np.float32)]
        outcome = bench.check_model(model, inputs, np.asarray)
        assert outcome.passed, outcome.problem
        sizes = np.abs(seen[-2].astype(float))  # the last is that of the copy in double precision
        assert ((sizes == 0) | (sizes >= 0.5)).all() and (sizes > 0).any() and (sizes == 0).any()
    assert jump.activation.name == "hard_shrink"
    case = bench.layer_case("conv1d", (2, 9, 4), (3,), filters=6, activation="hard_shrink")
    work = bench.layer_work("conv1d", case)
    assert work.facts["options"] == {"activation": "hard_shrink"} and work.check(np.asarray).case.options == {}


def test_whatever_an_engine_raises_is_the_outcome(monkeypatch):
    def fails(self, *_, **__):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(layers.Conv1D, "_infer", fails)
    model = models.Sequential([models.Input((9, 4)), layers.Conv1D(3, 3)])
    outcome = bench.check_model(model, [np.zeros((2, 9, 4), np.float32)], np.asarray)
    assert not outcome.passed and outcome.problem == "RuntimeError: the GPU is gone"


# --- On a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """What the measuring asks of a GPU, in the order in which it does; the arrays stay NumPy's."""
    events = []
    device = runtime.Device(0, "NVIDIA Test", "9.0", 80 << 30, DEVICES["H100"], runtime.Target("sm_90"))

    @contextlib.contextmanager
    def time_range(name):
        events.append(f"begin {name}")
        yield
        events.append(f"end {name}")

    def device_times(calls, samples, seconds):
        for call in calls.values():
            call.calls[0]()
        events.append(f"device time of {len(calls)}, {samples} samples")
        return {name: Timing(2e-6, 1e-6, 3e-6, samples) for name in calls}

    def synchronize():
        if events[-1] != "synchronize":
            events.append("synchronize")

    library = SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(deviceSynchronize=synchronize)))
    monkeypatch.setattr(
        runtime, "probe", lambda: runtime.Probe(True, "GPU NVIDIA Test", [device], "14", "13.0", "13.0")
    )
    monkeypatch.setattr(runtime, "current", lambda: SimpleNamespace(limits=device.limits))
    monkeypatch.setattr(runtime, "library", lambda: library)
    monkeypatch.setattr(runtime, "device_array", lambda array, device=None: np.array(array))
    monkeypatch.setattr(runtime, "on", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(runtime, "time_range", time_range)
    monkeypatch.setattr(timing, "device_times", device_times)
    return events


def test_on_a_gpu_the_device_and_the_call_are_timed_in_named_ranges(gpu, capsys):
    told = report(capsys, *LAYER)
    name = f"cuconv.conv[{told['predicted']['algorithm']}]"
    assert gpu == [
        f"begin {name}", "synchronize", f"end {name}", f"begin {name}", "device time of 1, 12 samples", f"end {name}",
    ]  # fmt: skip
    assert told["measured_on"] == "GPU 0 (NVIDIA Test)" and told["machine"] == {"gpu": "NVIDIA Test"}
    assert set(told["timings"]) == {"call", "device"} and told["timings"]["device"]["median"] == 2e-6
    assert told["flops_per_second"] == pytest.approx(told["flops"] / 2e-6), "the device's time, not the call's"
    assert told["predicted"]["device"] == "H100", "the GPU at hand"
    assert told["share_of_roof"] == pytest.approx(told["predicted"]["roof_seconds"] / 2e-6)


def test_another_gpu_can_be_predicted_for_while_this_one_is_timed(gpu, capsys):
    here, told = report(capsys, *LAYER), report(capsys, *LAYER, "--predict", "T4")
    assert told["predicted"]["device"] == "T4" and told["share_of_roof"] == here["share_of_roof"]
    run(*LAYER)
    shown = capsys.readouterr().out
    assert "GPU 0 (NVIDIA Test)" in shown and "2 us measured" in shown and "NumPy path" not in shown


def test_the_cpu_can_be_asked_for_where_there_is_a_gpu(gpu, capsys):
    told = report(capsys, *LAYER, "--device", "cpu")
    assert "NumPy" in told["measured_on"] and set(told["timings"]) == {"call"} and not gpu


def test_a_gpu_that_is_not_there_is_exit_code_2(capsys):
    run(*LAYER, "--device", "gpu", code=2)
    assert "no GPU here. `--device cpu`" in capsys.readouterr().err


# --- Two reports -------------------------------------------------------------------------------------------------


def times(p10, median, p90):
    return {"timings": {"call": dataclasses.asdict(Timing(median, p10, p90, 50))}}


# Before and now, as (p10, median, p90), and the verdict: a median 3 % away, and ranges that do not meet.
COMPARED = {
    "equal": ((9, 10, 11), (9, 10, 11), "same"),
    "slower": ((9, 10, 11), (12, 13, 14), "slower"),
    "faster": ((12, 13, 14), (9, 10, 11), "faster"),
    "slower-in-the-noise": ((9, 10, 13), (12, 13, 14), "same"),
    "faster-in-the-noise": ((12, 13, 14), (9, 10, 13), "same"),
    "slower-by-little": ((9.99, 10, 10.01), (10.2, 10.29, 10.3), "same"),
    "slower-by-enough": ((9.99, 10, 10.01), (10.2, 10.31, 10.4), "slower"),
    "faster-by-little": ((9.99, 10, 10.01), (9.7, 9.71, 9.72), "same"),
    "faster-by-enough": ((9.99, 10, 10.01), (9.6, 9.69, 9.7), "faster"),
    "ranges-that-touch": ((9, 10, 11), (11, 12, 13), "same"),
}


@pytest.mark.parametrize(("before", "now", "verdict"), COMPARED.values(), ids=COMPARED)
def test_a_change_is_told_beyond_noise(before, now, verdict):
    (change,) = bench.compare(times(*before), times(*now))
    assert change == ("call", before[1], now[1], verdict)


@pytest.fixture
def base(capsys):
    """A saved report; the function changes it."""
    run(*LAYER, "--save", "base.json")
    capsys.readouterr()

    def change(*path, to):
        saved = json.loads(Path("base.json").read_text())
        place = saved
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        Path("base.json").write_text(json.dumps(saved))

    return change


@pytest.mark.parametrize(("factor", "verdict", "code"), [(1e-3, "slower", 1), (1e3, "faster", 0)])
def test_the_exit_code_tells_of_a_regression(base, capsys, factor, verdict, code):
    saved = json.loads(Path("base.json").read_text())["timings"]["call"]
    base("timings", "call", to={**saved, **{key: factor * saved[key] for key in ("p10", "median", "p90")}})
    told = report(capsys, *LAYER, "--compare", "base.json", code=code)
    assert [change["verdict"] for change in told["changes"]] == [verdict]
    run(*LAYER, "--compare", "base.json", code=code)
    shown = capsys.readouterr().out
    assert f": {verdict}" in shown and "in base.json" in shown


def test_a_report_of_json_is_a_base_too(capsys):
    Path("base.json").write_text(json.dumps(report(capsys, *LAYER)))
    assert cli.main(["bench", *LAYER, "--compare", "base.json", "--save", "base.json"]) in (0, 1)
    assert "compared" in capsys.readouterr().out and json.loads(Path("base.json").read_text())["format"]


REFUSED = {
    "another-shape": (("work", "shapes"), [[2, 64, 9]], "another work: shapes"),
    "another-dtype": (("work", "dtype"), "float16", "another work: dtype 'float16' instead of 'float32'"),
    "another-option": (("work", "options"), {}, "another work: options"),
    "another-cpu": (("machine", "cpu"), "Abacus", "another machine: cpu 'Abacus'"),
    "a-gpu": (("machine",), {"gpu": "NVIDIA Test"}, "another machine: gpu 'NVIDIA Test'"),
    "another-format": (("format",), "cuconv bench 0", "not written by `cuconv bench --save`"),
    "no-times": (("timings",), {}, "not written by"),
    "broken-times": (("timings", "call"), {"median": 1}, "not written by"),
    "no-work": (("work",), None, "not written by"),
}


@pytest.mark.parametrize(("path", "value", "text"), REFUSED.values(), ids=REFUSED)
def test_a_base_of_something_else_is_refused_before_anything_is_timed(base, capsys, monkeypatch, path, value, text):
    base(*path, to=value)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("timed"))
    run(*LAYER, "--compare", "base.json", code=2)
    shown = capsys.readouterr()
    assert shown.out == "" and "base.json cannot be compared with: it " in shown.err and text in shown.err


UNREADABLE = {
    "missing": (None, "No such file"),
    "text": (b"hello", "not JSON"),
    "binary": (b"\xff\xfe\x00", "not JSON"),
}
UNREADABLE |= {
    "list": (b"[]", "not written by"),
    "number": (b"3", "not written by"),
    "null": (b"null", "not written by"),
}


@pytest.mark.parametrize(("content", "text"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_base(content, text, capsys):
    if content is not None:
        Path("base.json").write_bytes(content)
    run(*LAYER, "--compare", "base.json", code=1 if content is None else 2)
    assert text in capsys.readouterr().err


def test_another_model_of_the_same_shape_is_another_work(capsys):
    for name, activation in (("a", "relu"), ("b", "gelu")):
        inputs = models.Input((9, 4), name="x")
        conv = layers.Conv1D(3, 3, activation=activation, name="conv")
        models.Model(inputs, conv(inputs), name="net").save(f"{name}.npz")
    run("a.npz", "--samples", "10", "--save", "base.json")
    run("b.npz", "--samples", "10", "--compare", "base.json", code=2)
    assert "another work" in capsys.readouterr().err
    assert cli.main(["bench", "a.npz", "--samples", "10", "--compare", "base.json"]) in (0, 1)


def test_what_json_gives_back_is_equal(capsys):
    """Tuples become lists: the facts of a work are compared with those of a file."""
    case = bench.layer_case("conv2d", (1, 8, 8, 2), (3,), filters=2, padding=((0, 1), (1, 0)), strides=(1, 2))
    facts = bench.layer_work("conv2d", case).facts
    assert json.loads(json.dumps(facts)) == facts and copy.deepcopy(facts) == facts


# --- Wrong usage -------------------------------------------------------------------------------------------------

UNFIT = {
    "nothing": ("conv1d", "conv1d needs --shape", 2),
    "no-file-and-no-layer": ("conv9d --shape 1,2,3", "a layer (conv1d", 2),
    "no-such-file": ("missing.npz", "No such file", 1),
    "not-a-model": ("text.npz", "not an intact cuconv file", 1),
    "layer-options-for-a-model": ("net.npz --kernel 3 --groups 2", "--kernel, --groups must not be given", 2),
    "batch-for-a-layer": ("conv1d --shape 2,9,3 --kernel 3 --filters 2 --batch-size 3", "`--batch-size` is for", 2),
    "batch-and-shape": ("net.npz --batch-size 3 --shape 2,9,3", "must not be given", 2),
    "unknown-size": ("net.npz", "`shapes` must give every size", 2),
    "one-shape-of-two": ("net.npz --shape 2,9,4", "one for each of 2 inputs", 2),
    "shape-that-does-not-fit": ("net.npz --shape 2,9,4 --shape 2,9,5", "has shape (None, None, 4)", 2),
    "unknown-gpu": ("net.npz --predict V100", "`--predict` must be one of T4", 2),
    "save-into-nothing": ("net.npz --save no/base.json", "the folder no does not exist", 1),
    "save-onto-a-folder": ("net.npz --save .", "is a folder; --save names the file", 1),
    "activation": ("conv1d --shape 2,9,3 --kernel 3 --filters 2 --activation squash", "squash", 2),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(("arguments", "text", "code"), UNFIT.values(), ids=UNFIT)
def test_what_does_not_fit_is_told(arguments, text, code, as_json, capsys):
    net().save("net.npz")
    Path("text.npz").write_text("hello")
    run(*arguments.split(), *["--json"] * as_json, code=code)
    shown = capsys.readouterr()
    assert shown.err.startswith("cuconv bench: error: ") and text in shown.err and shown.err.count("\n") == 1
    assert text in json.loads(shown.out)["error"] if as_json else shown.out == ""


def test_out_of_memory_is_an_error_in_a_line(monkeypatch, capsys):
    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(timing, "host_times", full)
    run(*LAYER, code=1)
    assert capsys.readouterr().err == "cuconv bench: error: conv1d: out of memory\n"
