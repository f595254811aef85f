"""The README's tables are those of the measured CSVs, and two measurements are compared honestly.

Every GPU figure here is invented and lives in a temporary folder.
"""

import csv
import itertools
import json

import pytest

from benchmarks import report, run
from benchmarks.report import CUCONV


def line(number, contender, us, *, group="a", variant="plain", status="ok", spread=0.01, **other):
    """A line of invented figures: 1 GFLOP and 1 MB a problem, whose roof is 10 us."""
    told = dict.fromkeys(run.COLUMNS, "")
    told |= {"number": number, "group": group, "name": f"row {number}", "op": "conv", "dtype": "bfloat16"}
    told |= {"variant": variant, "contender": contender, "status": status, "gpu": "NVIDIA H200", "driver": "0.0"}
    told |= {"cuda": "0.1", "commit": "none", "date": "2000-01-01", "sm_clock_mhz": 1, "memory_clock_mhz": 2}
    if us:
        times = {"us": us, "p10_us": us * (1 - spread), "p90_us": us * (1 + spread)}
        told |= {f"device_{name}": time for name, time in times.items()}
        told |= {f"host_{name}": time + 100 for name, time in times.items()}
        told |= {"tflops": 1e3 / us, "gbytes_per_s": 1e3 / us, "share_of_roof": 10 / us}
    if contender == CUCONV:
        told |= {"kernel": "conv_simt", "predicted_us": 50}
    return {name: str(text) for name, text in (told | other).items()}


def sweep(power, contender, us):
    return line(101 + power, contender, us, group="sweep", name=f"WaveNet gate d={2**power}")


def save(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, run.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


MEASURED = [
    line(1, CUCONV, 20),
    line(1, "torch conv1d", 40),
    line(1, "torch conv2d channels_last", 30),
    line(1, "cublas gemm", 11),
    line(1, "torch.compile", None, status="absent: no compiler"),
    line(1, CUCONV, 21, variant="bias+relu"),
    line(1, "torch conv1d", 60, variant="bias+relu"),
    line(2, CUCONV, 100),
    line(2, "torch conv1d", 50),
    line(2, "torch conv2d channels_last", 9, status="wrong: 12 times what is allowed"),
    line(3, CUCONV, None, status="wrong: 7 times what is allowed"),
    line(3, "torch conv1d", 50),
    line(4, CUCONV, 12.5, group="b", op="depthwise_conv_grad"),
    line(4, "copy", 12, group="b", op="depthwise_conv_grad"),
    *(sweep(power, CUCONV, 20 + power) for power in range(10)),
    *(sweep(power, "torch conv1d", 20 * (power + 1)) for power in range(0, 10, 3)),
]


# --- The README --------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_committed_measurements():
    text = report.README.read_text()
    assert report.filled(text) == text, "run python -m benchmarks.report"


def test_between_replaces_what_the_markers_hold():
    assert report.between("a <!-- t -->old<!-- end of t --> z", "t", "new") == "a <!-- t -->\nnew\n<!-- end of t --> z"


@pytest.mark.parametrize(
    "text", ["", "<!-- t -->", "<!-- end of t --><!-- t -->", "<!-- t --><!-- t --><!-- end of t -->"]
)
def test_between_refuses_damaged_markers(text):
    with pytest.raises(ValueError, match="once each"):
        report.between(text, "t", "new")


def test_absent_peers_are_dashes():
    row = {"name": "r", "cuconv_ms": "2", "torch_ms": "", "onnxruntime_ms": "", "cuconv_gflops": "5", "ratio_torch": ""}
    told = dict.fromkeys(("cpu", "numpy", "blas", "torch", "onnxruntime", "commit", "date"), "x")
    assert "| r | 2 | 5 | - | - | - |" in report.cpu_table([{**row, **told}])


@pytest.fixture
def readme(monkeypatch, tmp_path):
    """A README and a folder of results that `main` works on."""
    path = tmp_path / "README.md"
    path.write_text(
        "top\n<!-- cpu table -->\n<!-- end of cpu table -->\n<!-- gpu table -->\nold\n<!-- end of gpu table -->\nend\n"
    )
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(report, "README", path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return path


def test_without_a_measurement_the_readme_says_so(readme, capsys):
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    assert "<!-- gpu table -->\nNot yet measured on a GPU.\n<!-- end of gpu table -->\nend\n" in readme.read_text()
    assert "compared with nothing" in capsys.readouterr().out
    assert report.main(["--check"]) == 0


def test_the_newest_measurement_fills_the_readme(readme, capsys):
    folder = readme.parent / "results"
    save(folder / "gpu-z.csv", [line(1, CUCONV, 77)])
    save(folder / "gpu-a.csv", [{**each, "date": "2000-02-01"} for each in MEASURED])
    save(folder / "gpu-untried.csv", [line(1, CUCONV, None, status="not measured", date="2000-03-01")])
    save(folder / "gpu-absent.csv", [line(1, "torch conv1d", None, status="absent: no torch", date="2000-03-01")])
    assert report.main([]) == 0
    text = readme.read_text()
    assert "2000-02-01" in text and "2000-01-01" not in text
    assert "conv_simt: measured / predicted 0.50 over 14; furthest off 4 row 4" in capsys.readouterr().out
    assert report.main(["--check"]) == 0
    save(folder / "gpu-a.csv", MEASURED)
    assert report.main(["--check"]) == 1


# --- The GPU's tables --------------------------------------------------------------------------------------------


def rows_of(text, head):
    """Cells of the first table whose first line begins with `head`."""
    lines = text.splitlines()
    begin = next(i for i, each in enumerate(lines) if each.startswith(f"| {head}"))
    rows = itertools.takewhile(lambda each: each.startswith("|"), lines[begin + 2 :])
    return [[cell.strip() for cell in each.strip("|").split("|")] for each in rows]


def test_rows_that_we_lose_come_first():
    lost, won = report.gpu_tables(MEASURED).split("<details><summary>All others</summary>\n\n")
    assert "Lost, 2 of 5 problems:" in lost and "</details>" in won
    assert rows_of(lost, "problem") == [
        ["3 row 3, bfloat16", "wrong: 7 times what is allowed", "torch conv1d", "50.0", "-", "-"],
        ["2 row 2, bfloat16", "100.0", "torch conv1d", "50.0", "0.50", "10 %"],
    ]
    assert rows_of(won, "problem") == [
        ["1 row 1, bfloat16", "20.0", "torch conv2d channels_last", "30.0", "1.50", "50 %"],
        ["1 row 1, bfloat16, bias+relu", "21.0", "torch conv1d", "60.0", "2.86", "48 %"],
        ["4 row 4, depthwise_conv_grad, bfloat16", "12.5", "none", "-", "-", "80 %"],
    ]
    assert "No problem is lost." in report.gpu_tables(MEASURED[:7])
    assert "<details>" not in report.gpu_tables([line(2, CUCONV, 9), line(2, "torch conv1d", 8)])


@pytest.mark.parametrize("dtype, best", [("float32", "torch conv1d"), ("tf32", "torch conv1d tf32")])
def test_float32_is_not_compared_with_tf32(dtype, best):
    names = (CUCONV, "torch conv1d", "torch conv1d tf32", "cublas gemm", "copy")
    lines = [line(4, name, 50 - i, dtype=dtype) for i, name in enumerate(names)]
    (standing,) = report.standings(lines)
    assert standing.best["contender"] == best


def test_groups_have_geometric_means():
    rows = rows_of(report.gpu_tables(MEASURED), "group")
    mean = (1.5 * 60 / 21 * 0.5) ** (1 / 3)
    assert rows == [
        ["a: dense, one axis", "4", "2", f"{mean:.2f}", "0.50", "48 %"],
        ["b: depthwise, one axis", "1", "0", "-", "-", "80 %"],
    ]


def test_the_sweep_has_a_line_for_each_contender():
    rows = rows_of(report.gpu_tables(MEASURED), "WaveNet gate, bfloat16, plain, us | d=1 | d=2")
    assert rows[0] == [CUCONV, *(f"{20 + power}.0" for power in range(10)), "1.45"]
    assert rows[1] == ["torch conv1d", "20.0", "-", "-", "80.0", "-", "-", "140.0", "-", "-", "200.0", "10.00"]


def test_the_tables_say_where_they_come_from_and_who_was_absent():
    text = report.gpu_tables(MEASURED)
    first = text.splitlines()[0]
    assert first.startswith("NVIDIA H200 at 1 MHz, memory at 2 MHz; driver 0.0, CUDA 0.1; commit none, 2000-01-01.")
    assert first.endswith("Not compared: torch.compile (absent: no compiler).")
    mean = (20 * 21 * 100 * 12.5 / 50**4) ** (1 / 4)
    only = report.gpu_tables([each for each in MEASURED if each["group"] != "sweep"])
    assert only.endswith(f"geometric means: conv_simt {mean:.2f} (4).")


def test_what_was_cut_off_or_measured_again_or_never_tried_counts_once_or_not(tmp_path):
    lines = [line(1, CUCONV, 20), line(1, "torch conv1d", 30), line(1, CUCONV, 25)]
    late = line(3, CUCONV, None, status="not measured: the time limit of 400 s was reached")
    path = save(tmp_path / "gpu-x.csv", [*lines, late])
    path.write_text(path.read_text() + "2,a,row 2,conv,bfloat16,pl")
    read = [(each["contender"], each["device_us"]) for each in report.read(path)]
    assert read == [("torch conv1d", "30"), (CUCONV, "25")]


def test_the_columns_that_are_read_are_written():
    assert set(report.COLUMNS) <= set(run.COLUMNS)
    assert run.NOT_MEASURED.startswith(report.UNTRIED)


# --- The model's errors ------------------------------------------------------------------------------------------


def test_the_models_error_is_told_by_kernel():
    lines = [
        line(1, CUCONV, 100),
        line(2, CUCONV, 25),
        line(3, CUCONV, 400),
        line(4, CUCONV, 50, kernel="depthwise"),
        line(5, CUCONV, 50, status="wrong: by far"),
        line(6, CUCONV, 70, predicted_us=""),
        line(6, "torch conv1d", 70, kernel="conv_simt", predicted_us="1"),
    ]
    conv, depthwise = report.predictions(lines)
    assert (conv.kernel, conv.count, conv.ratio) == ("conv_simt", 3, pytest.approx((2 * 0.5 * 8) ** (1 / 3)))
    assert conv.worst == (("3 row 3, bfloat16", 8.0), ("1 row 1, bfloat16", 2.0), ("2 row 2, bfloat16", 0.5))
    assert (depthwise.kernel, depthwise.ratio) == ("depthwise", pytest.approx(1.0))
    assert report.predictions([]) == []


# --- Two measurements --------------------------------------------------------------------------------------------


def kinds(old, new):
    return [(change.kind, change.column, change.fails) for change in report.changes(old, new)]


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ({}, {}, []),
        ({"us": 100}, {"us": 106}, [("regression", "device", True)]),
        ({"us": 106}, {"us": 100}, [("improvement", "device", False)]),
        ({"us": 100, "spread": 0.001}, {"us": 102.9, "spread": 0.001}, []),  # within 3 %
        ({"us": 100, "spread": 0.04}, {"us": 106, "spread": 0.04}, []),  # within the spread
        ({"us": 100, "spread": 0.0}, {"us": 106, "spread": 0.07}, []),  # of one of them
        ({"us": 100}, {"us": 300}, [("regression", "device", True), ("regression", "host", True)]),
        ({"contender": "torch conv1d"}, {"contender": "torch conv1d", "us": 300}, [("regression", "device", False)]),
        ({}, {"status": "wrong: by 4"}, [("status", "", True)]),
        ({}, {"status": "failed: out of memory", "us": None}, [("status", "", True)]),
        ({"contender": "copy"}, {"contender": "copy", "status": "wrong: by 4"}, [("status", "", False)]),
        ({"status": "wrong: by 4"}, {}, [("status", "", False)]),
        ({"status": "wrong: by 4"}, {"status": "wrong: by 5", "us": 900}, []),
        ({"variant": "bias+relu"}, {}, [("missing", "", False), ("new", "", False)]),
        ({"number": 2}, {}, [("missing", "", False), ("new", "", False)]),
    ],
)
def test_changes(before, after, expected):
    first = {"number": 1, "contender": CUCONV, "us": 100}
    found = kinds([line(**first | before)], [line(**first | after)])
    if before.get("contender") == "torch conv1d":
        found = found[:1]
    assert found == expected


def test_compare_prints_what_moved_and_fails_on_regressions_only(tmp_path, capsys):
    old = save(tmp_path / "old.csv", [line(1, CUCONV, 100), line(1, "torch conv1d", 100), line(2, CUCONV, 10)])
    new = save(
        tmp_path / "new.csv",
        [line(1, CUCONV, 90), line(1, "torch conv1d", 150), line(2, CUCONV, 20, driver="0.2"), line(3, CUCONV, 1)],
    )
    assert report.main(["--compare", str(old), str(new)]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "not the same machine, driver: 0.0 -> 0.0, 0.2"
    assert rest[0] == "regression: 2 row 2, bfloat16, cuconv: device 10.00 -> 20.00 us (+100.0%)"
    assert [each.split(",")[0] for each in rest] == [
        "regression: 2 row 2",
        "regression: 2 row 2",
        "regression: 1 row 1",
        "regression: 1 row 1",
        "improvement: 1 row 1",
        "improvement: 1 row 1",
        "new: 3 row 3",
    ]
    assert report.main(["--compare", str(new), str(new)]) == 0
    assert capsys.readouterr().out == "no change\n"
    assert report.main(["--compare", str(old), str(old), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"machine": [], "changes": []}
    assert report.main(["--compare", str(old), str(new), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)["changes"]
    assert told[0]["kind"] == "regression" and told[0]["fails"] and not told[-1]["fails"]


@pytest.mark.parametrize(
    "content, message",
    [("a,b\n1,2\n", "no columns number, group"), ("", "no columns number"), (None, "No such file")],
)
def test_other_files_are_refused(content, message, tmp_path, capsys):
    path = tmp_path / "other.csv"
    if content is not None:
        path.write_text(content)
    for arguments in (["--compare", str(path), str(path)], ["--plots", str(tmp_path), str(path)]):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_there_is_nothing_to_plot_in_a_dry_run(tmp_path, capsys):
    path = save(tmp_path / "gpu-x.csv", [line(1, CUCONV, None, status="not measured")])
    with pytest.raises(SystemExit):
        report.main(["--plots", str(tmp_path), str(path)])
    assert "must hold a measured line" in capsys.readouterr().err
    assert report.main(["--compare", str(path), str(path)]) == 0


# --- Plots -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gpu, name",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
    ],
)
def test_a_gpu_is_known_by_its_drivers_name(gpu, name):
    assert report.limits_of(gpu).name == name


@pytest.mark.parametrize("gpu", ["NVIDIA L40S", "NVIDIA A1000", ""])
def test_an_unknown_gpu_is_an_error(gpu):
    with pytest.raises(ValueError, match="the GPU must be one of T4, A100"):
        report.limits_of(gpu)


def test_plots_show_what_was_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from cuconv import plots

    drawn = {}
    for name in ("roofline", "bars"):
        real = getattr(plots, name)

        def keep(what, *rest, real=real, name=name):
            drawn.setdefault(name, []).append(list(what))
            real(drawn[name][-1], *rest)

        monkeypatch.setattr(plots, name, keep)
    path = save(tmp_path / "gpu-x.csv", MEASURED)
    assert report.main(["--plots", str(tmp_path / "made"), str(path)]) == 0
    names = ("roofline", "times-a", "times-a-fused", "times-b", "times-sweep")
    written = {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    assert {each.name for each in (tmp_path / "made").iterdir()} == written
    assert len(capsys.readouterr().out.splitlines()) == len(written)

    (points,) = drawn["roofline"]
    assert [point[0].split()[0] for point in points] == ["1", "1", "1", "2", "2", "2", "4", "4"]
    first = {kind: (intensity, rate) for _, intensity, rate, kind in points[:3]}
    assert first["measured"] == (pytest.approx(1000), pytest.approx(50e12))
    assert first["predicted"] == (pytest.approx(1000), pytest.approx(20e12))
    assert first["best peer"] == (pytest.approx(1000), pytest.approx(1e9 / 30e-6))
    bars, fused, *_ = drawn["bars"]
    assert ("1 row 1, bfloat16", CUCONV, *map(pytest.approx, (20e-6, 19.8e-6, 20.2e-6, 10e-6))) in bars
    assert len(bars) == 7 and [bar[:2] for bar in fused] == [
        ("1 row 1, bfloat16, bias+relu", CUCONV),
        ("1 row 1, bfloat16, bias+relu", "torch conv1d"),
    ]
