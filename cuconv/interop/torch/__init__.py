"""cuconv in PyTorch: custom operators with gradients, torch.nn's convolution modules, and models that change over.

    from cuconv.interop.torch import Conv1d, replace

    print(replace(model))  # cuconv computes the convolutions of a model; restore(model) undoes it
    layer = Conv1d(64, 64, 3, dilation=512, padding="causal", data_format="channels_last")  # (N, L, C), torch.nn's else

Three levels: the modules, :mod:`~cuconv.interop.torch.functional` with the functions of torch.nn.functional, and
:mod:`~cuconv.interop.torch.ops` with those of :mod:`cuconv.ops` on tensors. Gradients of any order, torch.compile and
autocast work. Tensors are computed where they lie: on a CPU by the NumPy path, on a GPU by our kernels through CuPy, on
torch's current stream. Memory is shared, results are allocated by torch. All results are deterministic.

Weak points:

* On a CPU this is mostly slower than torch itself, and uses the threads of NumPy's BLAS, not torch's.
* A GPU needs CuPy beside torch: ``pip install "cuconv[cuda12x]"`` or ``[cuda13x]``. What is shown without one: kernels
  in the emulator; stream, device and memory on a CuPy without CUDA.
* An operator written in Python costs a tenth of a millisecond of the host's time, so small layers are slow, and every
  call rearranges its weights. torch.compile does not look into operators: activations are not fused with them.
* A CUDA graph can capture a call only after it was made once: the first one compiles and uploads tables.
* torch.func's transforms, forward-mode derivatives, torch.jit and torch.fx.symbolic_trace are not supported.
* TF32 is chosen by `precision`, not by torch's switches, and is not the default.
"""

try:
    import torch
except ImportError as error:
    raise ImportError('cuconv.interop.torch needs PyTorch: pip install "cuconv[torch]"', name=error.name) from error
if not hasattr(torch.library, "custom_op"):
    raise ImportError(
        f'cuconv.interop.torch needs PyTorch 2.4: pip install "cuconv[torch]". Received: {torch.__version__}'
    )

from cuconv.interop.torch import functional, ops
from cuconv.interop.torch.modules import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    SeparableConv1d,
    SeparableConv2d,
    SeparableConv3d,
)
from cuconv.interop.torch.replacing import Report, Swap, replace, restore

__all__ = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Report",
    "SeparableConv1d",
    "SeparableConv2d",
    "SeparableConv3d",
    "Swap",
    "functional",
    "ops",
    "replace",
    "restore",
]
