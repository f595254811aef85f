"""What several commands need: errors, argument types, files, progress."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import rich.progress
from rich.console import Console

from cuconv import models, profiling
from cuconv.cuda import runtime
from cuconv.files.common import replacing
from cuconv.plan.devices import DEVICES

Item = TypeVar("Item")


class CommandError(Exception):
    """A command cannot do what it was asked for; the message tells the user why."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code  # to exit with


# --- Arguments ---------------------------------------------------------------------------------------------------


def count(text: str) -> int:
    """An integer of 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of 0 or more is needed, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """An integer of 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"an integer of 1 or more is needed, not {text!r}")
    return int(text)


def sizes(text: str) -> tuple[int, ...]:
    """Integers of 1 or more, "8,16384,128"."""
    parts = text.split(",")
    if any(not part.isdecimal() or int(part) == 0 for part in parts):
        raise argparse.ArgumentTypeError(f"integers of 1 or more with commas between are needed, not {text!r}")
    return tuple(map(int, parts))


def picture(text: str) -> Path:
    """A file to draw into."""
    if not text.lower().endswith((".png", ".svg")):
        raise argparse.ArgumentTypeError(f"a name that ends in .png or .svg is needed, not {text!r}")
    return Path(text)


# --- The machine -------------------------------------------------------------------------------------------------


def find_gpu(index: int | None, advice: str) -> runtime.Device:
    """The GPU of that number, or the first that kernels can be compiled for; `advice` is for where there is none."""
    found = runtime.probe()
    known = {each.index: each for each in found.devices}
    reason = found.reason
    if found.usable:
        chosen = next(each for each in found.devices if each.target) if index is None else known.get(index)
        if chosen and chosen.target:
            return chosen
        reason = (chosen and chosen.problem) or f"there is no GPU {index}"
    raise CommandError(f"{reason}. {advice}", code=2)


def check_gpu_name(name: str | None, option: str = "--device", also: str = "") -> None:
    """Raises CommandError where `name` is no GPU that cuconv knows."""
    if name is not None and name.lower() not in (known.lower() for known in DEVICES):
        raise CommandError(f"`{option}` must be {also}one of {', '.join(DEVICES)}. Received: {name!r}", code=2)


# --- Output ------------------------------------------------------------------------------------------------------


def print_json(report: dict[str, Any]) -> None:
    """Prints the one object of `--json`."""
    print(json.dumps(report, indent=2))


def tracked(items: Iterable[Item], description: str, as_json: bool, total: float | None = None) -> Iterable[Item]:
    """`items`, with a progress bar on stderr where that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal or as_json:
        return items
    return rich.progress.track(items, description=description, total=total, console=console)


@contextlib.contextmanager
def phases(as_json: bool) -> Iterator[Callable[[str, int | None], Callable[[], None]]]:
    """A function that shows what is done now, of so many parts, and gives one to call after each part."""
    console = Console(stderr=True)
    bar = rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        "{task.description}",
        rich.progress.BarColumn(),
        rich.progress.TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,  # the thread that draws disturbs what is timed
        transient=True,
        disable=as_json or not console.is_terminal,
    )
    with bar:

        def begin(what: str, count: int | None) -> Callable[[], None]:
            for known in bar.task_ids:
                bar.remove_task(known)
            task = bar.add_task(what, total=count)
            return lambda: bar.advance(task)

        yield begin


def draw(make: Callable[[], None]) -> None:
    """Calls `make`, which draws a picture."""
    try:
        make()
    except (ImportError, ValueError) as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"{error.filename} cannot be written: {error.strerror or error}") from error


# --- Files -------------------------------------------------------------------------------------------------------


def load_model(path: Path) -> models.Model:
    """The model in a file."""
    try:
        model = models.load_model(path)
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise CommandError(reason(error, path)) from error
    if not isinstance(model, models.Model):
        raise CommandError(f"{path} holds a {type(model).__name__} layer and not a model")
    return model


def input_shapes(
    model: models.Model, given: Sequence[tuple[int, ...]] | None, batch_size: int | None
) -> list[tuple[int, ...]]:
    """The shape of every input, as --shape or --batch-size say."""
    if given and batch_size:
        raise CommandError("`--batch-size` must not be given with --shape, which holds it", code=2)
    try:
        return profiling.input_shapes(model, given, batch_size)
    except ValueError as error:
        raise CommandError(f"{error} (`--shape N,...` once for each input)", code=2) from error


def check_output(path: Path, option: str, inputs: Sequence[Path] = ()) -> None:
    """Raises CommandError where the file that `option` names cannot be written, or is one of `inputs`."""
    if path.is_dir():
        raise CommandError(f"{path} is a folder; {option} names the file to write")
    if not path.parent.is_dir():
        raise CommandError(f"the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not path.is_file():
        raise CommandError(f"{path} is a device or the like, which a file would take the place of")
    if any(path.samefile(each) for each in inputs if each.exists()):
        raise CommandError(f"{path} is read by this command and cannot be its output as well")


def reason(error: Exception, path: Path, otherwise: str | None = None) -> str:
    """Why the file at `path` cannot be used, in a line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: {error.strerror}"
    return f"{path} {otherwise}: {error}" if otherwise else str(error)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    try:
        with replacing(path) as stream:
            stream.write(text.encode())
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from error
