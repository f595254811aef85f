"""benchmarks/gpu.sh: a dry run does every step, and with programs that only note what they are asked to do, a step that
fails, hangs or has no time left costs the others nothing. And benchmarks/warm.py, its step "kernels"."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fake_cupy
import pytest

from benchmarks import suite, warm
from cuconv.cuda import cubins
from cuconv.plan.devices import DEVICES

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
SUITE = ["a", "b", "c", "d", "e", "f", "g", "sweep"]
SANITIZERS = ["memcheck", "racecheck", "initcheck", "synccheck"]
STEPS = ["nvidia-smi", "doctor", "probe", "kernels", "parity", "tests", "vectors", *SANITIZERS]
STEPS += [*(f"suite-{group}" for group in SUITE), "report"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a bash script for Linux")

TOOLS = "bash cat dirname env grep head mkdir mktemp nproc sed sleep tail tee timeout tr wc".split()

# Stands for Python: notes its arguments, writes the CSV it is asked for, fails or hangs where it is told to.
PYTHON = """#!/usr/bin/env bash
echo "$*" | tr '\\n' ' ' >>"$CALLS"; echo >>"$CALLS"
[[ ! ${FAILING-} || "$*" != *"$FAILING"* ]] || { echo broken; exit 3; }
[[ ! ${HANGING-} || "$*" != *"$HANGING"* ]] || sleep 60
[[ "$*" != *pytest* ]] || echo "7 ${TESTS:-passed}"
while (($#)); do
  if [[ $1 == --csv ]]; then echo line >>"$2"; fi
  shift
done
echo done
"""
SMI = """#!/usr/bin/env bash
echo "nvidia-smi $*" >>"$CALLS"
echo "NVIDIA H200 NVL"
"""
SANITIZER = """#!/usr/bin/env bash
echo "compute-sanitizer $*" | tr '\\n' ' ' >>"$CALLS"; echo >>"$CALLS"
while [[ $1 != */python ]]; do shift; done
"$@"
"""


class Machine:
    """A folder of programs, and what they were asked to do."""

    def __init__(self, folder, programs):
        self.bin, self.calls, self.out = folder / "bin", folder / "calls", folder / "out"
        self.bin.mkdir()
        self.calls.touch()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name))
        for name, text in programs.items():
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)

    def run(self, *arguments, **variables):
        environment = {
            "PATH": str(self.bin),
            "PYTHON": str(self.bin / "python"),
            "OUT": str(self.out),
            "CALLS": str(self.calls),
            **variables,
        }
        command = [str(SCRIPT), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        return done, steps(done.stdout)

    @property
    def called(self):
        return self.calls.read_text().splitlines()

    @property
    def asked(self):
        """Modules that Python was to run."""
        return [call for call in self.called if call.startswith("-m ")]


def steps(printed):
    """What the table at the end says of each step."""
    lines = printed.splitlines()
    found = {}
    for line in lines[max(i for i, line in enumerate(lines) if line.startswith("step ")) + 1 :]:
        match = re.fullmatch(r"(\S+|in all, of \d+ s)\s+\d+  (.*)", line)
        found[match[1]] = match[2]
    return found


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path, {"python": PYTHON, "nvidia-smi": SMI, "compute-sanitizer": SANITIZER})


def names(found):
    return [name for name in found if not name.startswith("in all")]


# --- Dry ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run_does_every_step(tmp_path):
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()}
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([str(SCRIPT), "--dry-run"], env=environment, capture_output=True, text=True, timeout=480)
    found = steps(done.stdout)
    assert names(found) == STEPS
    assert {name: found[name] for name in names(found) if found[name] != "ok"} == {}, (tmp_path / "gpu.log").read_text()
    assert done.returncode == 0
    assert {each["answer"] for each in json.loads((tmp_path / "probe.json").read_text())} == {"dry run"}
    assert json.loads((tmp_path / "parity.json").read_text())["failed"] == 0
    assert done.stdout.count(" cases, 0 failed") == len(SANITIZERS)
    assert "test_every_tile_on_a_gpu" in done.stdout and "test_the_gpu_and_the_golden_vectors" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "benchmarks" / "results").iterdir()} == before


def test_a_dry_run_leaves_the_results_alone(machine, tmp_path):
    done, _ = machine.run("--dry-run", "probe", "a", OUT="", TMPDIR=str(tmp_path))
    assert done.returncode == 0 and str(tmp_path) in done.stdout
    assert all("--dry-run" in call for call in machine.asked) and len(machine.asked) == 2
    assert not any("benchmarks/results" in call for call in machine.called)


# --- With a GPU --------------------------------------------------------------------------------------------------


def test_all_steps_in_their_order(machine):
    done, found = machine.run()
    assert done.returncode == 0 and names(found) == STEPS and {found[name] for name in names(found)} == {"ok"}
    asked = machine.asked
    assert asked[:3] == [
        "-m cuconv doctor ",
        f"-m benchmarks.probe --json {machine.out}/probe.json ",
        "-m benchmarks.warm ",
    ]
    assert asked[3] == "-m cuconv parity --quick --json "
    assert (machine.out / "parity.json").read_text() == "done\n"
    tests, vectors = asked[4:6]
    assert all(each.startswith("-m pytest -m gpu ") and "--collect-only" not in each for each in (tests, vectors))
    marked = {
        path.name for path in ROOT.glob("tests/test_*.py") if re.search(r"^@pytest\.mark\.gpu", path.read_text(), re.M)
    }
    assert set(re.findall(r"tests/(\S+)", tests)) == marked - {"test_ptx_wrappers.py"}
    assert re.findall(r"tests/(\S+)", vectors) == ["test_ptx_wrappers.py"]
    csv = machine.out / "gpu-h200-nvl.csv"
    for call, group in zip(asked[6:14], SUITE, strict=True):
        pattern = rf"-m benchmarks.run --group {group} --csv {csv} --limit-seconds (\d+) --compile-seconds (\d+) "
        most, compiling = map(int, re.fullmatch(pattern, call).groups())
        assert 0 < most < 480 and abs(most - 3 * compiling) <= 3
    assert asked[14:] == [f"-m benchmarks.report --plots {machine.out} {csv} "]
    checked = [call for call in machine.called if call.startswith("compute-sanitizer")]
    assert [re.search(r"--tool (\S+) --error-exitcode 1", call)[1] for call in checked] == SANITIZERS
    assert (
        "done" in (machine.out / "gpu.log").read_text() and "in all, of 480 s" in (machine.out / "gpu.log").read_text()
    )


def test_groups_are_those_of_the_suite():
    assert list(suite.GROUPS) == SUITE


@pytest.mark.parametrize("groups, expected", [(["c", "probe"], ["probe", "suite-c"]), (["vectors"], ["vectors"])])
def test_groups_are_chosen_by_name(machine, groups, expected):
    done, found = machine.run(*groups)
    assert done.returncode == 0 and names(found) == expected


# What fails, as it is called, and the steps that fail with it.
FAILURES = {
    "benchmarks.probe": {"probe"},
    "cuconv parity": {"parity"},
    "test_ptx_wrappers": {"vectors"},
    "--group d": {"suite-d"},
    "from cuconv": set(SANITIZERS),
    "-m": set(STEPS) - {"nvidia-smi", *SANITIZERS},
}


@pytest.mark.parametrize("failing", FAILURES)
def test_a_step_that_fails_costs_the_others_nothing(machine, failing):
    done, found = machine.run(FAILING=failing)
    assert done.returncode == 1
    assert names(found) == STEPS
    broken = {name for name in names(found) if found[name] == "FAILED: exit code 3"}
    assert broken == FAILURES[failing] - ({"report"} if failing == "-m" else set())
    if failing == "-m":
        assert found["report"] == "skipped: nothing is measured"
    assert "broken" in done.stdout


def test_tests_that_are_skipped_are_no_success(machine):
    done, found = machine.run("parity", "vectors", TESTS="skipped")
    assert done.returncode == 1 and found["parity"] == "ok"
    assert found["tests"] == found["vectors"] == "FAILED: nothing passed"


def test_a_step_that_hangs_ends_and_the_rest_is_skipped(machine):
    done, found = machine.run("probe", "parity", "vectors", BUDGET="12", HANGING="benchmarks.probe")
    assert done.returncode == 1
    assert re.fullmatch(r"FAILED: not done after \d+ s", found["probe"])
    assert {found[name] for name in ("parity", "tests", "vectors")} == {"skipped: no time left"}
    assert len(machine.asked) == 1


TIMEOUT = """#!/usr/bin/env bash
echo "timeout $2" >>"$CALLS"
shift 2
"$@"
"""


def test_time_is_kept_for_the_suite(tmp_path):
    """No step may take what the groups of the suite need, and these share what is left."""
    machine = Machine(tmp_path, {"python": PYTHON, "nvidia-smi": SMI, "compute-sanitizer": SANITIZER})
    (machine.bin / "timeout").unlink()
    (machine.bin / "timeout").write_text(TIMEOUT)
    (machine.bin / "timeout").chmod(0o755)
    machine.run(BUDGET="192")
    given = [int(call.split()[1]) for call in machine.called if call.startswith("timeout")]
    limits = dict(zip(STEPS, given, strict=True))
    assert limits["nvidia-smi"] == 15
    before, after = STEPS[: STEPS.index("suite-a")], STEPS[STEPS.index("suite-a") : -1]
    assert all(limits[name] <= 192 - 8 * 8 for name in before) and limits["probe"] > 100
    spent = 192 - limits["suite-sweep"]  # at most: the last one gets all that is left
    for position, name in enumerate(after):
        left = len(after) - position
        assert (192 - spent) // left <= limits[name] <= 192 // left


def test_what_is_not_installed_is_said(tmp_path):
    machine = Machine(tmp_path, {"python": PYTHON})
    done, found = machine.run("machine", "sanitize", "report")
    assert done.returncode == 0
    assert found["nvidia-smi"] == "skipped: nvidia-smi is not installed" and found["doctor"] == "ok"
    assert {found[name] for name in SANITIZERS} == {"skipped: compute-sanitizer is not installed"}
    assert found["report"] == "skipped: nothing is measured"


USAGE = {
    "group": (["probe", "z"], {}, "a group must be one of machine probe .* Received: z"),
    "option": (["--fast"], {}, "Received: --fast"),
    "empty": ([""], {}, "Received:$"),
    "budget": ([], {"BUDGET": "0"}, "BUDGET must be a number of seconds. Received: 0"),
    "words": ([], {"BUDGET": "ten"}, "Received: ten"),
    "python": ([], {"PYTHON": "/nowhere/python"}, "PYTHON must be a Python interpreter. Received: /nowhere/python"),
}


@pytest.mark.parametrize("usage", USAGE)
def test_wrong_usage_runs_nothing(machine, usage):
    arguments, variables, message = USAGE[usage]
    done = subprocess.run(
        [str(SCRIPT), *arguments],
        env={"PATH": str(machine.bin), "PYTHON": str(machine.bin / "python"), "CALLS": str(machine.calls), **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stdout == "" and re.search(message, done.stderr.strip())
    assert machine.called == []


def test_help_names_every_group(machine):
    done = subprocess.run([str(SCRIPT), "--help"], env={"PATH": str(machine.bin)}, capture_output=True, text=True)
    assert done.returncode == 0 and machine.called == []
    for name in ("machine", "probe", "kernels", "parity", "vectors", "sanitize", "a .. g, sweep", "report"):
        assert re.search(rf"^  {name} ", done.stdout, re.M)
    assert "set -euo" not in done.stdout


def test_no_setting_of_the_gpu_is_changed():
    calls = re.findall(r"nvidia-smi +(\"?-[^|\n]*)", SCRIPT.read_text())
    options = {word for call in calls for word in re.findall(r"(?<!\S)\"?(-[\w-]+)", call)}
    assert options == {"--query-gpu", "--format"}


def test_shellcheck_has_nothing_to_say():
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([found, str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# --- Kernels beforehand ------------------------------------------------------------------------------------------


def test_kernels_of_the_parity_list_and_of_the_suite():
    kernels = warm.of_parity(DEVICES["H200"]) | warm.of_suite("H200")
    assert {kernel for kernel, _ in kernels} >= {
        "conv_simt",
        "kernel_grad_simt",
        "depthwise_carry",
        "conv_lstm",
        "upsample",
    }
    assert warm.of_suite("H200") - warm.of_parity(DEVICES["H200"])
    assert len(kernels) > 300
    for kernel, constants in kernels:
        assert (ROOT / "kernels" / f"{kernel}.cu").is_file()
        cubins.definitions(constants)


def test_a_kernel_is_compiled_into_the_cache_once(monkeypatch, tmp_path):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path / "cache"))
    fake = fake_cupy.install(monkeypatch)
    try:
        kernel = ("reduce_splits", (("ELEMENT", "float"), ("INDEX", "int"), ("VECTOR", 4)))
        assert warm.compile_one((9, 0), kernel) is None
        assert warm.compile_one((9, 0), kernel) is None
        assert len(fake.compiled) == 1 and "-arch=sm_90" in fake.compiled[0][1]
        assert [path.name.startswith("reduce_splits-") for path in (tmp_path / "cache").iterdir()] == [True]
        assert warm.compile_one((9, 0), ("nothing", ())).startswith("nothing: FileNotFoundError")
    finally:
        fake_cupy.forget()


class InThisProcess:
    def __init__(self, jobs, context):
        assert jobs == 3 and context.get_start_method() == "spawn"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, function, kernels, chunksize):
        return map(function, kernels)


@pytest.mark.parametrize("broken", [False, True])
def test_all_are_compiled_whatever_becomes_of_one(broken, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(warm.concurrent.futures, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(warm, "of_suite", lambda device: {("depthwise", (("RANK", rank),)) for rank in (1, 2)})
    monkeypatch.setattr(warm, "of_parity", lambda limits: {("nothing", ())} if broken else set())
    fake = fake_cupy.install(monkeypatch)
    try:
        assert warm.main(["--jobs", "3"]) == broken
        assert len(fake.compiled) == 2 and len(list((tmp_path / "cache").iterdir())) == 2
    finally:
        fake_cupy.forget()
    printed = capsys.readouterr().out
    assert "2 compiled or there already" in printed and ("nothing: FileNotFoundError" in printed) == broken


def test_a_dry_run_counts_kernels(capsys):
    assert warm.main(["--dry-run"]) == 0
    assert re.match(r"\d{3} kernels for H200\n", capsys.readouterr().out)
