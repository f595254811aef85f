"""What `cuconv demo` shows and reports."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import rich.progress
import rich.table
from rich.console import Console

from cuconv import doctor, layers, models
from cuconv.demo import classifier, data

EPOCHS = 50
QUICK_EPOCHS = 15


def demonstrate(console: Console, quick: bool = False, seed: int = 0, save: Path | None = None) -> dict[str, Any]:
    """Trains the classifier, prints what happens to `console` and returns the figures, fit for JSON.

    Args:
        save: a folder for the trained model and the held-out windows, so that `cuconv run` has something to run.

    Raises:
        FloatingPointError: the training diverged.
        OSError: the model or the windows cannot be written.
    """
    dataset = data.load()
    train, test = dataset.train, dataset.test
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
    _introduce(console)
    console.print(
        f"\n[bold]Which shoulder exercise is this?[/] Windows of {data.WINDOW} steps (5.1 s) from the sensors of a "
        f"smartwatch: acceleration, rotation and smoothed acceleration, 3 axes each. {len(train.y)} windows of "
        f"{len(np.unique(train.subject))} people to learn from, {len(test.y)} of {len(np.unique(test.subject))} others "
        "to be tested on.\n"
    )
    epochs = QUICK_EPOCHS if quick else EPOCHS
    with _progress(console) as progress:
        task = progress.add_task("training", total=epochs * (len(train.y) // classifier.BATCH), loss="...")
        model, fit = classifier.train(
            train,
            len(dataset.exercises),
            epochs,
            seed,
            started=lambda model: _summarize(console, model),
            progress=lambda steps, loss: progress.update(task, completed=steps, loss=f"{loss:.3f}"),
        )
    predicted, baseline = classifier.classify(model, test.x), classifier.nearest_centroid(train, test.x)
    report = {
        "task": "shoulder exercises from smartwatch sensors, held-out subjects",
        "seed": seed,
        "quick": quick,
        "parameters": model.count_params(),
        "train_windows": len(train.y),
        "test_windows": len(test.y),
        "held_out_subjects": list(data.HELD_OUT),
        "epochs": epochs,
        "steps": fit.steps,
        "batch_size": classifier.BATCH,
        "loss": fit.loss,
        "train_accuracy": classifier.accuracy(classifier.classify(model, train.x), train.y),
        "accuracy": classifier.accuracy(predicted, test.y),
        "baseline": "nearest centroid of each channel's mean and spread",
        "baseline_accuracy": classifier.accuracy(baseline, test.y),
        "exercises": [
            {
                "name": name,
                "windows": int(np.sum(test.y == label)),
                "accuracy": classifier.accuracy(predicted[test.y == label], label),
                "baseline_accuracy": classifier.accuracy(baseline[test.y == label], label),
            }
            for label, name in enumerate(dataset.exercises)
        ],
        "training_seconds": fit.seconds,
        "milliseconds_per_step": 1000 * fit.seconds_per_step,
        "device": doctor.device_of(fit.sample),
    }
    _tabulate(console, report)
    if save is not None:
        _save(console, save, model, test.x)
    return report


def _introduce(console: Console) -> None:
    console.print('[bold]One layer[/], Conv1D(100, 10, activation="relu")(Input((128, 9))):')
    inputs = models.Input((128, 9))
    _summarize(console, models.Model(inputs, layers.Conv1D(100, 10, activation="relu")(inputs), name="intro"))


def _summarize(console: Console, model: models.Model) -> None:
    model.summary(print_fn=lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True))


def _progress(console: Console) -> rich.progress.Progress:
    return rich.progress.Progress(
        "{task.description}",
        rich.progress.BarColumn(),
        "{task.completed}/{task.total} steps, loss {task.fields[loss]}",
        rich.progress.TimeElapsedColumn(),
        console=console,
        disable=console.quiet,
    )


def _tabulate(console: Console, report: dict[str, Any]) -> None:
    table = rich.table.Table(title="Accuracy on people it never saw", show_footer=True)
    table.add_column("exercise", footer="all")
    table.add_column("windows", f"{report['test_windows']}", justify="right")
    table.add_column("Conv1D network", f"{report['accuracy']:.1%}", justify="right")
    table.add_column("nearest centroid", f"{report['baseline_accuracy']:.1%}", justify="right")
    for row in report["exercises"]:
        shares = (row["accuracy"], row["baseline_accuracy"])
        table.add_row(row["name"], str(row["windows"]), *(f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(
        f"{report['milliseconds_per_step']:.1f} ms per step of {report['batch_size']} windows, forward and backward; "
        f"{report['steps']} steps in {report['training_seconds']:.1f} s, computed on {report['device']}.",
        highlight=False,
    )


def _save(console: Console, folder: Path, model: models.Model, windows: np.ndarray) -> None:
    model.save(folder / "model.npz")
    np.save(folder / "windows.npy", windows, allow_pickle=False)
    model_file, windows_file, scores_file = (
        shlex.quote(str(folder / name)) for name in ("model.npz", "windows.npy", "scores.npy")
    )
    command = f"cuconv run {model_file} {windows_file} -o {scores_file}"
    console.print(f"Apply it to the held-out windows: {command}", soft_wrap=True, markup=False, highlight=False)
