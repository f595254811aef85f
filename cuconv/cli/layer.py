"""The arguments that describe a layer, shared by `cuconv explain` and `cuconv bench`."""

from __future__ import annotations

import argparse

from cuconv import bench, geometry, parity
from cuconv.cli.common import CommandError, positive, sizes

DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "c64": "complex64"} | {
    "c128": "complex128"
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds everything but the layer's kind, into a group."""
    add = parser.add_argument_group("the layer").add_argument
    actions = [
        add(
            "--shape",
            type=sizes,
            action="append",
            metavar="N,...",
            help="of the input, batch first, channels where --data-format has them: 8,16384,128",
        ),
        add("--filters", type=positive, metavar="N", help="output channels (not depthwise)"),
        add("--kernel", type=sizes, metavar="N[,...]", help="taps: one number for all axes or one for each"),
        add("--strides", type=sizes, metavar="N[,...]", help="positions (default 1)"),
        add(
            "--padding",
            type=padding,
            default="valid",
            metavar="P",
            help="valid (default), same, causal; or zeros at both ends: N, for each axis N,N; or before and after N:M",
        ),
        add("--dilation", type=sizes, metavar="N[,...]", help="positions between taps (default 1)"),
        add("--groups", type=positive, default=1, metavar="N", help="of channels (default 1)"),
        add(
            "--depth-multiplier", type=positive, default=1, metavar="N", help="depthwise outputs a channel (default 1)"
        ),
        add("--data-format", choices=geometry.DATA_FORMATS, default=geometry.CHANNELS_LAST),
        add("--activation", metavar="NAME", help="relu, gelu, ... (default: none)"),
        add("--no-bias", action="store_true", help="without a bias"),
        add("--dtype", type=dtype, default="float32", metavar="TYPE", help=f"{', '.join(DTYPES)} (default f32)"),
        add(
            "--pass",
            dest="direction",
            choices=bench.PASSES,
            default="forward",
            help="the output (default), or the gradient of the input or of the kernel",
        ),
    ]
    parser.set_defaults(layer_actions=actions)


def given(options: argparse.Namespace) -> list[str]:
    """The options, other than --shape, that describe a layer and were given."""
    return [
        each.option_strings[0]
        for each in options.layer_actions
        if each.dest != "shape" and getattr(options, each.dest) != each.default
    ]


def dtype(text: str) -> str:
    """The name of a dtype."""
    name = DTYPES.get(text, text)
    if name not in parity.DTYPES:
        names = ", ".join([*DTYPES, *parity.DTYPES])
        raise argparse.ArgumentTypeError(f"one of {names} is needed, not {text!r}")
    return name


def padding(text: str) -> str | tuple[tuple[int, int], ...]:
    """A rule by its name, or (before, after) for each axis; one pair stands for all axes."""
    if text in ("valid", "same", "causal"):
        return text
    pairs = [part.split(":") for part in text.split(",")]
    if any(len(pair) > 2 or not all(number.isdecimal() for number in pair) for pair in pairs):
        raise argparse.ArgumentTypeError(
            f"valid, same, causal, or numbers like 1 or 1,2 or 0:1 are needed, not {text!r}"
        )
    return tuple((int(pair[0]), int(pair[-1])) for pair in pairs)


def case(layer: str, options: argparse.Namespace) -> parity.Case:
    """The call that the arguments describe."""
    for name in ("shape", "kernel"):
        if getattr(options, name) is None:
            raise CommandError(f"{layer} needs --{name}", code=2)
    if len(options.shape) > 1:
        raise CommandError(f"{layer} has one input. Received: --shape {len(options.shape)} times", code=2)
    rank = bench.LAYERS[layer][1]
    pads = options.padding
    try:
        return bench.layer_case(
            layer,
            options.shape[0],
            options.kernel,
            filters=options.filters,
            depth_multiplier=options.depth_multiplier,
            groups=options.groups,
            strides=_one_or_each(options.strides),
            padding=pads * rank if isinstance(pads, tuple) and len(pads) == 1 else pads,
            dilation_rate=_one_or_each(options.dilation),
            data_format=options.data_format,
            activation=options.activation,
            use_bias=not options.no_bias,
            dtype=options.dtype,
            direction=options.direction,
        )
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), code=2) from error


def _one_or_each(given: tuple[int, ...] | None) -> int | tuple[int, ...]:
    if given is None:
        return 1
    return given[0] if len(given) == 1 else given
