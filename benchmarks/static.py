"""What can be said of the kernels' speed without a GPU: `python -m benchmarks.static`.

A line is one launch of one case on one architecture: what ptxas made of its kernel, how many of its blocks a
multiprocessor holds with the registers it really takes, what its main loop issues, and the share of the roof that the
model predicts for the whole case. Cases are the rows of :mod:`benchmarks.suite` and the plans of
tests/test_static_gates.py; the compiler comes with cuconv[test], and no GPU is needed.

benchmarks/results/static.csv is the committed baseline, of which benchmarks/NOTES.md shows the main loops. A figure
that is more than 3 % off fails the tests; `--write` accepts it, and asks for a reason where it is worse. Machine code
depends on the compiler, so figures of two versions of NVRTC are never compared; predictions always are, and spilled
registers are always an error.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib.metadata
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import report, suite
from cuconv.plan.devices import device
from cuconv.plan.occupancy import occupancy
from cuconv.plan.types import DeviceLimits, LaunchPlan

# The compiler and the disassembler belong to the tests: they are of no use without the checkout.
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import disassembly
import test_static_gates
from emulator import nvrtc

BASELINE = Path(__file__).parent / "results" / "static.csv"
NOTES = Path(__file__).parent / "NOTES.md"
MARKER = "main loops"
NOTED = ("sm_80", "sm_89", "sm_90")  # one of each generation of tensor cores that a kernel is written for
DEVICES = {
    "sm_75": "T4",
    "sm_80": "A100",
    "sm_86": "RTX 3090",
    "sm_89": "L4",
    "sm_90": "H200",
    "sm_100": "B200",
    "sm_120": "RTX 5090",
}

# The arithmetic that kernels are written for; a loop without multiply-adds is judged by its additions.
MULTIPLY_ADDS = ("FFMA", "FFMA2", "DFMA", "DMMA", "HMMA", "HGMMA", "UTCHMMA")
ADDITIONS = ("FADD", "FADD2", "DADD")
# Operations that an instruction of a warp takes the room of in its unit, by opcode and shape, and that unit's rate.
UNITS = {
    "FFMA": (64, "fp32_rate"),
    "FADD": (64, "fp32_rate"),
    "FFMA2": (128, "fp32_rate"),
    "FADD2": (128, "fp32_rate"),
    "DFMA": (64, "fp64_rate"),
    "DADD": (64, "fp64_rate"),
    "HMMA.16816": (4096, "fp16_rate"),
    "HMMA.1688.TF32": (2048, "tf32_rate"),
    "DMMA.884": (512, "dmma_rate"),
    "DMMA.16x8x8": (2048, "dmma_rate"),
    # Of a warp's quarter of a product.
    **{f"HGMMA.64x{n}x16": (512 * n, "fp16_rate") for n in range(8, 257, 8)},
    **{f"HGMMA.64x{n}x8": (256 * n, "tf32_rate") for n in range(8, 257, 8)},
}
MIX = 6  # opcodes told of a main loop

LIMIT = 0.03
# What is judged, and whether more of it is better; COMPILED of them are the compiler's.
JUDGED = {
    "registers": False,
    "stack_bytes": False,
    "occupancy": True,
    "arithmetic": True,
    "efficiency": True,
    "integer": False,
    "busy": True,
    "percent_of_roof": True,
}
COMPILED = frozenset(JUDGED) - {"percent_of_roof"}
ACCEPT = 'If this is meant: python -m benchmarks.static --write --reason "why"'


@dataclass(frozen=True)
class Line:
    """A launch; figures that this machine cannot tell, or that mean nothing for it, are None.

    Attributes:
        step: the place of the launch in its case, from 1.
        tile: of a matrix product.
        planned: registers of a thread, as the plan estimates them.
        registers, stack_bytes, shared_bytes: of the machine code; shared_bytes are the static ones.
        resident, occupancy: blocks that a multiprocessor holds, and their share of its warps.
        loop, arithmetic: instructions of a pass of the main loop, and those of them that are the arithmetic meant. The
            fewer they are the more is left to what is outside the loop, so their share alone would not do.
        efficiency: that share.
        integer: the share of instructions that compute indices, addresses and predicates.
        busy: the share of the pass in which the unit of that arithmetic works, at its peak, if the only other limit is
            one instruction a cycle and quarter of a multiprocessor.
        mix: its most frequent opcodes.
        percent_of_roof: predicted, of the whole case.
        nvrtc: the compiler's version.
        reason: why a figure was allowed to become worse than it was.
    """

    arch: str
    case: str
    step: int
    kernel: str
    tile: str = ""
    planned: int | None = None
    registers: int | None = None
    stack_bytes: int | None = None
    shared_bytes: int | None = None
    resident: int | None = None
    occupancy: float | None = None
    loop: int | None = None
    arithmetic: int | None = None
    efficiency: float | None = None
    integer: float | None = None
    busy: float | None = None
    mix: str = ""
    percent_of_roof: float | None = None
    nvrtc: str = ""
    reason: str = ""

    @property
    def key(self) -> tuple[str, str, int]:
        return self.arch, self.case, self.step

    def __str__(self) -> str:
        return f"{self.arch}, {self.case}, launch {self.step} ({self.kernel})"


COLUMNS = tuple(field.name for field in dataclasses.fields(Line))
INTEGERS = ("step", "planned", "registers", "stack_bytes", "shared_bytes", "resident", "loop", "arithmetic")
FRACTIONS = ("occupancy", "efficiency", "integer", "busy", "percent_of_roof")


# --- The figures -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The launches of a case on an architecture."""

    arch: str
    name: str
    plans: tuple[LaunchPlan, ...]
    percent_of_roof: float | None = None


def row_cases(arch: str) -> Iterator[Case]:
    """The rows of the suite."""
    for row in suite.ROWS:
        told = row.explain(DEVICES[arch])
        plans = tuple(step.plan for step in told.steps if step.plan is not None)
        yield Case(arch, f"{row.number} {row.name}", plans, _rounded(100 * told.share))


def gate_cases(arch: str) -> Iterator[Case]:
    """The plans of the static gates, for the device that those are made for."""
    limits = test_static_gates.LIMITS[arch]
    for gate in test_static_gates.GATES:
        if not gate.since <= limits.capability <= gate.until:
            continue
        yield Case(arch, f"gate {gate.name}", (gate.plan(limits),))


def cases(archs: Iterable[str] = DEVICES) -> list[Case]:
    return [case for arch in archs for make in (row_cases, gate_cases) for case in make(arch)]


def lines_of(case: Case, compiled: bool = True) -> list[Line]:
    """A line for each launch; without the compiler's figures unless `compiled`."""
    limits, found = device(DEVICES[case.arch]), []
    for step, plan in enumerate(case.plans, 1):
        line = Line(
            case.arch, case.name, step, plan.kernel, plan.tile, plan.registers, percent_of_roof=case.percent_of_roof
        )
        if compiled:
            code = _code(plan.kernel, plan.constants, case.arch)
            shared = code.shared_bytes + plan.dynamic_shared_bytes
            held = occupancy(limits, plan.threads, code.registers, shared)
            line = dataclasses.replace(
                line, **vars(code), resident=held.blocks, occupancy=_rounded(held.share), nvrtc=compiler()
            )
        found.append(line)
    return found


@dataclass(frozen=True)
class Code:
    """The part of a line that is the machine code's."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    loop: int | None = None
    arithmetic: int | None = None
    efficiency: float | None = None
    integer: float | None = None
    busy: float | None = None
    mix: str = ""


@functools.cache
def _code(kernel: str, constants: tuple[tuple[str, int | str], ...], arch: str) -> Code:
    plan = LaunchPlan(kernel, constants, (), (1, 1, 1), (1, 1, 1))
    function = test_static_gates.compiled(plan, arch)
    code = Code(function.registers, function.stack_bytes, function.shared_bytes)
    if not function.loops:
        return code
    names: tuple[str, ...] = MULTIPLY_ADDS
    loop = function.main_loop(*names)
    if not loop.share(*names):
        names = ADDITIONS
        loop = function.main_loop(*names)
    mix = ", ".join(f"{name} {count}" for name, count in list(loop.mix().items())[:MIX])
    integer = _rounded(loop.share(*disassembly.INTEGER))
    code = dataclasses.replace(code, loop=len(loop.instructions), integer=integer, mix=mix)
    if not loop.share(*names):
        return code
    return dataclasses.replace(
        code,
        arithmetic=sum(map(loop.count, names)),
        efficiency=_rounded(loop.share(*names)),
        busy=_rounded(busy(loop, device(DEVICES[arch]))),
    )


def busy(loop: disassembly.Code, limits: DeviceLimits) -> float:
    """The share of a pass in which the busiest arithmetic unit works, see :class:`Line`."""
    cycles = dict.fromkeys({rate for _, rate in UNITS.values()}, 0.0)
    a_second = limits.clock * limits.multiprocessors  # cycles of all of them, of four quarters each
    for opcode, (operations, rate) in UNITS.items():
        if peak := getattr(limits, rate):
            cycles[rate] += 4 * operations * loop.count(*opcode.split(".")) * a_second / peak
    longest = max(cycles.values())
    return longest / max(longest, len(loop.instructions))


@functools.cache
def compiler() -> str:
    """The version of NVRTC, to the last digit where the wheel tells it."""
    try:
        return importlib.metadata.version("nvidia-cuda-nvrtc")
    except importlib.metadata.PackageNotFoundError:
        return nvrtc.version()


def _rounded(value: float) -> float:
    """To three digits: what the file holds is what is compared."""
    return float(f"{value:.3g}")


# --- The file ----------------------------------------------------------------------------------------------------


def write(lines: Iterable[Line], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for line in lines:
        writer.writerow("" if value is None else value for value in dataclasses.astuple(line))


def read(path: Path) -> list[Line]:
    with path.open(newline="") as file:
        return [Line(**{name: _parsed(name, text) for name, text in row.items()}) for row in csv.DictReader(file)]


def _parsed(name: str, text: str) -> Any:
    if name in INTEGERS:
        return int(text) if text else None
    if name in FRACTIONS:
        return float(text) if text else None
    return text


# --- The comparison ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A figure that is more than LIMIT off its baseline; `column` is "" where it is the launch itself that differs."""

    line: Line
    column: str
    before: float | str
    after: float | str
    worse: bool

    def __str__(self) -> str:
        what = self.column or "launch"
        return f"{self.line}: {what} {self.before} -> {self.after}{', worse' if self.worse else ''}"


def compare(baseline: Iterable[Line], lines: Iterable[Line], columns: Iterable[str] = JUDGED) -> list[Change]:
    """Where `lines` leave the baseline of their architectures and cases; compilers of two versions are not compared."""
    found = []
    new = {line.key: line for line in lines}
    told = {line.key[:2] for line in new.values()}
    old = {line.key: line for line in baseline if line.key[:2] in told}
    for key in (*new, *(key for key in old if key not in new)):
        before, after = old.get(key), new.get(key)
        if before is None or after is None or before.kernel != after.kernel:
            line = after or before
            assert line is not None
            found.append(
                Change(line, "", before.kernel if before else "none", after.kernel if after else "none", False)
            )
        if before is None or after is None:
            continue
        for column in columns:
            if column in COMPILED and before.nvrtc != after.nvrtc:
                continue
            was, now = getattr(before, column) or 0, getattr(after, column) or 0
            if abs(now - was) > LIMIT * was:
                found.append(Change(after, column, was, now, (now < was) == JUDGED[column]))
    return found


def other_compilers(baseline: Iterable[Line], arch: str) -> str:
    """The versions of NVRTC that the baseline of an architecture was made with, if they are not the one at hand."""
    return ", ".join(sorted({line.nvrtc for line in baseline if line.arch == arch} - {compiler()}))


def spills(lines: Iterable[Line]) -> list[str]:
    """Launches whose threads have a stack: spilled registers, or a local array."""
    return [f"{line}: {line.stack_bytes} bytes of stack a thread" for line in lines if line.stack_bytes]


def merged(baseline: Sequence[Line], lines: Sequence[Line], reason: str) -> list[Line]:
    """The baseline with `lines` in the place of what it had for their architectures.

    A line that became worse gets `reason`, one that is as it was keeps the reason it had.

    Raises:
        ValueError: a line is worse and there is no reason.
    """
    changes = compare(baseline, lines)
    worse = {change.line.key for change in changes if change.worse}
    if worse and not reason:
        told = "\n".join(str(change) for change in changes if change.worse)
        raise ValueError(f'`--reason` must say why these are worse. Received: reason=""\n{told}')
    changed = {change.line.key for change in changes}
    kept = {line.key: line.reason for line in baseline if line.key not in changed}
    new = [dataclasses.replace(line, reason=reason if line.key in worse else kept.get(line.key, "")) for line in lines]
    archs = {line.arch for line in lines}
    order = list(DEVICES)
    return sorted(
        [*(line for line in baseline if line.arch not in archs), *new], key=lambda line: order.index(line.arch)
    )


# --- Command line ------------------------------------------------------------------------------------------------


def table(lines: Sequence[Line], arch: str) -> Table:
    """The lines of one architecture, for the screen."""
    shown = Table(
        title=f"{arch}, {DEVICES[arch]}: NVRTC {compiler()}, shares of the roof are predicted", box=box.SIMPLE
    )
    shown.add_column("case")
    shown.add_column("kernel")
    for name in ("registers", "blocks", "occupancy", "arithmetic", "integer", "busy", "% of roof"):
        shown.add_column(name, justify="right")
    shown.add_column("main loop")
    for line in (each for each in lines if each.arch == arch):
        shown.add_row(
            line.case if line.step == 1 else "",
            f"{line.kernel} {line.tile.partition(',')[0]}",
            str(line.registers),
            str(line.resident),
            f"{line.occupancy:.0%}",
            *("-" if share is None else f"{share:.0%}" for share in (line.efficiency, line.integer, line.busy)),
            "-" if line.percent_of_roof is None or line.step > 1 else f"{line.percent_of_roof:g}",
            line.mix,
        )
    return shown


def markdown(lines: Iterable[Line]) -> str:
    """The main loops of the gates' kernels that hold arithmetic, for NOTES.md."""
    rows = [
        "| kernel | arch | registers | instructions | most frequent | integer | busy |",
        "|---|---|---:|---:|---|---:|---:|",
    ]
    noted = [line for line in lines if line.arch in NOTED and line.case.startswith("gate ") and line.busy is not None]
    rows += [
        f"| {line.case.removeprefix('gate ')} | {line.arch} | {line.registers} | {line.loop} | {line.mix} "
        f"| {line.integer:.0%} | {line.busy:.0%} |"
        for line in sorted(noted, key=lambda line: line.case)  # keeps the order of architectures
    ]
    return "\n".join(rows)


def noted(text: str, lines: Iterable[Line]) -> str:
    """NOTES.md with the main loops of `lines`."""
    return report.between(text, MARKER, markdown(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description="Figures of the kernels' code.")
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=tuple(DEVICES),
        default=list(DEVICES),
        metavar="ARCH",
        help="all of them unless named",
    )
    parser.add_argument("--json", action="store_true", help="print the lines as JSON")
    parser.add_argument("--csv", type=Path, metavar="OUT", help="write the lines to a file")
    parser.add_argument("--check", action="store_true", help="compare with the baseline; 1 where it does not hold")
    parser.add_argument("--write", action="store_true", help="make these lines the baseline of their architectures")
    parser.add_argument("--reason", default="", help="why a figure may become worse, with --write")
    given = parser.parse_args(arguments)
    if missing := nvrtc.missing() or disassembly.missing():
        parser.error(missing)

    errors = Console(stderr=True)
    todo = cases(given.arch)
    progress = track(todo, "compiling", console=errors, transient=True, disable=not errors.is_terminal)
    lines = [line for case in progress for line in lines_of(case)]
    if given.csv:
        with given.csv.open("w", newline="") as file:
            write(lines, file)
    if given.json:
        print(json.dumps([dataclasses.asdict(line) for line in lines], indent=1))
    baseline = read(BASELINE) if BASELINE.exists() else []
    if given.write:
        if spilled := spills(lines):
            parser.error("\n".join(["no reason allows a stack", *spilled]))
        try:
            new = merged(baseline, lines, given.reason)
        except ValueError as error:
            parser.error(str(error))
        with BASELINE.open("w", newline="") as file:
            write(new, file)
        NOTES.write_text(noted(NOTES.read_text(), new))
        print(f"{BASELINE.name}: {len(lines)} lines", file=sys.stderr)
        return 0
    if given.check:
        found = [*map(str, compare(baseline, lines)), *spills(lines)]
        for arch in given.arch:
            if others := other_compilers(baseline, arch):
                print(
                    f"{arch}: machine code of NVRTC {compiler()} is not compared with that of {others}", file=sys.stderr
                )
        print("\n".join([*found, ACCEPT] if found else ["as the baseline says"]), file=sys.stderr)
        return int(bool(found))
    if not given.json and not given.csv:
        for arch in given.arch:
            Console(width=None if sys.stdout.isatty() else 200).print(table(lines, arch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
