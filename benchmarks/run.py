"""cuconv and its peers on the suite's rows, on the GPU at hand: `python -m benchmarks.run [--group a ...] [--dry-run]`.

Of every row and variant: random operands, the answer of every contender against float64, and only then its time, on the
device and on the host, all contenders in turns. Whoever is wrong is reported and not timed; whoever is not there is
reported with the reason. Lines are written to the CSV file as they come. With --dry-run everything but the GPU's part
is done: plans, predictions and who would take part.

Exit codes: 0 done, 1 an answer of cuconv is wrong or missing, 2 wrong usage or no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import json
import math
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import timing as comparison
from benchmarks.peers import Peer, Prepared, competes, contenders
from benchmarks.suite import GROUPS, VARIANTS, Row, selected
from benchmarks.truth import Operands, Truth, WrongAnswerError, dtype_of, finite, poison
from cuconv import timing
from cuconv.cuda import runtime
from cuconv.plan.devices import device
from cuconv.timing import CupyCall, DeviceCall, Replay, Timing

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "number",
    "group",
    "name",
    "op",
    "dtype",
    "variant",
    "contender",
    "status",
    "device_us",
    "device_p10_us",
    "device_p90_us",
    "host_us",
    "host_p10_us",
    "host_p90_us",
    "error",
    "tflops",
    "gbytes_per_s",
    "share_of_roof",
    "predicted_us",
    "kernel",
    "gpu",
    "driver",
    "cuda",
    "commit",
    "date",
    "sm_clock_mhz",
    "memory_clock_mhz",
    "samples",
    "launches",
)
NOT_MEASURED = "not measured"

SAMPLES, LAUNCHES = 50, 20
SECONDS_PER_ROW = 6.0  # of everything, where no limit is given; timing gets half of it
MOST_SECONDS = 3.0  # of timing a row and variant: more samples would say no more
LEAST_SECONDS = 0.3
DEVICE_SHARE = 0.75  # of them; the rest is for the host's clock
ROTATED_BYTES = 240 << 20  # of operands in rotation, so that none is in the L2 cache when its turn comes


class UsageError(Exception):
    """What was asked for cannot be done; the message says what can."""


# --- The GPU -----------------------------------------------------------------------------------------------------


class Gpu:
    """Where rows are measured: CuPy's current GPU.

    Raises:
        UsageError: there is none.
    """

    def __init__(self) -> None:
        found = runtime.probe()
        if not found.usable:
            raise UsageError(f"there is no GPU to measure on: {found.reason}. `--dry-run` does everything else")
        self.library = runtime.library()
        self.device = int(self.library.cuda.runtime.getDevice())
        self.facts = comparison.gpu(self.device)

    def stream(self) -> Any:
        """See :func:`cuconv.timing.timing_stream`."""
        return timing.timing_stream()

    def device_call(self, peer: Peer, prepared: Prepared) -> DeviceCall:
        """The peer's calls, ready to be captured."""
        kind = CupyCall if peer.library == "cupy" else comparison.TorchCall
        return kind(*prepared.calls)

    def finish(self) -> None:
        """Waits for all work."""
        self.library.cuda.runtime.deviceSynchronize()

    def poison(self, row: Row) -> None:
        """Leaves NaN in the memory that the next call of either library gets for its results."""
        kept = [self.library.empty(shape, dtype_of(row)) for shape in row.outputs]
        for array in kept:
            poison(array)
        torch = sys.modules.get("torch")
        if torch is not None:
            kept += [
                torch.full(shape, math.nan, dtype=getattr(torch, row.array_dtype), device="cuda")
                for shape in row.outputs
            ]
        del kept

    def clocks(self) -> dict[str, str]:
        """At this moment."""
        return comparison.clocks(self.device)

    def release(self) -> None:
        """Gives unused memory of both libraries back to the driver."""
        gc.collect()
        self.library.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None:
            torch.cuda.empty_cache()


# --- One row -----------------------------------------------------------------------------------------------------


@dataclass
class Line:
    """What became of one contender on one row and variant."""

    row: Row
    variant: str
    contender: str
    status: str
    device: Timing | None = None
    host: Timing | None = None
    error: float | None = None  # the largest, as a share of what is allowed
    launches: int | None = None
    roof_seconds: float | None = None
    predicted_seconds: float | None = None
    kernel: str = ""
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it was right and timed."""
        return self.status == "ok"

    def record(self) -> dict[str, Any]:
        """A line of the CSV file, by column; None where there is no such number."""
        row, seconds = self.row, self.device.median if self.device else None
        found: dict[str, Any] = dict.fromkeys(COLUMNS)
        found |= {
            "number": row.number,
            "group": row.group,
            "name": row.name,
            "op": row.op,
            "dtype": row.dtype,
            "variant": row.variant_name(self.variant),
            "contender": self.contender,
            "status": self.status,
            "error": self.error,
            "kernel": self.kernel,
            "launches": self.launches,
        }
        for name, times in (("device", self.device), ("host", self.host)):
            if times:
                found[f"{name}_us"] = times.median * 1e6
                found[f"{name}_p10_us"], found[f"{name}_p90_us"] = times.p10 * 1e6, times.p90 * 1e6
        if seconds:
            found |= {"tflops": row.flops / seconds / 1e12, "gbytes_per_s": row.bytes / seconds / 1e9}
            found |= {"share_of_roof": (self.roof_seconds or 0) / seconds, "samples": self.device and self.device.count}
        if self.predicted_seconds is not None:
            found["predicted_us"] = self.predicted_seconds * 1e6
        return found | {name: value for name, value in self.facts.items() if name in COLUMNS}


@dataclass
class Compiling:
    """Seconds that slow peers may take to prepare, and have taken."""

    allowed: float
    spent: float = 0.0

    @property
    def why_not(self) -> str:
        """Why no further one is prepared; "" where one is."""
        if self.spent < self.allowed:
            return ""
        return f"the {self.allowed:g} s for compiling are used up (--compile-seconds)"


@dataclass
class Job:
    """One row and variant on a GPU."""

    gpu: Any
    row: Row
    variant: str
    sets: Sequence[Operands]
    seed: int
    compiling: Compiling
    lines: list[Line] = field(default_factory=list)

    def run(self, seconds: float) -> None:
        """Checks every contender, then times those that are right. Nobody's failure is another's."""
        explanation = self.row.explain(None, self.variant)
        truth = Truth(self.row, self.variant, self.sets[0], self.seed)
        right: dict[str, tuple[Line, Peer, Prepared]] = {}
        for peer in contenders(self.row):
            line = Line(self.row, self.variant, peer.name, "ok", facts=dict(self.gpu.facts))
            line.roof_seconds = roof_seconds(self.row, explanation, self.gpu.facts["gpu"])
            self.lines.append(line)
            if peer.name == "cuconv":
                line.predicted_seconds, line.kernel = explanation.seconds, explanation.algorithm
            why = peer.absent(self.row, self.variant) or (self.compiling.why_not if peer.slow else "")
            if why:
                line.status = f"absent: {why}"
                continue
            with self._told(line):
                prepared = self._checked(peer, line, truth)
                right[peer.name] = line, peer, prepared
        with self.gpu.stream():
            replays = dict(self._captured(right, truth, seconds * DEVICE_SHARE))
            if replays:
                times = timing.replay_times(replays, SAMPLES, seconds=seconds * DEVICE_SHARE)
                for name, each in times.items():
                    right[name][0].device, right[name][0].launches = each, replays[name].launches
        clocks = self.gpu.clocks()
        calls = {name: right[name][2].calls[0] for name in replays}
        hosts = timing.host_times(calls, SAMPLES, self.gpu.finish, seconds * (1 - DEVICE_SHARE)) if calls else {}
        for name, each in hosts.items():
            right[name][0].host = each
        for line in self.lines:
            line.facts |= clocks

    def fail(self, error: Exception) -> None:
        """Marks everyone failed whom an error of the whole job has kept from being timed."""
        if not self.lines:
            self.lines.append(Line(self.row, self.variant, "cuconv", "ok", facts=dict(self.gpu.facts)))
        for line in self.lines:
            if line.ok and not line.host:
                line.status = failure(error)

    def _checked(self, peer: Peer, line: Line, truth: Truth) -> Prepared:
        """The peer prepared, its first answer found right, in memory that held NaN before."""
        start = time.perf_counter()
        prepared = peer.prepare(self.row, self.variant, self.sets)
        self.gpu.poison(self.row)
        result = prepared.calls[0]()
        self.gpu.finish()
        if peer.slow:
            self.compiling.spent += time.perf_counter() - start
        line.error = right_or_raise(prepared, result, truth)
        return prepared

    def _captured(
        self, right: dict[str, tuple[Line, Peer, Prepared]], truth: Truth, seconds: float
    ) -> Iterator[tuple[str, Replay]]:
        """The graphs of those whose replay is right, too."""
        share = seconds / max(1, len(right))
        for name, (line, peer, prepared) in right.items():
            with self._told(line, "in a CUDA graph: "):
                call = self.gpu.device_call(peer, prepared)
                replay = call.capture(timing.launches_within(call, SAMPLES, LAUNCHES, share))
                for result in replay.results:
                    for array in prepared.answers(result):
                        poison(array)
                replay()
                self.gpu.finish()
                line.error = max(line.error or 0.0, right_or_raise(prepared, replay.results[0], truth))
                if not all(finite(array) for result in replay.results for array in prepared.answers(result)):
                    raise WrongAnswerError("it holds numbers that are not finite")
                yield name, replay

    @contextlib.contextmanager
    def _told(self, line: Line, where: str = "") -> Iterator[None]:
        """Turns an error into the line's status."""
        try:
            yield
        except WrongAnswerError as error:
            line.status = f"wrong: {where}{error}"
        except Exception as error:  # noqa: BLE001  every library has its own, and the others are still to be measured
            line.status = failure(error, where)


def right_or_raise(prepared: Prepared, result: Any, truth: Truth) -> float:
    """The largest error as a share of what is allowed.

    Raises:
        WrongAnswerError: it is more than that.
    """
    share = prepared.share(result) if prepared.share else truth.share(prepared.answers(result), prepared.tf32)
    if not share <= 1:  # NaN, too
        raise WrongAnswerError(f"off by {share:.3g} times what is allowed")
    return share


def failure(error: Exception, where: str = "") -> str:
    """The status of a contender whom an error has stopped."""
    return f"failed: {where}{type(error).__name__}: {one_line(str(error))}"


def one_line(text: str, most: int = 300) -> str:
    """The beginning of a message, without line breaks."""
    return " ".join(text.split())[:most]


def roof_seconds(row: Row, explanation: Any, gpu: str) -> float:
    """The row's roof on a GPU; the suite knows what products reach on an H200, of others the data sheet is taken."""
    return row.roof_seconds if "H200" in gpu else float(explanation.roof_seconds)


def operand_sets(row: Row, library: Any, seed: int) -> list[Operands]:
    """Operands of different values, as many as rotate through a graph."""
    copies = max(1, min(LAUNCHES, math.ceil(ROTATED_BYTES / row.bytes)))
    return [Operands.random(row, library, seed + number) for number in range(copies)]


# --- Writing -----------------------------------------------------------------------------------------------------


class Csv:
    """A CSV file that grows line by line; what is written stays written whatever comes after.

    Raises:
        UsageError: the file has other columns.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(COLUMNS):
                raise UsageError(f"`--csv` must be a new file or one with this command's columns. Received: csv={path}")
        self._file = path.open("a", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")
        if not self._file.tell():
            self._writer.writeheader()
            self._file.flush()

    def write(self, record: dict[str, Any]) -> None:
        """Appends one line, on disk when this returns."""
        self._writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in record.items()})
        self._file.flush()

    def close(self) -> None:
        """Ends it."""
        self._file.close()


def csv_path(options: argparse.Namespace, gpu: str) -> Path:
    """Where the lines go: what was asked for, or the results of this GPU."""
    name = gpu.lower().removeprefix("nvidia ").replace(" ", "-")
    return options.csv or RESULTS / f"gpu-{name}.csv"


# --- Running -----------------------------------------------------------------------------------------------------


def jobs_of(rows: Iterable[Row], variant: str | None) -> list[tuple[Row, tuple[str, ...]]]:
    """The rows with the variants to run of each."""
    wanted = VARIANTS if variant is None else (variant,)
    found = [(row, tuple(each for each in row.variants if each in wanted)) for row in rows]
    return [(row, variants) for row, variants in found if variants]


def measured(
    gpu: Any, jobs: Sequence[tuple[Row, tuple[str, ...]]], options: argparse.Namespace, step: Callable[[str], None]
) -> Iterator[Line]:
    """The lines of all rows, as they come."""
    start, compiling = time.monotonic(), Compiling(options.compile_seconds)
    left = sum(len(variants) for _, variants in jobs)
    limit = options.limit_seconds or math.inf
    planned = options.limit_seconds or SECONDS_PER_ROW * len(jobs)
    for row, variants in jobs:
        sets: list[Operands] = []
        for variant in variants:
            step(f"{row.number} {row.name}, {row.variant_name(variant)}")
            spent = time.monotonic() - start
            if spent >= limit:
                status = f"{NOT_MEASURED}: the time limit of {limit:g} s was reached"
                yield Line(row, variant, "cuconv", status, facts=dict(gpu.facts))
                left -= 1
                continue
            job = Job(gpu, row, variant, sets, options.seed, compiling)
            try:
                sets[:] = sets or operand_sets(row, gpu.library, options.seed)
                share = (planned - spent) / left / 2
                job.run(min(MOST_SECONDS, max(LEAST_SECONDS, share)))
            except Exception as error:  # noqa: BLE001  out of memory, or a plan: the next row is another matter
                job.fail(error)
            yield from job.lines
            del job
            left -= 1
        sets.clear()
        gpu.release()


def foreseen(
    jobs: Sequence[tuple[Row, tuple[str, ...]]], options: argparse.Namespace, step: Callable[[str], None]
) -> Iterator[Line]:
    """The same lines without a GPU: plans and predictions, and who would take part."""
    facts = {"commit": comparison.commit(), "date": comparison.today()}
    for row, variants in jobs:
        for variant in variants:
            step(f"{row.number} {row.name}, {row.variant_name(variant)}")
            explanation = row.explain(options.device, variant)
            for peer in contenders(row):
                why = peer.absent(row, variant)
                line = Line(row, variant, peer.name, f"absent: {why}" if why else NOT_MEASURED, facts=facts)
                if peer.name == "cuconv":
                    line.predicted_seconds, line.kernel = explanation.seconds, explanation.algorithm
                    line.roof_seconds = roof_seconds(row, explanation, options.device)
                yield line


# --- Reading -----------------------------------------------------------------------------------------------------


def best_peer(lines: Sequence[Line], ours: Line) -> Line | None:
    """The fastest of those who did the same as `ours`."""
    same = [
        line
        for line in lines
        if line.row is ours.row and line.variant == ours.variant and line.device and competes(line.row, line.contender)
    ]
    return min(same, key=lambda line: line.device.median if line.device else math.inf, default=None)


def narrow(title: str, row: int) -> Table:
    """A table of rows and variants, `row` columns of their names, that leaves room for numbers on 80 columns."""
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("#", justify="right", min_width=3)
    table.add_column("row", no_wrap=True, max_width=row)
    table.add_column("variant", no_wrap=True, min_width=9)
    return table


def result_table(lines: Sequence[Line]) -> Table:
    """cuconv against the best peer of every row: what is wrong first, then where we lose, the worst first."""
    table = narrow("device time in us; ratio: of the best peer to cuconv, below 1 we lose", row=15)
    table.add_column("cuconv", justify="right", min_width=8)
    for heading, width in (("ratio", 5), ("roof", 4)):
        table.add_column(heading, justify="right", min_width=width)
    table.add_column("best peer")
    entries = []
    for ours in (line for line in lines if line.contender == "cuconv"):
        head = (str(ours.row.number), ours.row.name, ours.row.variant_name(ours.variant))
        if not (ours.ok and ours.device):
            entries.append((-1.0, (*head, "-", "-", "-", one_line(ours.status, 60))))
            continue
        mine, peer = ours.device.median, best_peer(lines, ours)
        theirs = peer.device.median if peer and peer.device else math.nan
        ratio = math.inf if peer is None else theirs / mine
        entries.append(
            (
                ratio,
                (
                    *head,
                    f"{mine * 1e6:.1f}",
                    f"{ratio:.2f}" if peer else "-",
                    f"{(ours.roof_seconds or 0) / mine:.0%}",
                    peer.contender if peer else "none took part",
                ),
            )
        )
    for _, cells in sorted(entries, key=lambda entry: entry[0]):
        table.add_row(*cells)
    return table


def plan_table(lines: Sequence[Line], device: str) -> Table:
    """What a dry run foresees."""
    table = narrow(f"predicted for {device}, not measured", row=22)
    table.add_column("kernel", no_wrap=True, max_width=16)
    for heading, width in (("us", 8), ("roof us", 7), ("roof", 4)):
        table.add_column(heading, justify="right", min_width=width)
    for line in lines:
        if line.predicted_seconds is None or line.roof_seconds is None:
            continue
        table.add_row(
            str(line.row.number),
            line.row.name,
            line.row.variant_name(line.variant),
            line.kernel,
            f"{line.predicted_seconds * 1e6:.1f}",
            f"{line.roof_seconds * 1e6:.1f}",
            f"{line.roof_seconds / line.predicted_seconds:.0%}",
        )
    return table


def part_table(lines: Sequence[Line]) -> Table:
    """In how many rows each contender takes part, and why not in the others."""
    table = Table(title="who takes part", box=box.SIMPLE, pad_edge=False)
    table.add_column("contender", no_wrap=True)
    table.add_column("in", justify="right")
    table.add_column("of", justify="right")
    table.add_column("otherwise")
    for name in dict.fromkeys(line.contender for line in lines):
        own = [line for line in lines if line.contender == name]
        reasons = [line.status.removeprefix("absent: ") for line in own if line.status not in ("ok", NOT_MEASURED)]
        told = [f"{one_line(reason, 90)} ({reasons.count(reason)})" for reason in dict.fromkeys(reasons)]
        table.add_row(name, str(len(own) - len(reasons)), str(len(own)), "\n".join(told))
    return table


def write_json(path: Path, lines: Sequence[Line], options: argparse.Namespace) -> None:
    """All lines as one JSON object."""
    report = {"dry_run": options.dry_run, "seed": options.seed, "rows": [line.record() for line in lines]}
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# --- The command -------------------------------------------------------------------------------------------------


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[], help="only rows of these groups")
    parser.add_argument("--rows", nargs="+", type=int, default=[], metavar="N", help="only rows of these numbers")
    parser.add_argument("--variant", choices=VARIANTS, help="without or with bias and activation; both if not given")
    parser.add_argument("--dry-run", action="store_true", help="everything but the GPU's part")
    parser.add_argument("--device", default="H200", help="the GPU that --dry-run predicts for")
    parser.add_argument("--csv", type=Path, help="append lines to this file; else to benchmarks/results/gpu-NAME.csv")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write all lines to this file")
    parser.add_argument("--limit-seconds", type=float, metavar="S", help="start no further row after so long")
    parser.add_argument(
        "--compile-seconds", type=float, default=30.0, metavar="S", help="let torch.compile take so long in all"
    )
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**31), help="of operands and places to check")
    options = parser.parse_args(arguments)
    if options.limit_seconds is not None and not options.limit_seconds > 0:
        parser.error(f"`--limit-seconds` must be above 0. Received: limit_seconds={options.limit_seconds}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    console = Console()
    try:
        jobs = jobs_of(selected(options.group, options.rows), options.variant)
        if not jobs:
            raise UsageError(f"no chosen row has this variant. Received: variant={options.variant}")
        if options.dry_run:
            device(options.device)  # or say which there are
        gpu = None if options.dry_run else Gpu()
        path = csv_path(options, options.device if gpu is None else gpu.facts["gpu"])
        file = None if gpu is None and options.csv is None else Csv(path)
    except (UsageError, ValueError, runtime.PlanError) as error:
        print(f"benchmarks.run: error: {error}", file=sys.stderr)
        return 2
    lines: list[Line] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    interrupted = False
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("", total=sum(len(variants) for _, variants in jobs))
            started = iter(range(sys.maxsize))

            def step(text: str) -> None:
                progress.update(task, description=text, completed=next(started))

            for line in foreseen(jobs, options, step) if gpu is None else measured(gpu, jobs, options, step):
                lines.append(line)
                if file:
                    file.write(line.record())
            progress.update(task, completed=next(started))
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if file:
            file.close()
        if options.json:
            write_json(options.json, lines, options)
    if gpu is None:
        console.print(plan_table(lines, options.device))
    console.print(part_table(lines))
    if gpu is not None:
        console.print(result_table(lines))
    written = [str(each) for each in (path, options.json) if each]
    would = "would be " if file is None else ""
    console.print(f"seed {options.seed}; lines {would}written to {' and '.join(written)}", soft_wrap=True)
    if interrupted:
        return 130
    ours = [line for line in lines if line.contender == "cuconv"]
    return int(any(line.status.startswith(("wrong", "failed")) for line in ours))


if __name__ == "__main__":
    raise SystemExit(main())
