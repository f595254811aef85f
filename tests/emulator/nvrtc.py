"""PTX from CUDA C, by NVRTC: from the `nvidia-cuda-nvrtc` wheel, else through CuPy's binding."""

import ctypes
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path


class CompileError(RuntimeError):
    """NVRTC refused a source; the message is its log."""


class _Library:
    """The five NVRTC functions that turn a source into PTX."""

    def __init__(self, path: Path):
        self._lib = ctypes.CDLL(str(path))

    def compile(self, source: str, name: str, options: list[str]) -> str:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            encoded = [option.encode() for option in options]
            array = (ctypes.c_char_p * len(encoded))(*encoded)
            if self._lib.nvrtcCompileProgram(program, len(encoded), array):
                raise CompileError(self._text("ProgramLog", program))
            return self._text("PTX", program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _call(self, function: str, *arguments) -> None:
        if code := getattr(self._lib, function)(*arguments):
            self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise CompileError(f"{function}: {self._lib.nvrtcGetErrorString(code).decode()}")

    def _text(self, what: str, program: ctypes.c_void_p) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.value.decode()


class _CupyBinding:
    """The same through CuPy, which needs no driver for it."""

    def __init__(self, nvrtc):
        self._nvrtc = nvrtc

    def compile(self, source: str, name: str, options: list[str]) -> str:
        program = self._nvrtc.createProgram(source, name, [], [])
        try:
            self._nvrtc.compileProgram(program, tuple(options))
            return self._nvrtc.getPTX(program).rstrip(b"\0").decode()
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
    """The PTX of a CUDA C source, with line information.

    Args:
        source: the text, or the path of a .cu file; `#include "..."` is looked up beside that file.
        arch: such as "sm_80".
        defines: macros; None as a value defines the bare name.
        options: further NVRTC options.
    """
    nvrtc = _find()
    if nvrtc is None:
        raise CompileError(missing())
    flags = [f"--gpu-architecture={arch}", "--std=c++17", "--generate-line-info", *options]
    name = "kernel.cu"
    if isinstance(source, Path):
        name = source.name
        flags.append(f"--include-path={source.parent}")
        source = source.read_text()
    flags += [f"-D{key}" if value is None else f"-D{key}={value}" for key, value in (defines or {}).items()]
    return nvrtc.compile(source, name, flags)
