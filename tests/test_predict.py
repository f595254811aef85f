"""The table of predictions: what it says is what the plans say, and benchmarks/NOTES.md holds it."""

import json

import pytest

from benchmarks import predict, suite

ROWS = {row.number: row for row in suite.ROWS}


def test_the_notes_hold_the_table_of_todays_plans():
    text = predict.NOTES.read_text()
    assert predict.filled(text) == text, "python -m benchmarks.predict --write"


@pytest.mark.parametrize("device", predict.DEVICES)
@pytest.mark.parametrize("number", [1, 7, 20, 43, 54])
def test_a_prediction_is_the_explanation(number, device):
    row = ROWS[number]
    told, found = row.explain(device), predict.predict(row, device)
    longest = max(told.steps, key=lambda step: step.seconds)
    assert found.plan.startswith(longest.kernel) and all(step.kernel in found.plan for step in told.steps)
    assert found.microseconds == pytest.approx(1e6 * sum(step.seconds for step in told.steps))
    roof = row.roof_seconds if device == "H200" else told.roof_seconds
    assert found.share == pytest.approx(1e6 * roof / found.microseconds) and 0 < found.share < 1
    assert found.bound and found.bound == longest.bound
    assert (found.goal is None) == (device != "H200")


def test_every_row_says_what_it_waits_for():
    assert all(predict.predict(row, device).bound for row in suite.ROWS for device in predict.DEVICES)


@pytest.mark.parametrize(
    "number, goal",
    [
        (20, 0.85),  # depthwise, 4 taps
        (23, 0.8),  # 31 taps
        (37, 0.8),  # 7 x 7
        (38, 0.8),  # 3 x 3
        (57, 0.8),  # all gradients at once
        (7, 0.75),  # one channel: bound by memory
        (13, 0.6),  # dense
        (54, 0.6),  # its kernel gradient
        (5, 100 / (395 / 3)),  # float32: 100 TFLOP/s
        (6, None),  # 2 us of work
        (27, None),  # two kernels
    ],
)
def test_goals(number, goal):
    assert ROWS[number].goal == (goal and pytest.approx(goal))


def test_a_goal_is_missed_below_it_and_only_there():
    found = predict.predict(ROWS[13], "H200")
    assert not found.missed or found.share < 0.6
    for share, missed in ((found.goal - 0.01, True), (found.goal, False), (0.99, False)):
        assert vars(found)["share"] != share
        assert predict.Prediction(**{**vars(found), "share": share}).missed == missed
    assert not predict.Prediction(**{**vars(found), "share": 0.01, "goal": None}).missed


def test_command_line(capsys):
    assert predict.main(["--rows", "7", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["measured"] is False
    assert [(each["number"], each["device"]) for each in told["predictions"]] == [
        (number, device) for number in (7, 20) for device in predict.DEVICES
    ]
    assert predict.main(["--rows", "7"]) == 0
    shown = capsys.readouterr().out
    assert "predicted, not measured" in shown and "wav2vec2 L0" in shown
    with pytest.raises(SystemExit):
        predict.main(["--rows", "999"])
    assert "Received: rows=[999]" in capsys.readouterr().err


def test_writing_changes_the_table_alone(tmp_path, monkeypatch):
    notes = tmp_path / "NOTES.md"
    notes.write_text("before\n<!-- predictions -->\nold\n<!-- end of predictions -->\nafter\n")
    monkeypatch.setattr(predict, "NOTES", notes)
    assert predict.main(["--write"]) == 0
    text = notes.read_text()
    assert text.startswith("before\n<!-- predictions -->\n| # | row |") and text.endswith("-->\nafter\n")
    assert "old" not in text and text.count("\n| ") == 1 + len(suite.ROWS)
