"""The committed table of static figures holds within 3 %, for every architecture: `python -m benchmarks.static`."""

import dataclasses
import io
import json

import disassembly
import pytest
from emulator import nvrtc

from benchmarks import static, suite
from benchmarks.static import Line
from cuconv.plan.devices import DEVICES

QUICK = ("sm_80", "sm_90")  # whose gates test_static_gates.py compiles anyway


@pytest.fixture(scope="module")
def baseline():
    return static.read(static.BASELINE)


def told(changes):
    return "\n".join([*map(str, changes), static.ACCEPT])


# --- The baseline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", static.DEVICES)
def test_predicted_shares_of_the_roof_hold(arch, baseline):
    lines = [line for case in static.row_cases(arch) for line in static.lines_of(case, compiled=False)]
    changes = static.compare(baseline, lines, ["percent_of_roof"])
    assert not changes, told(changes)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize(
    "arch, kind",
    [
        pytest.param(arch, kind, marks=[] if kind == "gates" and arch in QUICK else pytest.mark.exhaustive)
        for arch in static.DEVICES
        for kind in ("gates", "rows")
    ],
)
def test_machine_code_holds(arch, kind, baseline):
    make = {"gates": static.gate_cases, "rows": static.row_cases}[kind]
    lines = [line for case in make(arch) for line in static.lines_of(case)]
    spills = static.spills(lines)
    assert not spills, "\n".join(spills)
    if disassembly.missing():
        pytest.skip(disassembly.missing())
    if others := static.other_compilers(baseline, arch):
        pytest.skip(f"machine code of NVRTC {static.compiler()} is not compared with that of {others}")
    changes = static.compare(baseline, lines)
    assert not changes, told(changes)


def test_the_baseline_holds_every_launch(baseline):
    assert [line.key for line in baseline] == [
        (case.arch, case.name, step) for case in static.cases() for step in range(1, len(case.plans) + 1)
    ]
    rows = {line.case for line in baseline if not line.case.startswith("gate ")}
    assert rows == {f"{row.number} {row.name}" for row in suite.ROWS} and len(rows) == 58
    for line in baseline:
        assert line.nvrtc and line.registers > 0 and line.stack_bytes == 0 and 0 < line.occupancy <= 1, line
        assert (line.percent_of_roof is None) == line.case.startswith("gate "), line
        if line.kernel in ("conv_simt", "kernel_grad_simt", "depthwise", "depthwise_carry", "depthwise_grads"):
            assert 0.2 < line.efficiency < 1 and "FMA" in line.mix, line


def test_the_file_is_what_is_written(baseline):
    file = io.StringIO()
    static.write(baseline, file)
    assert file.getvalue() == static.BASELINE.read_text()


def test_the_notes_show_the_baseline(baseline):
    text = static.NOTES.read_text()
    assert static.noted(text, baseline) == text, static.ACCEPT


def test_the_notes_show_main_loops_of_three_architectures():
    gates = [dataclasses.replace(LINE, case=f"gate {name}", arch=arch) for arch in static.DEVICES for name in "ba"]
    shown = static.markdown([*gates, LINE, dataclasses.replace(gates[0], arch="sm_90", busy=None)])
    _, _, *rows = shown.splitlines()
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| {name}", arch] for name in "ab" for arch in ("sm_80", "sm_89", "sm_90")
    ]
    assert rows[0] == "| a | sm_80 | 128 | 600 | FFMA 480 | 10% | 80% |"


# --- A main loop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instructions, device, expected",
    [
        # 128 lanes: a quarter starts one multiply-add of a warp a cycle; 64 lanes: one every second.
        (["FFMA"] * 8 + ["LDS"] * 2, "H200", 0.8),
        (["FFMA"] * 8 + ["LDS"] * 2, "A100", 1.0),
        (["FFMA"] * 4 + ["LDS"] * 16, "A100", 0.4),
        (["FADD"] * 5 + ["LDG.E.128"] * 5, "H200", 0.5),
        # 1024 products of 16 bits a cycle of an A100's multiprocessor: 8 cycles of its quarter for 2048.
        (["HMMA.16816.F32"] + ["LDSM"] * 15, "A100", 0.5),
        (["HMMA.16816.F32.BF16"] + ["LDSM"] * 7, "A100", 1.0),
        (["HMMA.1688.F32.TF32"] + ["LDSM"] * 15, "A100", 0.5),
        (["DMMA.16x8x8"] + ["LDS"] * 7, "H200", 1.0),
        (["DMMA.884"] + ["LDS"] * 31, "A100", 0.5),
        # 49,152 operations of 3779 / 4 a cycle: the data sheet has the rate of tensor cores at a lower clock.
        (["HGMMA.64x96x16.F32.BF16"] + ["R2UR"] * 103, "H200", 0.5),
        (["HGMMA.64x96x8.F32.TF32"] + ["R2UR"] * 103, "H200", 0.5),
        # Units work beside each other: the busiest counts.
        (["HMMA.16816.F32"] + ["FFMA"] * 15, "A100", 1.0),
        (["LDG"], "H200", 0.0),
    ],
)
def test_busy(instructions, device, expected):
    code = disassembly.Code(tuple(disassembly.Instruction(0, "", name, "", None) for name in instructions))
    # Data sheets round the clock that their rates are of.
    assert static.busy(code, DEVICES[device]) == pytest.approx(expected, rel=0.02)


# --- The comparison ----------------------------------------------------------------------------------------------

LINE = Line(
    *("sm_90", "1 row", 1, "conv_simt", "", 120, 128, 0, 16640, 2, 0.25, 600, 480, 0.8, 0.1, 0.8, "FFMA 480", 50.0),
    *("13.0", ""),
)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({}, []),
        ({"registers": 131}, []),
        ({"registers": 133}, [("registers", True)]),
        ({"registers": 120}, [("registers", False)]),
        ({"stack_bytes": 8}, [("stack_bytes", True)]),
        ({"occupancy": 0.125}, [("occupancy", True)]),
        ({"occupancy": 0.5}, [("occupancy", False)]),
        ({"efficiency": 0.78}, []),
        ({"efficiency": 0.77}, [("efficiency", True)]),
        ({"arithmetic": 240, "loop": 290, "efficiency": 0.828}, [("arithmetic", True), ("efficiency", False)]),
        ({"efficiency": None}, [("efficiency", True)]),
        ({"integer": 0.11}, [("integer", True)]),
        ({"integer": 0.05}, [("integer", False)]),
        ({"busy": 0.7}, [("busy", True)]),
        ({"busy": 0.9}, [("busy", False)]),
        ({"percent_of_roof": 48.0}, [("percent_of_roof", True)]),
        ({"percent_of_roof": 52.0}, [("percent_of_roof", False)]),
        ({"registers": 160, "efficiency": 0.9}, [("registers", True), ("efficiency", False)]),
        ({"shared_bytes": 99999, "loop": 1, "mix": "", "resident": 1, "planned": 1, "tile": "x"}, []),  # not judged
        ({"kernel": "conv_mma"}, [("", False)]),
        ({"step": 2}, [("", False), ("", False)]),
        # Another compiler: only the prediction counts.
        ({"nvrtc": "13.1", "registers": 160, "occupancy": 0.1, "efficiency": 0.1}, []),
        ({"nvrtc": "13.1", "percent_of_roof": 40.0}, [("percent_of_roof", True)]),
    ],
)
def test_compare(changed, expected):
    changes = static.compare([LINE], [dataclasses.replace(LINE, **changed)])
    assert [(change.column, change.worse) for change in changes] == expected


def test_a_change_says_what_was_and_what_is():
    (change,) = static.compare([LINE], [dataclasses.replace(LINE, registers=160)])
    assert str(change) == "sm_90, 1 row, launch 1 (conv_simt): registers 128 -> 160, worse"
    (change,) = static.compare([LINE], [dataclasses.replace(LINE, kernel="conv_mma")])
    assert str(change) == "sm_90, 1 row, launch 1 (conv_mma): launch conv_simt -> conv_mma"


def test_only_what_is_compared_can_be_missing():
    other = dataclasses.replace(LINE, arch="sm_80")
    assert static.compare([LINE, other], [LINE]) == []
    second = dataclasses.replace(LINE, step=2)
    assert [str(change) for change in static.compare([LINE, second], [LINE])] == [
        "sm_90, 1 row, launch 2 (conv_simt): launch conv_simt -> none"
    ]


def test_spills_are_told_whatever_the_baseline_says():
    assert static.spills([LINE, dataclasses.replace(LINE, stack_bytes=16)]) == [
        "sm_90, 1 row, launch 1 (conv_simt): 16 bytes of stack a thread"
    ]


# --- Accepting ---------------------------------------------------------------------------------------------------


def test_a_worse_figure_needs_a_reason_which_stays_until_the_line_changes():
    worse = dataclasses.replace(LINE, registers=160)
    with pytest.raises(ValueError, match=r"must say why these are worse(.|\n)*registers 128 -> 160, worse"):
        static.merged([LINE], [worse], "")
    (accepted,) = static.merged([LINE], [worse], "more sums in flight")
    assert accepted == dataclasses.replace(worse, reason="more sums in flight")
    assert static.merged([accepted], [worse], "") == [accepted]
    better = dataclasses.replace(LINE, registers=100)
    assert static.merged([accepted], [better], "unused") == [better]


def test_other_architectures_stay_as_they_are():
    others = [dataclasses.replace(LINE, arch=arch, reason="old") for arch in ("sm_75", "sm_90", "sm_120")]
    new = dataclasses.replace(LINE, percent_of_roof=60.0)
    assert static.merged(others, [new], "") == [others[0], new, others[2]]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A table of one gate and a baseline of its own; compiles nothing."""
    line = dataclasses.replace(LINE, nvrtc=static.compiler())
    monkeypatch.setattr(static, "BASELINE", tmp_path / "static.csv")
    monkeypatch.setattr(static, "NOTES", tmp_path / "NOTES.md")
    static.NOTES.write_text("<!-- main loops -->\n<!-- end of main loops -->\n")
    monkeypatch.setattr(static, "cases", lambda archs: [None])
    monkeypatch.setattr(static, "lines_of", lambda case: [line])

    def become(**changes):
        nonlocal line
        line = dataclasses.replace(line, **changes)

    return become


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
def test_the_command_checks_and_writes(small, capsys, tmp_path):
    assert static.main(["--write"]) == 0
    assert static.main(["--check"]) == 0
    small(registers=160)
    assert static.main(["--check"]) == 1
    printed = capsys.readouterr().err
    assert "registers 128 -> 160, worse" in printed and static.ACCEPT in printed
    with pytest.raises(SystemExit) as stopped:
        static.main(["--write"])
    assert stopped.value.code == 2
    assert static.main(["--write", "--reason", "because"]) == 0
    assert static.main(["--check"]) == 0
    assert static.read(static.BASELINE)[0].reason == "because"
    assert "| kernel | arch |" in static.NOTES.read_text()
    small(nvrtc="0.0", registers=200)
    assert static.main(["--check"]) == 0
    small(stack_bytes=8)
    capsys.readouterr()
    assert static.main(["--check"]) == 1
    assert "8 bytes of stack" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        static.main(["--write", "--reason", "because"])
    assert "no reason allows a stack" in capsys.readouterr().err


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
def test_the_command_prints_lines(small, capsys, tmp_path):
    assert static.main(["--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)
    assert line["kernel"] == "conv_simt" and set(line) == set(static.COLUMNS)
    assert static.main(["--csv", str(tmp_path / "out.csv")]) == 0
    assert capsys.readouterr().out == ""
    assert [each.kernel for each in static.read(tmp_path / "out.csv")] == ["conv_simt"]
    assert static.main(["--arch", "sm_90"]) == 0
    assert "128" in capsys.readouterr().out


def test_an_unknown_architecture_is_refused():
    with pytest.raises(SystemExit):
        static.main(["--arch", "sm_70"])
