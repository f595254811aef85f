"""What the plans choose for every row of the suite, how near to the roof the model sees it, and what it waits for.

python -m benchmarks.predict [--rows 1 31 ...] [--json]     a table for an H200, an A100 and an RTX 4090
python -m benchmarks.predict --write                        the same table into benchmarks/NOTES.md

Nothing here is measured. Where the prediction for an H200 misses the row's goal, the table says so, and what the kernel
waits for.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import report, suite
from benchmarks.suite import Row
from cuconv.explain import Explanation, Step

NOTES = Path(__file__).parent / "NOTES.md"
MARKER = "predictions"
DEVICES = ("H200", "A100", "RTX 4090")
AIMED_AT = DEVICES[0]


@dataclass(frozen=True)
class Prediction:
    """A row on a device; everything but the goal is the model's.

    Attributes:
        plan: its kernels, the one that takes longest with its tile.
        microseconds, share: of the whole call, and the part of that in which the roof says it could be done.
        bound: what the longest kernel waits for.
        goal: the share that the row's kernels are written for; None on other devices than AIMED_AT.
    """

    number: int
    name: str
    dtype: str
    device: str
    plan: str
    microseconds: float
    share: float
    bound: str
    goal: float | None

    @property
    def missed(self) -> bool:
        return self.goal is not None and self.share < self.goal


def predict(row: Row, device: str) -> Prediction:
    """What the model says of the plain variant of `row`."""
    told: Explanation = row.explain(device)
    longest = max(told.steps, key=lambda step: step.seconds)
    # The suite knows what dense products reach on an H200 in practice; of other devices there is the data sheet.
    roof = row.roof_seconds if device == AIMED_AT else told.roof_seconds
    return Prediction(
        row.number,
        row.name,
        row.dtype,
        device,
        _plan(told.steps, longest),
        1e6 * told.seconds,
        roof / told.seconds,
        longest.bound,
        row.goal if device == AIMED_AT else None,
    )


def _plan(steps: Sequence[Step], longest: Step) -> str:
    others = list(dict.fromkeys(step.kernel for step in steps if step.kernel != longest.kernel))
    tile = longest.tile.partition(",")[0]
    return f"{longest.kernel}{f' {tile}' if tile else ''}{''.join(f', {other}' for other in others)}"


# --- Printing ----------------------------------------------------------------------------------------------------

HEADINGS = ("#", "row", "dtype", "plan on an H200", "us", *DEVICES, "goal", "bound by, H200")


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table, as HEADINGS."""
    first, *others = (predict(row, device) for device in DEVICES)
    return (
        str(row.number),
        row.name,
        row.dtype,
        first.plan,
        f"{first.microseconds:.3g}",
        *(f"{100 * each.share:.0f}" for each in (first, *others)),
        "-" if first.goal is None else f"{100 * first.goal:.0f}{' missed' if first.missed else ''}",
        first.bound,
    )


def table(rows: Sequence[Row]) -> Table:
    """The predictions to read on a screen."""
    shown = Table(title="predicted, not measured: % of the roof", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in HEADINGS:
        number = heading in ("#", "us", "goal", *DEVICES)
        shown.add_column(heading, justify="right" if number else "left", no_wrap=number)
    for row in rows:
        shown.add_row(*cells(row))
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """The same for NOTES.md, with what it amounts to below."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---:|---|---|---|---:|---:|---:|---:|---:|---|"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    aimed = [each for each in (predict(row, AIMED_AT) for row in rows) if each.goal is not None]
    missed = sum(each.missed for each in aimed)
    return "\n".join([*lines, "", f"{len(aimed) - missed} of {len(aimed)} goals are met in prediction."])


def filled(text: str) -> str:
    """NOTES.md with the table of today's plans."""
    return report.between(text, MARKER, markdown(suite.ROWS))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", nargs="+", type=int, default=[], metavar="N", help="only these rows")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--write", action="store_true", help=f"put the table of all rows into {NOTES.name}")
    given = parser.parse_args(arguments)
    if given.write:
        NOTES.write_text(filled(NOTES.read_text()))
        return 0
    try:
        rows = suite.selected(numbers=given.rows)
    except ValueError as error:
        parser.error(str(error))
    if given.json:
        predictions = [asdict(predict(row, device)) for row in rows for device in DEVICES]
        print(json.dumps({"measured": False, "predictions": predictions}, indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 200).print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
