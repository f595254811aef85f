"""The README's tables are those of the measured CSV."""

import csv

import pytest

from benchmarks import report


def test_the_readme_shows_the_committed_measurement():
    with report.CPU_CSV.open(newline="") as file:
        table = report.cpu_table(list(csv.DictReader(file)))
    text = report.README.read_text()
    assert report.between(text, "cpu table", table) == text, "run python -m benchmarks.report"


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
