"""`cuconv run`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from cuconv import doctor, models
from cuconv.cli.common import CommandError, check_output, load_model, positive, print_json, reason, tracked
from cuconv.files.common import replacing

NAME, WHAT = "run", "apply a saved model to the samples of a file"

PIECES = 100  # an input is run in about so many pieces, so that the progress bar moves
MAX_BATCHES = 64  # of a piece: enough to overlap copies with computing, and few enough to stay in memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="a .npz, .keras or .h5 file")
    parser.add_argument("input", type=Path, metavar="IN.npy", help="samples along the first axis; read piece by piece")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT.npy", help="replaced once it is complete"
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="samples at once (default 32)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: a GPU where one is usable")


def command(options: argparse.Namespace) -> int:
    """Reads, computes and writes piece by piece."""
    started = time.perf_counter()
    model = _load_model(options.model)
    x = _open_samples(options.input, model)
    check_output(options.output, "-o", (options.model, options.input))
    piece = options.batch_size * min(MAX_BATCHES, max(1, len(x) // (PIECES * options.batch_size)))
    try:
        with replacing(options.output) as stream:
            for start in tracked(range(0, max(len(x), 1), piece), options.model.name, options.json):
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
        raise CommandError(
            f"{options.model} cannot be run on {options.input}: {str(error) or 'out of memory'}"
        ) from error
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
        print_json(report)
    else:
        print(f"{options.output}: {shape} {y.dtype} in {report['seconds']:.1f} s, computed on {report['device']}")
    return 0


def _load_model(path: Path) -> models.Model:
    model = load_model(path)
    for ends, word in ((model.inputs, "input"), (model.outputs, "output")):
        if len(ends) != 1:
            raise CommandError(f"{path} has {len(ends)} {word}s; `cuconv run` takes models with one")
    return model


def _open_samples(path: Path, model: models.Model) -> np.ndarray:
    """The array in the file, mapped into memory instead of read, after it was compared with the model's input."""
    try:
        x: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise CommandError(reason(error, path, "is not an .npy file of plain numbers")) from error
    if x.dtype.kind not in "biufc":
        raise CommandError(f"{path} holds {x.dtype} and not numbers")
    expected = model.input_shape
    fits = len(x.shape) == len(expected) and all(n in (None, m) for n, m in zip(expected[1:], x.shape[1:], strict=True))
    if not fits:
        raise CommandError(f"{path} has the shape {x.shape}; {model.name!r} takes {expected}, None being any size")
    return x
