"""The benchmark measures the rows it names, refuses wrong answers and reports what it could not measure."""

from __future__ import annotations

import csv
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest

from benchmarks import cpu, timing

ROOT = Path(__file__).parents[1]

# Multiplications and additions written out by hand: 2 * positions * taps * input channels * filters.
FLOPS = {
    "conv1d k10 9->100": 2 * 32 * 119 * 10 * 9 * 100,
    "conv1d k80 s4 1->64": 2 * 8 * 3981 * 80 * 64,
    "conv1d k3 d1 64->64": 2 * 16 * 1024 * 3 * 64 * 64,
    "conv1d k3 d8 64->64": 2 * 16 * 1024 * 3 * 64 * 64,
    "conv1d k3 d64 64->64": 2 * 16 * 1024 * 3 * 64 * 64,
    "conv1d k15 128->256": 2 * 8 * 4096 * 15 * 128 * 256,
    "depthwise1d k4": 2 * 8 * 2045 * 4 * 512,
    "depthwise1d k31": 2 * 8 * 2048 * 31 * 512,
    "pointwise 512->512": 2 * 8 * 2048 * 512 * 512,
    "conv2d 3x3 64->64": 2 * 8 * 56 * 56 * 9 * 64 * 64,
    "conv2d 3x3 s2 128->128": 2 * 8 * 14 * 14 * 9 * 128 * 128,
    "depthwise2d k7": 2 * 8 * 56 * 56 * 49 * 96,
    "transpose1d k16 s8 256->128": 2 * 8 * 256 * 16 * 256 * 128,
    "conv1d k15 input grad": 2 * 8 * 4096 * 15 * 128 * 256,
    "conv1d k15 kernel grad": 2 * 8 * 4096 * 15 * 128 * 256,
    "conv2d 3x3 input grad": 2 * 8 * 56 * 56 * 9 * 64 * 64,
    "conv2d 3x3 kernel grad": 2 * 8 * 56 * 56 * 9 * 64 * 64,
}


def shrunk(row: cpu.Row) -> cpu.Row:
    """The row with its kernel, strides, dilation and padding, on few positions and channels."""
    positions = [min(n, 140 if len(row.kernel_size) == 1 else 12) for n in row.x[1:-1]]
    channels, filters = min(row.x[-1], 6), min(row.filters, 5)
    pair = (channels, 1) if row.depthwise else (filters, channels) if row.transposed else (channels, filters)
    return replace(row, x=(2, *positions, channels), w=(*row.kernel_size, *pair))


SMALL_ROWS = [pytest.param(shrunk(row), id=row.name) for row in cpu.ROWS]


def test_rows_are_the_ones_of_the_flop_table():
    assert {row.name: row.flops for row in cpu.ROWS} == FLOPS


def test_minimal_bytes_count_every_array_once():
    (row,) = cpu.selected(cpu.ROWS, "conv1d k10*")
    assert row.bytes == 4 * (32 * 128 * 9 + 10 * 9 * 100 + 32 * 119 * 100)


@pytest.mark.parametrize("row", SMALL_ROWS)
def test_definition_is_the_oracle(row):
    """The loops of tests/oracle.py share nothing with the benchmark."""
    operands = cpu.Operands.random(row)
    x, w, dy = operands.x, operands.w, operands.dy
    gradients = {"conv_input_grad": (dy, w, row.x), "conv_kernel_grad": (x, dy, row.w)}
    truth = getattr(oracle, row.op)(
        *gradients.get(row.op, (x, w)), strides=row.strides, padding=row.padding, dilation_rate=row.dilation_rate
    )
    np.testing.assert_allclose(cpu.definition(row, operands), truth, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("library", cpu.LIBRARIES)
@pytest.mark.parametrize("row", SMALL_ROWS)
def test_every_way_of_every_library_is_right(row, library):
    operands = cpu.Operands.random(row)
    truth = cpu.definition(row, operands)
    try:
        ways = cpu.LIBRARIES[library](row, operands)
    except ImportError as error:
        pytest.skip(str(error))
    assert ways or (library == "onnxruntime" and row.op.endswith("grad"))
    for variant, call in ways.items():
        cpu.check(row, variant, call(), truth)


def spoil_one(answer):
    answer[(-1,) * answer.ndim] += 0.01 * np.abs(answer).max()


def spoil_nan(answer):
    answer[(0,) * answer.ndim] = np.nan


def spoil_shift(answer):
    answer[:] = np.roll(answer, 1, axis=1)


@pytest.mark.parametrize("spoil", [spoil_one, spoil_nan, spoil_shift])
@pytest.mark.parametrize("row", SMALL_ROWS)
def test_check_refuses_a_wrong_answer(row, spoil):
    truth = cpu.definition(row, cpu.Operands.random(row))
    answer = truth.astype(np.float32)
    cpu.check(row, "unspoilt", answer, truth)
    spoil(answer)
    with pytest.raises(cpu.WrongAnswerError):
        cpu.check(row, "spoilt", answer, truth)


@pytest.mark.parametrize("change", [lambda a: a.astype(np.float64), lambda a: a[:, :-1]], ids=["dtype", "shape"])
def test_check_refuses_another_kind_of_array(change):
    row = shrunk(cpu.ROWS[0])
    truth = cpu.definition(row, cpu.Operands.random(row))
    with pytest.raises(cpu.WrongAnswerError):
        cpu.check(row, "changed", change(truth.astype(np.float32)), truth)


def test_calls_take_turns():
    order = []
    times = timing.interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2)
    assert "".join(order) == "abc" * 3  # one round of warming up
    assert all(0 < seconds < 1 for seconds in times.values())


def test_the_shortest_time_counts():
    clock = iter([0.0, 5.0, 10.0, 12.0, 20.0, 29.0])
    assert timing.interleaved({"a": lambda: None}, 3, lambda: next(clock)) == {"a": 2.0}


def test_rounds_go_on_until_enough_was_measured():
    clock = itertools.count()
    calls = []
    timing.interleaved({"a": lambda: calls.append(0)}, 2, lambda: next(clock), seconds=7)
    assert len(calls) == 1 + 7


def test_per_call_divides_by_the_loops():
    seen = []
    clock = iter([0.0, 5.0])
    assert timing.per_call({"a": lambda: seen.append(0)}, 1, lambda: next(clock), loops=50) == {"a": 0.1}
    assert len(seen) == 2 * 50  # one round of warming up


def test_threads_are_pinned_before_numpy_is_loaded(monkeypatch):
    restarts = []
    monkeypatch.setattr(timing.os, "execve", lambda *call: restarts.append(call))
    monkeypatch.setattr(sys, "argv", ["cpu.py", "--json"])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    timing.pin_to_one_thread("benchmarks.cpu")
    ((_, arguments, environment),) = restarts
    assert arguments[1:] == ["-m", "benchmarks.cpu", "--json"]
    assert {environment[name] for name in timing.THREAD_VARIABLES} == {"1"}
    for name in timing.THREAD_VARIABLES:
        monkeypatch.setenv(name, "1")
    timing.pin_to_one_thread("benchmarks.cpu")
    assert len(restarts) == 1


def missing(row, operands):
    raise ImportError("No module named 'peer'")


def right(row, operands):
    truth = cpu.definition(row, operands).astype(np.float32)
    return {"slow": lambda: [truth.copy() for _ in range(300)][-1], "quick": lambda: truth}


def wrong(row, operands):
    return {"wrong": lambda: np.zeros_like(cpu.definition(row, operands), dtype=np.float32)}


def test_an_absent_peer_is_reported_and_the_fastest_way_counts(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARIES", {"cuconv": right, "torch": missing, "onnxruntime": right})
    measured = cpu.measure(shrunk(cpu.ROWS[0]), repeats=3, clock=time.perf_counter)
    assert measured.variant == {"cuconv": "quick", "onnxruntime": "quick"}
    record = measured.record()
    assert record["torch_ms"] is None and record["ratio_torch"] is None
    assert "No module named 'peer'" in record["torch_variant"]
    assert record["ratio_onnxruntime"] == record["cuconv_ms"] / record["onnxruntime_ms"]


def test_cuconv_may_not_be_absent(monkeypatch):
    monkeypatch.setattr(cpu, "LIBRARIES", {"cuconv": missing, "torch": right, "onnxruntime": right})
    with pytest.raises(ImportError):
        cpu.measure(shrunk(cpu.ROWS[0]), repeats=1, clock=time.perf_counter)


@pytest.mark.parametrize("library", cpu.LIBRARIES)
def test_a_wrong_answer_is_not_timed(monkeypatch, library):
    monkeypatch.setattr(cpu, "LIBRARIES", {name: wrong if name == library else right for name in cpu.LIBRARIES})
    with pytest.raises(cpu.WrongAnswerError, match=library):
        cpu.measure(shrunk(cpu.ROWS[0]), repeats=1, clock=time.perf_counter)


def measurements(ratios):
    rows = {row.name: row for row in cpu.ROWS}
    return [cpu.Measurement(rows[name], {"cuconv": ratio, "torch": 1.0}, {}, {}) for name, ratio in ratios.items()]


def test_goals_separate_dense_from_depthwise():
    ratios = {"conv1d k10 9->100": 0.5, "conv2d 3x3 64->64": 2.5, "depthwise1d k4": 19.0, "depthwise2d k7": 7.0}
    summary = {goal.name: goal.record() for goal in cpu.goals(measurements(ratios), overhead=39.0)}
    assert {name: (record["value"], record["met"]) for name, record in summary.items()} == {
        "median ratio to torch": (4.75, False),
        "worst dense ratio to torch": (2.5, False),
        "depthwise2d ratio to torch": (7.0, True),
        "overhead of a tiny layer call": (39.0, True),
    }


def test_a_goal_without_its_rows_is_not_met_and_nan_is_missed():
    records = [goal.record() for goal in cpu.goals([], overhead=math.nan)]
    assert [record["met"] for record in records] == [None, None, None, False]


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.cpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_writes_json_and_csv(tmp_path):
    done = run("--json", "--rows", "conv1d k10*", "--repeats", "1", "--csv", str(tmp_path / "rows.csv"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    (row,) = report["rows"]
    assert row["name"] == "conv1d k10 9->100" and row["cuconv_ms"] > 0 and row["cuconv_gflops"] > 0
    assert report["overhead_us"]["cuconv"] > 0
    assert len(report["summary"]) == 4
    with (tmp_path / "rows.csv").open(newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["cuconv_ms"]) == pytest.approx(row["cuconv_ms"], rel=1e-4)
    assert {"cpu", "numpy", "blas", "torch", "onnxruntime", "commit", "date", "clock"} <= set(line)


def test_command_prints_tables():
    done = run("--rows", "conv1d k10*", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "median ratio to torch" in done.stdout


@pytest.mark.parametrize(("option", "value"), [("rows", "'nothing'"), ("repeats", "0")])
def test_command_explains_wrong_arguments(option, value):
    done = run(f"--{option}", value.strip("'"))
    assert done.returncode != 0
    assert f"Received: {option}={value}" in done.stderr


@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in cpu.MEMORY_ROWS])
def test_workspace_is_bounded_on_a_large_input(row):
    """On a twentieth of the benchmark's 2 GB: a copy of it would still break the bound."""
    shorter = replace(row, x=(1, row.x[1] // 20, *row.x[2:]))
    record = cpu.measure_memory(shorter)
    assert record["met"], record


@pytest.mark.parametrize("spoilt", [0, 250, -1])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in cpu.MEMORY_ROWS[:-1]])
def test_ends_of_a_large_answer_are_checked(row, spoilt):
    """Right at both ends and finite in between is what is asked for."""
    row = replace(row, x=(1, 400, *(5 for _ in row.x[2:-1]), 128))
    operands = cpu.Operands.random(row)
    answer = cpu.definition(row, operands).astype(np.float32)
    cpu.check_ends(row, operands, answer)
    answer[0, spoilt] = np.nan if spoilt == 250 else 2 * answer[0, spoilt] + 1
    with pytest.raises(cpu.WrongAnswerError):
        cpu.check_ends(row, operands, answer)


def test_memory_counts_what_is_allocated():
    """A call that keeps 100 MB to itself is charged with them."""
    code = (
        "import numpy as np; from benchmarks import cpu; honest = cpu.cuconv_calls\n"
        "def greedy(row, operands):\n"
        "    (call,) = honest(row, operands).values()\n"
        "    return {'': lambda: (np.ones(100 * 2**17), call())[1]}\n"
        "cpu.cuconv_calls = greedy\n"
        "print(cpu.workspace_bytes(cpu.Row('k1', 'conv', (1, 300_000, 128), (1, 128, 64))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 99 * 2**20 < int(done.stdout) < 150 * 2**20
