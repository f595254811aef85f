"""An array that, like CuPy's, can only be reached through NumPy's protocols.

Plain NumPy arrays must not meet it, only the functions listed take it, with the keywords that CuPy's versions have, and
it never turns into a NumPy array by itself.
"""

import numpy as np

FUNCTIONS = {
    np.clip: {"out"},
    np.concatenate: {"axis"},
    np.cumsum: {"axis"},
    np.empty_like: {"shape"},
    np.fill_diagonal: set(),
    np.full_like: set(),
    np.max: {"axis", "keepdims"},
    np.ones_like: set(),
    np.sort: {"axis"},
    np.sum: {"axis", "keepdims", "dtype"},
    np.where: set(),
    np.zeros_like: set(),
}


class DeviceArray(np.lib.mixins.NDArrayOperatorsMixin):
    """A NumPy array behind the protocols."""

    def __init__(self, array):
        self.host = np.array(array)

    shape = property(lambda self: self.host.shape)
    dtype = property(lambda self: self.host.dtype)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    T = property(lambda self: DeviceArray(self.host.T))

    def __len__(self):
        return len(self.host)

    def __float__(self):
        return float(self.host)

    def __getitem__(self, index):
        view = DeviceArray(())
        view.host = self.host[index]
        return view

    def __setitem__(self, index, value):
        self.host[index] = _host(value)

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def astype(self, dtype, copy=True):
        return DeviceArray(self.host.astype(dtype, copy=copy))

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **keywords):
        if method != "__call__" or set(keywords) - {"casting", "dtype"}:
            return NotImplemented
        if out:
            ufunc(*map(_host, inputs), out=out[0].host, **keywords)
            return out[0]
        return DeviceArray(ufunc(*map(_host, inputs), **keywords))

    def __array_function__(self, function, types, args, keywords):
        keywords = {key: value for key, value in keywords.items() if value is not None}
        known = function in FUNCTIONS and set(keywords) <= FUNCTIONS[function]
        if not known or any(kind is not DeviceArray for kind in types):
            return NotImplemented
        out = keywords.pop("out", None)
        if out is not None:
            out.host[...] = function(*map(_host, args), **keywords)
            return out
        result = function(*map(_host, args), **keywords)
        return None if result is None else DeviceArray(result)


def _host(value):
    if isinstance(value, DeviceArray):
        return value.host
    if isinstance(value, (list, tuple)):
        return type(value)(map(_host, value))
    if isinstance(value, np.ndarray):
        raise TypeError("A NumPy array met a device array.")
    return value
