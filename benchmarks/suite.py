"""The 58 problems that cuconv is measured on, as data: `python -m benchmarks.suite --list [--json]`.

What a row costs at least is computed from its geometry: operations, those that meet padding included; every array of
the call moved once; and the time that a GPU at its peaks would take for either. Nothing here needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from cuconv import geometry
from cuconv.geometry import ConvShape

# Peaks of an H200: operations and bytes a second. bfloat16 and float16 are what dense matrix products reach in
# practice (its data sheet says 989e12); TF32 is half of that; float32 as three products of TF32, which are as exact;
# the ordinary units and the memory are the data sheet's.
RATES = {"bfloat16": 790e12, "float16": 790e12, "tf32": 395e12, "float32": 395e12 / 3}
ORDINARY_RATE = 67e12  # depthwise convolutions of float32; of 16 bits they are products of banded matrices
BANDWIDTH = 4.8e12
SHORT = 10e-6  # seconds; what is shorter is bound by its launch
RIDGE = 1.25  # a row whose two times are closer than this factor lies on the ridge

ITEM_BYTES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
GROUPS = {
    "a": "dense, one axis",
    "b": "depthwise, one axis",
    "c": "separable",
    "d": "two axes",
    "e": "transposed",
    "f": "three axes",
    "g": "gradients",
    "sweep": "dilation 1 to 512",
}
DEPTHWISE = ("depthwise_conv", "depthwise_conv_grad")
GRADIENTS = ("conv_input_grad", "conv_kernel_grad", "depthwise_conv_grad")
VARIANTS = ("plain", "fused")


@dataclass(frozen=True)
class Row:
    """One problem: `op` is a function of :mod:`cuconv.ops`, the rest its arguments; x is the input of the forward pass.

    Attributes:
        padding: as ops takes it, a (before, after) pair for each axis where it is numbers.
        dtype: of the arrays; "tf32" is float32 with precision="high".
        activation: what the fused variant applies after the bias.
    """

    number: int
    group: str
    name: str
    op: str
    x: tuple[int, ...]
    kernel_size: tuple[int, ...]
    filters: int
    strides: tuple[int, ...]
    dilation_rate: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dtype: str
    note: str = ""
    activation: str = "relu"

    # --- What the operation gets ---

    @property
    def depthwise(self) -> bool:
        """Whether every filter reads one channel."""
        return self.op in DEPTHWISE

    @property
    def variants(self) -> tuple[str, ...]:
        """ "plain", and "fused" where the operation has a bias and an activation."""
        return VARIANTS[:1] if self.op in GRADIENTS else VARIANTS

    def variant_name(self, variant: str) -> str:
        """ "plain", or what is fused, "bias+relu"."""
        return variant if variant == "plain" else f"bias+{self.activation}"

    @property
    def array_dtype(self) -> str:
        """The dtype of the arrays."""
        return "float32" if self.dtype == "tf32" else self.dtype

    @cached_property
    def kernels(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the kernels; a separable convolution has two."""
        channels, taps = self.x[-1], self.kernel_size
        if self.depthwise:
            return ((*taps, channels, self.filters // channels),)
        if self.op == "separable_conv":
            return (*taps, channels, 1), (*(1,) * len(taps), channels, self.filters)
        return ((*taps, self.filters, channels),) if self.op == "conv_transpose" else ((*taps, channels, self.filters),)

    @cached_property
    def geometry(self) -> ConvShape:
        """The convolution; of a transposed one, that whose input gradient it is."""
        rule = geometry.conv_shape
        if self.op == "conv_transpose":
            rule = geometry.transpose_shape
        elif self.depthwise or self.op == "separable_conv":
            rule = geometry.depthwise_shape
        return rule(
            self.x,
            self.kernels[0],
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
        )

    @cached_property
    def y(self) -> tuple[int, ...]:
        """Shape of the forward pass's output."""
        shape = self.geometry.x_shape if self.op == "conv_transpose" else self.geometry.y_shape
        return (*shape[:-1], self.filters)

    @property
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of what the operation returns."""
        if self.op == "depthwise_conv_grad":
            return self.x, self.kernels[0], (self.filters,)
        return ({"conv_input_grad": self.x, "conv_kernel_grad": self.kernels[0]}.get(self.op, self.y),)

    def shapes(self, variant: str = "plain") -> tuple[tuple[int, ...], ...]:
        """The positional arguments of the operation, each array as its shape."""
        if self.op == "conv_input_grad":
            return self.y, self.kernels[0], self.x
        if self.op == "conv_kernel_grad":
            return self.x, self.y, self.kernels[0]
        if self.op == "depthwise_conv_grad":
            return self.x, self.kernels[0], self.y
        return (self.x, *self.kernels, *([(self.filters,)] if variant == "fused" else []))

    def options(self, variant: str = "plain") -> dict[str, Any]:
        """The keywords of the operation."""
        given: dict[str, Any] = {
            "strides": self.strides,
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
        }
        if variant == "fused":
            given["activation"] = self.activation
        if self.dtype == "tf32":
            given["precision"] = "high"
        return given

    def explain(self, device: str | None = "H200", variant: str = "plain") -> Any:
        """The launches that cuconv makes of it on a GPU of that name, or for None on the one at hand, as an Explanation
        of :mod:`cuconv.explain`."""
        from cuconv import ops

        return ops.explain(
            self.op, *self.shapes(variant), dtype=self.array_dtype, device=device, **self.options(variant)
        )

    # --- What it costs at least ---

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions, those that meet padding included."""
        shape = self.geometry
        positions = math.prod((shape.batch, *shape.out_size))
        forward = 2 * positions * sum(map(math.prod, self.kernels))
        return 2 * forward if self.op == "depthwise_conv_grad" else forward  # of x and of w; the bias only adds

    @cached_property
    def bytes(self) -> int:
        """Every array of the plain call moved once."""
        # The last argument of these two is the shape of their output.
        outputs = () if self.op in ("conv_input_grad", "conv_kernel_grad") else self.outputs
        return ITEM_BYTES[self.dtype] * sum(map(math.prod, (*self.shapes(), *outputs)))

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """Operations a second that the arithmetic units can do at most."""
        return ORDINARY_RATE if self.depthwise and self.dtype == "float32" else RATES[self.dtype]

    @property
    def compute_seconds(self) -> float:
        """What the operations take at the peak."""
        return self.flops / self.rate

    @property
    def memory_seconds(self) -> float:
        """What the bytes take at the peak."""
        return self.bytes / BANDWIDTH

    @property
    def roof_seconds(self) -> float:
        """What no implementation can be faster than."""
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def side(self) -> str:
        """What bounds it, "compute" or "memory"."""
        return "compute" if self.compute_seconds >= self.memory_seconds else "memory"

    @property
    def ridge(self) -> bool:
        """Whether the other bound is nearly as high."""
        return max(self.compute_seconds, self.memory_seconds) < RIDGE * min(self.compute_seconds, self.memory_seconds)

    @property
    def goal(self) -> float | None:
        """The share of the roof on an H200 that its kernels are written for; None where a launch takes longer than the
        work, and where two kernels run that are to become one.

        Memory-bound rows aim at the speed of a copy, dense ones at 60 % of the best matrix product, which is about what
        mma.sync reaches, and in float32 at 100 TFLOP/s.
        """
        if self.op == "separable_conv" or self.roof_seconds < SHORT:
            return None
        if self.op == "depthwise_conv":
            return 0.85 if math.prod(self.kernel_size) <= 8 else 0.8
        if self.op == "depthwise_conv_grad":
            return 0.8
        if self.dtype == "float32":
            return 100e12 / self.rate
        return 0.75 if self.side == "memory" else 0.6

    def record(self) -> dict[str, Any]:
        """One flat line for JSON."""
        return {
            "number": self.number,
            "group": self.group,
            "name": self.name,
            "op": self.op,
            "x": self.x,
            "kernels": self.kernels,
            "y": self.y,
            "strides": self.strides,
            "dilation_rate": self.dilation_rate,
            "padding": self.padding,
            "dtype": self.dtype,
            "variants": [self.variant_name(variant) for variant in self.variants],
            "gflop": self.flops / 1e9,
            "minimal_mb": self.bytes / 1e6,
            "flop_per_byte": self.intensity,
            "compute_us": self.compute_seconds * 1e6,
            "memory_us": self.memory_seconds * 1e6,
            "roof_us": self.roof_seconds * 1e6,
            "side": self.side,
            "ridge": self.ridge,
            "goal": self.goal,
            "note": self.note,
        }


# --- The rows ----------------------------------------------------------------------------------------------------

OPS = {
    "fwd": "conv",
    "fwdT": "conv_transpose",
    "dw": "depthwise_conv",
    "sep": "separable_conv",
    "dgrad": "conv_input_grad",
    "wgrad": "conv_kernel_grad",
    "dwbwd": "depthwise_conv_grad",
}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "tf32": "tf32"}


def _row(
    number: int,
    group: str,
    name: str,
    op: str,
    x: str,
    filters: int,
    kernel: str,
    strides: str,
    dilation: int,
    padding: str | int,
    dtype: str,
    note: str = "",
    activation: str = "relu",
) -> Row:
    """A line of the table: sizes are written "8x16384x128", one number counts for every axis."""

    def sizes(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split("x")))

    shape = sizes(x)
    rank = len(shape) - 2

    def each(text: str) -> tuple[int, ...]:
        return sizes(text) * rank if "x" not in text else sizes(text)

    return Row(
        number=number,
        group=group,
        name=name,
        op=OPS[op],
        x=shape,
        kernel_size=each(kernel),
        filters=filters,
        strides=each(strides),
        dilation_rate=(dilation,) * rank,
        padding=((padding, padding),) * rank if isinstance(padding, int) else padding,
        dtype=DTYPES[dtype],
        note=note,
        activation=activation,
    )


ROWS: tuple[Row, ...] = tuple(
    _row(number, *line)
    for number, line in enumerate(
        (
            # group, name, operation, x, filters, kernel, strides, dilation, padding, dtype
            ("a", "WaveNet gate d=1", "fwd", "8x16384x128", 256, "2", "1", 1, "causal", "bf16"),
            ("a", "WaveNet gate d=16", "fwd", "8x16384x128", 256, "2", "1", 16, "causal", "bf16"),
            ("a", "WaveNet gate d=512", "fwd", "8x16384x128", 256, "2", "1", 512, "causal", "bf16"),
            ("a", "TCN k3 d=1", "fwd", "64x2048x128", 128, "3", "1", 1, "causal", "tf32"),
            ("a", "TCN k3 d=64", "fwd", "64x2048x128", 128, "3", "1", 64, "causal", "fp32"),
            ("a", "MS-TCN d=256 (one video)", "fwd", "1x6000x64", 64, "3", "1", 256, "same", "fp32", "bound by launch"),
            ("a", "wav2vec2 L0", "fwd", "8x256000x1", 512, "10", "5", 1, "valid", "bf16", "one channel: writes"),
            ("a", "wav2vec2 L1", "fwd", "8x51199x512", 512, "3", "2", 1, "valid", "bf16"),
            ("a", "wav2vec2 L5", "fwd", "8x3199x512", 512, "2", "2", 1, "valid", "bf16"),
            ("a", "Whisper-large conv1", "fwd", "16x3000x128", 1280, "3", "1", 1, 1, "bf16"),
            ("a", "Whisper-large conv2", "fwd", "16x3000x1280", 1280, "3", "2", 1, 1, "bf16"),
            ("a", "Enformer stem", "fwd", "2x196608x4", 768, "15", "1", 1, "same", "bf16", "four channels: writes"),
            ("a", "Enformer tower k5", "fwd", "2x98304x768", 768, "5", "1", 1, "same", "bf16"),
            ("a", "ChromBPNet stem k21", "fwd", "64x2114x4", 512, "21", "1", 1, "valid", "bf16"),
            ("a", "ChromBPNet dilated d=128", "fwd", "64x2000x512", 512, "3", "1", 128, "same", "bf16"),
            ("a", "HAR conv1 (UCI)", "fwd", "256x128x9", 100, "10", "1", 1, "valid", "fp32"),
            ("a", "HAR conv2", "fwd", "256x119x100", 100, "10", "1", 1, "valid", "fp32"),
            ("a", "Inductor PR#174989", "fwd", "3072x202x128", 384, "3", "1", 1, "valid", "bf16"),
            ("a", "JAX#11143", "fwd", "16x512x2048", 2048, "3", "1", 1, 1, "bf16"),
            ("b", "Mamba-2.8B k4+SiLU", "dw", "8x2048x5120", 5120, "4", "1", 1, "causal", "bf16", "", "silu"),
            ("b", "pytorch#192902", "dw", "1x16384x12288", 12288, "4", "1", 1, "causal", "bf16"),
            ("b", "Inductor PR#175280", "dw", "3072x202x128", 128, "3", "1", 1, "valid", "bf16"),
            ("b", "Conformer k31", "dw", "32x1000x512", 512, "31", "1", 1, "same", "bf16"),
            ("b", "Conformer k31 fp32", "dw", "32x1000x512", 512, "31", "1", 1, "same", "fp32"),
            ("b", "dilated dw (JAX#26266)", "dw", "32x1024x512", 512, "7", "1", 64, "same", "fp32"),
            ("b", "StripedHyena-medium k128", "dw", "2x8192x4096", 4096, "128", "1", 1, "causal", "bf16"),
            ("c", "SepConv1D k5", "sep", "32x4096x256", 256, "5", "1", 1, "same", "bf16"),
            ("c", "QuartzNet k33", "sep", "32x800x256", 256, "33", "1", 1, "same", "bf16"),
            ("c", "Xception 19x19", "sep", "64x19x19x728", 728, "3", "1", 1, "same", "bf16"),
            ("c", "MobileNetV1 14x14", "sep", "128x14x14x512", 512, "3", "1", 1, "same", "bf16"),
            ("d", "ResNet50 conv1 7x7", "fwd", "64x224x224x3", 64, "7", "2", 1, 3, "bf16"),
            ("d", "ResNet50 3x3 64 (56^2)", "fwd", "64x56x56x64", 64, "3", "1", 1, 1, "bf16"),
            ("d", "ResNet50 1x1 256->64", "fwd", "64x56x56x256", 64, "1", "1", 1, 0, "bf16"),
            ("d", "ResNet50 3x3 128 (28^2)", "fwd", "64x28x28x128", 128, "3", "1", 1, 1, "bf16"),
            ("d", "ResNet50 3x3 s2 256", "fwd", "64x28x28x256", 256, "3", "2", 1, 1, "bf16"),
            ("d", "ResNet50 3x3 512 (7^2)", "fwd", "64x7x7x512", 512, "3", "1", 1, 1, "bf16", "few tiles: waves"),
            ("d", "ConvNeXt-T dw7x7", "dw", "64x56x56x96", 96, "7", "1", 1, 3, "bf16"),
            ("d", "MobileNetV2 dw3x3", "dw", "128x56x56x144", 144, "3", "1", 1, 1, "bf16"),
            ("d", "DeepLab 3x3 d=6 (ASPP)", "fwd", "8x64x64x2048", 256, "3", "1", 6, 6, "bf16"),
            ("d", "SD-UNet 3x3 320", "fwd", "4x64x64x320", 320, "3", "1", 1, 1, "bf16"),
            ("d", "VAE 3x3 512 (256^2)", "fwd", "1x256x256x512", 512, "3", "1", 1, 1, "bf16"),
            ("e", "HiFi-GAN up1 k16 s8", "fwdT", "16x256x512", 256, "16", "8", 1, "same", "bf16"),
            ("e", "HiFi-GAN up2 k16 s8", "fwdT", "16x2048x256", 128, "16", "8", 1, "same", "bf16"),
            ("e", "HiFi-GAN up4 k4 s2", "fwdT", "16x32768x64", 32, "4", "2", 1, "same", "bf16"),
            ("e", "Oobleck k20 s10 (candle#3383)", "fwdT", "1x512x2048", 1024, "20", "10", 1, "same", "tf32"),
            ("e", "UNet up 2x2 s2", "fwdT", "16x64x64x512", 256, "2", "2", 1, "same", "bf16"),
            ("f", "3D-UNet 64^3 32->64", "fwd", "2x64x64x64x32", 64, "3", "1", 1, 1, "bf16"),
            ("f", "pytorch#24082 64^3 64->64", "fwd", "8x64x64x64x64", 64, "3", "1", 1, 1, "fp16"),
            ("f", "video-VAE causal 96->96", "fwd", "1x21x240x416x96", 96, "3", "1", 1, "same", "bf16"),
            ("f", "Qwen-VL patch embed", "fwd", "1x2x1024x1024x3", 1152, "2x16x16", "2x16x16", 1, "valid", "bf16"),
            ("g", "WaveNet gate d=16", "dgrad", "8x16384x128", 256, "2", "1", 16, "causal", "bf16"),
            (
                "g",
                "WaveNet gate d=16",
                "wgrad",
                "8x16384x128",
                256,
                "2",
                "1",
                16,
                "causal",
                "bf16",
                "few tiles: splits",
            ),
            ("g", "wav2vec2 L1 s2", "dgrad", "8x51199x512", 512, "3", "2", 1, "valid", "bf16"),
            ("g", "wav2vec2 L1 s2", "wgrad", "8x51199x512", 512, "3", "2", 1, "valid", "bf16"),
            ("g", "ResNet50 3x3 128", "wgrad", "64x28x28x128", 128, "3", "1", 1, 1, "bf16"),
            ("g", "ResNet50 conv1 (CUTLASS#793)", "wgrad", "128x224x224x4", 64, "7", "2", 1, 3, "fp16"),
            ("g", "Mamba k4 fused dx+dw+db", "dwbwd", "8x2048x5120", 5120, "4", "1", 1, "causal", "bf16"),
            ("g", "Conformer k31 fused bwd", "dwbwd", "32x1000x512", 512, "31", "1", 1, "same", "bf16"),
        ),
        start=1,
    )
)

# Rows 1 to 3 are three of these.
SWEEP: tuple[Row, ...] = tuple(
    replace(ROWS[0], number=101 + power, group="sweep", name=f"WaveNet gate d={2**power}", dilation_rate=(2**power,))
    for power in range(10)
)


def selected(groups: Sequence[str] = (), numbers: Sequence[int] = ()) -> list[Row]:
    """The rows of these groups and those of these numbers, in order; without either, the 58.

    Raises:
        ValueError: a number that no row has.
    """
    every = (*ROWS, *SWEEP)
    unknown = sorted(set(numbers) - {row.number for row in every})
    if unknown:
        raise ValueError(
            f"`rows` must be numbers from 1 to {len(ROWS)}, or from {SWEEP[0].number} to {SWEEP[-1].number} of the "
            f"sweep. Received: rows={unknown}"
        )
    if not groups and not numbers:
        return list(ROWS)
    return [row for row in every if row.group in groups or row.number in numbers]


# --- Printing ----------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    """The rows to read."""
    out = Table(
        title="least cost of the suite's rows, at the peaks of an H200",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    out.add_column("#", justify="right", min_width=3)
    out.add_column("row", no_wrap=True, max_width=24)
    out.add_column("dtype", no_wrap=True)
    for heading in ("GFLOP", "MB", "FLOP/B", "us C", "us M"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("", min_width=2)
    short = {long: name for name, long in DTYPES.items()}
    for row, following in zip(rows, (*rows[1:], None), strict=True):
        out.add_row(
            str(row.number),
            row.name,
            short[row.dtype],
            f"{row.flops / 1e9:.2f}",
            f"{row.bytes / 1e6:.1f}",
            f"{row.intensity:.0f}",
            f"{row.compute_seconds * 1e6:.1f}",
            f"{row.memory_seconds * 1e6:.1f}",
            row.side[0].upper() + ("~" if row.ridge else ""),
            end_section=following is not None and following.group != row.group,
        )
    out.caption = "bound by C compute or M memory; ~ the other is within a quarter"
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the rows, which is all it does, also without this")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[], help="only rows of these groups")
    options = parser.parse_args(arguments)
    rows = selected(options.group) if options.group else [*ROWS, *SWEEP]
    if options.json:
        print(json.dumps({"rows": [row.record() for row in rows]}, indent=2))
    else:
        Console().print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
