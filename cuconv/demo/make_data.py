"""Makes shoulder.npz from the `watch_dataset` of the seglearn package: ``pip install seglearn==1.2.5``, then
``python -m cuconv.demo.make_data``.

From each of the 140 recordings (10 people, 7 exercises, both arms) it keeps 14 seconds from the middle, at half the
original rate, in 8 bits. Nothing is drawn at random, so the arrays come out the same every time.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
from pathlib import Path
from typing import Any

import numpy as np

from cuconv.demo.data import FILE, STEPS

SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
DECIMATION = 2  # neighbours averaged, 50 Hz to 25 Hz: 128 steps then hold one or two repetitions of an exercise
LEVELS = 127  # the largest value of a channel becomes the largest of int8

EXERCISES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius row",
    "ROW": "bent-over row",
}


def find_source() -> Path | None:
    """The data file of an installed seglearn, or None. Its code is not imported."""
    found = importlib.util.find_spec("seglearn")
    folders = found.submodule_search_locations if found else None
    return Path(folders[0]) / "data" / "watch_dataset.npy" if folders else None


def read_source(path: Path) -> dict[str, Any]:
    """The dataset as seglearn has it. The file is a pickle: it is not opened before its hash has been checked."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} is not the dataset of seglearn 1.2.5. Received: sha256={digest}")
    source: dict[str, Any] = np.load(io.BytesIO(content), allow_pickle=True).item()
    return source


def excerpt(recording: np.ndarray) -> np.ndarray:
    """The middle `STEPS` steps of a recording [steps, channels] at half its rate."""
    whole = len(recording) // DECIMATION * DECIMATION
    slow = recording[:whole].reshape(-1, DECIMATION, recording.shape[1]).mean(axis=1)
    start = (len(slow) - STEPS) // 2
    return slow[start : start + STEPS]


def make(source: dict[str, Any]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The arrays of the file, and the excerpts before quantisation [channels, recordings, steps]."""
    order = np.lexsort((source["side"], source["y"], source["subject"]))
    exact = np.stack([excerpt(source["X"][index]) for index in order]).transpose(2, 0, 1)
    scale = (np.abs(exact).max(axis=(1, 2)) / LEVELS).astype(np.float32)
    arrays = {
        "signal": np.rint(exact / scale[:, None, None]).astype(np.int8),
        "scale": scale,
        "subject": source["subject"][order].astype(np.uint8),
        "exercise": source["y"][order].astype(np.uint8),
        "exercises": np.array([EXERCISES[label] for label in source["y_labels"]]),
        "channels": np.array(source["X_labels"]),
    }
    return arrays, exact


def main() -> None:
    """Writes the file and prints what it holds."""
    path = find_source()
    if path is None:
        raise SystemExit("the data comes from the seglearn package: pip install seglearn==1.2.5")
    arrays, exact = make(read_source(path))
    np.savez_compressed(FILE, allow_pickle=False, **arrays)
    error = arrays["signal"] * arrays["scale"][:, None, None] - exact
    rms, spread = np.sqrt(np.mean(error**2, axis=(1, 2))), exact.std(axis=(1, 2))
    print(f"{FILE.name}: {FILE.stat().st_size / 1000:.1f} kB, {arrays['signal'].shape} int8")
    for channel, level, wrong, share in zip(arrays["channels"], arrays["scale"], rms, rms / spread, strict=True):
        print(f"  {channel}: one level {level:.4f}, rms error {wrong:.4f}, {share:.1%} of the spread")


if __name__ == "__main__":
    main()
