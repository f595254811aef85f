"""PTX and cubins from CUDA C, by NVRTC: from the `nvidia-cuda-nvrtc` wheel, else through CuPy's binding."""

import ctypes
import importlib.util
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from . import cache


class CompileError(RuntimeError):
    """NVRTC refused a source; the message is its log."""


class _Library:
    """The NVRTC functions that turn a source into PTX or a cubin."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, name: str, options: list[str], what: str) -> bytes:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            encoded = [option.encode() for option in options]
            array = (ctypes.c_char_p * len(encoded))(*encoded)
            if self._lib.nvrtcCompileProgram(program, len(encoded), array):
                raise CompileError(self._data("ProgramLog", program).rstrip(b"\0").decode())
            return self._data(what, program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _call(self, function: str, *arguments) -> None:
        if code := getattr(self._lib, function)(*arguments):
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"{function}: {self._lib.nvrtcGetErrorString(code).decode()}")

    def _data(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw


class _CupyBinding:
    """The same through CuPy, which needs no driver for it."""

    def __init__(self, nvrtc):
        self._nvrtc = nvrtc

    def version(self) -> str:
        return "{}.{}".format(*self._nvrtc.getVersion())

    def compile(self, source: str, name: str, options: list[str], what: str) -> bytes:
        program = self._nvrtc.createProgram(source, name, [], [])
        try:
            self._nvrtc.compileProgram(program, tuple(options))
            if what == "PTX":
                return self._nvrtc.getPTX(program)
            return self._nvrtc.getCUBIN(program) + b"\0"  # CuPy takes the last byte for the end of a text
        except self._nvrtc.NVRTCError as error:
            raise CompileError(self._nvrtc.getProgramLog(program)) from error
        finally:
            self._nvrtc.destroyProgram(program)


@lru_cache(maxsize=1)
def _find() -> _Library | _CupyBinding | None:
    if spec := importlib.util.find_spec("nvidia"):
        for folder in spec.submodule_search_locations or ():
            for pattern in ("cu*/lib/libnvrtc.so.*", "cuda_nvrtc/lib/libnvrtc.so.*"):
                for path in sorted(Path(folder).glob(pattern), reverse=True):
                    return _Library(path)
    if importlib.util.find_spec("cupy"):
        try:
            from cupy.cuda import nvrtc

            nvrtc.getVersion()
        except Exception:  # CuPy raises many kinds when a CUDA library is missing; all mean the same here
            return None
        return _CupyBinding(nvrtc)
    return None


def missing() -> str | None:
    """Why no PTX can be made here, or None."""
    return None if _find() else "NVRTC is missing: pip install nvidia-cuda-nvrtc"


def compile_ptx(
    source: str | Path,
    arch: str = "sm_80",
    defines: Mapping[str, object] | None = None,
    *,
    options: tuple[str, ...] = (),
) -> str:
    """The PTX of a CUDA C source, with line information; kept by content.

    Args:
        source: the text, or the path of a .cu file; `#include "..."` is looked up beside that file.
        arch: such as "sm_80".
        defines: macros; None as a value defines the bare name.
        options: further NVRTC options.
    """
    return _compile("PTX", source, arch, defines, options).rstrip(b"\0").decode()


def compile_cubin(
    source: str | Path,
    arch: str = "sm_80",
    defines: Mapping[str, object] | None = None,
    *,
    options: tuple[str, ...] = (),
) -> bytes:
    """The machine code of a CUDA C source; arguments as :func:`compile_ptx`."""
    return _compile("CUBIN", source, arch, defines, options)


def _compile(what, source, arch, defines, options) -> bytes:
    nvrtc = _find()
    if nvrtc is None:
        raise CompileError(missing())
    flags = [f"--gpu-architecture={arch}", "--std=c++17", "--generate-line-info", *options]
    name, folders = "kernel.cu", []
    if isinstance(source, Path):
        name = source.name
        folders.append(source.parent)
        flags.append(f"--include-path={source.parent}")
        source = source.read_text()
    folders += [Path(option.partition("=")[2]) for option in options if option.startswith("--include-path=")]
    flags += [f"-D{key}" if value is None else f"-D{key}={value}" for key, value in (defines or {}).items()]
    key = json.dumps([what, nvrtc.version(), name, flags, source, _included(source, folders)])
    return cache.cached(key, f".{what.lower()}", lambda: nvrtc.compile(source, name, flags, what)).read_bytes()


def _included(source: str, folders: list[Path]) -> dict[str, str]:
    """The text of every file that a source includes, and that those include."""
    found: dict[str, str] = {}
    texts = [source]
    while texts:
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', texts.pop(), re.MULTILINE):
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path and name not in found:
                found[name] = path.read_text()
                texts.append(found[name])
    return found
