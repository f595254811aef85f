"""The demo: its data, its training tools one by one, and that it learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_device import DeviceArray

from cuconv import cli
from cuconv.demo import classifier, data, make_data, show

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def dataset():
    return data.load()


@pytest.fixture(scope="module")
def stored():
    with np.load(data.FILE, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


# --- Data --------------------------------------------------------------------------------------------------------


def test_the_file_is_small_and_its_licence_is_beside_it():
    assert 100_000 <= data.FILE.stat().st_size <= 200_000
    licence = data.FILE.with_name("LICENSE.seglearn").read_text()
    assert "Copyright (c) 2018, David M. Burns" in licence and licence.count("* ") == 3


def test_the_file_holds_plain_arrays(stored):
    assert {name: (array.dtype.kind, array.shape) for name, array in stored.items()} == {
        "signal": ("i", (6, 140, data.STEPS)),
        "scale": ("f", (6,)),
        "subject": ("u", (140,)),
        "exercise": ("u", (140,)),
        "exercises": ("U", (7,)),
        "channels": ("U", (6,)),
    }
    assert stored["signal"].dtype == np.int8 and data.STEPS == 344
    assert stored["channels"].tolist() == ["ax", "ay", "az", "wx", "wy", "wz"]
    # The whole range is used, and -128, which has no positive counterpart, is not.
    assert np.abs(stored["signal"].astype(int)).max(axis=(1, 2)).tolist() == [127] * 6


def test_windows(dataset):
    assert dataset.train.x.shape == (686, 128, 9) and dataset.test.x.shape == (294, 128, 9)
    for part in (dataset.train, dataset.test):
        assert part.x.dtype == np.float32 and np.isfinite(part.x).all()
        assert part.y.shape == part.subject.shape == part.x.shape[:1]
        assert len(set(np.bincount(part.y, minlength=7))) == 1  # every exercise as often
        assert len(np.unique(part.x.reshape(len(part.x), -1), axis=0)) == len(part.x)  # none twice
    assert len(dataset.exercises) == len(set(dataset.exercises)) == 7


def test_nobody_is_in_both_parts(dataset):
    learned, held_out = set(dataset.train.subject.tolist()), set(dataset.test.subject.tolist())
    assert held_out == set(data.HELD_OUT) and learned | held_out == set(range(1, 11)) and not learned & held_out
    for part in (dataset.train, dataset.test):
        for person in np.unique(part.subject):
            assert np.bincount(part.y[part.subject == person]).tolist() == [14] * 7  # both arms, 7 windows each


def test_gravity_and_motion_are_plausible(dataset):
    acceleration, rotation, smooth = np.split(dataset.train.x, 3, axis=-1)
    # A wrist hangs in a field of 1 g: that much is left when its motion is averaged away.
    assert 0.9 < np.median(np.linalg.norm(smooth, axis=-1)) < 1.05
    assert 0.5 < rotation.std() < 5  # rad/s
    assert smooth.std(axis=1).mean() < 0.8 * acceleration.std(axis=1).mean()


def test_smoothed_channels_average_the_last_second(dataset):
    x = dataset.train.x[::50].astype(np.float64)
    for step in range(data.SMOOTHING - 1, data.WINDOW):
        mean = x[:, step - data.SMOOTHING + 1 : step + 1, :3].mean(axis=1)
        np.testing.assert_allclose(x[:, step, 6:], mean, rtol=0, atol=1e-5)


def test_windows_of_a_recording_overlap(dataset):
    x = dataset.test.x.reshape(-1, data.WINDOWS_EACH, data.WINDOW, 9)
    np.testing.assert_array_equal(x[:, 1:, : -data.HOP], x[:, :-1, data.HOP :])


def test_windows_come_from_the_file(dataset, stored):
    index = np.flatnonzero(stored["subject"] == 8)[3]
    recording = (stored["signal"][:, index].T * stored["scale"])[data.SMOOTHING - 1 :]
    mine = dataset.test.x[3 * data.WINDOWS_EACH : 4 * data.WINDOWS_EACH, :, :6]
    np.testing.assert_array_equal(mine[0], recording[: data.WINDOW])
    np.testing.assert_array_equal(mine[-1], recording[-data.WINDOW :])
    assert dataset.test.y[3 * data.WINDOWS_EACH] == stored["exercise"][index]


@pytest.fixture
def source():
    generator = np.random.default_rng(5)
    return {
        "X": [generator.normal(scale=1 + index, size=(700 + index, 6)) for index in range(4)],
        "y": np.array([1, 0, 1, 0]),
        "side": np.array([1.0, 0.0, 0.0, 1.0]),
        "subject": np.array([2, 1, 2, 1]),
        "X_labels": ["ax", "ay", "az", "wx", "wy", "wz"],
        "y_labels": ["PEN", "ROW"],
    }


def test_make_orders_decimates_and_quantises(source):
    arrays, exact = make_data.make(source)
    assert arrays["subject"].tolist() == [1, 1, 2, 2] and arrays["exercise"].tolist() == [0, 0, 1, 1]
    assert arrays["exercises"].tolist() == ["pendulum", "bent-over row"]
    assert exact.shape == arrays["signal"].shape == (6, 4, data.STEPS)
    first = source["X"][1]  # subject 1, exercise 0, left: 701 steps, 350 pairs, 3 of them before the excerpt
    np.testing.assert_allclose(exact[:, 0, 0], (first[6] + first[7]) / 2)
    error = np.abs(arrays["signal"] * arrays["scale"][:, None, None] - exact)
    assert (error.max(axis=(1, 2)) <= 0.5001 * arrays["scale"]).all() and error.any()


def test_make_data_refuses_another_file(tmp_path):
    path = tmp_path / "watch_dataset.npy"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not the dataset of seglearn 1\.2\.5. Received: sha256="):
        make_data.read_source(path)


def test_the_file_comes_out_the_same_again(stored):
    path = make_data.find_source()
    if path is None:
        pytest.skip("seglearn is not installed")
    arrays, exact = make_data.make(make_data.read_source(path))
    assert arrays.keys() == stored.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, stored[name], err_msg=name)
        assert array.dtype == stored[name].dtype
    error = stored["signal"] * stored["scale"][:, None, None] - exact
    assert (np.sqrt(np.mean(error**2, axis=(1, 2))) < 0.05 * exact.std(axis=(1, 2))).all()


# --- Training tools ----------------------------------------------------------------------------------------------


def test_cross_entropy_gradient_against_finite_differences():
    generator = np.random.default_rng(3)
    scores = generator.normal(size=(3, 4, 5))
    targets = generator.dirichlet(np.ones(5), size=3)
    loss, gradient = classifier.cross_entropy(scores, targets)
    expected = np.empty_like(scores)
    for place in np.ndindex(scores.shape):
        moved = [scores.copy() for _ in range(2)]
        moved[0][place] += 1e-6
        moved[1][place] -= 1e-6
        above, below = (classifier.cross_entropy(each, targets)[0] for each in moved)
        expected[place] = (above - below) / 2e-6
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-9)
    softmax = np.exp(scores.mean(axis=1)) / np.exp(scores.mean(axis=1)).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -(targets * np.log(softmax)).sum() / 3, rtol=1e-12)


def test_cross_entropy_of_huge_scores_is_finite():
    scores = np.zeros((1, 2, 3), np.float32)
    scores[..., 0] = 1e4
    loss, gradient = classifier.cross_entropy(scores, np.array([[0, 0, 1]], np.float32))
    assert loss == np.float32(1e4) and gradient.dtype == np.float32
    np.testing.assert_array_equal(gradient[0], [[0.5, 0, -0.5]] * 2)


def test_cross_entropy_stays_where_the_scores_are():
    generator = np.random.default_rng(3)
    scores, targets = generator.normal(size=(3, 4, 5)), np.eye(5)[:3]
    expected = classifier.cross_entropy(scores, targets)
    computed = classifier.cross_entropy(DeviceArray(scores), DeviceArray(targets))
    assert all(type(each) is DeviceArray for each in computed)
    for ours, theirs in zip(computed, expected):
        np.testing.assert_array_equal(ours.host, theirs)


def test_adam_follows_its_definition():
    weight, adam = np.array([1.0, -2.0]), classifier.Adam()
    mean = square = np.zeros(2)
    expected = weight.copy()
    for step, gradient in enumerate(([0.5, 3.0], [-1.0, 0.1], [2.0, 0.0]), start=1):
        gradient, rate = np.array(gradient), 0.1 / step
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        unbiased = mean / (1 - 0.9**step), square / (1 - 0.999**step)
        expected -= rate * unbiased[0] / (np.sqrt(unbiased[1]) + 1e-7 / np.sqrt(1 - 0.999**step))
        adam.step([weight], [gradient], rate)
        np.testing.assert_allclose(weight, expected, rtol=1e-13)


def test_adam_updates_in_place_where_the_weights_are():
    host, device = np.array([1.0, -2.0]), DeviceArray(np.array([1.0, -2.0]))
    for weight, gradient in ((host, np.ones(2)), (device, DeviceArray(np.ones(2)))):
        adam = classifier.Adam()
        adam.step([weight], [gradient], 0.1)
        adam.step([weight], [gradient], 0.1)
    np.testing.assert_array_equal(device.host, host)
    np.testing.assert_allclose(host, [0.8, -2.2], rtol=1e-6)


def test_tilted_windows_are_the_same_motion_seen_from_another_angle(dataset):
    x = dataset.train.x[:40]
    turned = classifier.tilted(x, np.random.default_rng(1))
    before, after = (each.reshape(40, -1, 3).astype(np.float64) for each in (x, turned))
    assert turned.dtype == np.float32 and turned.shape == x.shape
    # Rotations keep all inner products, those of acceleration with rotation among them.
    np.testing.assert_allclose(after @ after.swapaxes(1, 2), before @ before.swapaxes(1, 2), atol=1e-3)
    matrices = np.linalg.lstsq(before.reshape(-1, 3), after.reshape(-1, 3), rcond=None)[0]
    assert not np.allclose(matrices, np.eye(3), atol=1e-4)
    cosines = np.sum(before * after, axis=-1) / (before**2).sum(axis=-1)
    angles = np.degrees(np.arccos(np.clip(cosines.min(axis=1), -1, 1)))
    assert 3 < np.median(angles) < 20 and angles.max() < 40 and len(np.unique(angles)) == 40


def test_mixed_windows_keep_the_proportions_of_their_targets():
    x = np.arange(60, dtype=np.float32).reshape(60, 1, 1) * np.ones((1, 4, 2), np.float32)
    targets = np.eye(60, dtype=np.float32)
    blend, shares = classifier.mixed(x, targets, np.random.default_rng(2))
    assert blend.dtype == shares.dtype == np.float32 and blend.shape == x.shape
    np.testing.assert_allclose(shares.sum(axis=1), np.ones(60), rtol=1e-6)
    assert ((shares > 0).sum(axis=1) <= 2).all() and (np.diag(shares) >= 0.5).all()
    assert len(np.unique(np.diag(shares).round(3))) > 30  # every window is blended differently
    np.testing.assert_allclose(blend, np.tensordot(shares, x, 1), rtol=1e-5, atol=1e-5)


def test_the_network(dataset):
    model = classifier.build(dataset.train.x, 7)
    assert model.output_shape == (None, 128, 7) and model.count_params() == 17177
    standard = model.get_layer("standardize")(dataset.train.x)
    np.testing.assert_allclose(standard.mean(axis=(0, 1), dtype=np.float64), np.zeros(9), atol=1e-4)
    np.testing.assert_allclose(standard.std(axis=(0, 1), dtype=np.float64), np.ones(9), atol=1e-4)
    assert sum(weight.size for weight in model.non_trainable_weights) == 18


def test_the_network_never_looks_ahead(dataset):
    model = classifier.build(dataset.train.x, 7)
    x = dataset.test.x[:2]
    late = x.copy()
    late[:, 70:] += 1
    before, after = model(x), model(late)
    np.testing.assert_array_equal(before[:, :70], after[:, :70])
    assert (before[:, 70:] != after[:, 70:]).any()


def part_of(windows, every):
    return data.Windows(*(array[::every] for array in windows))


def test_the_same_seed_gives_the_same_network(dataset):
    some, starts = part_of(dataset.train, 5), []

    def started(model):
        starts.append(model.get_weights())

    ends = [classifier.train(some, 7, 1, seed, started=started)[0].get_weights() for seed in (4, 4, 5)]
    for first, again, other in (*zip(*starts), *zip(*ends)):
        np.testing.assert_array_equal(first, again)
        assert first.shape in ((1, 9, 1), (9,)) or not first.any() or (first != other).any()
    assert all(weight.any() for weight in ends[0])


def test_training_reports_its_progress_and_lowers_the_loss(dataset):
    some, reports, shown = part_of(dataset.train, 5), [], []
    _, fit = classifier.train(some, 7, 4, 0, started=shown.append, progress=lambda *report: reports.append(report))
    assert [steps for steps, _ in reports] == [4, 8, 12, 16] and fit.steps == 16
    losses = [loss for _, loss in reports]
    assert losses[0] < 2.5 and losses[-1] < losses[0] - 0.1 and fit.loss == losses[-1]
    assert 0 < fit.seconds_per_step * 16 < 2 * fit.seconds and len(shown) == 1


def test_a_diverged_training_is_an_error(dataset):
    some = part_of(dataset.train, 5)
    some.x[:] = np.nan
    with pytest.raises(FloatingPointError, match="diverged: its loss became nan after 4 steps"):
        classifier.train(some, 7, 1, 0)


def test_nearest_centroid():
    generator = np.random.default_rng(0)
    still, shaking = generator.normal(scale=0.1, size=(2, 20, 50, 3)), generator.normal(scale=2, size=(2, 20, 50, 3))
    x, y = np.concatenate([still[0], shaking[0]]), np.repeat([0, 1], 20)
    train = data.Windows(x, y, np.zeros(40))
    assert classifier.nearest_centroid(train, still[1]).tolist() == [0] * 20
    assert classifier.nearest_centroid(train, shaking[1]).tolist() == [1] * 20


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished `cuconv demo --quick --save kept` in a folder of its own."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cuconv", "demo", "--quick", "--save", "kept"]
    return folder, subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_demo_learns_and_shows_it(quick, dataset):
    _, done = quick
    assert (done.returncode, done.stderr) == (0, "")
    for piece in (
        "(None, 119, 100)",
        "9,100",
        "(None, 128, 7)",
        "17,177",
        "315/315 steps",
        "ms per step of 32 windows",
    ):
        assert piece in done.stdout
    assert "computed on CPU" in done.stdout or "computed on GPU" in done.stdout
    rows = [line.split("│") for line in done.stdout.splitlines() if line.count("%") == 2]
    assert [row[1].strip() for row in rows] == [*dataset.exercises, "all"]
    shares = np.array([[float(cell.strip(" %")) for cell in row[3:5]] for row in rows])
    np.testing.assert_allclose(shares[:-1].mean(axis=0), shares[-1], atol=0.06)  # as many windows of each
    assert shares[-1, 0] > shares[-1, 1] > 70


@pytest.mark.slow
def test_run_gives_the_scores_of_the_demo(quick, dataset, monkeypatch, capsys):
    folder, done = quick
    monkeypatch.chdir(folder)
    command = done.stdout.splitlines()[-1].split("cuconv ")[-1].split()
    assert cli.main(command) == 0
    capsys.readouterr()
    predicted = np.load("kept/scores.npy", allow_pickle=False).mean(axis=1).argmax(axis=1)
    share = f"{classifier.accuracy(predicted, dataset.test.y):.1%}"
    assert any(line.startswith("│ all ") and share in line for line in done.stdout.splitlines())


@pytest.fixture
def one_epoch(monkeypatch):
    monkeypatch.setattr(show, "QUICK_EPOCHS", 1)


def test_demo_as_json(one_epoch, capsys, monkeypatch, dataset):
    monkeypatch.setattr(classifier, "nearest_centroid", lambda train, x: np.full(len(x), -1))
    assert cli.main(["demo", "--quick", "--json", "--seed", "3"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["seed"], report["quick"], report["epochs"], report["steps"]) == (3, True, 1, 21)
    assert report["accuracy"] > report["baseline_accuracy"] == 0
    assert [row["name"] for row in report["exercises"]] == list(dataset.exercises)
    assert np.mean([row["accuracy"] for row in report["exercises"]]) == pytest.approx(report["accuracy"])
    assert report["milliseconds_per_step"] > 0 and report["device"]


def test_demo_fails_where_it_does_not_beat_the_baseline(one_epoch, capsys, monkeypatch, dataset):
    monkeypatch.setattr(classifier, "nearest_centroid", lambda train, x: dataset.test.y)
    assert cli.main(["demo", "--quick", "--json"]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["baseline_accuracy"] == 1 and "no better" in shown.err


def test_demo_says_that_it_diverged(one_epoch, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "cross_entropy", lambda scores, targets: (np.nan, np.zeros_like(scores)))
    assert cli.main(["demo", "--quick", "--json"]) == 1
    assert "diverged" in json.loads(capsys.readouterr().out)["error"]


def test_demo_refuses_a_folder_it_cannot_make_before_it_trains(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(classifier, "train", None)
    assert cli.main(["demo", "--save", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err
