"""`cuconv profile`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Literal

import rich.box
import rich.table
from rich.console import Console
from rich.markup import escape

from cuconv import plots, profiling
from cuconv.cli.common import (
    CommandError,
    check_gpu_name,
    check_output,
    draw,
    find_gpu,
    input_shapes,
    load_model,
    phases,
    picture,
    positive,
    print_json,
    sizes,
    write_text,
)
from cuconv.cuda import runtime
from cuconv.explain import count, duration
from cuconv.plan.devices import DEVICES

NAME, WHAT = "profile", "show where the time of a model goes, layer by layer"
EXAMPLES = """examples:
  cuconv profile model.npz --batch-size 64
  cuconv profile model.npz --device H200 --html profile.html
  cuconv profile two_inputs.npz --shape 32,128,9 --shape 32,128,3 --json

Times are measured on the GPU here or else on the CPU, and predicted, by cuconv's model of launches and caches, for a
GPU that --device names; the table says which. Work counts FLOP, a multiplication and an addition being two; data is
every input, weight and output of a layer once.
"""

BAR = 8  # characters
WIDE = 156  # columns of a terminal that shows everything


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .npz, .keras or .h5 file")
    parser.add_argument(
        "--shape", type=sizes, action="append", metavar="N,...", help="of an input, batch first; once for each input"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="instead of --shape (default 32)")
    parser.add_argument(
        "--device",
        metavar="D",
        help=f"gpu or cpu: measure there (default: a GPU where one is usable); or predict for {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--samples",
        type=positive,
        default=profiling.SAMPLES,
        metavar="N",
        help="timed calls of each layer (default 50)",
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write a page to look at in a browser; it loads nothing"
    )
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the layers' times, .png or .svg")


def command(options: argparse.Namespace) -> int:
    """Walks through the model and tells."""
    for path, option in ((options.html, "--html"), (options.plot, "--plot")):
        if path:
            check_output(path, option, (options.model,))
    where: runtime.Device | str | None = None
    limits = None
    if options.device == "gpu" or (options.device is None and runtime.probe().usable):
        where = find_gpu(None, "`--device cpu` measures the NumPy path, and `--device H200` predicts")
        limits = where.limits
    elif options.device in (None, "cpu"):
        where = "cpu"
    else:
        check_gpu_name(options.device, also="gpu, cpu or ")
        limits = profiling.limits_of(options.device)
    model = load_model(options.model)
    shapes = input_shapes(model, options.shape, options.batch_size)
    try:
        with phases(options.json) as phase:
            advance = phase("profiling", None)
            report = profiling.profile(model, shapes, limits or profiling.limits_of(), where, options.samples, advance)
    except MemoryError as error:
        raise CommandError(f"{options.model}: {str(error) or 'out of memory'}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise CommandError(f"{options.model} cannot be profiled: {error}") from error
    if options.html:
        write_text(options.html, profiling.page(report))
    if options.plot:
        rows = [(each["name"], each["seconds"], each["roof_seconds"] * report["on_gpu"]) for each in report["layers"]]
        draw(lambda: plots.layers(rows, options.plot, f"{report['model']}, {report['timing']}, {report['device']}"))
    if options.json:
        print_json(report)
    else:
        _print(report, options.html)
    return 0


def _print(report: dict[str, Any], page: Path | None) -> None:
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:  # a file has room
        console = Console(highlight=False, width=WIDE)
    word, gpu = report["timing"], report["roof"]["name"]
    last = "of roof" if report["on_gpu"] else f"on {gpu}, predicted"
    columns = ["layer", "kind", "output", word, "share", "work", "data", "FLOP/B", "bound by", last, "kernel"]
    left_out = () if console.width >= WIDE else ("kind", "output", "work", "data", "FLOP/B")
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        if name not in left_out:
            text = name in ("layer", "kind", "output", "share", "bound by", "kernel")
            folds = name in ("layer", "kernel", last)
            side: Literal["left", "right"] = "left" if text else "right"
            least = 15 if name == "layer" else None
            table.add_column(name, justify=side, overflow="fold", no_wrap=not folds, min_width=least)
    for row in report["layers"]:
        cells = dict(zip(columns, _cells(row, report["on_gpu"]), strict=True))
        table.add_row(*(cell for name, cell in cells.items() if name not in left_out))
    inputs = ", ".join(f"{'x'.join(map(str, each['shape']))} {each['dtype']}" for each in report["inputs"])
    console.print(f"[bold]{escape(report['model'])}[/] on {inputs}: times are [bold]{word}[/], {report['device']}")
    console.print(table)
    rate = report["batch"] / report["seconds"] if report["seconds"] else 0.0
    console.print(f"{duration(report['seconds'])} in all, {rate:,.{0 if rate >= 100 else 2}f} samples a second, {word}")
    if report["call_seconds"] is not None:
        console.print(f"{duration(report['call_seconds'])} for one call of the model from Python, measured")
    if word == "measured":
        console.print(f"{duration(report['predicted_seconds'])} in all predicted for {gpu}, not measured")
    if page:
        console.print(f"[bold]{escape(str(page))}[/] shows it in a browser", soft_wrap=True)


def _cells(row: dict[str, Any], on_gpu: bool) -> list[str]:
    """One for each column."""
    last = duration(row["predicted_seconds"])
    if on_gpu:
        last = "-" if row["share_of_roof"] is None else f"{row['share_of_roof']:.0%}"
    return [
        escape(row["name"]),
        row["kind"],
        " ".join("x".join(map(str, shape)) for shape in row["outputs"]),
        duration(row["seconds"]),
        f"[cyan]{_bar(row['share'])}[/]{row['share']:5.0%}",
        count(row["flops"], "FLOP") if row["flops"] else "-",
        count(row["bytes"], "B") if row["bytes"] else "-",
        f"{row['intensity']:.1f}" if row["flops"] else "-",
        row["side"] if row["flops"] else "-",
        last,
        row["kernel"] or "-",
    ]


def _bar(share: float) -> str:
    """Eighths of a character."""
    eighths = round(share * BAR * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(BAR)
