"""A small classifier of sensor windows: the network, its training through `backward`, and the baseline to beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cuconv import layers, models, ops, seeding
from cuconv.demo.data import Windows

Array = Any  # a NumPy or a CuPy array

FILTERS = 32
TAPS = 5
DILATIONS = (1, 2, 4, 8)  # the last layer sees 1 + 4 * (1 + 2 + 4 + 8) = 61 steps, 2.4 s: one repetition
BATCH = 32
RATE = 3e-3  # of Adam at the start; falls to zero along a cosine
TILT = np.deg2rad(6)  # per axis: how differently a watch sits from wrist to wrist
MIXING = 0.4  # parameter of the beta distribution of mixup: most windows stay nearly pure


def build(x: np.ndarray, classes: int) -> models.Model:
    """The network for windows like `x` [windows, steps, channels], in the units of the sensors: scores at every step.

    Its first layer, which is not trained, brings every channel of `x` to mean 0 and spread 1.
    """
    mean, spread = x.mean(axis=(0, 1)), x.std(axis=(0, 1))
    scaling = [(1 / spread)[None, :, None], -mean / spread]
    inputs = models.Input(x.shape[1:], name="sensors")
    y = layers.DepthwiseConv1D(1, weights=scaling, trainable=False, name="standardize")(inputs)
    for dilation in DILATIONS:
        name = f"dilation_{dilation}"
        y = layers.Conv1D(FILTERS, TAPS, padding="causal", dilation_rate=dilation, activation="relu", name=name)(y)
    return models.Model(inputs, layers.Conv1D(classes, 1, name="scores")(y), name="exercises")


class Adam:
    """Adam (Kingma and Ba, 2015) for arrays updated in place, wherever they live."""

    def __init__(self, decay: float = 0.9, square_decay: float = 0.999, epsilon: float = 1e-7) -> None:
        self.decay, self.square_decay, self.epsilon = decay, square_decay, epsilon
        self.moments: list[tuple[Array, Array]] = []
        self.steps = 0

    def step(self, weights: Sequence[Array], gradients: Sequence[Array], rate: float) -> None:
        """Moves `weights` against `gradients`."""
        if not self.moments:
            self.moments = [(np.zeros_like(weight), np.zeros_like(weight)) for weight in weights]
        self.steps += 1
        rate *= np.sqrt(1 - self.square_decay**self.steps) / (1 - self.decay**self.steps)
        for weight, gradient, (mean, square) in zip(weights, gradients, self.moments, strict=True):
            mean += (1 - self.decay) * (gradient - mean)
            square += (1 - self.square_decay) * (gradient * gradient - square)
            weight -= rate * mean / (np.sqrt(square) + self.epsilon)


def cross_entropy(scores: Array, targets: Array) -> tuple[Array, Array]:
    """The mean loss [] of the softmax of the scores' mean over time, and its gradient [batch, steps, classes].

    Args:
        scores: [batch, steps, classes].
        targets: probabilities [batch, classes].
    """
    batch, steps, _ = scores.shape
    logits = np.sum(scores, axis=1) / steps
    logits = logits - np.max(logits, axis=-1, keepdims=True)
    log_softmax = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
    loss = np.sum(-targets * log_softmax) / batch
    gradient = (np.exp(log_softmax) - targets) / (batch * steps)
    return loss, np.zeros_like(scores) + gradient[:, None, :]


def tilted(x: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The windows [windows, steps, 9], each turned as if the watch sat a little differently.

    All nine channels are vectors of three: acceleration, rotation, smoothed acceleration.
    """
    halves = np.cross(np.eye(3), generator.normal(scale=TILT / 2, size=(len(x), 1, 3)))
    rotations = np.linalg.solve(np.eye(3) - halves, np.eye(3) + halves).astype(x.dtype)  # Cayley: exactly orthogonal
    return (x.reshape(len(x), -1, 3) @ rotations).reshape(x.shape)


def mixed(x: np.ndarray, targets: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Each window blended with less of another one, and their targets alike (mixup, Zhang et al., 2018)."""
    drawn = generator.beta(MIXING, MIXING, size=(len(x), 1)).astype(x.dtype)
    own, others = np.maximum(drawn, 1 - drawn), generator.permutation(len(x))
    blend = own[:, None] * x + (1 - own[:, None]) * x[others]
    return blend, own * targets + (1 - own) * targets[others]


class Fit(NamedTuple):
    """How the training went: the loss of the last epoch, its steps and time, and one output, where it was computed."""

    loss: float
    steps: int
    seconds: float
    seconds_per_step: float
    sample: Array


def fit(
    model: models.Model,
    windows: Windows,
    classes: int,
    epochs: int,
    seed: int,
    progress: Callable[[int, float], None],
) -> Fit:
    """Trains the model in place; `progress` is told the steps done and the loss after each epoch.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    generator = np.random.default_rng(seed)
    adam = Adam()
    certain = np.eye(classes, dtype=np.float32)
    batches = len(windows.y) // BATCH
    total = epochs * batches
    times: list[float] = []
    loss = float("nan")
    scores: Array = None
    for _ in range(epochs):
        start = time.perf_counter()
        losses: Array = 0
        for chosen in generator.permutation(len(windows.y))[: batches * BATCH].reshape(batches, BATCH):
            rate = RATE * (1 + np.cos(np.pi * adam.steps / total)) / 2
            x, targets = mixed(tilted(windows.x[chosen], generator), certain[windows.y[chosen]], generator)
            scores = model.forward(ops.asarray(x))
            batch_loss, gradient = cross_entropy(scores, ops.asarray(targets))
            model.backward(gradient)
            adam.step(model.trainable_weights, model.trainable_gradients, rate)
            losses = losses + batch_loss
        loss = float(losses) / batches  # the only wait for a GPU
        times.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            raise FloatingPointError(f"the training diverged: its loss became {loss} after {adam.steps} steps")
        progress(adam.steps, loss)
    warm = times[1:] or times  # the first epoch also pays for buffers, and on a GPU for compiling
    return Fit(loss, adam.steps, sum(times), sum(warm) / (len(warm) * batches), scores)


def classify(model: models.Model, x: np.ndarray) -> np.ndarray:
    """The class [windows] with the largest mean score over time."""
    predicted: np.ndarray = model.predict(x, verbose=False).mean(axis=1).argmax(axis=-1)
    return predicted


def nearest_centroid(train: Windows, x: np.ndarray) -> np.ndarray:
    """The class [windows] whose mean is closest, by the mean and the spread of each channel over a window."""

    def features(windows: np.ndarray) -> np.ndarray:
        return np.concatenate([windows.mean(axis=1), windows.std(axis=1)], axis=1)

    known = features(train.x)
    scale = known.std(axis=0)
    centroids = np.stack([known[train.y == label].mean(axis=0) for label in np.unique(train.y)])
    distances = np.square((features(x)[:, None] - centroids) / scale).sum(axis=-1)
    nearest: np.ndarray = distances.argmin(axis=1)
    return nearest


def accuracy(predicted: np.ndarray, truth: np.ndarray | int) -> float:
    """The share of windows in the right class."""
    return float(np.mean(predicted == truth))


def train(
    windows: Windows,
    classes: int,
    epochs: int,
    seed: int,
    started: Callable[[models.Model], None] = lambda model: None,
    progress: Callable[[int, float], None] = lambda steps, loss: None,
) -> tuple[models.Model, Fit]:
    """A network trained on the windows. The same seed gives the same network on the same machine.

    Args:
        started: called once with the untrained network.
        progress: told the steps done and the loss after each epoch.

    Raises:
        FloatingPointError: the training diverged.
    """
    seeding.set_random_seed(seed)
    model = build(windows.x, classes)
    started(model)
    return model, fit(model, windows, classes, epochs, seed, progress)
