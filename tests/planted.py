"""Kernels with a bug: copies of kernels/ with a text replaced, which EmulatedRuntime runs in place of the originals."""

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import emulated
import emulator

from cuconv.cuda.runtime import kernel_directory

WRONG = "wrong values"


def what_catches(run, *arguments) -> set[str]:
    """The kinds of the detector's reports of a run, WRONG where its result is, nothing where it passes."""
    try:
        run(*arguments)
    except emulator.EmulationError as error:
        return {report.kind for report in error.reports}
    except AssertionError:
        return {WRONG}
    return set()


@contextmanager
def planted(file: str, right: str, wrong: str):
    """While this is open, `file` has `wrong` where it says `right`, once."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "kernels")
        shutil.copytree(kernel_directory(), copy)
        text = (copy / file).read_text()
        assert text.count(right) == 1, f"{file} has {right!r} {text.count(right)} times"
        (copy / file).write_text(text.replace(right, wrong))
        emulated.module.cache_clear()
        try:
            with mock.patch.object(emulated, "kernel_directory", return_value=copy):
                yield
        finally:
            emulated.module.cache_clear()
