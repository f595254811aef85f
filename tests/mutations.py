"""Files with damage, made from a seed, and a process that loads them with little memory.

    python mutations.py FOLDER

writes a sound file of each format into FOLDER, and then for each line of standard input, "suffix seed", loads that
file with the damage of that seed and prints one JSON line: what came of it, in what time and memory.
"""

import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np

from cuconv import layers, models

SUFFIXES = ("h5", "weights.h5", "keras", "safetensors")


def small_model():
    x = models.Input((12, 4), name="x")
    shared = layers.Conv1D(4, 3, padding="same", activation="tanh", name="shared")
    inner = models.Sequential([models.Input((12, 4), name="z"), layers.SeparableConv1D(3, 2, name="s")], name="inner")
    model = models.Model(x, layers.Conv1D(2, 1, name="head", trainable=False)(inner(shared(x))), name="m")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(-1, 1, w.shape) for w in model.weights])
    return model


def write_sound(folder):
    model = small_model()
    for suffix in SUFFIXES:
        (model.save if suffix in ("h5", "keras") else model.save_weights)(folder / f"sound.{suffix}")


def damaged(data, seed):
    """`data` with one to four bytes changed, or cut off, or with a piece taken out or doubled."""
    draw = random.Random(seed)
    data = bytearray(data)
    kind = draw.choice(("bit", "bit", "byte", "bytes", "cut", "piece"))
    place = draw.randrange(len(data))
    if kind == "bit":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[place:]
    elif kind == "piece":
        end = min(len(data), place + draw.randrange(1, 64))
        data[place:end] = draw.choice((b"", bytes(data[place:end]) * 2))
    else:
        for _ in range(1 if kind == "byte" else 4):
            data[draw.randrange(len(data))] = draw.choice((0, 1, 127, 128, 255, draw.randrange(256)))
    return bytes(data)


def load(path):
    """The model in a file, or one with the weights in a file."""
    if path.suffix == ".keras" or (path.name.count(".") == 1 and path.suffix == ".h5"):
        return models.load_model(path)
    model = small_model()
    models.load_weights(model, path)
    return model


def outcome(path):
    try:
        model = load(path)
    except Exception as error:
        clear = type(error) is ValueError and f"Received: path={str(path)!r}" in str(error)
        return {"error": str(error) if clear else f"UNCLEAR {error!r}"}
    return {
        "weights": {name: weight.value.tobytes().hex() for name, weight in model._named_weights().items()},
        "config": json.loads(json.dumps(model.get_config())),
    }


def main():
    folder = Path(sys.argv[1])
    write_sound(folder)
    for suffix in SUFFIXES:
        outcome(folder / f"sound.{suffix}")  # modules are loaded, which is no file's doing
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 200 * 2**20,) * 2)  # an allocation above it is a MemoryError
    print("ready", flush=True)
    for line in sys.stdin:
        suffix, seed = line.split()
        path = folder / f"damaged.{suffix}"
        path.write_bytes(damaged((folder / f"sound.{suffix}").read_bytes(), f"{suffix} {seed}"))
        start = time.process_time()
        found = outcome(path)
        print(json.dumps({**found, "seconds": time.process_time() - start}), flush=True)


if __name__ == "__main__":
    main()
