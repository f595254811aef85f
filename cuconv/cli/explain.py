"""`cuconv explain`."""

from __future__ import annotations

import argparse
from typing import Any

import rich.box
import rich.table
from rich.console import Console

from cuconv import bench, parity, plots
from cuconv.cli import layer
from cuconv.cli.common import CommandError, check_gpu_name, check_output, draw, picture, print_json
from cuconv.explain import Explanation, duration
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import PlanError

NAME, WHAT = "explain", "say what a layer costs on a GPU and why, without needing one"
EXAMPLES = """examples:
  cuconv explain conv1d --shape 8,16384,128 --filters 256 --kernel 2 --dilation 512 --padding causal --dtype bf16
  cuconv explain depthwise_conv2d --shape 64,56,56,96 --kernel 7 --padding same --device A100 --json
  cuconv explain conv2d_transpose --shape 16,64,64,512 --filters 256 --kernel 2 --strides 2 --plot roofline.png

Every time is predicted by the model that plans are chosen with, none is measured; `cuconv bench` measures.
Bytes are B, kB = 1000 B; operations are FLOP, a multiplication and an addition being two.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("layer", choices=bench.LAYERS, metavar="LAYER", help=", ".join(bench.LAYERS))
    layer.add_arguments(parser)
    parser.add_argument("--device", metavar="GPU", help=f"{', '.join(DEVICES)} (default: the GPU here, else H200)")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the roofline, .png or .svg")


def command(options: argparse.Namespace) -> int:
    """Predicts and tells."""
    check_gpu_name(options.device)
    case = layer.case(options.layer, options)
    if options.plot:
        check_output(options.plot, "--plot")
    try:
        found = bench.explain(case, options.device)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), code=2) from error
    except PlanError as error:
        raise CommandError(str(error)) from error
    everywhere = [_on(case, name) for name in DEVICES]
    if options.plot:
        point = (options.layer, found.intensity, found.flops / found.seconds if found.seconds else 0.0, "predicted")
        draw(lambda: plots.roofline([point], found.device, options.plot, f"{options.layer} on {found.device.name}"))
    if options.json:
        print_json({**found.to_dict(), "every_gpu": everywhere})
    else:
        _print(found, everywhere)
    return 0


def _on(case: parity.Case, name: str) -> dict[str, Any]:
    try:
        found = bench.explain(case, name)
    except PlanError as error:
        return {"device": name, "problem": str(error)}
    return {
        "device": name,
        "predicted_seconds": found.seconds,
        "roof_seconds": found.roof_seconds,
        "share_of_roof": found.share,
        "side": found.side,
        "algorithm": found.algorithm,
    }


def _print(found: Explanation, everywhere: list[dict[str, Any]]) -> None:
    console = Console(highlight=False)
    console.print(str(found), markup=False, soft_wrap=True)
    table = rich.table.Table(title="On other GPUs, predicted", box=rich.box.SIMPLE_HEAD, title_justify="left")
    for heading in ("GPU", "predicted", "its roof", "of the roof", "bound by", "kernel"):
        table.add_column(heading, justify="right" if heading in ("predicted", "its roof", "of the roof") else "left")
    for row in everywhere:
        if "problem" in row:
            table.add_row(row["device"], "-", "-", "-", "-", row["problem"])
            continue
        times = (duration(row["predicted_seconds"]), duration(row["roof_seconds"]), f"{row['share_of_roof']:.0%}")
        table.add_row(row["device"], *times, row["side"], row["algorithm"])
    console.print()
    console.print(table)
