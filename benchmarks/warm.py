"""Compiles the kernels of the quick parity list and of the suite into the user's cache: `python -m benchmarks.warm`.

They would be compiled one after the other when they are needed. On all cores at once it takes a tenth of the time,
which a short stay on a GPU has better uses for. `--dry-run` only counts them, and needs no GPU.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence

from benchmarks import suite
from cuconv import parity
from cuconv.cuda import cubins, runtime
from cuconv.cuda.tape import Launch, Recorder
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import DeviceLimits

Kernel = tuple[str, cubins.Constants]  # a file of kernels/ and what it is compiled with


def of_parity(limits: DeviceLimits) -> set[Kernel]:
    """Those of `cuconv parity --quick`."""
    recorder = Recorder(limits)
    for number, case in enumerate(parity.cases(quick=True)):
        # What comes out has no numbers to compare; the launches are on record by then.
        parity.check(case, lambda array: recorder.argument(array.shape, array.dtype), number)
    return {(step.plan.kernel, step.plan.constants) for step in recorder.steps if isinstance(step, Launch)}


def of_suite(device: str | None) -> set[Kernel]:
    """Those of the benchmark suite on the GPU at hand (None) or on one of DEVICES."""
    explained = [row.explain(device, variant) for row in (*suite.ROWS, *suite.SWEEP) for variant in row.variants]
    plans = [step.plan for each in explained for step in each.steps if step.plan is not None]
    return {(plan.kernel, plan.constants) for plan in plans}


def compile_one(capability: tuple[int, int], kernel: Kernel) -> str | None:
    """Makes the file of a kernel where it is not in the cache; what is wrong, or None."""
    try:
        compiler = runtime._Compiler()
        source = cubins.expanded(runtime.kernel_directory(), f"{kernel[0]}.cu")
        recipe = compiler.recipe(kernel[0], source, kernel[1], compiler.target(capability))
        runtime.cubin_cache().obtain(recipe, functools.partial(compiler.compile, recipe))
    except Exception as error:  # noqa: BLE001  the next kernel is still of use
        return f"{kernel[0]}: {type(error).__name__}: {error}".partition("\n")[0]
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.warm", description=__doc__.partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="count them only; needs no GPU")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (default: cores)")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    limits = DEVICES["H200"] if options.dry_run else runtime.current().limits
    kernels = sorted(of_parity(limits) | of_suite("H200" if options.dry_run else None), key=str)
    print(f"{len(kernels)} kernels for {limits.name}", flush=True)
    if options.dry_run:
        return 0
    # A fork of a process that has used CUDA is broken.
    with concurrent.futures.ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        found = pool.map(functools.partial(compile_one, limits.capability), kernels, chunksize=4)
        problems = list(filter(None, found))
    print("\n".join(problems[:10]))
    print(f"{len(kernels) - len(problems)} compiled or there already, in {time.perf_counter() - started:.1f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
