"""The command line: `cuconv demo`, `cuconv run`, `cuconv doctor` and `cuconv parity`.

Exit codes: 0 done, 1 failed (the reason is on stderr, or in "error" with --json), 2 wrong usage, or a GPU is asked for
that is not there.
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
import rich.table
from rich.console import Console

import cuconv
from cuconv import doctor, models, parity
from cuconv.cuda import runtime
from cuconv.demo import show


class CommandError(Exception):
    """A command cannot do what it was asked for; the message tells the user why."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code  # to exit with


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

    check = add("parity", _parity, "compare every operation with its answer in double precision")
    check.add_argument(
        "--device", type=_device, metavar="N", help="number of a GPU (default: the first usable one), or cpu"
    )
    check.add_argument("--quick", action="store_true", help="all variants of float32 in 1-D only, one of the rest")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"an integer of 0 or more is needed, not {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"an integer of 1 or more is needed, not {text!r}")
    return int(text)


def _device(text: str) -> int | str:
    if text != "cpu" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"the number of a GPU or cpu is needed, not {text!r}")
    return text if text == "cpu" else int(text)


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
    kernels, arrays, compiling, compiled = (found[key] for key in ("kernels", "arrays", "compiling", "compiled"))
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
    }
    rows |= {f"GPU {gpu['index']}": _gpu_in_words(gpu) for gpu in found["gpus"]} or {"GPUs": unknown}
    rows["kernels"] = kernels["error"] or f"{len(kernels['files'])} file(s) in {kernels['path']}"
    if compiling:
        took = f"common.cuh for {compiling['target']} in {1e3 * compiling['seconds']:.0f} ms"
        rows["compiling"] = f"fails: {compiling['problem']}" if compiling["problem"] else took
    size = (
        f"{compiled['files']} file(s), {compiled['bytes'] / 2**20:.1f} of at most {compiled['limit_bytes'] >> 20} MiB"
    )
    problem = f"; not used: {compiled['problem']}" if compiled["problem"] else ""
    rows["compiled"] = f"{size} in {compiled['path']}{problem}"
    rows["arrays"] = f"cuconv.asarray gives {arrays['library']} arrays: {arrays['reason']}"
    console = Console(highlight=False)
    for name, fact in rows.items():  # a path that is broken into lines could not be copied
        console.print(f"[bold]{name:<10}[/]{rich.markup.escape(fact)}", soft_wrap=True)


def _gpu_in_words(gpu: dict[str, Any]) -> str:
    words = f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['compute_capability']}"
    if gpu["limits"]:
        limits = gpu["limits"]
        words += (
            f", {limits['multiprocessors']} multiprocessors, {limits['shared_bytes'] >> 10} KiB of shared memory "
            f"a block, {limits['l2_bytes'] >> 20} MiB L2, {limits['bandwidth'] / 1e12:.2f} TB/s; "
            f"kernels as {gpu['kernels_as']}"
        )
    return f"{words}; {gpu['problem']}" if gpu["problem"] else words


# --- parity ------------------------------------------------------------------------------------------------------

SHOWN_FAILURES = 20


def _parity(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    place: parity.Place = np.asarray
    without: tuple[str, ...] = ()
    current: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if options.device == "cpu":  # in double precision there is nothing to compare it with
        name, without = doctor.device_of(np.zeros(1)), ("float64", "complex128")
    else:
        gpu = _gpu_to_check(options.device)
        name = f"GPU {gpu.index} ({gpu.name}, {gpu.target})"
        place, current = runtime.device_array, runtime.on(gpu.index)
    listed = parity.cases(options.quick, without)
    console = Console(stderr=True)
    results: Iterable[parity.Outcome] = parity.run(listed, place)
    if console.is_terminal and not options.json:
        results = rich.progress.track(results, description="parity", total=len(listed), console=console)
    with current:
        outcomes = list(results)
    report = {"device": name, **parity.summary(outcomes), "seconds": time.perf_counter() - started}
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print_parity(report)
    return 1 if report["failed"] else 0


def _gpu_to_check(index: int | None) -> runtime.Device:
    """The GPU of that number, or the first that kernels can be compiled for."""
    found = runtime.probe()
    known = {each.index: each for each in found.devices}
    reason = found.reason
    if found.usable:
        chosen = next(each for each in found.devices if each.target) if index is None else known.get(index)
        if chosen and chosen.target:
            return chosen
        reason = (chosen and chosen.problem) or f"there is no GPU {index}"
    raise CommandError(f"{reason}. `--device cpu` checks the NumPy path", code=2)


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
