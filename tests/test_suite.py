"""The suite's rows are those of the plan, and what each costs follows from its geometry."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from suite_rows import ALL, answers, case, small

from benchmarks import suite
from benchmarks.truth import Operands

ROOT = Path(__file__).parents[1]

# As the plan of the suite prints it, computed there without this package: number, GFLOP, MB, FLOP/B, microseconds at
# the arithmetic and at the memory peak, which of the two is more, "~" where they are within a quarter.
# Two kinds of rows have a faster unit than there: float32 of matrix products (three of TF32, 131.7 TFLOP/s and not 67),
# depthwise of 16 bits (tensor cores, 790). Their arithmetic is 0.509 and 0.0848 times as long.
TABLE = """
1 17.18 100.8 170 21.7 21.0 C~
2 17.18 100.8 170 21.7 21.0 C~
3 17.18 100.8 170 21.7 21.0 C~
4 12.88 134.4 96 32.6 28.0 C~
5 12.88 134.4 96 97.9 28.0 C
6 0.15 3.1 47 1.1 0.7 C
7 4.19 423.5 10 5.3 88.2 M
8 322.11 630.7 511 407.7 131.4 C
9 13.41 40.4 332 17.0 8.4 C
10 47.19 136.2 347 59.7 28.4 C
11 235.93 194.2 1215 298.6 40.4 C
12 36.24 607.2 60 45.9 126.5 M
13 1159.64 609.9 1901 1467.9 127.1 C
14 11.53 138.4 83 14.6 28.8 M
15 201.33 263.7 763 254.8 54.9 C
16 0.55 13.4 41 4.2 2.8 C
17 5.63 23.8 236 42.8 5.0 C
18 181.19 631.0 287 229.4 131.5 C
19 206.16 92.3 2234 261.0 19.2 C
20 0.67 335.6 2 0.8 69.9 M
21 1.61 805.4 2 2.0 167.8 M
22 0.47 316.1 1 0.6 65.9 M
23 1.02 65.6 15 1.3 13.7 M
24 1.02 131.1 8 15.2 27.3 M
25 0.23 134.2 2 3.5 28.0 M
26 17.18 269.5 64 21.7 56.1 M
27 17.52 134.4 130 22.2 28.0 M
28 3.79 26.4 144 4.8 5.5 M~
29 24.79 68.4 363 31.4 14.2 C
30 13.38 51.9 258 16.9 10.8 C
31 15.11 122.0 124 19.1 25.4 M
32 14.80 51.5 288 18.7 10.7 C
33 6.58 128.5 51 8.3 26.8 M
34 14.80 26.0 569 18.7 5.4 C
35 14.80 33.3 444 18.7 6.9 C
36 14.80 11.1 1328 18.7 2.3 C
37 1.89 77.1 24 2.4 16.1 M
38 1.04 231.2 4 1.3 48.2 M
39 309.24 160.4 1928 391.4 33.4 C
40 30.20 22.8 1324 38.2 4.8 C
41 309.24 138.9 2226 391.4 28.9 C
42 17.18 25.2 683 21.7 5.2 C
43 34.36 84.9 405 43.5 17.7 C
44 8.59 134.2 64 10.9 28.0 M
45 42.95 192.9 223 108.7 40.2 C
46 68.72 202.4 340 87.0 42.2 C
47 57.98 100.8 575 73.4 21.0 C
48 463.86 537.1 864 587.2 111.9 C
49 1043.42 805.6 1295 1320.8 167.8 C
50 14.50 25.6 567 18.3 5.3 C
51 17.18 100.8 170 21.7 21.0 C~
52 17.18 100.9 170 21.7 21.0 C~
53 322.11 630.7 511 407.7 131.4 C
54 322.11 632.3 509 407.7 131.7 C
55 14.80 26.3 563 18.7 5.5 C
56 40.28 257.0 157 51.0 53.5 M~
57 1.34 503.4 3 1.7 104.9 M
58 2.03 98.4 21 2.6 20.5 M
"""


# That table counts a kernel gradient in float32; those of cuconv have the dtype of their operands.
KERNEL_GRADIENTS = {52, 54, 55, 56}


def printed(row: suite.Row, extra_bytes: int = 0) -> str:
    count = row.bytes + extra_bytes
    compute, memory = row.compute_seconds * 1e6, (row.memory_seconds + extra_bytes / 4.8e12) * 1e6
    bound = ("C" if row.side == "compute" else "M") + ("~" if row.ridge else "")
    costs = f"{row.flops / 1e9:.2f} {count / 1e6:.1f} {row.flops / count:.0f} {compute:.1f} {memory:.1f}"
    return f"{row.number} {costs} {bound}"


@pytest.mark.parametrize("row", ALL)
def test_cost_is_that_of_the_table(row):
    line = TABLE.split("\n")[row.number]
    if row.number in KERNEL_GRADIENTS:
        assert printed(row) != line
        assert printed(row, extra_bytes=2 * math.prod(row.kernels[0])) == line
    else:
        assert printed(row) == line


def test_rows_are_58_in_order_and_the_sweep_doubles():
    assert [row.number for row in suite.ROWS] == list(range(1, 59))
    counts = {group: sum(row.group == group for row in suite.ROWS) for group in "abcdefg"}
    assert counts == {"a": 19, "b": 7, "c": 4, "d": 11, "e": 5, "f": 4, "g": 8}
    assert [row.dilation_rate for row in suite.SWEEP] == [
        (1,),
        (2,),
        (4,),
        (8,),
        (16,),
        (32,),
        (64,),
        (128,),
        (256,),
        (512,),
    ]
    for row, twin in ((suite.SWEEP[0], 1), (suite.SWEEP[4], 2), (suite.SWEEP[9], 3)):
        assert row.options() == suite.ROWS[twin - 1].options() and row.shapes() == suite.ROWS[twin - 1].shapes()


@pytest.mark.parametrize("row", [*ALL, *map(case, suite.SWEEP)])
def test_shapes_and_options_are_what_the_operation_takes(row):
    """The oracle, which shares no arithmetic with the package, accepts them and returns the outputs' shapes."""
    row = small(row)
    for variant in row.variants:
        operands = Operands.random(row, np, seed=0)
        assert tuple(np.shape(a) if isinstance(a, np.ndarray) else a for a in operands.arguments(row, variant)) == (
            row.shapes(variant)
        )
        assert tuple(a.shape for a in answers(row, operands, variant)) == row.outputs


def test_explicit_padding_is_pairs_and_strides_one_per_axis():
    for row in suite.ROWS:
        rank = len(row.x) - 2
        assert len(row.strides) == len(row.dilation_rate) == len(row.kernel_size) == rank
        assert row.padding in ("valid", "same", "causal") or all(len(pair) == 2 for pair in row.padding)
    assert suite.ROWS[49].strides == suite.ROWS[49].kernel_size == (2, 16, 16)
    assert suite.ROWS[38].padding == ((6, 6), (6, 6))


def test_precision_is_high_exactly_in_tf32_rows():
    assert [row.number for row in suite.ROWS if row.options().get("precision", "highest") == "high"] == [4, 45]
    assert {row.array_dtype for row in suite.ROWS if row.dtype == "tf32"} == {"float32"}


def test_fused_variants():
    assert suite.ROWS[19].variant_name("fused") == "bias+silu"
    assert suite.ROWS[0].variant_name("fused") == "bias+relu"
    assert all(row.variants == ("plain",) for row in suite.ROWS if row.group == "g")
    assert suite.ROWS[0].shapes("fused") == ((8, 16384, 128), (2, 128, 256), (256,))
    assert suite.ROWS[0].options("fused")["activation"] == "relu"


def test_rows_are_explained_as_they_are_run():
    plain, fused = (suite.ROWS[0].explain("H200", variant) for variant in ("plain", "fused"))
    assert [shape for _, shape in plain.arrays] == [(8, 16384, 128), (2, 128, 256), (8, 16384, 256)]
    assert [shape for _, shape in fused.arrays] == [(8, 16384, 128), (2, 128, 256), (256,), (8, 16384, 256)]
    assert fused.options["activation"] == "relu" and "activation" not in plain.options
    assert plain.dtype == "bfloat16" and suite.ROWS[3].explain().dtype == "float32"


@pytest.mark.parametrize("row", ALL)
def test_bytes_and_operations_are_those_that_explain_counts(row):
    explained = row.explain("H200")
    assert explained.bytes == row.bytes
    assert explained.flops == row.flops


def test_rows_are_selected_by_group_and_number():
    assert [row.number for row in suite.selected(["e"], [3])] == [3, 42, 43, 44, 45, 46]
    assert len(suite.selected()) == 58
    assert [row.number for row in suite.selected(["sweep"])] == list(range(101, 111))
    with pytest.raises(ValueError, match=r"Received: rows=\[0, 59\]"):
        suite.selected(numbers=[59, 1, 0])


def run(*arguments):
    command = [sys.executable, "-m", "benchmarks.suite", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_command_lists_rows():
    rows = json.loads(run("--list", "--json"))["rows"]
    assert [row["number"] for row in rows] == [*range(1, 59), *range(101, 111)]
    assert rows[0]["gflop"] == pytest.approx(2 * 8 * 16384 * 2 * 128 * 256 / 1e9)
    assert rows[7]["side"] == "compute" and rows[6]["side"] == "memory"
    text = run("--list", "--group", "e")
    assert "45" in text and "Oobleck" in text and "WaveNet" not in text


def test_listing_needs_no_gpu_library():
    code = (
        "import sys; from benchmarks import suite; [row.record() for row in suite.ROWS]; "
        "print([name for name in ('cupy', 'torch', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
