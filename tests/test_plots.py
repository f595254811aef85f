"""Pictures show what they were given, complete and readable, in files that are equal where the arguments are."""

import itertools
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from cuconv import plots
from cuconv.plan.devices import DEVICES, device
from cuconv.plots import Bar, Layer, Point

matplotlib = pytest.importorskip("matplotlib")


def suite_like(count, kinds=("measured",)):
    """Points as crowded as those of the benchmark suite; invented."""
    rng = random.Random(count)
    limits = device("H200")
    found = []
    for number in range(1, count + 1):
        intensity = 10 ** rng.choice([rng.uniform(0, 3.4), 2.23, 2.7])
        for kind in kinds:
            rate = min(limits.fp16_rate, intensity * limits.bandwidth) * rng.uniform(0.3, 0.95)
            found.append(Point(f"{number} problem of group {number % 7}", intensity, rate, kind))
    return found


PEERS = ("measured", "predicted", "torch conv1d", "torch conv2d channels_last", "torch.compile")
BARS = [
    Bar(f"row {row}", contender, 1e-5 * (row + 1.1 + i), 1e-5 * (row + 1.05 + i), 1e-5 * (row + 2 + i), 1e-5)
    for row in range(4)
    for i, contender in enumerate(("cuconv", "predicted", "torch conv2d channels_last", "a peer", "another peer"))
]
PICTURES = {
    "one point": (plots.roofline, ([Point("a conv", 2.0, 1e12)], device("T4"))),
    "far below": (plots.roofline, ([Point("a conv", 0.01, 1e6)], device("RTX 4090"))),
    "suite": (plots.roofline, (suite_like(58), device("H200"))),
    "suite with peers": (plots.roofline, (suite_like(58, PEERS), device("H200"))),
    "bars": (plots.bars, (BARS,)),
    "one bar": (plots.bars, (BARS[:1],)),
    "bars apart": (plots.bars, ([bar._replace(median=bar.median * 90, high=bar.high * 100) for bar in BARS],)),
    "layers": (plots.layers, ([Layer(f"conv1d_{i}", 1e-5 * (i + 1), 4e-6) for i in range(12)],)),
    "one layer": (plots.layers, ([Layer("a layer with a long name", 0.25, 0.01)],)),
}


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a picture and returns its figure."""

    def draw(function, *arguments, **keywords):
        figures = []
        saved = plots._save
        monkeypatch.setattr(plots, "_save", lambda figure, files: (figures.append(figure), saved(figure, files)))
        function(*arguments, tmp_path / "picture.png", **keywords)
        return figures[0]

    return draw


def texts(figure):
    """Every text that can be seen, with its box in pixels."""
    renderer = figure.canvas.get_renderer()
    for text in figure.findobj(matplotlib.text.Text):
        if text.get_visible() and text.get_text():
            box = matplotlib.text.Text.get_window_extent(text, renderer)  # of the words, not of a line to them
            if box.width and box.height:
                yield text, box


@pytest.mark.parametrize("name", PICTURES)
def test_every_text_lies_inside_the_picture(name, drawn):
    function, arguments = PICTURES[name]
    figure = drawn(function, *arguments, title="A title")
    width, height = figure.bbox.size
    assert "A title" in [text.get_text() for text, _ in texts(figure)]
    hidden = {
        id(label)
        for axes in figure.axes
        for i, axis in enumerate((axes.xaxis, axes.yaxis))
        for label in axis.get_ticklabels(which="both")
        if not min(axis.get_view_interval()) <= label.get_position()[i] <= max(axis.get_view_interval())
    }
    for text, box in texts(figure):
        if id(text) not in hidden:
            assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text.get_text()


@pytest.mark.parametrize("kinds", [("measured",), PEERS[:2]], ids=["measured", "both"])
def test_numbers_cover_neither_each_other_nor_points_nor_roofs(kinds, drawn):
    points = suite_like(58, kinds)
    figure = drawn(plots.roofline, points, device("H200"))
    (axes,) = figure.axes
    numbers = [(text, box) for text, box in texts(figure) if text in axes.texts and text.get_text().isdigit()]
    assert sorted(int(text.get_text()) for text, _ in numbers) == list(range(1, 59))
    for (one, a), (other, b) in itertools.combinations(numbers, 2):
        assert not a.overlaps(b), f"{one.get_text()} and {other.get_text()}"
    markers = [axes.transData.transform((point.intensity, point.rate)) for point in points]
    for (text, box), (x, y) in itertools.product(numbers, markers):
        assert not (box.x0 < x < box.x1 and box.y0 < y < box.y1), text.get_text()
    for text, box in numbers:
        for rate in (device("H200").fp32_rate, device("H200").tf32_rate, device("H200").fp16_rate):
            x, y = axes.transData.transform((rate / device("H200").bandwidth, rate))
            assert box.x1 < x or not box.y0 < y < box.y1, f"{text.get_text()} on the roof of {rate:g}"


def test_numbers_leave_the_memorys_name_alone(drawn):
    limits = device("H200")
    points = [Point(f"{i} p", 10 ** (i / 30), 10 ** (i / 30) * limits.bandwidth * 0.999) for i in range(1, 60)]
    figure = drawn(plots.roofline, points, limits)
    (name,) = (text for text in figure.axes[0].texts if text.get_text().startswith("memory"))
    renderer = figure.canvas.get_renderer()
    angle = math.radians(name.get_rotation())
    turned = matplotlib.text.Text.get_window_extent(name, renderer)
    middle = ((turned.x0 + turned.x1) / 2, (turned.y0 + turned.y1) / 2)
    height = name.get_fontsize() * figure.dpi / 72
    long = (turned.width - height * math.sin(angle)) / math.cos(angle)
    assert long > 3 * height
    for text, box in texts(figure):
        if text in figure.axes[0].texts and text.get_text().isdigit():
            x, y = (box.x0 + box.x1) / 2 - middle[0], (box.y0 + box.y1) / 2 - middle[1]
            along, aside = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
            assert abs(along) > long / 2 or abs(aside) > height / 2, text.get_text()


@pytest.mark.parametrize("name", DEVICES)
def test_roofs_are_those_of_the_device(name, drawn):
    limits = device(name)
    figure = drawn(plots.roofline, [Point("p", 10.0, 1e12)], limits)
    (axes,) = figure.axes
    slope, *flat = (line.get_xydata() for line in axes.lines if line.get_marker() == "None")
    rates = {rate for rate in (limits.fp32_rate, limits.tf32_rate, limits.fp16_rate) if rate}
    assert [float(line[0][1]) for line in flat] == [float(line[1][1]) for line in flat] == sorted(rates)
    for line in flat:
        assert line[0][0] * limits.bandwidth == pytest.approx(line[0][1])
    assert slope[:, 1] / slope[:, 0] == pytest.approx(limits.bandwidth)
    assert slope[1][1] == max(rates)
    labels = " ".join(text.get_text() for text in axes.texts)
    assert all(f"{rate / 1e12:.3g} TFLOP/s" in labels for rate in rates)
    assert ("tf32" in labels) == (limits.tf32_rate > 0)


def test_points_are_where_they_belong_and_kinds_differ(drawn):
    points = suite_like(20, PEERS)
    figure = drawn(plots.roofline, points, device("H200"))
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if line.get_marker() != "None"}
    assert list(lines) == list(PEERS)
    for kind, line in lines.items():
        assert line.get_xydata().tolist() == [[p.intensity, p.rate] for p in points if p.kind == kind]
    looks = {(line.get_color(), line.get_marker(), line.get_markerfacecolor()) for line in lines.values()}
    assert len(looks) == len(PEERS)
    assert lines["predicted"].get_markerfacecolor() == "white"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(PEERS)
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < p.intensity < right and low < p.rate < high for p in points)


@pytest.mark.parametrize(
    "names, expected",
    [
        (["7 a", "3 b", "7 a"], {"7 a": ("7", "a"), "3 b": ("3", "b")}),
        (["7 a", "7 b"], {"7 a": ("1", "7 a"), "7 b": ("2", "7 b")}),
        (["7 a", "b"], {"7 a": ("1", "7 a"), "b": ("2", "b")}),
        (["3x3"], {"3x3": ("1", "3x3")}),
    ],
)
def test_a_problem_keeps_the_number_it_comes_with(names, expected):
    assert plots._numbers(names) == expected


def test_points_without_work_are_left_out(drawn):
    figure = drawn(plots.roofline, [("copy", 0.0, 0.0, "measured"), ("conv", 2.0, 1e12, "measured")], device("T4"))
    assert [text.get_text() for text in figure.texts] == ["1", "conv"]


def test_bars_reach_from_the_roof_to_the_median(drawn):
    figure = drawn(plots.bars, BARS)
    (axes,) = figure.axes
    ends = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    assert ends == [(1, pytest.approx(bar.median / bar.roof)) for bar in BARS]
    whiskers = [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 0.7]
    assert whiskers == [pytest.approx([bar.low / bar.roof, bar.high / bar.roof]) for bar in BARS]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["row 0", "row 1", "row 2", "row 3"]
    assert [text.get_text() for text in axes.texts][:2] == ["11 µs", "21 µs"]
    assert axes.yaxis_inverted()
    low, high = axes.get_xlim()
    assert low < 1 and high > max(bar.high / bar.roof for bar in BARS)


def test_a_time_below_the_roof_is_shown(drawn):
    figure = drawn(plots.bars, [Bar("warm", "cuconv", 0.5e-5, 0.4e-5, 0.6e-5, 1e-5)])
    assert figure.axes[0].get_xlim()[0] < 0.4


def test_layers_show_shares_and_what_the_peaks_need(drawn):
    figure = drawn(plots.layers, [("a", 3e-6, 1e-6), ("b", 1e-6, 5e-6)])
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([3, 1, 1, 1])
    assert [text.get_text() for text in axes.texts] == ["75.0 %", "25.0 %"]
    assert axes.get_xlabel() == "µs; 4 µs in all"


@pytest.mark.parametrize("name", ["suite with peers", "bars", "layers"])
def test_equal_arguments_give_equal_files(name, tmp_path):
    function, arguments = PICTURES[name]
    files = [tmp_path / "a.svg", tmp_path / "a.png", str(tmp_path / "made" / "b.svg"), tmp_path / "b.png"]
    function(*arguments, files[:2])
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": "other"}):
        function(*arguments, files[2:])
        assert matplotlib.rcParams["font.size"] == 20
    svg, png = files[0].read_bytes(), files[1].read_bytes()
    assert svg == (tmp_path / "made" / "b.svg").read_bytes()
    assert png == files[3].read_bytes()
    assert png.startswith(b"\x89PNG") and b"Software" not in png
    assert ET.fromstring(svg).tag.endswith("svg")
    assert not re.search(rb"20\d\d-\d\d|[Mm]atplotlib v", svg)


@pytest.mark.parametrize("path", ["a.pdf", "a", "png"])
@pytest.mark.parametrize("function, arguments", [PICTURES[name] for name in ("one point", "one bar", "one layer")])
def test_other_files_are_refused(function, arguments, path):
    with pytest.raises(ValueError, match=rf"`paths` must end in \.png or \.svg\. Received: {path}$"):
        function(*arguments, ["fine.png", path])


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        (plots.roofline, ([("copy", 0.0, 1.0, "x")], device("T4")), "`points` must hold at least one with work"),
        (plots.bars, ([],), "`rows` must hold at least one bar"),
        (plots.bars, ([BARS[0]._replace(roof=0.0)],), "`rows` must hold times above 0. Received: Bar"),
        (plots.layers, ([],), "must hold a layer that takes time. Received: 0 layers"),
        (plots.layers, ([("a", math.nan, 0.0)],), "Received: 1 layers of nan s"),
    ],
)
def test_nothing_to_draw_is_an_error(function, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        function(*arguments, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install cuconv\[plot\]"):
        plots.bars(BARS, tmp_path / "a.png")


def test_matplotlib_is_imported_late_and_never_its_global_state(tmp_path):
    code = f"""
import sys
from cuconv import plots
assert "matplotlib" not in sys.modules
plots.layers([("a", 1.0, 0.5)], {str(tmp_path / "a.svg")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
