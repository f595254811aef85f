"""The command line: what each command does, prints and returns, in one process and as a process of its own."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cuconv
from cuconv import cli, doctor, layers, models
from cuconv.cuda import runtime
from cuconv.files import common, npz

ROOT = Path(__file__).parents[1]


def process(*arguments, cwd, path=ROOT, **options):
    """A finished `python -m cuconv` in the folder `cwd`, with modules from `path`."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cuconv", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture
def model():
    inputs = models.Input((None, 3))
    return models.Model(inputs, layers.Conv1D(4, 3, padding="causal", activation="relu")(inputs), name="small")


@pytest.fixture
def samples():
    return np.random.default_rng(7).normal(size=(23, 10, 3)).astype(np.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch, model, samples):
    """A folder, now the current one, with model.npz and in.npy."""
    monkeypatch.chdir(tmp_path)
    model.save("model.npz")
    np.save("in.npy", samples)
    return tmp_path


def run(*more, model="model.npz", samples="in.npy", output="out.npy"):
    return cli.main(["run", model, samples, "-o", output, *more])


# --- The command itself ------------------------------------------------------------------------------------------


def test_help_names_every_command(tmp_path):
    done = process("--help", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert all(
        f"\n    {name} " in done.stdout for name in ("demo", "run", "explain", "bench", "profile", "doctor", "parity")
    )


def test_version(tmp_path):
    done = process("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"cuconv {cuconv.__version__}\n")


USAGE = {
    "nothing": ([], "required"),
    "unknown-command": (["fly"], "fly"),
    "unknown-option": (["demo", "--fast"], "--fast"),
    "seed-negative": (["demo", "--seed=-1"], "0 or more"),
    "seed-float": (["demo", "--seed", "1.5"], "0 or more"),
    "run-nothing": (["run"], "MODEL"),
    "run-no-output": (["run", "model.npz", "in.npy"], "-o"),
    "batch-zero": (["run", "model.npz", "in.npy", "-o", "out.npy", "--batch-size", "0"], "1 or more"),
    "batch-word": (["run", "model.npz", "in.npy", "-o", "out.npy", "--batch-size", "all"], "1 or more"),
    "device": (["run", "model.npz", "in.npy", "-o", "out.npy", "--device", "tpu"], "tpu"),
    "doctor-argument": (["doctor", "now"], "now"),
}


@pytest.mark.parametrize(("arguments", "text"), USAGE.values(), ids=USAGE)
def test_wrong_usage_is_exit_code_2(arguments, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert shown.out == "" and shown.err.startswith("usage: cuconv") and text in shown.err


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]], ids=["text", "json"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(tmp_path, arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "cuconv", *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


# --- run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 7, 23, 100])
def test_run_writes_what_predict_returns(folder, model, samples, capsys, batch_size):
    assert run("--batch-size", str(batch_size)) == 0
    written = np.load("out.npy", allow_pickle=False)
    np.testing.assert_array_equal(written, model.predict(samples, batch_size=batch_size, verbose=0))
    assert written.dtype == np.float32 and np.isfinite(written).all() and written.any()
    assert "(23, 10, 4) float32" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["in.npy", "model.npz", "out.npy"]


def test_run_as_json(folder, capsys):
    assert run("--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.pop("seconds") > 0 and "NumPy" in report.pop("device")
    assert report == {
        "model": "model.npz",
        "input": "in.npy",
        "output": "out.npy",
        "samples": 23,
        "shape": [23, 10, 4],
        "dtype": "float32",
    }


STORED = {
    "float64": lambda x: x.astype(np.float64),
    "big-endian": lambda x: x.astype(">f4"),
    "float16": lambda x: x.astype(np.float16),
    "int16": lambda x: (1000 * x).astype(np.int16),
    "bool": lambda x: x > 0,
    "fortran-order": np.asfortranarray,
    "no-samples": lambda x: x[:0],
    "longer-windows": lambda x: x.reshape(1, -1, 3),
}


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
def test_run_takes_numbers_of_every_kind(folder, model, samples, store):
    x = store(samples)
    np.save("in.npy", x)
    assert run() == 0
    expected = model.predict(np.ascontiguousarray(x), verbose=0)
    np.testing.assert_array_equal(np.load("out.npy", allow_pickle=False), expected)


def test_run_stores_bfloat16_as_float32(folder, samples):
    inputs = models.Input((None, 3), dtype="bfloat16")
    model = models.Model(inputs, layers.Conv1D(4, 3, dtype="bfloat16")(inputs))
    model.save("model.npz")
    assert run() == 0
    written = np.load("out.npy", allow_pickle=False)
    assert written.dtype == np.float32
    np.testing.assert_array_equal(written, model.predict(samples, verbose=0).astype(np.float32))


def test_run_reads_and_computes_piece_by_piece(folder, samples, monkeypatch):
    np.save("in.npy", np.tile(samples, (100, 1, 1)))
    pieces = []
    predict = models.Model.predict

    def spy(self, x, *args, **kwargs):
        pieces.append(x)
        return predict(self, x, *args, **kwargs)

    monkeypatch.setattr(models.Model, "predict", spy)
    assert run("--batch-size", "2") == 0
    assert all(type(piece) is np.memmap for piece in pieces)
    assert [len(piece) for piece in pieces] == [22] * 104 + [12]
    assert len(np.load("out.npy")) == 2300


def save_two_ends():
    inputs = [models.Input((8, 3)), models.Input((8, 3))]
    models.Model(inputs, [layers.Conv1D(2, 1)(each) for each in inputs]).save("model.npz")


def save_two_outputs():
    inputs = models.Input((8, 3))
    models.Model(inputs, [layers.Conv1D(2, 1)(inputs), layers.Conv1D(2, 1)(inputs)]).save("model.npz")


def save_bare_layer():
    npz.write(Path("model.npz"), {}, layers.serialize(layers.Cropping1D(1)))


def write(path, content):
    Path(path).write_bytes(content)


def cut(path, end):
    write(path, Path(path).read_bytes()[:end])


def zeros(*shape, dtype=np.float32):
    np.save("in.npy", np.zeros(shape, dtype))


# What is wrong: how the folder is spoiled, arguments that differ, and a piece of the message.
BROKEN = {
    "model-missing": (lambda: os.remove("model.npz"), {}, "model.npz: No such file"),
    "model-is-folder": (lambda: (os.remove("model.npz"), os.mkdir("model.npz")), {}, "model.npz: Is a directory"),
    "model-named-otherwise": (lambda: None, {"model": "in.npy"}, "must end in .npz"),
    "model-is-text": (lambda: write("model.npz", b"hello"), {}, "not an intact cuconv file"),
    "model-is-other-npz": (
        lambda: np.savez("model.npz", a=np.zeros(3)),
        {},
        "not an intact cuconv file",
    ),
    "model-truncated": (lambda: cut("model.npz", 500), {}, "not an intact cuconv file"),
    "model-is-pickle": (lambda: write("model.npz", pickle.dumps([1])), {}, "not an intact cuconv file"),
    "model-is-layer": (save_bare_layer, {}, "holds a Cropping1D layer and not a model"),
    "model-with-two-inputs": (save_two_ends, {}, "has 2 inputs"),
    "model-with-two-outputs": (save_two_outputs, {}, "has 2 outputs"),
    "input-missing": (lambda: os.remove("in.npy"), {}, "in.npy: No such file"),
    "input-is-folder": (lambda: (os.remove("in.npy"), os.mkdir("in.npy")), {}, "in.npy: Is a directory"),
    "input-is-empty-file": (lambda: write("in.npy", b""), {}, "in.npy is not an .npy file"),
    "input-is-pickle": (lambda: write("in.npy", pickle.dumps([1])), {}, "in.npy is not an .npy file of plain numbers"),
    "input-holds-objects": (lambda: np.save("in.npy", np.array([{}])), {}, "Python objects"),
    "input-truncated": (lambda: cut("in.npy", -4), {}, "in.npy is not an .npy file"),
    "input-is-npz": (lambda: os.replace("model.npz", "in.npy"), {"model": "in.npy"}, "must end in .npz"),
    "input-is-text-array": (lambda: np.save("in.npy", np.array(["a"])), {}, "and not numbers"),
    "input-is-complex": (lambda: zeros(2, 10, 3, dtype=np.complex64), {}, "complex64"),
    "input-other-channels": (
        lambda: zeros(2, 10, 4),
        {},
        "in.npy has the shape (2, 10, 4); 'small' takes (None, None, 3)",
    ),
    "input-other-rank": (lambda: zeros(10, 3), {}, "in.npy has the shape (10, 3)"),
    "input-scalar": (lambda: zeros(), {}, "in.npy has the shape ()"),
    "output-is-folder": (lambda: os.mkdir("out"), {"output": "out"}, "out is a folder"),
    "output-in-no-folder": (lambda: None, {"output": "no/out.npy"}, "the folder no does not exist"),
    "output-is-device": (lambda: os.mkfifo("pipe"), {"output": "pipe"}, "pipe is a device or the like"),
    "output-is-input": (lambda: None, {"output": "in.npy"}, "in.npy is read by this command"),
    "output-is-model": (lambda: None, {"output": "./model.npz"}, "model.npz is read by this command"),
    "output-is-link-to-input": (
        lambda: os.link("in.npy", "same.npy"),
        {"output": "same.npy"},
        "same.npy is read by this",
    ),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize(("spoil", "arguments", "text"), BROKEN.values(), ids=BROKEN)
def test_run_says_what_is_wrong_and_writes_nothing(folder, capsys, spoil, arguments, text, as_json):
    spoil()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(*["--json"] * as_json, **arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("cuconv run: error: ") and text in shown.err and shown.err.count("\n") == 1
    if as_json:
        assert text in json.loads(shown.out)["error"]
    else:
        assert shown.out == ""
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(runtime.probe().usable, reason="there is a GPU")
def test_run_on_a_gpu_that_is_not_there(folder, capsys):
    assert run("--device", "gpu") == 1
    assert "no usable GPU" in capsys.readouterr().err and not Path("out.npy").exists()


FAILURES = {
    "full-disk": (OSError(28, "No space left on device"), 1, "No space left"),
    "full-memory": (MemoryError(), 1, "out of memory"),
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
}


@pytest.mark.parametrize(("error", "code", "text"), FAILURES.values(), ids=FAILURES)
def test_a_failure_half_way_leaves_the_old_output_alone(folder, monkeypatch, samples, capsys, error, code, text):
    np.save("in.npy", np.tile(samples, (100, 1, 1)))
    Path("out.npy").write_bytes(b"precious")
    predict, calls = models.Model.predict, []

    def failing(self, x, *args, **kwargs):
        calls.append(len(x))
        if len(calls) > 2:
            raise error
        return predict(self, x, *args, **kwargs)

    monkeypatch.setattr(models.Model, "predict", failing)
    assert run("--batch-size", "1") == code
    assert len(calls) == 3 and Path("out.npy").read_bytes() == b"precious"
    assert sorted(os.listdir()) == ["in.npy", "model.npz", "out.npy"]
    assert text in capsys.readouterr().err


def test_run_writes_through_a_link(folder, model, samples):
    os.mkdir("elsewhere")
    os.symlink("elsewhere/out.npy", "link.npy")
    for _ in range(2):  # to a file that is not there yet, and to one that is
        assert run(output="link.npy") == 0
        assert os.readlink("link.npy") == "elsewhere/out.npy" and os.listdir("elsewhere") == ["out.npy"]
        np.testing.assert_array_equal(np.load("elsewhere/out.npy"), model.predict(samples, verbose=0))


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(common, "open", refuse, raising=False)
    assert run() == 1
    assert capsys.readouterr().err == "cuconv run: error: out.npy cannot be written: Permission denied\n"


def test_run_as_a_process_with_odd_names(folder, model, samples):
    os.mkdir("with space")
    os.rename("in.npy", "with space/[in].npy")
    done = process("run", "model.npz", "with space/[in].npy", "-o", "-out.npy", cwd=folder)
    assert done.returncode == 2  # a name like an option needs ./ in front
    done = process("run", "model.npz", "with space/[in].npy", "-o", "./-out.npy", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(np.load("-out.npy"), model.predict(samples, verbose=0))


# --- doctor ------------------------------------------------------------------------------------------------------


def test_doctor_as_json(tmp_path):
    done = process("doctor", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["healthy"] is True
    assert (found["cuconv"], found["numpy"]) == (cuconv.__version__, np.__version__)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["blas"] and found["blas"] != "unknown BLAS"
    assert found["arrays"]["library"] in ("NumPy", "CuPy") and found["arrays"]["reason"]
    assert Path(found["kernels"]["path"]) == ROOT / "kernels" and "common.cuh" in found["kernels"]["files"]


def test_doctor_in_words(capsys):
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for fact in (np.__version__, runtime.probe().reason, str(runtime.kernel_directory())):
        assert fact in shown


GPU = runtime.Device(0, "NVIDIA Test [7]", "9.0", 80 << 30)
PROBES = {
    "usable": (runtime.Probe(True, "GPU NVIDIA Test [7]", [GPU], "14.1.1", "13.0", "12.9"), "CuPy"),
    "no-kernels": (runtime.Probe(False, "no CUDA kernels", [GPU], "14.1.1", "13.0", "12.9"), "NumPy"),
    "no-driver": (runtime.Probe(False, "no usable NVIDIA driver", [], "14.1.1", None, "12.9"), "NumPy"),
    "no-cupy": (runtime.Probe(False, "CuPy is not installed"), "NumPy"),
}


@pytest.mark.parametrize(("probe", "library"), PROBES.values(), ids=PROBES)
def test_doctor_tells_what_the_probe_found(monkeypatch, capsys, probe, library):
    monkeypatch.setattr(runtime, "probe", lambda: probe)
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["arrays"] == {"library": library, "reason": probe.reason}
    assert (found["cupy"], found["driver"], found["nvrtc"]) == (
        probe.cupy_version,
        probe.driver_version,
        probe.nvrtc_version,
    )
    assert [gpu["name"] for gpu in found["gpus"]] == [device.name for device in probe.devices]
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert probe.reason in text and ("80 GiB, compute capability 9.0" in text) == bool(probe.devices)
    assert ("unknown without CuPy" in text) == (probe.cupy_version is None)


def test_doctor_fails_where_the_kernels_are_missing(monkeypatch, capsys):
    def missing():
        raise FileNotFoundError("cuconv's kernel sources are missing")

    monkeypatch.setattr(runtime, "kernel_directory", missing)
    assert cli.main(["doctor"]) == 1
    assert "kernel sources are missing" in capsys.readouterr().out
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["healthy"], found["kernels"]["path"], found["kernels"]["files"]) == (False, None, [])


@pytest.mark.parametrize("error", ["ImportError('libcuda.so.1')", "RuntimeError('CUDA is broken')"])
def test_doctor_survives_a_broken_cupy(tmp_path, error):
    (tmp_path / "cupy.py").write_text(f"raise {error}")
    done = process("doctor", "--json", cwd=tmp_path, path=f"{ROOT}{os.pathsep}{tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    arrays = json.loads(done.stdout)["arrays"]
    assert arrays["library"] == "NumPy" and error.split("'")[1] in arrays["reason"]


def test_device_of(monkeypatch):
    assert "NumPy" in doctor.device_of(np.zeros(3))
    monkeypatch.setattr(runtime, "probe", lambda: PROBES["usable"][0])
    on_gpu = SimpleNamespace(device=SimpleNamespace(id=0))
    assert doctor.device_of(on_gpu) == "GPU 0 (NVIDIA Test [7], CuPy 14.1.1)"
