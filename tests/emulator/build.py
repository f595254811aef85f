"""Shared libraries from translated kernels, cached by content in a private directory of the user."""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
HEADERS = ("arithmetic.h", "runtime.h", "collectives.h")
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


def cache_directory() -> Path:
    """The directory of built libraries; only its owner can write to it, since what is in it gets loaded."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = root / "cuconv" / "emulator"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(f"{directory} must belong to this user and be writable by no one else")
    return directory


@lru_cache(maxsize=1)
def _compiler() -> str:
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout


def _cached(suffix: str, content: str, arguments: list[str], mode: str) -> Path:
    """The file that g++ makes of `content`."""
    flags = [*FLAGS, f"-DTRACE={MODES[mode]}"]
    headers = "".join((HERE / name).read_text() for name in HEADERS)
    key = "\0".join((content, headers, _compiler(), *flags, *arguments))
    target = cache_directory() / (hashlib.sha256(key.encode()).hexdigest()[:32] + suffix)
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        source, output = Path(directory, "source.cpp"), Path(directory, "output")
        source.write_text(content)
        command = ["g++", *flags, f"-I{HERE}", str(source), *arguments, "-o", str(output)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"the translated kernel does not compile:\n{result.stderr[:4000]}")
        output.replace(target)
    return target


def library(code: str, mode: str) -> Path:
    """The shared library of a translated module together with the runtime, in one of MODES."""
    runtime = _cached(".o", (HERE / "runtime.cpp").read_text(), ["-c"], mode)
    return _cached(".so", code, ["-shared", str(runtime)], mode)
