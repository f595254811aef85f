"""`cuconv bench`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from cuconv import bench, plots, profiling, weights
from cuconv.cli import layer
from cuconv.cli.common import (
    CommandError,
    check_gpu_name,
    check_output,
    draw,
    find_gpu,
    input_shapes,
    load_model,
    phases,
    picture,
    positive,
    print_json,
    reason,
    write_text,
)
from cuconv.cuda import runtime
from cuconv.explain import count, duration
from cuconv.plan.devices import DEVICES

NAME, WHAT = "bench", "time your own layer or model file, after checking its result"
EXAMPLES = """examples:
  cuconv bench conv1d --shape 8,16384,128 --filters 256 --kernel 2 --dilation 512 --padding causal --dtype bf16
  cuconv bench model.npz --batch-size 64 --save before.json
  cuconv bench model.npz --batch-size 64 --compare before.json

On a GPU the time of the device and that of the call from Python are measured; without one that of the NumPy path, and
the GPU's is predicted and called so. Times are medians, with what 10 % and 90 % of the samples stay below. --compare
exits with 1 where a time has grown: the ranges from 10 % to 90 % do not meet and the medians differ by more than 3 %.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what the command takes."""
    parser.add_argument(
        "subject", metavar="LAYER|MODEL", help=f"{', '.join(bench.LAYERS)}; or a .npz, .keras or .h5 file"
    )
    layer.add_arguments(parser)
    parser.add_argument("--batch-size", type=positive, metavar="N", help="of a model, instead of --shape (default 32)")
    parser.add_argument("--device", choices=("cpu", "gpu"), help="where to time (default: a GPU where one is usable)")
    parser.add_argument(
        "--predict", metavar="GPU", help=f"predict for {', '.join(DEVICES)} (default: this GPU, or H200)"
    )
    parser.add_argument("--samples", type=positive, default=bench.SAMPLES, metavar="N", help="timed calls (default 50)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the report for --compare")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="a report that --save or --json has given")
    parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the roofline, .png or .svg")


def command(options: argparse.Namespace) -> int:
    """Checks, times, compares and tells."""
    check_gpu_name(options.predict, "--predict")
    for path, option in ((options.save, "--save"), (options.plot, "--plot")):
        if path:
            check_output(path, option)
    gpu = None
    if options.device == "gpu" or (options.device is None and runtime.probe().usable):
        gpu = find_gpu(None, "`--device cpu` times the NumPy path")
    work = _work(options)
    base = _read_base(options.compare, work, gpu) if options.compare else None
    try:
        with phases(options.json) as phase:
            report = bench.measure(work, gpu, options.predict, options.samples, phase)
    except (ValueError, TypeError) as error:
        raise CommandError(str(error), code=2) from error
    except MemoryError as error:
        raise CommandError(f"{work.name}: {str(error) or 'out of memory'}") from error
    except (ArithmeticError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    changes = [] if base is None else bench.compare(base, report)
    if options.save:
        write_text(options.save, json.dumps(report, indent=2) + "\n")
    if options.plot:
        _draw(report, gpu, options)
    if options.json:
        compared = {} if base is None else {"changes": [change._asdict() for change in changes]}
        print_json({**report, **compared})
    else:
        _print(report, gpu, changes, options.compare)
    return 1 if any(change.verdict == "slower" for change in changes) else 0


def _work(options: argparse.Namespace) -> bench.Work:
    name = options.subject
    if name in bench.LAYERS:
        if options.batch_size:
            raise CommandError("`--batch-size` is for model files; --shape holds a layer's", code=2)
        return bench.layer_work(name, layer.case(name, options))
    if not name.endswith(weights.MODEL_SUFFIXES):
        suffixes = ", ".join(weights.MODEL_SUFFIXES)
        raise CommandError(
            f"a layer ({', '.join(bench.LAYERS)}) or a file ({suffixes}) is needed. Received: {name!r}", code=2
        )
    path = Path(name)
    given = layer.given(options)
    if given:
        raise CommandError(f"{', '.join(given)} must not be given for a model. Received: {name!r}", code=2)
    model = load_model(path)
    return bench.model_work(path.name, model, input_shapes(model, options.shape, options.batch_size))


def _read_base(path: Path, work: bench.Work, gpu: runtime.Device | None) -> dict[str, Any]:
    try:
        base: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        bench.check_base(base, work, bench.machine(gpu))
    except OSError as error:
        raise CommandError(reason(error, path)) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path} is not JSON: {error}", code=2) from error
    except ValueError as error:
        raise CommandError(f"{path} cannot be compared with: it {error}", code=2) from error
    return base


def _draw(report: dict[str, Any], gpu: runtime.Device | None, options: argparse.Namespace) -> None:
    predicted, limits = report["predicted"], profiling.limits_of(options.predict)
    intensity = report["flops"] / max(1, report["bytes"])
    points = [(report["name"], intensity, report["flops"] / (predicted["seconds"] or 1), "predicted")]
    if gpu is not None and options.predict is None:
        points.append((report["name"], intensity, report["flops_per_second"], "measured"))
    draw(lambda: plots.roofline(points, limits, options.plot, f"{report['name']} on {limits.name}"))


def _print(report: dict[str, Any], gpu: runtime.Device | None, changes: list[bench.Change], base: Path | None) -> None:
    console = Console(highlight=False)

    def line(name: str, text: str) -> None:
        console.print(f"[bold]{name:<11}[/]{escape(text)}", soft_wrap=True)

    work, predicted, checked = report["work"], report["predicted"], report["check"]
    shapes = " ".join("x".join(map(str, shape)) if shape else "-" for shape in work["shapes"])
    options = "".join(f" {key}={value}" for key, value in work["options"].items())
    line(report["name"], f"{work['operation']} {work['dtype']} {shapes}{options}")
    line("where", report["measured_on"])
    if gpu is None:
        line("", f"no GPU is used ({runtime.probe().reason}): the times below are those of the NumPy path")
    if checked["against"]:
        line("checked", f"largest error {checked['error']:.2f} of what is allowed, against {checked['against']}")
    else:
        line("checked", "not: the NumPy path is what double precision is compared with")
    for name, each in report["timings"].items():
        spread = f"{duration(each['p10'])} to {duration(each['p90'])}, {each['count']} samples"
        what = "the device alone" if name == "device" else "from Python until the result is there"
        line(name, f"{duration(each['median'])} measured ({spread}), {what}")
    roof = "" if report["share_of_roof"] is None else f", {report['share_of_roof']:.0%} of the roof"
    line("rate", f"{count(report['flops_per_second'], 'FLOP/s')}, {count(report['bytes_per_second'], 'B/s')}{roof}")
    share = predicted["roof_seconds"] / predicted["seconds"] if predicted["seconds"] else 0.0
    kernel = predicted["algorithm"] or "no kernel"
    line(
        "predicted",
        f"{duration(predicted['seconds'])} on {predicted['device']}, not measured: {kernel}, {share:.0%} of the roof, "
        f"bound by {predicted['side']}",
    )
    for change in changes:
        color = {"slower": "red", "faster": "green", "same": "default"}[change.verdict]
        word = "no change beyond noise" if change.verdict == "same" else change.verdict
        part = change.now / change.before - 1
        console.print(
            f"[bold]{'compared':<11}[/]{change.timing}: {duration(change.before)} in {escape(str(base))}, now "
            f"{duration(change.now)} ({part:+.1%}): [{color}]{word}[/]",
            soft_wrap=True,
        )
