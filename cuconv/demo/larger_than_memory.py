"""A convolution of more data than there is memory for, on a Dask cluster of this machine.

    pip install "cuconv[dask]"
    python -m cuconv.demo.larger_than_memory
    python -m cuconv.demo.larger_than_memory --gigabytes 40 --workers 8 --memory 0.5

Recordings of four sensors, 4 GB of them, go chunk by chunk through two workers that may use 0.5 GB each: made up at
random where they are needed, convolved, summed up and forgotten. At the end the cluster says how much memory it took at
most, and some outputs at the borders of chunks are compared with a convolution that knows no chunks.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sys
import time
from typing import Any

import dask.array as da
import distributed
import numpy as np
from rich.console import Console

from cuconv import ops
from cuconv.interop.dask import conv, halo

CHUNK = 1 << 20  # positions of a recording in one chunk, 16 MiB of it
RECORDINGS, CHANNELS, FILTERS, TAPS, STRIDE = 4, 4, 8, 9, 2


def demonstrate(
    console: Console, gigabytes: float = 4.0, memory: float = 0.5, workers: int = 2, chunk: int = CHUNK
) -> dict[str, Any]:
    """Computes on a cluster that it starts and ends, prints what happens to `console` and returns the figures.

    Args:
        gigabytes: of data, 10**9 bytes each.
        memory: that each worker may use, likewise.
        chunk: positions of one chunk.
    """
    length = max(2 * chunk, round(gigabytes * 1e9 / (RECORDINGS * CHANNELS * 4)))
    x = da.random.default_rng(0).random((RECORDINGS, length, CHANNELS), dtype=np.float32, chunks=(1, chunk, -1))
    rng = np.random.default_rng(1)
    w = rng.standard_normal((TAPS, CHANNELS, FILTERS)).astype(np.float32)
    options: dict[str, Any] = {"strides": STRIDE, "activation": "relu"}
    y = conv(x, w, padding="same", **options)
    # Some outputs around the first borders of chunks and at both ends, and the inputs that they read.
    (axis,) = halo(TAPS, STRIDE, padding="same", in_size=length)
    borders = (0, *np.cumsum(y.chunks[1])[:3], y.shape[1])
    ranges = [(max(int(border) - 8, 0), min(int(border) + 8, y.shape[1])) for border in borders]
    reads = [axis.piece(start, stop, length) for start, stop in ranges]
    wanted = [y.mean(), y.max()]
    wanted += [y[:, start:stop] for start, stop in ranges] + [x[:, first:last] for (first, last), _ in reads]
    limit = {"n_workers": workers, "threads_per_worker": 1, "memory_limit": round(memory * 1e9)}
    console.print(
        f"{x.nbytes / 1e9:.1f} GB in {x.npartitions} chunks, {workers} workers of {memory:g} GB", highlight=False
    )
    with distributed.LocalCluster(**limit, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        start = time.perf_counter()
        futures = client.compute(wanted)
        if not console.quiet:
            distributed.progress(futures, notebook=False)
        mean, largest, *pieces = client.gather(futures)
        seconds = time.perf_counter() - start
        peak = sum(client.run(peak_bytes).values())
    given, inputs = pieces[: len(ranges)], pieces[len(ranges) :]
    direct = [ops.conv(piece, w, padding=(zeros,), **options) for piece, (_, zeros) in zip(inputs, reads, strict=True)]
    off = max(float(np.max(np.abs(a - b))) for a, b in zip(given, direct, strict=True))
    report = {
        "gigabytes": x.nbytes / 1e9,
        "limit_gigabytes": workers * memory,
        "peak_gigabytes": peak / 1e9,
        "seconds": seconds,
        "mean": float(mean),
        "largest": float(largest),
        "off": off,
        "right": off <= 1e-5 * float(largest),
    }
    console.print(
        f"\n{report['gigabytes']:.1f} GB went through {report['peak_gigabytes']:.2f} GB in {seconds:.0f} s: all the "
        f"memory the workers ever took, Python included. Outputs at the borders of chunks are off by {off:.0e} at most "
        f"from those of a convolution without chunks (mean {mean:.4f}, largest {largest:.4f}).",
        highlight=False,
    )
    return report


def peak_bytes() -> int:
    """The most memory that this process has had."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():  # what a process began as counts in ru_maxrss there, and that is as large as its parent
        (line,) = (each for each in status.read_text().splitlines() if each.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    what = "a convolution of more data than there is memory for, on a Dask cluster of this machine"
    parser = argparse.ArgumentParser(prog="python -m cuconv.demo.larger_than_memory", description=what)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of data (default 4)")
    parser.add_argument("--memory", type=float, default=0.5, help="gigabytes that a worker may use (default 0.5)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    options = parser.parse_args(arguments)
    report = demonstrate(Console(), options.gigabytes, options.memory, options.workers)
    return 0 if report["right"] else 1


if __name__ == "__main__":
    sys.exit(main())
