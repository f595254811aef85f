"""sigpy's convolutions of CuPy arrays, which need the cuDNN that CuPy 14 no longer has, on our kernels.

Two lines more, at any place before the first convolution, before or after `import sigpy`::

    from cuconv.compat.sigpy import enable

    enable()

From then on :func:`sigpy.convolve` and its two adjoints, `sigpy.linop.ConvolveData`, `ConvolveFilter` and the apps that
use them, such as `sigpy.mri.app.JsenseRecon`, take CuPy arrays of one, two and three dimensions, as they did with
CuPy 13. Arrays of NumPy go where they always went, to SciPy.

sigpy asks whether cuDNN is there while it is imported, and defines its functions for the GPU only where it is. So
`enable` says yes and lets sigpy define them, with :mod:`cuconv.compat.cudnn` as the `cupy.cudnn` that it imports. The
name is lent to sigpy for that moment: no other library finds a `cupy.cudnn` where there is none. What sigpy makes of
four real convolutions, the product of complex arrays, is one complex convolution then.

Weak points:

* data and filter of a real convolution must have one dtype, as with cuDNN; SciPy mixes them. A filter of a complex
  convolution is converted to the dtype of the data, whatever it has.
* in mode "valid" a filter longer than the data is refused, on the CPU by sigpy itself.
* `enable` loads `sigpy.conv` a second time and sets names in it that are not public, those of sigpy 0.1.26 and 0.1.27.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from sigpy import config, conv

from cuconv.compat import cudnn

__all__ = ["enable"]


def enable() -> bool:
    """Convolves what sigpy has on a GPU with our kernels, from now on and in the whole process.

    Returns:
        Whether sigpy found CuPy. Where it did not, all its arrays are NumPy's and nothing changes.
    """
    if not config.cupy_enabled:
        return False
    config.cudnn_enabled = True
    public = {name: getattr(conv, name) for name in conv.__all__}
    with _lent("cupy.cudnn", cudnn):
        importlib.reload(conv)
    conv.__dict__.update(public)  # those that others have imported, which find the new ones beneath them
    conv.cudnn = cudnn  # CuPy 13 has one of its own
    conv._complex = _complex
    return True


@contextlib.contextmanager
def _lent(name: str, module: ModuleType) -> Iterator[None]:
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


def _complex(function: Callable[..., Any], data: Any, factor: Any, *arguments: Any, **keywords: Any) -> Any:
    """What sigpy's function of this name does: `function` of complex arrays.

    For an adjoint sigpy conjugates the second array beforehand. Ours does that itself.
    """
    if function is not conv._convolve_cuda:
        factor = factor.conj()
    return function(data, factor.astype(data.dtype, copy=False), *arguments, **keywords)
