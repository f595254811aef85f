"""`cuconv doctor`."""

from __future__ import annotations

import argparse
from typing import Any

import rich.markup
from rich.console import Console

from cuconv import doctor
from cuconv.cli.common import print_json

NAME, WHAT = "doctor", "say what this machine offers and where cuconv computes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""


def command(options: argparse.Namespace) -> int:
    """Looks and tells."""
    found = doctor.examine()
    if options.json:
        print_json(found)
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
