"""What the tests of the bridge to torch share: torch itself, made to poison new tensors, and drawn convolutions."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from compare import dtype_of, is_complex
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the bridge to torch")

FAMILIES = ("conv", "conv_transpose", "depthwise_conv", "separable_conv")
# How x lies in memory. The first three are (N, C, L..), of which the second one is stored (N, L.., C) and the third one
# has NaN in between; the last one is given as (N, L.., C).
MEMORY = ("channels_first", "channels_last in memory", "sliced", "channels_last")


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors of torch hold NaN, and what is not deterministic raises."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def random_tensor(rng, shape, dtype, grad=True):
    """Values between -1 and 1, as `dtype` has them."""
    values = rng.uniform(-1, 1, shape)
    if is_complex(dtype):
        values = values + 1j * rng.uniform(-1, 1, shape)
    return torch.from_numpy(np.asarray(values)).to(getattr(torch, dtype)).requires_grad_(grad)


def laid(x, memory: str):
    """x (N, C, L..) with other strides, its gradient reaching x."""
    if memory == "sliced":
        return _Amid.apply(x)
    if memory == "channels_first":
        return x
    last = x.movedim(1, -1).contiguous()
    return last if memory == "channels_last" else last.movedim(-1, 1)


class _Amid(torch.autograd.Function):
    """x in the middle of NaN."""

    @staticmethod
    def forward(ctx, x):
        wide = torch.full([2 * n + 1 for n in x.shape], float("nan"), dtype=x.dtype)
        places = tuple(slice(1, 1 + 2 * n, 2) for n in x.shape)
        wide[places] = x
        return wide[places]

    @staticmethod
    def backward(ctx, g):
        return g


def array(tensor):
    """A tensor's values as a NumPy array of its dtype."""
    tensor = tensor.detach().resolve_conj()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(dtype_of("bfloat16"))
    return tensor.numpy()


def wide(tensor):
    """A tensor in float64 or complex128, a new leaf."""
    if tensor is None:
        return None
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).requires_grad_()


@dataclass(frozen=True)
class Case:
    """One call of a function of torch.nn.functional: x (N, C, L..), its kernels, its keywords."""

    family: str
    x_shape: tuple[int, ...]
    w_shapes: tuple[tuple[int, ...], ...]
    options: dict = field(default_factory=dict)
    bias: int = 0  # elements; 0 for none
    memory: str = "channels_first"
    seed: int = 0

    @property
    def rank(self):
        return len(self.x_shape) - 2

    def tensors(self, dtype):
        rng = np.random.default_rng(self.seed)
        x, *kernels = (random_tensor(rng, shape, dtype) for shape in (self.x_shape, *self.w_shapes))
        return x, kernels, random_tensor(rng, (self.bias,), dtype) if self.bias else None


def one_or_all(draw, values):
    """Equal sizes as one integer or as a tuple."""
    return values[0] if len(set(values)) == 1 and draw(st.booleans()) else tuple(values)


@st.composite
def cases(draw, families=FAMILIES):
    family = draw(st.sampled_from(families))
    rank = draw(st.sampled_from((1, 1, 2, 2, 3)))
    batch = draw(st.sampled_from((1, 2, 3, 2, 0)))
    groups, c, f = draw(st.sampled_from((1, 1, 2, 3))), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    taps = [draw(st.integers(1, {1: 5, 2: 3, 3: 2}[rank])) for _ in range(rank)]
    dilation = [draw(st.integers(1, 3)) for _ in range(rank)]
    stride = [draw(st.integers(1, 3)) for _ in range(rank)]
    spans = [(k - 1) * d + 1 for k, d in zip(taps, dilation)]
    padding, room = [draw(st.integers(0, 2)) for _ in range(rank)], {1: 9, 2: 4, 3: 2}[rank]
    if family == "conv_transpose":
        extra = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation)]
        # As many positions as leave one of the result at least.
        least = [max(1, (2 * p - span - e) // s + 2) for p, span, s, e in zip(padding, spans, stride, extra)]
    else:
        least = [max(1, span - 2 * p) for span, p in zip(spans, padding)]
    sizes = [n + draw(st.integers(0, room)) for n in least]
    options = {"stride": one_or_all(draw, stride), "dilation": one_or_all(draw, dilation)}
    options["padding"] = one_or_all(draw, padding)
    if family == "conv_transpose":
        options["output_padding"] = one_or_all(draw, extra)
    elif draw(st.integers(0, 5)) == 0:
        options |= {"stride": 1, "padding": "same"}
        if draw(st.booleans()):
            options["padding"] = "valid"
            sizes = [n + span for n, span in zip(sizes, spans)]
    if family == "depthwise_conv":
        groups, c = draw(st.integers(2, 4)), 1
    if family in ("conv", "depthwise_conv", "conv_transpose"):
        options["groups"] = groups
    channels = groups * c
    shapes = {
        "conv": ((groups * f, c, *taps),),
        "depthwise_conv": ((groups * f, 1, *taps),),
        "conv_transpose": ((channels, f, *taps),),
        "separable_conv": ((channels * min(f, 2), 1, *taps), (f, channels * min(f, 2), *(1,) * rank)),
    }[family]
    filters = f if family == "separable_conv" else groups * f
    memory = draw(st.sampled_from(MEMORY))
    return Case(
        family,
        (batch, channels, *sizes),
        shapes,
        options,
        draw(st.sampled_from((0, filters))),
        memory,
        draw(st.integers(0, 2**16)),
    )
