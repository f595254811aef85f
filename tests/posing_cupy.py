"""A `cupy` that is NumPy underneath, for libraries that compute with CuPy: like CuPy 14 it has no cuDNN.

    cupy = posing_cupy.module()                       # its arrays are Posing, a subclass of NumPy's
    with posing_cupy.installed(cupy, "sigpy"): ...    # sigpy, imported in here, finds it

CUDA code of the library itself is taken and refuses to run.
"""

import contextlib
import importlib.machinery
import sys
import types

import numpy as np


class Posing(np.ndarray):
    """An array that says it is on GPU 0."""

    device = property(lambda self: Device(0))

    def get(self):
        return np.array(self)


class Device(contextlib.nullcontext):
    def __init__(self, index=0):
        super().__init__()
        self.id = int(index)

    def use(self):
        pass


class CudaCode:
    """A kernel of the library's own."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        raise NotImplementedError("CUDA code needs a GPU")


class Module(types.ModuleType):
    """A package of which whatever it has not itself comes from `numpy`, with arrays of `kind` as results."""

    def __init__(self, name, numpy, kind):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        self.__dict__.update(_numpy=numpy, _kind=kind)

    def __getattr__(self, name):
        found = getattr(self._numpy, name)
        if isinstance(found, types.ModuleType):
            return Module(f"{self.__name__}.{name}", found, self._kind)
        if not callable(found) or isinstance(found, type):
            return found

        def function(*arguments, **keywords):
            return self._posing(found(*arguments, **keywords))

        return function

    def _posing(self, result):
        if isinstance(result, np.ndarray) or np.isscalar(result):
            return np.asanyarray(result).view(self._kind)
        return type(result)(map(self._posing, result)) if type(result) in (tuple, list) else result


def module(kind=Posing):
    """A `cupy`; `kind` is the class of its arrays."""
    cupy = Module("cupy", np, kind)
    cupy.__version__ = "14.0.1"
    cupy.ndarray = kind
    cupy.cuda = Module("cupy.cuda", types.SimpleNamespace(), kind)
    cupy.cuda.Device = Device
    cupy.ElementwiseKernel = cupy.RawKernel = CudaCode
    cupy.get_array_module = lambda *arrays: cupy if any(isinstance(array, kind) for array in arrays) else np
    return cupy


@contextlib.contextmanager
def installed(cupy, *modules):
    """While this is open, `modules` and what is in them are imported anew and find `cupy`; then all is as it was."""

    def concerned():
        return [each for each in sys.modules if any(f"{each}.".startswith(f"{name}.") for name in ("cupy", *modules))]

    kept = {name: sys.modules.pop(name) for name in concerned()}
    sys.modules.update({"cupy": cupy, "cupy.cuda": cupy.cuda})
    try:
        yield
    finally:
        for name in concerned():
            del sys.modules[name]
        sys.modules.update(kept)
