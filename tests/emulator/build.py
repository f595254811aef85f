"""Shared libraries from translated kernels, kept by content."""

import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from . import cache

HERE = Path(__file__).parent
HEADERS = ("arithmetic.h", "runtime.h", "collectives.h", "internals.h")
RUNTIME = ("runtime.cpp", "tensor_copies.cpp", "warpgroup.cpp")
MODES = {"plain": 0, "trace": 1}

# PTX says which products and sums are fused, so the compiler must not decide. Unique symbols would be shared between
# the libraries of two modules.
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fwrapv", "-w"]
FLAGS += ["-fvisibility=hidden", "-fno-gnu-unique"]
if platform.machine() == "x86_64":
    FLAGS.append("-march=x86-64-v3")  # fused multiply-add and half-precision conversions in hardware


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    return None if shutil.which("g++") else "g++ is missing"


@lru_cache(maxsize=1)
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


@lru_cache(maxsize=1)
def _headers() -> str:
    return "".join((HERE / name).read_text() for name in HEADERS)


def _compiled(suffix: str, content: str, arguments: list[str], mode: str) -> Path:
    """The file that g++ makes of `content`."""
    flags = [*FLAGS, f"-DTRACE={MODES[mode]}"]

    def compile_it() -> bytes:
        with tempfile.TemporaryDirectory() as directory:
            source, output = Path(directory, "source.cpp"), Path(directory, "output")
            source.write_text(content)
            command = ["g++", *flags, f"-I{HERE}", str(source), *arguments, "-o", str(output)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise RuntimeError(f"the translated kernel does not compile:\n{result.stderr[:4000]}")
            return output.read_bytes()

    key = "\0".join((content, _headers(), _compiler(), *flags, *arguments))
    return cache.cached(key, suffix, compile_it)


def library(code: str, mode: str) -> Path:
    """The shared library of a translated module together with the runtime, in one of MODES."""
    runtime = [str(_compiled(".o", (HERE / name).read_text(), ["-c"], mode)) for name in RUNTIME]
    return _compiled(".so", code, ["-shared", "-s", *runtime], mode)
