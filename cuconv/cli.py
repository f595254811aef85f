"""The command line: `cuconv demo`, `cuconv run` and `cuconv doctor`.

Exit codes: 0 done, 1 failed (the reason is on stderr, or in "error" with --json), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import rich.markup
import rich.progress
from rich.console import Console

import cuconv
from cuconv import doctor, models
from cuconv.demo import show


class CommandError(Exception):
    """A command cannot do what it was asked for; the message tells the user why."""


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
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, for example `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cuconv", description=cuconv.__doc__)
    parser.add_argument("--version", action="version", version=f"cuconv {cuconv.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", dest="name")

    def add(name: str, command: Callable[[argparse.Namespace], int], what: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        added.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
        added.set_defaults(command=command)
        return added

    demo = add("demo", _demo, "watch a Conv1D network learn shoulder exercises from a smartwatch's sensors")
    demo.add_argument("--quick", action="store_true", help="train for a few seconds only")
    demo.add_argument(
        "--seed", type=_count, default=0, metavar="N", help="0 or more (default 0): other weights, other order"
    )
    demo.add_argument("--save", type=Path, metavar="FOLDER", help="keep model and test windows for `cuconv run`")

    run = add("run", _run, "apply a saved model to the samples of a file")
    run.add_argument("model", type=Path, metavar="MODEL", help="an .npz file written by Model.save")
    run.add_argument("input", type=Path, metavar="IN.npy", help="samples along the first axis; read piece by piece")
    run.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.npy", help="replaced once it is complete")
    run.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="samples at once (default 32)")
    run.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU where one is usable")

    add("doctor", _doctor, "say what this machine offers and where cuconv computes")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of 0 or more is needed, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"an integer of 1 or more is needed, not {text!r}")
    return int(text)


# --- demo --------------------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    console = Console(quiet=options.json)
    try:
        report = show.demonstrate(console, options.quick, options.seed, options.save)
    except (FloatingPointError, OSError) as error:
        raise CommandError(str(error)) from error
    learned = report["accuracy"] > report["baseline_accuracy"]
    if options.json:
        print(json.dumps(report, indent=2))
    if not learned:
        print("cuconv demo: the network is no better than the nearest centroid", file=sys.stderr)
    return 0 if learned else 1


# --- run ---------------------------------------------------------------------------------------------------------

PIECES = 100  # an input is run in about so many pieces, so that the progress bar moves
MAX_BATCHES = 64  # of a piece: enough to overlap copies with computing, and few enough to stay in memory


def _run(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    model = _load_model(options.model)
    x = _open_samples(options.input, model)
    _check_output(options.output, (options.model, options.input))
    piece = options.batch_size * min(MAX_BATCHES, max(1, len(x) // (PIECES * options.batch_size)))
    console = Console(stderr=True)
    try:
        with _replacing(options.output) as stream:
            starts: Iterable[int] = range(0, max(len(x), 1), piece)
            if console.is_terminal and not options.json:
                starts = rich.progress.track(starts, description=options.model.name, console=console)
            for start in starts:
                y = model.predict(x[start : start + piece], options.batch_size, verbose=False, device=options.device)
                y = y if y.dtype.kind in "fc" else y.astype(np.float32)  # .npy has no bfloat16; float32 holds all of it
                shape = (len(x), *y.shape[1:])
                if start == 0:
                    described = {"descr": np.lib.format.dtype_to_descr(y.dtype), "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, described)
                stream.write(np.ascontiguousarray(y).data)
    except OSError as error:
        raise CommandError(f"{options.output} cannot be written: {error.strerror or error}") from error
    except (ValueError, TypeError, MemoryError) as error:
        raise CommandError(f"{options.model} cannot be run on {options.input}: {error or 'out of memory'}") from error
    report = {
        "model": str(options.model),
        "input": str(options.input),
        "output": str(options.output),
        "samples": len(x),
        "shape": list(shape),
        "dtype": y.dtype.name,
        "seconds": time.perf_counter() - started,
        "device": doctor.device_of_model(model),
    }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{options.output}: {shape} {y.dtype} in {report['seconds']:.1f} s, computed on {report['device']}")
    return 0


def _load_model(path: Path) -> models.Model:
    try:
        model = models.load_model(path)
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(_reason(error, path)) from error
    if not isinstance(model, models.Model):
        raise CommandError(f"{path} holds a {type(model).__name__} layer and not a model")
    for ends, word in ((model.inputs, "input"), (model.outputs, "output")):
        if len(ends) != 1:
            raise CommandError(f"{path} has {len(ends)} {word}s; `cuconv run` takes models with one")
    return model


def _open_samples(path: Path, model: models.Model) -> np.ndarray:
    """The array in the file, mapped into memory instead of read, after it was compared with the model's input."""
    try:
        x: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise CommandError(_reason(error, path, "is not an .npy file of plain numbers")) from error
    if x.dtype.kind not in "biufc":
        raise CommandError(f"{path} holds {x.dtype} and not numbers")
    expected = model.input_shape
    fits = len(x.shape) == len(expected) and all(n in (None, m) for n, m in zip(expected[1:], x.shape[1:], strict=True))
    if not fits:
        raise CommandError(f"{path} has the shape {x.shape}; {model.name!r} takes {expected}, None being any size")
    return x


def _check_output(path: Path, inputs: Sequence[Path]) -> None:
    if path.is_dir():
        raise CommandError(f"{path} is a folder; -o names the file to write")
    if not path.parent.is_dir():
        raise CommandError(f"the folder {path.parent} does not exist")
    if not path.exists():
        return
    if not path.is_file():
        raise CommandError(f"{path} is a device or the like, which a file would take the place of")
    if any(path.samefile(each) for each in inputs):
        raise CommandError(f"{path} is read by this command and cannot be its output as well")


def _reason(error: Exception, path: Path, otherwise: str | None = None) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path}: {error.strerror}"
    return f"{path} {otherwise}: {error}" if otherwise else str(error)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A stream to a new file that takes the place of `path` at the end, or vanishes if anything fails."""
    path = path.resolve()  # a link stays a link
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


# --- doctor ------------------------------------------------------------------------------------------------------


def _doctor(options: argparse.Namespace) -> int:
    found = doctor.examine()
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_findings(found)
    return 0 if found["healthy"] else 1


def _print_findings(found: dict[str, Any]) -> None:
    kernels, arrays = found["kernels"], found["arrays"]
    gpus = [
        f"{gpu['index']}: {gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, "
        f"compute capability {gpu['compute_capability']}"
        for gpu in found["gpus"]
    ]
    unknown = "absent" if found["cupy"] else "unknown without CuPy"
    rows = {
        "cuconv": found["cuconv"],
        "Python": f"{found['python']} on {found['platform']}, {found['cpu_cores']} cores",
        "NumPy": f"{found['numpy']} with {found['blas']}",
        "ml_dtypes": found["ml_dtypes"],
        "rich": found["rich"],
        "CuPy": found["cupy"] or "absent",
        "driver": f"CUDA {found['driver']}" if found["driver"] else unknown,
        "NVRTC": found["nvrtc"] or unknown,
        "GPUs": "; ".join(gpus) or unknown,
        "kernels": kernels["error"] or f"{len(kernels['files'])} file(s) in {kernels['path']}",
        "arrays": f"cuconv.asarray gives {arrays['library']} arrays: {arrays['reason']}",
    }
    console = Console(highlight=False)
    for name, fact in rows.items():  # a path that is broken into lines could not be copied
        console.print(f"[bold]{name:<10}[/]{rich.markup.escape(fact)}", soft_wrap=True)
