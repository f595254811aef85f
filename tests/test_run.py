"""A run of the suite: nobody is timed before they are right or left out silently, and nothing written is lost."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fake_graphs
import ml_dtypes
import numpy as np
import pytest
from suite_rows import answers, small

from benchmarks import peers, run, suite
from benchmarks.peers import AbsentError, Peer, Prepared
from benchmarks.truth import dtype_of
from cuconv import timing
from cuconv.cuda import runtime
from cuconv.timing import CupyCall, Timing

ROOT = Path(__file__).parents[1]


class Machine:
    """A GPU whose arrays are NumPy's, on the clock of tests/fake_graphs.py; `events` is what happened to whom."""

    library = np

    def __init__(self, gpu):
        self.gpu, self.events = gpu, []
        self.facts = {"gpu": "NVIDIA H200", "driver": "580.1", "cuda": "13.0", "commit": "abc", "date": "2026-11-20"}

    def stream(self):
        return timing.timing_stream()

    def device_call(self, peer, prepared):
        self.events.append(("capture", peer.name))
        return CupyCall(*prepared.calls)

    def finish(self):
        pass

    def poison(self, row):
        self.events.append(("poison", ""))

    def clocks(self):
        return {"sm_clock_mhz": "1980", "memory_clock_mhz": "3201"}

    def release(self):
        self.events.append(("release", ""))


class Contender:
    """A peer that takes so many seconds and answers what `spoil` makes of the right answer."""

    def __init__(self, machine, name, seconds=1e-5, spoil=lambda result, captured: None):
        self.machine, self.name, self.seconds, self.spoil = machine, name, seconds, spoil

    def prepare(self, row, variant, sets):
        self.machine.events.append(("prepare", self.name))

        def call(operands):
            right = [np.array(each, dtype_of(row)) for each in answers(row, operands, variant)]

            def run():
                gpu = self.machine.gpu
                self.machine.events.append(("call", self.name))
                results = tuple(map(np.copy, right))

                def work():
                    for result, each in zip(results, right):
                        result[...] = each
                    self.spoil(results, gpu.capturing is not None or gpu.stream is not None)

                work()
                gpu.kernel((self.name, work), self.seconds)
                return results

            return run

        return Prepared(tuple(map(call, sets)), lambda result: result)

    def peer(self, need=lambda row, variant: None, **more):
        return Peer(self.name, "cupy", need, self.prepare, **more)


@pytest.fixture
def machine(monkeypatch):
    gpu = fake_graphs.install(monkeypatch)
    execute = gpu.execute

    def working(name, seconds):
        if isinstance(name, tuple):
            if gpu.stream is not None:
                name[1]()
            name = name[0]
        execute(name, seconds)

    gpu.execute = working
    monkeypatch.setattr(run, "ROTATED_BYTES", 1)
    monkeypatch.setattr(suite.Row, "explain", lambda row, device, variant: EXPLANATION)
    return Machine(gpu)


EXPLANATION = SimpleNamespace(seconds=2e-5, algorithm="conv_simt", roof_seconds=1e-9)
OPTIONS = argparse.Namespace(compile_seconds=30.0, limit_seconds=None, seed=1)
ROW = replace(small(suite.ROWS[1], "float32"), name="small")


def lines_of(machine, monkeypatch, *contenders, rows=(ROW,), variants=("plain",), **options):
    monkeypatch.setattr(run, "contenders", lambda row: list(contenders))
    jobs = [(row, variants) for row in rows]
    given = argparse.Namespace(**{**vars(OPTIONS), **options})
    return list(run.measured(machine, jobs, given, lambda text: None))


def one_off(results, captured):
    results[0].reshape(-1)[-1] += 1


def one_nan(results, captured):
    results[0].reshape(-1)[0] = np.nan


def wrong_in_graph(results, captured):
    if captured:
        one_off(results, captured)


def launched(machine):
    """Who ran on the timing stream, in order, each graph once."""
    found = []
    for entry in machine.gpu.log:
        if entry in ("flush", "event", "wait"):
            found.append("")
        elif not found or found[-1] != entry:
            found.append(entry)
    return [entry for entry in found if entry]


# --- Right before timed ------------------------------------------------------------------------------------------


def test_the_right_ones_are_timed_in_turns(machine, monkeypatch):
    ours, theirs = Contender(machine, "cuconv", 1e-5), Contender(machine, "torch", 2e-5)
    first, second = lines_of(machine, monkeypatch, ours.peer(), theirs.peer())
    assert first.ok and second.ok
    assert first.device == Timing(*(pytest.approx(1e-5),) * 3, 50)
    assert second.device.median == pytest.approx(2e-5) and second.host.count >= 10
    assert first.launches == 20
    turns = launched(machine)[-100:]
    assert turns == ["cuconv", "torch"] * 50


def test_memory_is_poisoned_before_every_first_call(machine, monkeypatch):
    lines_of(machine, monkeypatch, Contender(machine, "cuconv").peer(), Contender(machine, "torch").peer())
    for name in ("cuconv", "torch"):
        start = machine.events.index(("prepare", name))
        assert machine.events[start + 1 : start + 3] == [("poison", ""), ("call", name)]
    first_capture = machine.events.index(("capture", "cuconv"))
    assert machine.events.index(("prepare", "torch")) < first_capture, "all are checked before any is timed"


@pytest.mark.parametrize("spoil, told", [(one_off, "off by"), (one_nan, "not finite")])
def test_a_wrong_contender_is_told_and_not_timed(machine, monkeypatch, spoil, told):
    ours, theirs = Contender(machine, "cuconv"), Contender(machine, "torch", spoil=spoil)
    first, second = lines_of(machine, monkeypatch, ours.peer(), theirs.peer())
    assert first.ok and first.device
    assert second.status.startswith("wrong: ") and told in second.status
    assert second.device is None and second.host is None
    assert ("capture", "torch") not in machine.events and "torch" not in launched(machine)


def test_an_error_that_is_no_number_is_too_much():
    for share, wrong in ((0.5, False), (1.5, True), (np.nan, True)):
        with pytest.raises(run.WrongAnswerError) if wrong else nullcontext():
            run.right_or_raise(Prepared((), tuple, share=lambda result, share=share: share), None, None)


def test_a_graph_that_answers_otherwise_is_told_and_not_timed(machine, monkeypatch):
    ours, theirs = Contender(machine, "cuconv", spoil=wrong_in_graph), Contender(machine, "torch")
    first, second = lines_of(machine, monkeypatch, ours.peer(), theirs.peer())
    assert first.status.startswith("wrong: in a CUDA graph: off by") and first.device is None
    assert second.ok and launched(machine)[-50:] == ["torch"] * 50


def test_a_graph_that_holds_nothing_is_seen(machine, monkeypatch):
    """Work that went to another stream is not captured: the poisoned result stays as it is."""

    class Elsewhere(Contender):
        def prepare(self, row, variant, sets):
            prepared = super().prepare(row, variant, sets)

            def call():
                kept, machine.gpu.capturing = machine.gpu.capturing, None
                stream, machine.gpu.stream = machine.gpu.stream, None
                result = prepared.calls[0]()
                machine.gpu.capturing, machine.gpu.stream = kept, stream
                return result

            return replace(prepared, calls=(call,))

    (line,) = lines_of(machine, monkeypatch, Elsewhere(machine, "cuconv").peer())
    assert line.status == "wrong: in a CUDA graph: it holds numbers that are not finite"


@pytest.mark.parametrize("where", ["prepare", "call", "capture"])
def test_a_failure_is_told_and_stops_nobody_else(machine, monkeypatch, where):
    class Failing(Contender):
        def prepare(self, row, variant, sets):
            if where == "prepare":
                raise RuntimeError("cuDNN error:\n  NOT_SUPPORTED")
            prepared = super().prepare(row, variant, sets)

            def call():
                if where == "call" or machine.gpu.capturing is not None:
                    raise RuntimeError("cuDNN error:\n  NOT_SUPPORTED")
                return prepared.calls[0]()

            return replace(prepared, calls=(call,))

    failing, ours = Failing(machine, "torch").peer(), Contender(machine, "cuconv").peer()
    first, second = lines_of(machine, monkeypatch, failing, ours)
    context = "in a CUDA graph: " if where == "capture" else ""
    assert first.status == f"failed: {context}RuntimeError: cuDNN error: NOT_SUPPORTED"
    assert second.ok and second.device


def test_a_failure_of_all_is_told_by_every_line(machine, monkeypatch):
    def broken(*arguments, **options):
        raise MemoryError("no room")

    monkeypatch.setattr(run.timing, "host_times", broken)
    absent = Contender(machine, "torch").peer(need=partial(no, "No module named 'torch'"))
    first, second = lines_of(machine, monkeypatch, Contender(machine, "cuconv").peer(), absent)
    assert first.status == "failed: MemoryError: no room" and second.status == "absent: No module named 'torch'"
    monkeypatch.setattr(run, "operand_sets", broken)
    (line,) = lines_of(machine, monkeypatch, Contender(machine, "cuconv").peer())
    assert line.contender == "cuconv" and line.status == "failed: MemoryError: no room"


class Recomputing:
    """A graph that does its work anew at every replay, into the results of its capture."""

    def __init__(self, machine, prepared):
        self.machine, self.prepared = machine, prepared

    def capture(self, launches):
        results = [call() for call in self.prepared.calls]

        def start():
            for result, call in zip(results, self.prepared.calls):
                for old, new in zip(self.prepared.answers(result), self.prepared.answers(call())):
                    old[...] = new
            self.machine.gpu.execute("work", 1e-5 * launches)

        return timing.Replay(start, launches, results)


@pytest.mark.keras
@pytest.mark.parametrize("number", [2, 20, 27, 45, 51, 52, 57])
def test_a_row_with_the_real_peers(machine, monkeypatch, request, number):
    """Everything but the GPU: all of torch's ways, cuconv and both ceilings, from operands to lines."""
    torch = pytest.importorskip("torch")
    torch.backends.mkldnn.set_flags(False)  # as in test_peers.py
    request.addfinalizer(lambda: torch.backends.mkldnn.set_flags(True))
    row = small(suite.ROWS[number - 1])
    monkeypatch.setattr(machine, "device_call", lambda peer, prepared: Recomputing(machine, prepared), raising=False)
    monkeypatch.setattr(run, "ROTATED_BYTES", 3 * row.bytes)
    monkeypatch.setattr(run, "SAMPLES", 10)
    lines = list(run.measured(machine, [(row, row.variants)], OPTIONS, lambda text: None))
    told = {(line.contender, line.variant): line for line in lines}
    assert len(told) == len(lines) == len(row.variants) * len(peers.contenders(row))
    for line in lines:
        if not line.status.startswith("absent: "):
            assert line.ok and line.device and line.host and line.error <= 1, (line.contender, line.status)
    assert told["cuconv", "plain"].ok and told["copy", "plain"].ok
    assert sum(line.contender.startswith("torch conv") and line.ok for line in lines) >= 2 * len(row.variants)
    assert told["cublas gemm", "plain"].ok != row.depthwise


# --- Who takes part ----------------------------------------------------------------------------------------------


def no(why, row, variant):
    raise AbsentError(why)


def test_absent_peers_are_reported(machine, monkeypatch):
    absent = Contender(machine, "causal_conv1d").peer(need=partial(no, "No module named 'causal_conv1d'"))
    first, second = lines_of(machine, monkeypatch, absent, Contender(machine, "cuconv").peer())
    assert first.status == "absent: No module named 'causal_conv1d'" and not first.device
    assert second.ok and ("prepare", "causal_conv1d") not in machine.events


def test_compiling_is_bounded_and_what_is_left_out_says_so(machine, monkeypatch):
    clock = iter(range(0, 10_000, 20))
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock))
    slow = Contender(machine, "torch.compile").peer(slow=True)
    lines = lines_of(machine, monkeypatch, slow, rows=[ROW] * 3, compile_seconds=30)
    assert [line.status for line in lines] == [
        "ok",
        "ok",
        "absent: the 30 s for compiling are used up (--compile-seconds)",
    ]


def test_the_time_limit_leaves_rows_out_and_says_so(machine, monkeypatch):
    clock = iter([0.0, 1.0, 9.0, 11.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    rows = [replace(ROW, number=number) for number in (1, 2, 3)]
    lines = lines_of(machine, monkeypatch, Contender(machine, "cuconv").peer(), rows=rows, limit_seconds=10)
    assert [line.status for line in lines] == ["ok", "ok", "not measured: the time limit of 10 s was reached"]


def test_small_operands_rotate_and_memory_is_given_back(machine, monkeypatch):
    seen = []

    class Counting(Contender):
        def prepare(self, row, variant, sets):
            seen.append([each.x[0, 0, 0] for each in sets])
            return super().prepare(row, variant, sets)

    monkeypatch.setattr(run, "ROTATED_BYTES", 3 * ROW.bytes)
    lines_of(machine, monkeypatch, Counting(machine, "cuconv").peer(), variants=("plain", "fused"))
    assert len(seen[0]) == 3 and len(set(seen[0])) == 3
    assert seen[0] == seen[1], "made once for both variants"
    monkeypatch.setattr(run, "ROTATED_BYTES", 1 << 60)
    assert len(run.operand_sets(ROW, np, 0)) == run.LAUNCHES
    assert machine.events[-1] == ("release", "")


# --- Files -------------------------------------------------------------------------------------------------------


def measured_line(row=ROW, contender="cuconv", seconds=1e-5, status="ok", variant="plain", **more):
    times = Timing(seconds, seconds, seconds, 50) if status == "ok" else None
    return run.Line(row, variant, contender, status, times, times, **more)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_record_has_the_columns_and_their_units():
    line = run.Line(
        suite.ROWS[0], "fused", "cuconv", "ok", Timing(1e-4, 9e-5, 2e-4, 50), Timing(3e-4, 2e-4, 4e-4, 12), 0.25,
        launches=20, roof_seconds=2.5e-5, predicted_seconds=1.5e-4, kernel="conv_simt",
        facts={"gpu": "NVIDIA H200", "sm_clock_mhz": "1980"},
    )  # fmt: skip
    record = line.record()
    assert tuple(record) == run.COLUMNS
    assert (record["number"], record["group"], record["variant"]) == (1, "a", "bias+relu")
    assert record["device_us"] == pytest.approx(100) and record["device_p10_us"] == pytest.approx(90)
    assert record["host_p90_us"] == pytest.approx(400) and record["predicted_us"] == pytest.approx(150)
    assert record["tflops"] == pytest.approx(171.8, rel=1e-3)
    assert record["gbytes_per_s"] == pytest.approx(1008, rel=1e-3)
    assert record["share_of_roof"] == pytest.approx(0.25)
    assert record["samples"] == 50 and record["launches"] == 20 and record["driver"] is None


def test_the_roof_is_the_suites_on_an_h200_and_the_data_sheets_elsewhere():
    assert run.roof_seconds(suite.ROWS[0], EXPLANATION, "NVIDIA H200") == suite.ROWS[0].roof_seconds
    assert run.roof_seconds(suite.ROWS[0], EXPLANATION, "NVIDIA L4") == 1e-9


def test_lines_are_on_disk_as_they_come(tmp_path):
    path = tmp_path / "new" / "gpu.csv"
    file = run.Csv(path)
    file.write(measured_line(status="absent: no, not here").record())
    assert read(path)[0]["status"] == "absent: no, not here"
    file.write(measured_line().record())
    assert len(read(path)) == 2 and read(path)[1]["device_us"] == "10"
    file.close()
    again = run.Csv(path)
    again.write(measured_line().record())
    again.close()
    assert len(read(path)) == 3, "a further run appends"


def test_a_file_with_other_columns_is_left_alone(tmp_path):
    path = tmp_path / "cpu.csv"
    path.write_text("name,op\n1,2\n")
    with pytest.raises(run.UsageError, match="Received: csv="):
        run.Csv(path)
    assert path.read_text() == "name,op\n1,2\n"


@pytest.fixture
def on_machine(machine, monkeypatch):
    """`main` on the fake machine, on rows 1 to 4 of the suite made small."""
    rows = [small(row, "float32") for row in suite.ROWS[:4]]
    monkeypatch.setattr(run, "Gpu", lambda: machine)
    monkeypatch.setattr(run, "selected", lambda groups, numbers: rows)
    return machine


def main(monkeypatch, contenders, *arguments):
    monkeypatch.setattr(run, "contenders", lambda row: contenders)
    return run.main([*arguments, "--variant", "plain"])


def test_a_crash_leaves_what_was_measured(on_machine, monkeypatch, tmp_path):
    ours = Contender(on_machine, "cuconv")
    prepare = ours.prepare

    def crashing(row, variant, sets):
        if row.number == 3:
            raise SystemExit("the driver took the process down")
        return prepare(row, variant, sets)

    ours.prepare = crashing
    path, report = tmp_path / "gpu.csv", tmp_path / "gpu.json"
    with pytest.raises(SystemExit):
        main(monkeypatch, [ours.peer()], "--csv", str(path), "--json", str(report))
    assert [(line["number"], line["status"]) for line in read(path)] == [("1", "ok"), ("2", "ok")]
    assert len(json.loads(report.read_text())["rows"]) == 2


def test_exit_codes_and_what_is_printed(on_machine, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.csv"
    right, peer = Contender(on_machine, "cuconv", 2e-5), Contender(on_machine, "torch conv1d", 1e-5)
    assert main(monkeypatch, [right.peer(), peer.peer()], "--csv", str(path)) == 0
    out = capsys.readouterr().out
    assert "0.50" in out and "torch conv1d" in out and str(path) in out
    lines = read(path)
    assert len(lines) == 8 and {line["gpu"] for line in lines} == {"NVIDIA H200"}
    assert {line["sm_clock_mhz"] for line in lines} == {"1980"}
    wrong = Contender(on_machine, "cuconv", spoil=one_off)
    assert main(monkeypatch, [wrong.peer(), peer.peer()], "--csv", str(path)) == 1
    wrong_peer = Contender(on_machine, "torch conv1d", spoil=one_off)
    assert main(monkeypatch, [right.peer(), wrong_peer.peer()], "--csv", str(path)) == 0, "not our mistake"


def test_an_interrupted_run_keeps_its_lines(on_machine, monkeypatch, tmp_path):
    ours = Contender(on_machine, "cuconv")
    prepare = ours.prepare

    def interrupted(row, variant, sets):
        if row.number == 2:
            raise KeyboardInterrupt
        return prepare(row, variant, sets)

    ours.prepare = interrupted
    path = tmp_path / "gpu.csv"
    assert main(monkeypatch, [ours.peer()], "--csv", str(path)) == 130
    assert [line["number"] for line in read(path)] == ["1"]


def test_results_go_to_the_file_of_the_gpu():
    nothing = argparse.Namespace(csv=None)
    assert run.csv_path(nothing, "NVIDIA H200") == run.RESULTS / "gpu-h200.csv"
    assert run.csv_path(nothing, "NVIDIA GeForce RTX 4090").name == "gpu-geforce-rtx-4090.csv"
    assert run.csv_path(argparse.Namespace(csv=Path("x.csv")), "NVIDIA H200") == Path("x.csv")


# --- The table ---------------------------------------------------------------------------------------------------


def test_lost_rows_come_first_and_only_equals_compete():
    rows = [replace(row, dtype="float32") for row in suite.ROWS[:3]]
    lines = [
        measured_line(rows[0], "cuconv", 10e-6),
        measured_line(rows[0], "torch conv1d", 30e-6),
        measured_line(rows[0], "torch conv1d tf32", 1e-6),  # computes something else
        measured_line(rows[0], "copy", 1e-6),  # a ceiling
        measured_line(rows[1], "cuconv", 10e-6),
        measured_line(rows[1], "torch conv1d", 30e-6),
        measured_line(rows[1], "torch conv2d channels_last", 8e-6),
        measured_line(rows[2], "cuconv", status="wrong: off by 3 times what is allowed"),
        measured_line(rows[2], "torch conv1d", 5e-6),
    ]
    table = run.result_table(lines)
    cells = list(zip(*(column.cells for column in table.columns)))
    assert [row[0] for row in cells] == ["3", "2", "1"]
    assert cells[0][6].startswith("wrong") and cells[1][6] == "torch conv2d channels_last"
    assert [row[4] for row in cells] == ["-", "0.80", "3.00"]
    part = {row[0]: row[1:3] for row in zip(*(column.cells for column in run.part_table(lines).columns))}
    assert part["cuconv"] == ("2", "3") and part["copy"] == ("1", "1")


# --- Without a GPU -----------------------------------------------------------------------------------------------


def command(*arguments):
    words = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_dry_run_does_all_but_the_gpus_part(tmp_path):
    path, report = tmp_path / "dry.csv", tmp_path / "dry.json"
    done = command("--dry-run", "--csv", str(path), "--json", str(report))
    assert done.returncode == 0, done.stderr
    lines = read(path)
    ours = [line for line in lines if line["contender"] == "cuconv"]
    assert len(ours) == 58 + 50, "50 rows have a fused variant"
    assert {line["status"] for line in ours} == {"not measured"}
    assert all(line["status"] == "not measured" or line["status"].startswith("absent: ") for line in lines)
    assert all(float(line["predicted_us"]) > 0 and line["kernel"] for line in ours)
    assert not any(line["device_us"] or line["host_us"] or line["gpu"] or line["tflops"] for line in lines)
    records = json.loads(report.read_text())
    assert records["dry_run"] and len(records["rows"]) == len(lines)
    assert "not measured" in done.stdout and "conv_simt" in done.stdout and str(path) in done.stdout
    assert "predicted for H200" in done.stdout


def test_dry_run_predicts_for_the_named_gpu_and_touches_no_results(tmp_path):
    predicted = []
    for device in ("H200", "T4"):
        report = tmp_path / device
        assert command("--dry-run", "--rows", "8", "--device", device, "--json", str(report)).returncode == 0
        predicted.append(json.loads(report.read_text())["rows"][0]["predicted_us"])
    assert predicted[1] > 2 * predicted[0]
    assert not list((ROOT / "benchmarks" / "results").glob("gpu-t4*"))


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--rows", "59"], "Received: rows=[59]"),
        (["--group", "z"], "invalid choice: 'z'"),
        (["--dry-run", "--device", "H300"], "H300"),
        (["--rows", "51", "--variant", "fused", "--dry-run"], "Received: variant=fused"),
        (["--limit-seconds", "0"], "Received: limit_seconds=0"),
    ],
)
def test_wrong_usage(arguments, told):
    done = command(*arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr


def test_without_a_gpu_dry_run_is_named(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "probe", lambda: runtime.Probe(False, "CuPy is not installed"))
    assert run.main(["--rows", "1"]) == 2
    told = capsys.readouterr().err
    assert "CuPy is not installed" in told and "`--dry-run`" in told


# --- The part of the real GPU that can be seen without one --------------------------------------------------------


def test_poison_reaches_both_libraries(monkeypatch):
    filled = []
    torch = SimpleNamespace(
        full=lambda shape, value, dtype, device: filled.append((shape, value, dtype, device)), bfloat16="bf16"
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    made = []

    def empty(shape, dtype):
        made.append(np.zeros(shape, dtype))
        return made[-1]

    gpu = object.__new__(run.Gpu)
    gpu.library = SimpleNamespace(empty=empty)
    row = small(suite.ROWS[56])
    gpu.poison(row)
    assert [a.shape for a in made] == list(row.outputs) and made[0].dtype == ml_dtypes.bfloat16
    assert all(np.isnan(a.astype(float)).all() for a in made)
    assert [entry[0] for entry in filled] == list(row.outputs) and all(np.isnan(entry[1]) for entry in filled)


def test_contenders_are_captured_by_their_own_library(monkeypatch):
    gpu = object.__new__(run.Gpu)
    prepared = Prepared((int, float), lambda result: result)
    kinds = {}
    for peer in peers.contenders(suite.ROWS[0]):
        call = gpu.device_call(peer, prepared)
        kinds[peer.name] = type(call).__name__
        assert call.calls == (int, float)
    assert kinds.pop("cuconv") == kinds.pop("copy") == "CupyCall"
    assert set(kinds.values()) == {"TorchCall"}
