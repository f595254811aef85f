"""The recordings that ship with the demo, as windows. README.md beside this file says where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

FILE = Path(__file__).with_name("shoulder.npz")

WINDOW = 128  # steps, 5.1 s at 25 Hz
HOP = 32
SMOOTHING = 25  # steps averaged, 1 s: what is left of the acceleration is how the wrist hangs
WINDOWS_EACH = 7
STEPS = SMOOTHING - 1 + WINDOW + (WINDOWS_EACH - 1) * HOP  # of a recording

HELD_OUT = (8, 9, 10)  # subjects the network never sees in training


class Windows(NamedTuple):
    """Windows `x` [windows, 128, 9] in g and rad/s, with the index `y` [windows] of the exercise and the `subject`."""

    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray


class Dataset(NamedTuple):
    """The windows of the subjects to learn from, those of the held-out ones, and the names of the exercises."""

    train: Windows
    test: Windows
    exercises: tuple[str, ...]


def load() -> Dataset:
    """The dataset, split by subject: nobody is in both parts."""
    with np.load(FILE, allow_pickle=False) as file:
        signal = file["signal"].transpose(1, 2, 0) * file["scale"]  # [recordings, steps, channels]
        subject, exercise = file["subject"], file["exercise"].astype(np.intp)
        exercises = tuple(file["exercises"].tolist())
    x = np.concatenate([_windows(recording) for recording in signal])
    every = Windows(x, exercise.repeat(WINDOWS_EACH), subject.repeat(WINDOWS_EACH))
    held_out = np.isin(every.subject, HELD_OUT)
    train, test = (Windows(*(array[part] for array in every)) for part in (~held_out, held_out))
    return Dataset(train, test, exercises)


def _windows(recording: np.ndarray) -> np.ndarray:
    """Overlapping windows [7, 128, 9] of a recording [344, 6], the last 3 channels its smoothed acceleration."""
    smooth = np.lib.stride_tricks.sliding_window_view(recording[:, :3], SMOOTHING, axis=0).mean(axis=-1)
    channels = np.concatenate([recording[SMOOTHING - 1 :], smooth], axis=1)  # no step knows a later one
    windows = np.lib.stride_tricks.sliding_window_view(channels, WINDOW, axis=0)[::HOP]
    return windows.transpose(0, 2, 1).astype(np.float32)
