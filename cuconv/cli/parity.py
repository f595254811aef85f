"""`cuconv parity`."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

import numpy as np
import rich.markup
import rich.table
from rich.console import Console

from cuconv import doctor, parity
from cuconv.cli.common import find_gpu, print_json, tracked
from cuconv.cuda import runtime

NAME, WHAT = "parity", "compare every operation with its answer in double precision"

SHOWN_FAILURES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "--device", type=_device, metavar="N", help="number of a GPU (default: the first usable one), or cpu"
    )
    parser.add_argument("--quick", action="store_true", help="all variants of float32 in 1-D only, one of the rest")


def _device(text: str) -> int | str:
    if text != "cpu" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"the number of a GPU or cpu is needed, not {text!r}")
    return text if text == "cpu" else int(text)


def command(options: argparse.Namespace) -> int:
    """Compares and tells."""
    started = time.perf_counter()
    place: parity.Place = np.asarray
    without: tuple[str, ...] = ()
    current: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if options.device == "cpu":  # in double precision there is nothing to compare it with
        name, without = doctor.device_of(np.zeros(1)), ("float64", "complex128")
    else:
        gpu = find_gpu(options.device, "`--device cpu` checks the NumPy path")
        name = f"GPU {gpu.index} ({gpu.name}, {gpu.target})"
        place, current = runtime.device_array, runtime.on(gpu.index)
    listed = parity.cases(options.quick, without)
    with current:
        outcomes = list(tracked(parity.run(listed, place), "parity", options.json, len(listed)))
    report = {"device": name, **parity.summary(outcomes), "seconds": time.perf_counter() - started}
    if options.json:
        print_json(report)
    else:
        _print_parity(report)
    return 1 if report["failed"] else 0


def _print_parity(report: dict[str, Any]) -> None:
    console = Console(highlight=False)
    table = rich.table.Table(title=f"Cases, and the largest error as a part of what is allowed, on {report['device']}")
    table.add_column("operation")
    dtypes = list(dict.fromkeys(dtype for row in report["operations"].values() for dtype in row))
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for operation, row in report["operations"].items():
        table.add_row(operation, *(_cell(row.get(dtype)) for dtype in dtypes))
    console.print(table)
    for failure in report["failures"][:SHOWN_FAILURES]:
        text = rich.markup.escape(f"{failure['case']}: {failure['problem']}")
        console.print(f"[red]failed[/] {text}", soft_wrap=True)
    hidden = report["failed"] - SHOWN_FAILURES
    if hidden > 0:
        console.print(f"and {hidden} more; --json lists them all")
    verdict = f"[red]{report['failed']} of {report['cases']} cases failed[/]"
    if not report["failed"]:
        verdict = f"[green]all {report['cases']} cases passed[/]"
    console.print(f"{verdict} in {report['seconds']:.0f} s")


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    return (
        f"[red]{cell['failed']} of {cell['cases']} failed[/]"
        if cell["failed"]
        else f"{cell['cases']}  {cell['share']:.2f}"
    )
