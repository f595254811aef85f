"""cuconv in Keras 3: a model trains on our kernels, and layers and models go from one library to the other.

    from cuconv.interop.keras import accelerate, from_keras, to_keras

    with accelerate(model) as acceleration:  # on Keras' torch backend
        model.fit(x, y)
    print(acceleration)  # which layers, how often they were called, and which were left for what reason

    ours = from_keras(model)  # a cuconv.Model with the same configuration and equal weights
    again = to_keras(ours)

While :func:`accelerate` is open, the convolutions of the model's layers go through :mod:`cuconv.interop.torch.ops`,
forward and backward. Weights, optimizer, callbacks and saved files are what they were, and afterwards so is the model,
whatever happened inside. Other models are untouched, unless they share layers with this one.

:func:`from_keras` and :func:`to_keras` copy: neither side sees later changes of the other. They ask nothing of Keras'
backend, but only torch's is tested.

Weak points:

* Layers are found when ``accelerate(model)`` is entered. What a model makes later, in a `build` inside, is left.
* A subclass whose `call` is its own is left, since that may compute anything; quantized layers are, too.
* Activations are Keras' and not fused with the convolution. The eight convolutions of a ConvLSTM's step become two; its
  gates are torch's.
* On a CPU this is mostly slower than torch, and every call has the price of an operator written in Python. A GPU needs
  CuPy beside torch: ``pip install "cuconv[cuda12x]"`` or ``[cuda13x]``. See :mod:`cuconv.interop.torch` for more.
* The switch is in the layer: while it is on, other threads that call the same layer use it as well.
* Conversion knows the layers that cuconv has. Models with others are refused, as are subclassed models, which have no
  graph. The state of an optimizer and of stateful layers is not carried over, and LoRA's factors are merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

try:
    import keras
except ImportError as error:
    if (error.name or "").partition(".")[0] == "keras":
        raise ImportError('cuconv.interop.keras needs Keras 3: pip install "cuconv[keras]"', name="keras") from error
    raise ImportError(
        f"Keras does not start: {error}. It looks for TensorFlow unless KERAS_BACKEND says otherwise: set "
        'KERAS_BACKEND=torch before Keras is imported, and pip install "cuconv[keras]"',
        name=error.name,
    ) from error

if not keras.__version__.startswith("3."):
    raise ImportError(
        f'cuconv.interop.keras needs Keras 3: pip install "cuconv[keras]". Received: keras {keras.__version__}'
    )

from cuconv.interop.keras.converting import from_keras, to_keras

if TYPE_CHECKING:
    from cuconv.interop.keras.accelerating import Acceleration

__all__ = ["accelerate", "from_keras", "to_keras"]


def accelerate(model: Any, *, precision: str = "highest") -> Acceleration:
    """A context manager: while it is open, cuconv computes the convolutions of `model`.

    It can be nested, and opened from several threads; the last one to close gives the layers back.

    Args:
        model: a Keras model or layer, built or not, on the torch backend.
        precision: of float32 on a GPU's tensor cores, "highest" or "high" (TF32).

    Returns:
        What `with` hands over too. Its `accelerated` and `left` tell of each layer with a convolution; it prints as a
        table.

    Raises:
        RuntimeError: Keras runs on another backend.
        TypeError: `model` is none of Keras'.
    """
    if keras.config.backend() != "torch":
        raise RuntimeError(
            "accelerate() needs Keras on torch: set KERAS_BACKEND=torch before Keras is imported. "
            f"Received: backend={keras.config.backend()!r}"
        )
    from cuconv.interop.keras.accelerating import Acceleration  # torch is needed from here on

    return Acceleration(model, precision)
