"""Tensors as the arrays that :mod:`cuconv.ops` takes: the same memory, on both sides.

On a CPU that is a NumPy view. On a GPU it is a CuPy view by way of DLPack, and while cuconv computes, CuPy works on
torch's current stream of the tensor's GPU and takes its scratch memory from torch's allocator: one order of work, one
pool of memory, and a CUDA graph that torch captures holds our kernels too.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import ml_dtypes
import numpy as np
import torch

from cuconv.cuda import runtime

DTYPES = (torch.float16, torch.float32, torch.float64, torch.bfloat16, torch.complex64, torch.complex128)
DEVICES = ("cpu", "cuda")  # device types that cuconv computes on


def view(tensor: torch.Tensor) -> Any:
    """`tensor` as a NumPy or CuPy array of the same memory and strides."""
    tensor = tensor.detach()
    bfloat16 = tensor.dtype == torch.bfloat16  # which NumPy does not have, nor every version of DLPack
    if bfloat16:
        tensor = tensor.view(torch.int16)
    array = runtime.from_dlpack(tensor) if tensor.is_cuda else tensor.numpy()
    return array.view(ml_dtypes.bfloat16) if bfloat16 else array


def placed(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """While this is open, what cuconv does is in order with what torch does on the device of `tensor`."""
    if not tensor.is_cuda:
        return np.errstate(all="ignore")  # torch does not warn of infinities, on which the scaling of losses relies
    stream = torch.cuda.current_stream(tensor.device).cuda_stream
    gpu = runtime.current(tensor.get_device())
    return gpu.borrowing(stream, torch.cuda.caching_allocator_alloc, _free)


def _free(address: int, device: int) -> None:
    if not sys.is_finalizing():  # then torch's allocator may be gone, and its memory with it
        torch.cuda.caching_allocator_delete(address)
