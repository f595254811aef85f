"""Tables in the README, printed from the measured CSV: `python -m benchmarks.report`."""

from __future__ import annotations

import csv
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
CPU_CSV = HERE / "results" / "cpu.csv"
PEERS = ("cuconv", "torch", "onnxruntime")


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced.

    Raises:
        ValueError: `text` does not hold each marker once, in order.
    """
    first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
    head, found, rest = text.partition(first)
    _, closed, tail = rest.partition(last)
    if not (found and closed) or first in rest or last in tail:
        raise ValueError(f"the text must hold {first} and {last} once each, in this order")
    return f"{head}{first}\n{content}\n{last}{tail}"


def cpu_table(rows: list[dict[str, str]]) -> str:
    """The rows of benchmarks.cpu as a Markdown table, with the machine and the median below it."""
    lines = [
        "| row | cuconv ms | GFLOP/s | PyTorch ms | ONNX Runtime ms | ratio to PyTorch |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        times = [f"{float(row[f'{name}_ms']):.3g}" if row[f"{name}_ms"] else "-" for name in PEERS]
        ratio = f"{float(row['ratio_torch']):.2f}" if row["ratio_torch"] else "-"
        lines.append(
            f"| {row['name']} | {times[0]} | {float(row['cuconv_gflops']):.0f} | {times[1]} | {times[2]} | {ratio} |"
        )
    ratios = [float(row["ratio_torch"]) for row in rows if row["ratio_torch"]]
    median = f"The median ratio to PyTorch is {statistics.median(ratios):.2f}. " if ratios else ""
    told = rows[0]
    where = f"{told['cpu']}, one thread; NumPy {told['numpy']} with {told['blas']}"
    peers = ", ".join(
        f"{title} {told[name]}" for name, title in (("torch", "PyTorch"), ("onnxruntime", "ONNX Runtime"))
    )
    return "\n".join([*lines, "", f"{median}{where}; {peers}; commit {told['commit']}, {told['date']}."])


def main() -> None:
    """Writes the tables into the README; `--check` only says by its exit code whether they are those of the CSV."""
    with CPU_CSV.open(newline="") as file:
        table = cpu_table(list(csv.DictReader(file)))
    text = README.read_text()
    written = between(text, "cpu table", table)
    if "--check" in sys.argv[1:]:
        sys.exit(int(written != text))
    README.write_text(written)


if __name__ == "__main__":
    main()
