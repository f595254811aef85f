"""`cuconv demo`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from cuconv.cli.common import CommandError, count, print_json
from cuconv.demo import show

NAME, WHAT = "demo", "watch a Conv1D network learn shoulder exercises from a smartwatch's sensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument(
        "--seed", type=count, default=0, metavar="N", help="0 or more (default 0): other weights, other order"
    )
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep model and test windows for `cuconv run`")


def command(options: argparse.Namespace) -> int:
    """Trains and shows."""
    console = Console(quiet=options.json)
    try:
        report = show.demonstrate(console, options.quick, options.seed, options.save)
    except (FloatingPointError, OSError) as error:
        raise CommandError(str(error)) from error
    learned = report["accuracy"] > report["baseline_accuracy"]
    if options.json:
        print_json(report)
    if not learned:
        print("cuconv demo: the network is no better than the nearest centroid", file=sys.stderr)
    return 0 if learned else 1
