"""Writes keras.keras, keras.h5 and keras.weights.h5, one model in the files of a live Keras, and files.npz: an input of
it, its weights and its output.

    KERAS_BACKEND=torch python tests/golden/make_files.py
"""

from pathlib import Path

import keras
import numpy as np

HERE = Path(__file__).parent


def small_model():
    x, z = keras.Input((2, 6, 2), name="x"), keras.Input((5, 2), name="z")
    y = keras.layers.ConvLSTM1D(2, 3, padding="same", dropout=0.1)(x)
    shared = keras.layers.DepthwiseConv1D(2, activation="tanh", name="shared")
    part = keras.Sequential([keras.Input((5, 2)), keras.layers.Conv1D(2, 3, padding="causal")], name="part")
    y, other = part(shared(y)), part(z)
    y = keras.layers.Activation("relu")(keras.layers.ZeroPadding1D(1)(shared(y)))
    return keras.Model([x, z], [y, other])


def main():
    model = small_model()
    rng = np.random.default_rng(20261128)
    model.set_weights([rng.uniform(-1, 1, w.shape) for w in model.get_weights()])
    inputs = [rng.standard_normal((2, 2, 6, 2)).astype("f"), rng.standard_normal((2, 5, 2)).astype("f")]
    outputs = [keras.ops.convert_to_numpy(y) for y in model(inputs)]
    for name in ("keras.keras", "keras.h5"):
        model.save(HERE / name)
    model.save_weights(HERE / "keras.weights.h5")
    names = [f"{kind}{i}" for kind, of in (("x", inputs), ("y", outputs), ("w", model.weights)) for i in range(len(of))]
    np.savez_compressed(HERE / "files.npz", **dict(zip(names, [*inputs, *outputs, *model.get_weights()])))
    print(f"Keras {keras.__version__}: {len(model.weights)} weights")


if __name__ == "__main__":
    main()
