"""The command line, `cuconv COMMAND ...`; one module for each command.

Exit codes: 0 done, 1 failed (the reason is on stderr, or in "error" with --json), 2 wrong usage, or a GPU is asked for
that is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from types import ModuleType

import cuconv
from cuconv.cli import bench, demo, doctor, explain, parity, profile, run
from cuconv.cli.common import CommandError

__all__ = ["CommandError", "main"]

# What each module has: NAME, WHAT it does in a line, `add_arguments(parser)`, and `command(options)`, which returns the
# exit code.
COMMANDS: tuple[ModuleType, ...] = (demo, run, explain, bench, profile, doctor, parity)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except CommandError as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        print(f"cuconv {options.name}: error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cuconv", description=cuconv.__doc__, epilog="`cuconv COMMAND --help` says more, with examples."
    )
    parser.add_argument("--version", action="version", version=f"cuconv {cuconv.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="name")
    for module in COMMANDS:
        what = module.WHAT
        added = commands.add_parser(
            module.NAME,
            help=what,
            description=f"{what[0].upper()}{what[1:]}.",
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(added)
        added.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        added.set_defaults(command=module.command)
    return parser
