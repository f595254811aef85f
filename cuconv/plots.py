"""Pictures of where time goes, as PNG and SVG files: rooflines, times beside each other, the layers of a model.

They need matplotlib (``pip install cuconv[plot]``), which is imported when the first one is drawn. Equal arguments give
equal files: no date, no random identifiers, nothing taken from the user's matplotlib settings.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cuconv.plan.types import DeviceLimits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Bar", "Layer", "Point", "bars", "layers", "roofline"]

# The colours of Okabe and Ito, which all kinds of sight tell apart, and a marker each for print without colour.
INK, GREY, PALE, BLUE = "#222222", "#777777", "#DDDDDD", "#0072B2"
PEERS = (
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#8C6D31", "X"),
    (INK, "*"),
    (GREY, "h"),
)
MEASURED, PREDICTED = "measured", "predicted"
OURS = (MEASURED, PREDICTED, "cuconv")

POINT = 1 / 72  # inches
SMALL, TINY = 7.5, 6.2  # text, in points
MARGIN = 0.15  # inches around everything
NAMES_A_COLUMN = 42
DPI = 200


class Point(NamedTuple):
    """One problem of a roofline; `kind` is "measured" or "predicted" for cuconv, else the name of a peer."""

    name: str
    intensity: float  # FLOP/B
    rate: float  # FLOP/s
    kind: str = MEASURED


class Bar(NamedTuple):
    """A contender's time for one problem, in seconds; `low` and `high` are what 10 % and 90 % of the times stay below,
    `roof` the least time that the device's peaks allow."""

    row: str
    contender: str
    median: float
    low: float
    high: float
    roof: float


class Layer(NamedTuple):
    """A layer's seconds and the least that the device's peaks allow for it."""

    name: str
    seconds: float
    roof: float


Paths = str | Path | Iterable[str | Path]


# --- Pictures ----------------------------------------------------------------------------------------------------


def roofline(
    points: Iterable[tuple[str, float, float, str]], device: DeviceLimits, paths: Paths, title: str = ""
) -> None:
    """Draws `points` under the roofs of `device`: its memory, its arithmetic units and tensor cores.

    A problem has one number, the one that its name begins with or its place in the order, which a list at the side
    explains; points of one name belong together.

    Args:
        points: :class:`Point` or the same as a tuple; those without work (an intensity or a rate of 0) are left out.
        paths: the files to write, each ending in .png or .svg.
        title: what stands above; the device's name where it is empty.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a path ends otherwise, or there is no point with work.
    """
    files = _files(paths)
    given = [point for point in itertools.starmap(Point, points) if point.intensity > 0 and point.rate > 0]
    if not given:
        raise ValueError("`points` must hold at least one with work. Received: none")
    numbers = _numbers(point.name for point in given)
    looks = _looks(point.kind for point in given)
    roofs = _roofs(device)

    columns = -(-len(numbers) // NAMES_A_COLUMN)
    column = 0.35 + 0.55 * TINY * POINT * max(len(name) for _, name in numbers.values())
    plot = (0.75, 0.6, 6.2, 4.6)  # left, bottom, width, height in inches
    names_at = plot[0] + plot[2] + 1.3
    with _style():
        figure = _figure(names_at + columns * column + MARGIN, plot[1] + plot[3] + 0.45)
        axes = _axes(figure, plot)
        scale = _Scale(
            *_range([p.intensity for p in given] + [rate / device.bandwidth for _, rate in roofs]),
            *_range([p.rate for p in given] + [rate for _, rate in roofs]),
            *plot[2:],
        )
        axes.set(xscale="log", yscale="log", xlim=scale.x, ylim=scale.y)
        axes.set_xlabel("arithmetic intensity, FLOP per byte of every array once")
        axes.set_ylabel("TFLOP/s")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value / 1e12:g}")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(which="minor", labelbottom=False, labelleft=False)
        axes.set_title(title or device.name, loc="left")
        axes.grid(True, color=PALE, linewidth=0.4)
        taken = _draw_roofs(axes, device, roofs, scale)
        for kind, (color, marker) in looks.items():
            axes.plot(
                [point.intensity for point in given if point.kind == kind],
                [point.rate for point in given if point.kind == kind],
                linestyle="none",
                marker=marker,
                markersize=4.5,
                color=color,
                markerfacecolor="white" if kind == PREDICTED else color,
                markeredgewidth=0.8,
                label=kind,
                zorder=3,
                clip_on=False,
            )
        axes.legend(loc="upper left", frameon=True, framealpha=1, edgecolor=PALE)
        _number(axes, given, numbers, taken, scale)
        for i, (number, name) in enumerate(numbers.values()):
            across, down = divmod(i, -(-len(numbers) // columns))
            x, y = names_at + across * column, plot[1] + plot[3] * (1 - (down + 0.5) / NAMES_A_COLUMN)
            place: Any = {"fontsize": TINY, "va": "center", "transform": figure.dpi_scale_trans}
            figure.text(x + 0.2, y, number, ha="right", color=GREY, **place)
            figure.text(x + 0.26, y, name, **place)
        _save(figure, files)


def bars(rows: Iterable[tuple[str, str, float, float, float, float]], paths: Paths, title: str = "") -> None:
    """Draws how far each contender's time is from the roof, problem by problem: a bar begins at the roof, times grow to
    the right on a logarithmic axis, a whisker reaches from `low` to `high`.

    Args:
        rows: :class:`Bar` or the same as a tuple, in the order to be drawn.
        paths: the files to write, each ending in .png or .svg.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a path ends otherwise, there is no bar, or a time is not above 0.
    """
    files = _files(paths)
    given = list(itertools.starmap(Bar, rows))
    if not given:
        raise ValueError("`rows` must hold at least one bar. Received: none")
    for bar in given:
        if min(bar.median, bar.low, bar.high, bar.roof) <= 0:
            raise ValueError(f"`rows` must hold times above 0. Received: {bar}")
    looks = _looks(bar.contender for bar in given)
    groups = {name: [bar for bar in given if bar.row == name] for name in dict.fromkeys(bar.row for bar in given)}

    thick, gap = 0.125, 0.09  # inches, of a bar and between problems
    room = 0.25 + 0.58 * SMALL * POINT * max(map(len, groups))
    height = len(given) * thick + len(groups) * gap
    legend = 0.2 * -(-len(looks) // 4)
    plot = (room, 0.55, 5.6, height)
    with _style():
        figure = _figure(room + plot[2] + 0.6, plot[1] + height + legend + 0.5)
        axes = _axes(figure, plot)
        ratios = [value / bar.roof for bar in given for value in (bar.low, bar.median, bar.high)]
        axes.set(xscale="log", xlim=(min(1.0, *ratios) / 1.08, max(2.0, *ratios) * 1.35), ylim=(height, 0))
        y, ticks = gap / 2, []
        for number, group in enumerate(groups.values()):
            begin = y
            for bar in group:
                color, _ = looks[bar.contender]
                ratio, middle = bar.median / bar.roof, y + thick / 2
                axes.barh(
                    middle,
                    ratio - 1,
                    0.8 * thick,
                    left=1,
                    color="white" if bar.contender == PREDICTED else color,
                    edgecolor=color,
                    linewidth=0.6,
                    zorder=3,
                )
                whisker = [bar.low / bar.roof, bar.high / bar.roof]
                axes.plot(whisker, [middle] * 2, color=INK, linewidth=0.7, zorder=4)
                end = max(1.0, ratio, *whisker)
                text: Any = {"fontsize": TINY, "va": "center", "xytext": (3, 0), "textcoords": "offset points"}
                axes.annotate(_time(bar.median), (end, middle), **text)
                y += thick
            ticks.append((begin + y) / 2)
            y += gap
            if number + 1 < len(groups):
                axes.axhline(y - gap / 2, color=PALE, linewidth=0.4)
        axes.axvline(1, color=INK, linewidth=1, zorder=5)
        axes.annotate("roof", (1, 1), (0, 2), fontsize=TINY, ha="center", va="bottom", **_above(axes))
        axes.set_yticks(ticks, list(groups))
        axes.tick_params(axis="y", length=0)
        _ratio_ticks(axes)
        axes.set_xlabel("time, in multiples of the roof's")
        axes.grid(True, axis="x", color=PALE, linewidth=0.4)
        handles = [_patch(color, kind) for kind, (color, _) in looks.items()]
        place = ((room + plot[2]) / figure.get_figwidth(), (plot[1] + height + 0.16) / figure.get_figheight())
        figure.legend(
            handles=handles,
            loc="lower right",
            bbox_to_anchor=place,
            ncols=min(4, len(looks)),
            frameon=False,
            borderaxespad=0,
        )
        _title(figure, title)
        _save(figure, files)


def layers(rows: Iterable[tuple[str, float, float]], paths: Paths, title: str = "") -> None:
    """Draws the time of each layer of a model with its share of all, and how much of it the device's peaks need.

    Args:
        rows: :class:`Layer` or the same as a tuple, in the order to be drawn.
        paths: the files to write, each ending in .png or .svg.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a path ends otherwise, or no layer takes time.
    """
    files = _files(paths)
    given = list(itertools.starmap(Layer, rows))
    total = sum(layer.seconds for layer in given)
    if not total > 0:
        raise ValueError(f"`rows` must hold a layer that takes time. Received: {len(given)} layers of {total:g} s")

    thick = 0.2  # inches
    room = 0.25 + 0.58 * SMALL * POINT * max(len(layer.name) for layer in given)
    plot = (room, 0.55, 5.0, thick * len(given))
    unit, factor = ("ms", 1e3) if max(layer.seconds for layer in given) >= 1e-3 else ("µs", 1e6)
    with _style():
        figure = _figure(room + plot[2] + 0.4, plot[1] + plot[3] + 0.6)
        axes = _axes(figure, plot)
        for i, layer in enumerate(given):
            axes.barh(i, layer.seconds * factor, 0.7, color="#9CC9E3", zorder=2)
            axes.barh(i, min(layer.roof, layer.seconds) * factor, 0.7, color=BLUE, zorder=3)
            text = f"{100 * layer.seconds / total:.1f} %"
            where: Any = {"xytext": (3, 0), "textcoords": "offset points", "va": "center", "fontsize": TINY}
            axes.annotate(text, (layer.seconds * factor, i), **where)
        axes.set(ylim=(len(given) - 0.5, -0.5), xlim=(0, 1.12 * factor * max(layer.seconds for layer in given)))
        axes.set_yticks(range(len(given)), [layer.name for layer in given])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{unit}; {_time(total)} in all")
        axes.grid(True, axis="x", color=PALE, linewidth=0.4)
        handles = [_patch(BLUE, "what the device's peaks need"), _patch("#9CC9E3", "the rest of the time")]
        place = ((room + plot[2]) / figure.get_figwidth(), (plot[1] + plot[3] + 0.06) / figure.get_figheight())
        figure.legend(handles=handles, loc="lower right", bbox_to_anchor=place, ncols=2, frameon=False, borderaxespad=0)
        _title(figure, title)
        _save(figure, files)


# --- The parts of a roofline -------------------------------------------------------------------------------------


class _Scale(NamedTuple):
    """Logarithmic axes of a known size in inches; places in points, so that text is laid out without drawing it."""

    left: float
    right: float
    low: float
    high: float
    width: float
    height: float

    @property
    def x(self) -> tuple[float, float]:
        return self.left, self.right

    @property
    def y(self) -> tuple[float, float]:
        return self.low, self.high

    @property
    def decade(self) -> tuple[float, float]:
        """Points that a factor of ten takes, across and up."""
        across, up = math.log10(self.right / self.left), math.log10(self.high / self.low)
        return self.width / POINT / across, self.height / POINT / up

    def place(self, intensity: float, rate: float) -> tuple[float, float]:
        across, up = self.decade
        return math.log10(intensity / self.left) * across, math.log10(rate / self.low) * up


class _Box(NamedTuple):
    """What something covers, in points: its middle and half of its sizes."""

    x: float
    y: float
    width: float
    height: float


def _range(values: Sequence[float]) -> tuple[float, float]:
    """What an axis shows: all of `values` and some room."""
    return min(values) / 3, max(values) * 2


def _roofs(device: DeviceLimits) -> list[tuple[str, float]]:
    """(name, FLOP/s) from low to high; equal ones share a name."""
    rates = {"fp32": device.fp32_rate, "tf32": device.tf32_rate, "16 bit": device.fp16_rate}
    found: dict[float, list[str]] = {}
    for name, rate in rates.items():
        if rate > 0:
            found.setdefault(rate, []).append(name)
    return [(", ".join(found[rate]), rate) for rate in sorted(found)]


def _draw_roofs(axes: Axes, device: DeviceLimits, roofs: list[tuple[str, float]], scale: _Scale) -> list[_Box]:
    """Draws and names the roofs; returns what they cover."""
    slope = device.bandwidth
    top = roofs[-1][1]
    start = max(scale.left, scale.low / slope)
    axes.plot([start, top / slope], [start * slope, top], color=INK, linewidth=1.2, zorder=2)
    for name, rate in roofs:
        axes.plot([rate / slope, scale.right], [rate, rate], color=INK, linewidth=1.2, zorder=2)
        where: Any = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": SMALL}
        axes.annotate(f"{name}: {rate / 1e12:.3g} TFLOP/s", (scale.right, rate), annotation_clip=False, **where)

    across, up = scale.decade
    cosine, sine = across / math.hypot(across, up), up / math.hypot(across, up)
    text = f"memory: {slope / 1e12:.3g} TB/s"
    x = start * (roofs[0][1] / slope / start) ** 0.5  # half way up to the lowest roof
    axes.annotate(
        text,
        (x, x * slope),
        (-6 * sine, 6 * cosine),
        textcoords="offset points",
        ha="center",
        va="center",
        rotation=math.degrees(math.atan2(up, across)),
        rotation_mode="anchor",
        fontsize=SMALL,
    )

    ridges = [scale.place(rate / slope, rate) for _, rate in roofs]
    width, (end, height) = scale.width / POINT, ridges[-1]
    flat = [_Box((x + width) / 2, y, (width - x) / 2, 0.8) for x, y in ridges]
    rising = [_Box(end - i, height - i * up / across, 1.0, 1.0) for i in range(0, int(end), 2)]
    middle, half = scale.place(x, x * slope), int(0.3 * SMALL * len(text))
    words = [
        _Box(middle[0] - 6 * sine + i * cosine, middle[1] + 6 * cosine + i * sine, 4.0, 4.0)
        for i in range(-half, half + 1, 3)
    ]
    return [*flat, *rising, *words]


def _numbers(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(number, rest of the name) of each name: the number it begins with, where all have one of their own."""
    distinct = list(dict.fromkeys(names))
    split = [re.match(r"(\d+) +(.*)", name) for name in distinct]
    found = [(match[1], match[2]) for match in split if match]
    if len({number for number, _ in found}) < len(distinct):
        found = [(str(i), name) for i, name in enumerate(distinct, 1)]
    return dict(zip(distinct, found, strict=True))


def _number(
    axes: Axes,
    points: Sequence[Point],
    numbers: dict[str, tuple[str, str]],
    covered: Sequence[_Box],
    scale: _Scale,
) -> None:
    """Writes the number of each name beside its first point, where it covers no point, number or roof."""
    places = [scale.place(point.intensity, point.rate) for point in points]
    taken = [*covered, *(_Box(x, y, 3.0, 3.0) for x, y in places)]
    first = {point.name: (place, point) for point, place in reversed(list(zip(points, places, strict=True)))}
    for name, ((x, y), point) in sorted(first.items(), key=lambda each: each[1]):
        number, _ = numbers[name]
        half = (0.33 * TINY * len(number) + 0.4, 0.52 * TINY)
        ways = (
            (radius * math.cos(turn * math.pi / 8) * 1.15, radius * math.sin(turn * math.pi / 8))
            for radius in (7, 9, 12, 15, 19, 24, 30, 37, 45, 60)
            for turn in (2, 0, 6, 4, 1, 3, 5, 7, 8, 15, 9, 14, 10, 13, 11, 12)
        )
        free = (way for way in ways if _is_free(_Box(x + way[0], y + way[1], *half), taken, scale))
        dx, dy = next(free, (7.0, 5.0))
        taken.append(_Box(x + dx, y + dy, *half))
        line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            number,
            (point.intensity, point.rate),
            (dx, dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=TINY,
            zorder=5,
            arrowprops=line if math.hypot(dx, dy) > 11 else None,
        )


def _is_free(box: _Box, taken: Iterable[_Box], scale: _Scale) -> bool:
    """Whether a box lies inside the axes and touches none of `taken`."""
    x, y, width, height = box
    inside = width < x < scale.width / POINT - width and height < y < scale.height / POINT - height
    return inside and all(abs(x - a) >= width + w or abs(y - b) >= height + h for a, b, w, h in taken)


# --- What all pictures share -------------------------------------------------------------------------------------


def _files(paths: Paths) -> list[Path]:
    files = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    for file in files:
        if file.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"`paths` must end in .png or .svg. Received: {file}")
    return files


def _looks(kinds: Iterable[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each kind: blue circles for cuconv, the others in the order they come."""
    peers = itertools.cycle(PEERS)
    return {kind: (BLUE, "o") if kind in OURS else next(peers) for kind in dict.fromkeys(kinds)}


@contextlib.contextmanager
def _style() -> Iterator[None]:
    try:
        import matplotlib.style
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install cuconv[plot]", name="matplotlib") from error
    settings = {
        "svg.hashsalt": "cuconv",  # identifiers in the file depend on its content alone
        "font.size": SMALL,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.edgecolor": GREY,
        "axes.axisbelow": True,
        "text.color": INK,
        "xtick.major.width": 0.6,
        "ytick.major.width": 0.6,
        "legend.fontsize": SMALL,
        "legend.handlelength": 1.2,
    }
    with matplotlib.style.context(["default", settings]):
        yield


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    """Axes at (left, bottom, width, height) in inches."""
    width, height = figure.get_size_inches()
    return figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))


def _title(figure: Figure, title: str) -> None:
    height = figure.get_figheight() - MARGIN
    figure.text(MARGIN, height, title, va="top", fontsize=9, transform=figure.dpi_scale_trans)


def _save(figure: Figure, files: Sequence[Path]) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        without = {"Date": None, "Creator": None} if file.suffix.lower() == ".svg" else {"Software": None}
        figure.savefig(file, metadata=without)


def _patch(color: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor="white" if label == PREDICTED else color, edgecolor=color, linewidth=0.8, label=label)


def _above(axes: Axes) -> dict[str, Any]:
    """Makes a place (x of the data, y of the axes), with an offset in points."""
    return {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}


def _ratio_ticks(axes: Axes) -> None:
    low, high = axes.get_xlim()
    step = 2 if high / low < 40 else 10
    powers = range(math.ceil(math.log(low, step)), math.floor(math.log(high, step)) + 1)
    axes.set_xticks([step**power for power in powers], [f"{float(step) ** power:g}" for power in powers])
    axes.minorticks_off()


def _time(seconds: float) -> str:
    """A time with a unit: "21.7 µs"."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 0.9995e-3 else f"{seconds * 1e6:.3g} µs"
