"""The benchmark of the host's time runs without a GPU, and a repeated call does not do more than it has to.

Times are not looked at: functions called are counted, which is the same on every machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
# Functions that a call of a known shape may call, in Python and in C. Whoever needs one more says why.
MOST_CALLS = {"ops.conv": 26, "layers.Conv1D": 50, "prepared": 11}


@pytest.fixture(scope="module")
def report():
    command = [sys.executable, "-m", "benchmarks.overhead", "--json", "--repeats", "1"]
    printed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return json.loads(printed)


def test_every_figure_is_there(report):
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert len(figures) == 6 and report["arrays"] and report["machine"]["commit"]
    for figure in figures.values():
        assert 0 < figure["microseconds"] < 1e6 and figure["goal"] > 0
        assert figure["met"] is (figure["microseconds"] <= figure["goal"])


@pytest.mark.parametrize("name", MOST_CALLS)
def test_a_repeated_call_calls_few_functions(report, name):
    (calls,) = (figure["calls"] for figure in report["figures"] if figure["name"].startswith(f"{name},"))
    assert 0 < calls <= MOST_CALLS[name]
