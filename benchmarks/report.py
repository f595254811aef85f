"""What the measured CSVs say: `python -m benchmarks.report` prints the README's tables and the model's errors.

python -m benchmarks.report [--check]                       the README, from cpu.csv and the newest gpu-*.csv
python -m benchmarks.report --compare OLD.csv NEW.csv       what changed beyond noise; 1 where cuconv got worse
python -m benchmarks.report --plots FOLDER CSV              roofline and times, as PNG and SVG
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers import CEILINGS, TF32_SUFFIX
from benchmarks.suite import GROUPS
from cuconv import timing
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import DeviceLimits

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
CPU_CSV = RESULTS / "cpu.csv"
PEERS = ("cuconv", "torch", "onnxruntime")

CUCONV = "cuconv"
SWEEP = "sweep"  # group
UNTRIED = "not measured"  # a status begins so where time was up, and in dry runs
NOT_MEASURED = "Not yet measured on a GPU."
WORST = 5  # rows told of where the model errs most

Line = dict[str, str]
# What is read of a results file; benchmarks.run writes more.
COLUMNS = (
    *("number", "group", "name", "op", "dtype", "variant", "contender", "status", "device_us", "device_p10_us"),
    *("device_p90_us", "host_us", "host_p10_us", "host_p90_us", "tflops", "gbytes_per_s", "share_of_roof"),
    *("predicted_us", "kernel", "gpu", "driver", "cuda", "commit", "date", "sm_clock_mhz", "memory_clock_mhz"),
)


# --- The README's markers ----------------------------------------------------------------------------------------


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises:
        ValueError: `text` does not hold each marker once, in order.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, found, rest = text.partition(first)
    _, closed, tail = rest.partition(last)
    if not (found and closed) or first in rest or last in tail:
        raise ValueError(f"the text must hold {first} and {last} once each, in this order")
    return f"{head}{first}\n{content}\n{last}{tail}"


def filled(text: str) -> str:
    """The README with the tables of the CSVs."""
    with CPU_CSV.open(newline="") as file:
        text = between(text, "cpu table", cpu_table(list(csv.DictReader(file))))
    measured = newest(RESULTS)
    return between(text, "gpu table", gpu_tables(read(measured)) if measured else NOT_MEASURED)


# --- CPU ---------------------------------------------------------------------------------------------------------


def cpu_table(rows: list[dict[str, str]]) -> str:
    """The rows of benchmarks.cpu as a Markdown table, with the machine and the median below it."""
    lines = [
        "| row | cuconv ms | GFLOP/s | PyTorch ms | ONNX Runtime ms | ratio to PyTorch |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = [f"{float(row[f'{name}_ms']):.3g}" if row[f"{name}_ms"] else "-" for name in PEERS]
        ratio = f"{float(row['ratio_torch']):.2f}" if row["ratio_torch"] else "-"
        lines.append(
            f"| {row['name']} | {times[0]} | {float(row['cuconv_gflops']):.0f} | {times[1]} | {times[2]} | {ratio} |"
        )
    ratios = [float(row["ratio_torch"]) for row in rows if row["ratio_torch"]]
    median = f"The median ratio to PyTorch is {statistics.median(ratios):.2f}. " if ratios else ""
    told = rows[0]
    where = f"{told['cpu']}, one thread; NumPy {told['numpy']} with {told['blas']}"
    peers = ", ".join(
        f"{title} {told[name]}" for name, title in (("torch", "PyTorch"), ("onnxruntime", "ONNX Runtime"))
    )
    return "\n".join([*lines, "", f"{median}{where}; {peers}; commit {told['commit']}, {told['date']}."])


# --- GPU ---------------------------------------------------------------------------------------------------------


def key(line: Line) -> tuple[str, ...]:
    """What makes a line of one file the same as one of another."""
    return tuple(line[name] for name in ("number", "name", "op", "dtype", "variant", "contender"))


def problem(line: Line) -> tuple[str, ...]:
    """What contenders of one table row have in common: they all do the same."""
    return key(line)[:-1]


def read(path: Path) -> list[Line]:
    """What a results file tells: the last of lines for the same, none that was cut off while being written, and nothing
    of what there was no time for.

    Raises:
        ValueError: it is no results file of a GPU.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in COLUMNS if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} must have a GPU's results. Received: no columns {', '.join(missing)}")
        lines = [line for line in reader if None not in line.values() and not line["status"].startswith(UNTRIED)]
    last = {key(line): i for i, line in enumerate(lines)}
    return [lines[i] for i in sorted(last.values())]


def newest(folder: Path) -> Path | None:
    """The gpu-*.csv that was measured last, by what stands in it."""
    dates = {
        path: max((line["date"] for line in read(path) if ok(line)), default="") for path in folder.glob("gpu-*.csv")
    }
    return max((path for path in dates if dates[path]), key=lambda path: (dates[path], path), default=None)


def value(line: Line, column: str) -> float | None:
    """A number of a line; None where it was not measured."""
    text = line.get(column) or ""
    return float(text) if text else None


def ok(line: Line) -> bool:
    """Whether it was computed, found right and timed."""
    return line["status"] == "ok" and value(line, "device_us") is not None


def competes(line: Line) -> bool:
    """Whether a peer did what the row asks for, and right: no ceiling, and no TF32 where float32 is to be exact."""
    rounded = line["dtype"] == "float32" and line["contender"].endswith(TF32_SUFFIX)
    return ok(line) and line["contender"] not in (CUCONV, *CEILINGS) and not rounded


def title(line: Line) -> str:
    """The problem in a few words."""
    op = "" if line["op"] in ("conv", "depthwise_conv", "conv_transpose", "separable_conv") else f", {line['op']}"
    variant = "" if line["variant"] == "plain" else f", {line['variant']}"
    return f"{line['number']} {line['name']}{op}, {line['dtype']}{variant}"


@dataclass(frozen=True)
class Standing:
    """cuconv's line of a problem, and the fastest peer that computes the same, if there is one."""

    ours: Line
    best: Line | None

    @property
    def lead(self) -> float | None:
        """The best peer's time in multiples of ours: below 1 we lose."""
        ours, best = value(self.ours, "device_us"), self.best and value(self.best, "device_us")
        return best / ours if ours and best and ok(self.ours) else None

    @property
    def lost(self) -> bool:
        """Whether a peer is faster, or cuconv has no right answer."""
        return not ok(self.ours) or (self.lead is not None and self.lead < 1)


def standings(lines: Sequence[Line]) -> list[Standing]:
    """Where cuconv failed first, then where it loses most, last where nobody else computes the problem."""
    found = []
    for ours in (line for line in lines if line["contender"] == CUCONV):
        peers = [line for line in lines if problem(line) == problem(ours) and competes(line)]
        found.append(Standing(ours, min(peers, key=lambda line: float(line["device_us"]), default=None)))
    return sorted(found, key=lambda each: (ok(each.ours), each.lead or math.inf))


def geomean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(list(values))


def _share(line: Line) -> str:
    share = value(line, "share_of_roof")
    return "-" if share is None else f"{100 * share:.0f} %"


def gpu_tables(lines: Sequence[Line]) -> str:
    """The groups, the rows with those that we lose first, and the dilation sweep, as Markdown."""
    rows = [each for each in standings(lines) if each.ours["group"] != SWEEP]
    parts = [_machine(lines)]
    if rows:
        lost = [each for each in rows if each.lost]
        won = [each for each in rows if not each.lost]
        parts += [_group_table(rows), f"Lost, {len(lost)} of {len(rows)} problems:" if lost else "No problem is lost."]
        parts += [_row_table(lost)] if lost else []
        # A blank line behind the summary, or GitHub takes the table for HTML.
        parts += ["<details><summary>All others</summary>", _row_table(won), "</details>"] if won else []
    if sweep := [line for line in lines if line["group"] == SWEEP]:
        parts.append(_sweep_table(sweep))
    if errors := [f"{each.kernel} {each.ratio:.2f} ({each.count})" for each in predictions(lines)]:
        parts.append(f"Measured time in multiples of what the plans predict, geometric means: {', '.join(errors)}.")
    return "\n\n".join(parts)


def _machine(lines: Sequence[Line]) -> str:
    told = lines[-1]
    reasons = {line["contender"]: line["status"] for line in lines if line["status"].startswith("absent")}
    absent = [
        f"{name} ({reasons[name]})" for name in reasons if not any(ok(x) for x in lines if x["contender"] == name)
    ]
    compared = f" Not compared: {', '.join(absent)}." if absent else ""
    return (
        f"{told['gpu']} at {told['sm_clock_mhz']} MHz, memory at {told['memory_clock_mhz']} MHz; driver "
        f"{told['driver']}, CUDA {told['cuda']}; commit {told['commit']}, {told['date']}. Device time, medians. A lead "
        "is the time of the fastest peer that computes the same, bias and activation included, divided by ours: "
        f"below 1 we lose.{compared}"
    )


def _group_table(rows: Sequence[Standing]) -> str:
    table = [
        "| group | problems | lost | lead, geometric mean | smallest lead | share of the roof, median |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for group in sorted({each.ours["group"] for each in rows}):
        mine = [each for each in rows if each.ours["group"] == group]
        leads = [each.lead for each in mine if each.lead is not None]
        shares = [share for each in mine if ok(each.ours) and (share := value(each.ours, "share_of_roof")) is not None]
        lost = sum(each.lost for each in mine)
        told = f"{geomean(leads):.2f} | {min(leads):.2f}" if leads else "- | -"
        median = f"{100 * statistics.median(shares):.0f} %" if shares else "-"
        table.append(f"| {group}: {GROUPS.get(group, group)} | {len(mine)} | {lost} | {told} | {median} |")
    return "\n".join(table)


def _row_table(rows: Sequence[Standing]) -> str:
    table = [
        "| problem | cuconv us | best peer | its us | lead | share of the roof |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for each in rows:
        ours = f"{float(each.ours['device_us']):.1f}" if ok(each.ours) else each.ours["status"]
        peer = (each.best["contender"], f"{float(each.best['device_us']):.1f}") if each.best else ("none", "-")
        lead = "-" if each.lead is None else f"{each.lead:.2f}"
        table.append(f"| {title(each.ours)} | {ours} | {' | '.join(peer)} | {lead} | {_share(each.ours)} |")
    return "\n".join(table)


def _sweep_table(lines: Sequence[Line]) -> str:
    """Microseconds of each contender by dilation, and its slowest over its fastest."""
    found = []
    for variant in dict.fromkeys(line["variant"] for line in lines):
        mine = [line for line in lines if line["variant"] == variant]
        names = list(dict.fromkeys(line["name"] for line in sorted(mine, key=lambda line: int(line["number"]))))
        heads = [name.rpartition(" ")[2] for name in names]
        what = f"{names[0].rpartition(' ')[0]}, {mine[0]['dtype']}, {variant}, us"
        table = [
            f"| {what} | {' | '.join(heads)} | slowest / fastest |",
            f"|---|{'---:|' * (len(names) + 1)}",
        ]
        for contender in dict.fromkeys(line["contender"] for line in mine):
            times = {
                line["name"]: float(line["device_us"]) for line in mine if line["contender"] == contender and ok(line)
            }
            if times:
                cells = [f"{times[name]:.1f}" if name in times else "-" for name in names]
                spread = max(times.values()) / min(times.values())
                table.append(f"| {contender} | {' | '.join(cells)} | {spread:.2f} |")
        found.append("\n".join(table))
    return "\n\n".join(found)


# --- The model's errors ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A kernel's measured time in multiples of the predicted: geometric mean and the rows furthest from it."""

    kernel: str
    count: int
    ratio: float
    worst: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        rows = "; ".join(f"{name}: {ratio:.2f}" for name, ratio in self.worst)
        return f"{self.kernel}: measured / predicted {self.ratio:.2f} over {self.count}; furthest off {rows}"


def predictions(lines: Iterable[Line]) -> list[Prediction]:
    """The model's error, kernel by kernel; empty where nothing was predicted and measured."""
    ratios: dict[str, list[tuple[str, float]]] = {}
    for line in lines:
        predicted = value(line, "predicted_us")
        if line["contender"] == CUCONV and ok(line) and predicted:
            ratios.setdefault(line["kernel"], []).append((title(line), float(line["device_us"]) / predicted))
    return [
        Prediction(
            kernel,
            len(found),
            geomean(ratio for _, ratio in found),
            tuple(sorted(found, key=lambda each: -abs(math.log(each[1])))[:WORST]),
        )
        for kernel, found in sorted(ratios.items())
    ]


# --- Two files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """What differs between two files; `kind` is "regression", "improvement", "status", "new" or "missing"."""

    kind: str
    problem: str
    contender: str
    column: str = ""
    before: float | str = ""
    after: float | str = ""

    @property
    def fails(self) -> bool:
        """Whether cuconv got slower, or stopped to compute what it did."""
        return self.contender == CUCONV and (
            self.kind == "regression" or (self.kind == "status" and self.before == "ok")
        )

    def __str__(self) -> str:
        told = f"{self.kind}: {self.problem}, {self.contender}"
        if self.kind in ("regression", "improvement"):
            ratio = float(self.after) / float(self.before)
            return f"{told}: {self.column} {float(self.before):.2f} -> {float(self.after):.2f} us ({ratio - 1:+.1%})"
        return f"{told}: {self.before} -> {self.after}" if self.kind == "status" else told


def changes(old: Sequence[Line], new: Sequence[Line]) -> list[Change]:
    """What moved beyond noise (:func:`cuconv.timing.verdict`), what came and went."""
    before, after = ({key(line): line for line in lines} for lines in (old, new))
    found = [Change("missing", title(line), line["contender"]) for each, line in before.items() if each not in after]
    found += [Change("new", title(line), line["contender"]) for each, line in after.items() if each not in before]
    for each in (each for each in after if each in before):
        was, now = before[each], after[each]
        if was["status"] != now["status"] and "ok" in (was["status"], now["status"]):
            found.append(Change("status", title(now), now["contender"], "", was["status"], now["status"]))
        elif ok(was) and ok(now):
            found += [change for what in ("device", "host") if (change := _moved(was, now, what))]
    order = ("regression", "status", "improvement", "missing", "new")
    return sorted(found, key=lambda change: (not change.fails, order.index(change.kind)))


def _moved(was: Line, now: Line, what: str) -> Change | None:
    """The change of a median, where it is one."""
    figures = [[value(line, f"{what}{part}_us") for part in ("", "_p10", "_p90")] for line in (was, now)]
    if None in (*figures[0], *figures[1]):
        return None
    before, after = (timing.Timing(*each, count=1) for each in figures)  # type: ignore[arg-type]
    kind = {"slower": "regression", "faster": "improvement"}.get(timing.verdict(before, after))
    return Change(kind, title(now), now["contender"], what, before.median, after.median) if kind else None


def different_machines(old: Sequence[Line], new: Sequence[Line]) -> list[str]:
    """Why two files may differ though cuconv did not change."""
    found = []
    for column in ("gpu", "driver", "cuda", "sm_clock_mhz", "memory_clock_mhz"):
        was, now = ({line[column] for line in lines} for lines in (old, new))
        if was != now:
            found.append(f"{column}: {', '.join(sorted(was))} -> {', '.join(sorted(now))}")
    return found


# --- Plots -------------------------------------------------------------------------------------------------------


def limits_of(gpu: str) -> DeviceLimits:
    """The limits of a GPU by the name that its driver gives it.

    Raises:
        ValueError: no such GPU is known.
    """
    known = [name for name in DEVICES if re.search(rf"\b{name}\b", gpu)]
    if not known:
        raise ValueError(f"the GPU must be one of {', '.join(DEVICES)}. Received: {gpu!r}")
    return DEVICES[max(known, key=len)]


def plot(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Writes a roofline of the plain rows, and the times of each group without and with bias, as PNG and SVG.

    Raises:
        ValueError: there is no line, or the GPU's limits are not known.
    """
    from cuconv import plots

    if not lines:
        raise ValueError("the file must hold a measured line. Received: none")
    gpu = lines[-1]["gpu"]
    points, written = [], []

    def files(name: str) -> list[Path]:
        paths = [folder / f"{name}.{ending}" for ending in ("png", "svg")]
        written.extend(paths)
        return paths

    for each in standings(lines):
        ours = each.ours
        if not ok(ours) or ours["variant"] != "plain" or ours["group"] == SWEEP:
            continue
        rate, bandwidth = (value(ours, column) or 0.0 for column in ("tflops", "gbytes_per_s"))
        if not (rate and bandwidth):
            continue
        flops = rate * 1e6 * float(ours["device_us"])
        intensity = 1e3 * rate / bandwidth
        name = title(ours)
        points.append((name, intensity, 1e12 * rate, "measured"))
        if predicted := value(ours, "predicted_us"):
            points.append((name, intensity, flops / predicted * 1e6, "predicted"))
        if each.best:
            points.append((name, intensity, flops / float(each.best["device_us"]) * 1e6, "best peer"))
    points.sort(key=lambda point: int(point[0].partition(" ")[0]))
    if points:
        plots.roofline(points, limits_of(gpu), files("roofline"), f"The suite's plain rows on {gpu}")
    for group, fused in sorted({(line["group"], line["variant"] != "plain") for line in lines}):
        bars = []
        for line in lines:
            share = value(line, "share_of_roof")
            if (line["group"], line["variant"] != "plain") == (group, fused) and ok(line) and share:
                median, low, high = (1e-6 * float(line[f"device{part}_us"]) for part in ("", "_p10", "_p90"))
                bars.append((title(line), line["contender"], median, low, high, share * median))
        if bars:
            what = f"{GROUPS.get(group, group)}, {'with bias and activation' if fused else 'plain'}, on {gpu}"
            plots.bars(bars, files(f"times-{group}{'-fused' if fused else ''}"), what[0].upper() + what[1:])
    return written


# --- Command line ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables into the README; `--check` only says by its exit code whether they are those of the CSVs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description="What the measured CSVs say.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="1 where the README's tables are not those of the CSVs")
    what.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="what changed beyond noise")
    what.add_argument("--plots", nargs=2, type=Path, metavar=("FOLDER", "CSV"), help="draw roofline and times")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    given = parser.parse_args(arguments)

    try:
        if given.compare:
            old, new = map(read, given.compare)
            return _compare(old, new, given.json)
        if given.plots:
            folder, file = given.plots
            print("\n".join(map(str, plot(read(file), folder))))
            return 0
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))

    text = README.read_text()
    written = filled(text)
    if given.check:
        return int(written != text)
    README.write_text(written)
    measured = newest(RESULTS)
    found = predictions(read(measured)) if measured else []
    if given.json:
        print(json.dumps({"file": measured and measured.name, "predictions": list(map(asdict, found))}, indent=1))
    else:
        nothing = f"{NOT_MEASURED} The model's predictions have been compared with nothing."
        print("\n".join(map(str, found)) or nothing)
    return 0


def _compare(old: Sequence[Line], new: Sequence[Line], as_json: bool) -> int:
    """Prints what changed; 1 where cuconv got worse."""
    found, machines = changes(old, new), different_machines(old, new)
    if as_json:
        told = [{**asdict(change), "fails": change.fails} for change in found]
        print(json.dumps({"machine": machines, "changes": told}, indent=1))
    else:
        print("\n".join([*(f"not the same machine, {each}" for each in machines), *map(str, found)] or ["no change"]))
    return int(any(change.fails for change in found))


if __name__ == "__main__":
    sys.exit(main())
