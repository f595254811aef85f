"""Writes Keras' own answers to directed corner cases of all 22 layers: <backend>.json (the questions) and .npz.

    KERAS_BACKEND=torch python tests/golden/make_golden.py     # keras 3.15.1, torch 2.13.0 (CPU)
    KERAS_BACKEND=jax   python tests/golden/make_golden.py     # the two interpolations that torch lacks

The .npz holds one float32 vector, "values". A case takes from it, in this order: the input of every call, the weights,
the outputs of every call, then, where it has gradients, dy of every output, dx, and the gradient of every weight. Their
shapes are in the .json. Inputs and weights are eighths between -1 and 1, so that sums of products are exact in float32.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import keras
import numpy as np

HERE = Path(__file__).parent


def case(name, layer, input_shape, *, calls=1, gradients=True, **config):
    return {
        "id": f"{layer}-{name}",
        "layer": layer,
        "config": config,
        "input_shape": input_shape,
        "calls": calls,
        "gradients": gradients,
    }


def convolutions():
    yield case("k4-same", "Conv1D", (2, 7, 3), filters=2, kernel_size=4, padding="same")
    yield case("k3-same-s2-even", "Conv1D", (2, 8, 2), filters=2, kernel_size=3, strides=2, padding="same")
    yield case("k3-same-s2-odd", "Conv1D", (2, 9, 2), filters=2, kernel_size=3, strides=2, padding="same")
    yield case("k4-same-s3", "Conv1D", (1, 8, 2), filters=3, kernel_size=4, strides=3, padding="same")
    yield case("k1-same-s3-skips", "Conv1D", (1, 8, 2), filters=2, kernel_size=1, strides=3, padding="same")
    yield case("k2-same-d3", "Conv1D", (1, 8, 2), filters=2, kernel_size=2, dilation_rate=3, padding="same")
    yield case("valid-tail-dropped", "Conv1D", (1, 8, 2), filters=2, kernel_size=3, strides=4)
    yield case("valid-exact-fit", "Conv1D", (2, 5, 2), filters=3, kernel_size=5)
    yield case("valid-exact-fit-dilated", "Conv1D", (2, 7, 2), filters=3, kernel_size=3, dilation_rate=3)
    yield case("causal", "Conv1D", (2, 6, 2), filters=3, kernel_size=3, padding="causal")
    yield case("causal-d3", "Conv1D", (2, 9, 2), filters=3, kernel_size=3, padding="causal", dilation_rate=3)
    yield case("causal-s2", "Conv1D", (2, 7, 2), filters=3, kernel_size=4, padding="causal", strides=2)
    yield case(
        "causal-first", "Conv1D", (2, 2, 6), filters=3, kernel_size=3, padding="causal", data_format="channels_first"
    )
    yield case("kernel-longer-same", "Conv1D", (1, 3, 2), filters=2, kernel_size=7, padding="same")
    yield case("kernel-longer-same-s2", "Conv1D", (1, 3, 2), filters=2, kernel_size=6, padding="same", strides=2)
    yield case("kernel-longer-causal", "Conv1D", (1, 3, 2), filters=2, kernel_size=7, padding="causal", strides=2)
    yield case("groups2", "Conv1D", (2, 6, 4), filters=6, kernel_size=3, groups=2, activation="relu")
    yield case(
        "groups-first-same",
        "Conv1D",
        (2, 6, 5),
        filters=3,
        kernel_size=2,
        groups=3,
        padding="same",
        data_format="channels_first",
        strides=2,
    )
    yield case("batch0", "Conv1D", (0, 6, 2), filters=3, kernel_size=3)
    yield case("size1", "Conv1D", (1, 1, 1), filters=1, kernel_size=1)
    yield case("no-bias", "Conv1D", (1, 5, 2), filters=2, kernel_size=2, use_bias=False)
    yield case("softmax-last", "Conv1D", (1, 5, 2), filters=3, kernel_size=2, activation="softmax")
    yield case(
        "softmax-first",
        "Conv1D",
        (1, 2, 5),
        filters=3,
        kernel_size=2,
        activation="softmax",
        data_format="channels_first",
    )
    yield case("readme", "Conv1D", (1, 12, 9), filters=4, kernel_size=10, activation="relu")

    yield case("same-s21-k23", "Conv2D", (2, 5, 6, 2), filters=3, kernel_size=(2, 3), strides=(2, 1), padding="same")
    yield case("same-s3", "Conv2D", (1, 7, 8, 2), filters=2, kernel_size=(4, 2), strides=3, padding="same")
    yield case("valid-d12", "Conv2D", (1, 5, 7, 2), filters=2, kernel_size=(2, 3), dilation_rate=(1, 2))
    yield case("same-d23", "Conv2D", (1, 5, 7, 2), filters=2, kernel_size=(3, 2), dilation_rate=(2, 3), padding="same")
    yield case(
        "first-groups2", "Conv2D", (2, 4, 5, 4), filters=2, kernel_size=(3, 1), groups=2, data_format="channels_first"
    )
    yield case("groups-each-channel", "Conv2D", (1, 4, 5, 3), filters=6, kernel_size=2, groups=3)
    yield case(
        "kernel-longer-same", "Conv2D", (1, 2, 3, 2), filters=2, kernel_size=(5, 4), padding="same", activation="tanh"
    )
    yield case("batch0-first", "Conv2D", (0, 2, 4, 4), filters=2, kernel_size=3, data_format="channels_first")
    yield case("1xn", "Conv2D", (1, 1, 6, 2), filters=2, kernel_size=(1, 3), activation="elu")

    yield case(
        "same-s123", "Conv3D", (1, 4, 5, 6, 2), filters=2, kernel_size=(2, 3, 2), strides=(1, 2, 3), padding="same"
    )
    yield case(
        "first-valid-d2",
        "Conv3D",
        (1, 2, 4, 5, 3),
        filters=2,
        kernel_size=2,
        dilation_rate=2,
        data_format="channels_first",
    )
    yield case("groups2-relu", "Conv3D", (2, 3, 2, 3, 4), filters=2, kernel_size=2, groups=2, activation="relu")
    yield case("batch0", "Conv3D", (0, 3, 3, 3, 2), filters=2, kernel_size=2)


def transposed_convolutions():
    for padding in ("valid", "same"):
        for k in (1, 2, 3, 4):
            for s in (1, 2, 3):
                for extra in (None, *range(s)):
                    yield case(
                        f"{padding}-k{k}-s{s}-op{extra}",
                        "Conv1DTranspose",
                        (1, 4, 2),
                        filters=1,
                        kernel_size=k,
                        strides=s,
                        padding=padding,
                        output_padding=extra,
                    )
        for k in (2, 3):
            yield case(
                f"{padding}-k{k}-d2",
                "Conv1DTranspose",
                (2, 4, 2),
                filters=2,
                kernel_size=k,
                padding=padding,
                dilation_rate=2,
            )
            yield case(
                f"{padding}-k{k}-d3-op0",
                "Conv1DTranspose",
                (2, 4, 2),
                filters=2,
                kernel_size=k,
                padding=padding,
                dilation_rate=3,
                output_padding=0,
            )
    yield case(
        "first-relu",
        "Conv1DTranspose",
        (2, 3, 4),
        filters=2,
        kernel_size=3,
        strides=2,
        activation="relu",
        data_format="channels_first",
    )
    yield case(
        "gaps-hold-bias", "Conv1DTranspose", (1, 3, 2), filters=2, kernel_size=1, strides=3, activation="sigmoid"
    )
    yield case("batch0", "Conv1DTranspose", (0, 3, 2), filters=2, kernel_size=3, strides=2)
    yield case("size1-same", "Conv1DTranspose", (1, 1, 2), filters=2, kernel_size=5, strides=2, padding="same")

    yield case(
        "same-s23-k34", "Conv2DTranspose", (1, 3, 2, 2), filters=2, kernel_size=(3, 4), strides=(2, 3), padding="same"
    )
    yield case(
        "valid-op01",
        "Conv2DTranspose",
        (1, 3, 2, 2),
        filters=2,
        kernel_size=(2, 3),
        strides=(1, 2),
        output_padding=(0, 1),
    )
    yield case(
        "same-op10-first",
        "Conv2DTranspose",
        (2, 2, 3, 2),
        filters=3,
        kernel_size=(3, 2),
        strides=2,
        padding="same",
        output_padding=(1, 0),
        data_format="channels_first",
    )
    yield case(
        "valid-d12", "Conv2DTranspose", (1, 3, 3, 2), filters=2, kernel_size=2, dilation_rate=(1, 2), use_bias=False
    )
    yield case("valid-s32", "Conv3DTranspose", (1, 2, 2, 2, 2), filters=2, kernel_size=(2, 1, 3), strides=(3, 2, 1))
    yield case(
        "same-op-first",
        "Conv3DTranspose",
        (1, 2, 2, 3, 2),
        filters=1,
        kernel_size=(3, 2, 2),
        strides=2,
        padding="same",
        output_padding=(1, 0, 1),
        data_format="channels_first",
    )
    yield case(
        "same-tanh", "Conv3DTranspose", (1, 2, 2, 2, 1), filters=2, kernel_size=3, padding="same", activation="tanh"
    )


def depthwise_and_separable():
    for layer, more in (
        ("DepthwiseConv1D", {}),
        ("SeparableConv1D", {"filters": 3}),
    ):
        yield case("m2", layer, (2, 6, 3), kernel_size=3, depth_multiplier=2, **more)
        yield case(
            "k4-same-s2-first",
            layer,
            (1, 3, 7),
            kernel_size=4,
            strides=2,
            padding="same",
            data_format="channels_first",
            **more,
        )
        yield case("s2-d2", layer, (1, 9, 2), kernel_size=3, strides=2, dilation_rate=2, activation="relu", **more)
        yield case("same-s3-d2", layer, (1, 8, 2), kernel_size=2, strides=3, dilation_rate=2, padding="same", **more)
        yield case("batch0", layer, (0, 6, 2), kernel_size=3, **more)
        yield case("kernel-longer-same", layer, (1, 2, 2), kernel_size=5, padding="same", **more)
    for layer, more in (
        ("DepthwiseConv2D", {}),
        ("SeparableConv2D", {"filters": 2, "use_bias": False}),
    ):
        yield case(
            "m3-same-s21",
            layer,
            (1, 4, 5, 2),
            kernel_size=(2, 3),
            depth_multiplier=3,
            strides=(2, 1),
            padding="same",
            **more,
        )
        yield case(
            "first-d12",
            layer,
            (1, 2, 4, 6),
            kernel_size=(2, 3),
            dilation_rate=(1, 2),
            activation="tanh",
            data_format="channels_first",
            **more,
        )
        yield case("same-s2-d2", layer, (1, 5, 6, 2), kernel_size=2, strides=2, dilation_rate=2, padding="same", **more)
        yield case("batch0", layer, (0, 4, 4, 2), kernel_size=3, **more)


def convolutional_lstms():
    yield case("last", "ConvLSTM1D", (2, 3, 5, 2), filters=2, kernel_size=3)
    yield case(
        "sequence-state-same",
        "ConvLSTM1D",
        (1, 3, 4, 2),
        filters=2,
        kernel_size=2,
        padding="same",
        return_sequences=True,
        return_state=True,
    )
    yield case(
        "backwards-s2",
        "ConvLSTM1D",
        (1, 3, 6, 2),
        filters=1,
        kernel_size=2,
        strides=2,
        go_backwards=True,
        return_sequences=True,
    )
    yield case(
        "first-d2-relu",
        "ConvLSTM1D",
        (1, 2, 3, 6),
        filters=2,
        kernel_size=2,
        dilation_rate=2,
        activation="relu",
        recurrent_activation="hard_sigmoid",
        data_format="channels_first",
        return_state=True,
    )
    yield case(
        "stateful", "ConvLSTM1D", (2, 2, 4, 1), filters=2, kernel_size=2, stateful=True, calls=2, gradients=False
    )
    yield case("t1-no-bias", "ConvLSTM1D", (1, 1, 3, 2), filters=2, kernel_size=3, padding="same", use_bias=False)
    yield case(
        "same-s2",
        "ConvLSTM2D",
        (1, 2, 4, 3, 2),
        filters=2,
        kernel_size=(3, 2),
        padding="same",
        strides=(2, 1),
        return_sequences=True,
    )
    yield case(
        "first-state",
        "ConvLSTM2D",
        (2, 2, 1, 3, 3),
        filters=2,
        kernel_size=2,
        data_format="channels_first",
        return_state=True,
    )
    yield case("batch0", "ConvLSTM2D", (0, 2, 3, 3, 1), filters=1, kernel_size=2)
    yield case("valid", "ConvLSTM3D", (1, 2, 3, 2, 3, 1), filters=1, kernel_size=2, return_sequences=True)


def reshaping():
    yield case("default", "Cropping1D", (2, 5, 2))
    yield case("02", "Cropping1D", (2, 5, 2), cropping=(0, 2))
    yield case("default", "Cropping2D", (1, 3, 4, 2))
    yield case("first-pairs", "Cropping2D", (1, 2, 5, 6), cropping=((1, 0), (2, 3)), data_format="channels_first")
    yield case("symmetric", "Cropping2D", (1, 5, 6, 2), cropping=(1, 2))
    yield case("default", "Cropping3D", (1, 3, 4, 5, 2))
    yield case(
        "mixed-first", "Cropping3D", (1, 1, 3, 4, 5), cropping=((0, 2), (1, 0), (0, 0)), data_format="channels_first"
    )
    yield case("default", "ZeroPadding1D", (2, 3, 2))
    yield case("first-02", "ZeroPadding1D", (2, 3, 2), padding=(0, 2), data_format="channels_first")
    yield case("default", "ZeroPadding2D", (1, 2, 3, 2))
    yield case("pairs-first", "ZeroPadding2D", (1, 2, 3, 2), padding=((1, 0), (0, 2)), data_format="channels_first")
    yield case("default", "ZeroPadding3D", (1, 2, 1, 2, 2))
    yield case("ints", "ZeroPadding3D", (1, 2, 1, 2, 1), padding=(0, 1, 2))
    yield case("batch0", "ZeroPadding2D", (0, 2, 3, 2))
    yield case("default", "UpSampling1D", (2, 3, 2))
    yield case("x3", "UpSampling1D", (1, 2, 2), size=3)
    yield case("nearest", "UpSampling2D", (1, 2, 3, 2), size=(3, 2))
    for interpolation in ("bilinear", "bicubic"):
        yield case(f"{interpolation}-x2", "UpSampling2D", (1, 2, 2, 1), interpolation=interpolation)
        yield case(f"{interpolation}-x32", "UpSampling2D", (1, 3, 4, 2), size=(3, 2), interpolation=interpolation)
        yield case(
            f"{interpolation}-first",
            "UpSampling2D",
            (2, 1, 4, 3),
            size=(1, 4),
            interpolation=interpolation,
            data_format="channels_first",
        )
    yield case("first", "UpSampling3D", (1, 2, 2, 1, 3), size=(2, 3, 1), data_format="channels_first")
    yield case("default", "UpSampling3D", (1, 1, 2, 2, 2))


def without_torch():
    for interpolation in ("lanczos3", "lanczos5"):
        yield case(f"{interpolation}-x2", "UpSampling2D", (1, 4, 7, 1), interpolation=interpolation)
        yield case(
            f"{interpolation}-x32-first",
            "UpSampling2D",
            (2, 1, 3, 12),
            size=(3, 2),
            interpolation=interpolation,
            data_format="channels_first",
        )
        yield case(f"{interpolation}-x41-small", "UpSampling2D", (1, 1, 2, 2), size=(4, 1), interpolation=interpolation)


def refused():
    """Configurations that Keras refuses, in the constructor or at the first call."""
    yield case("filters0", "Conv1D", (1, 5, 2), filters=0, kernel_size=2)
    yield case("kernel0", "Conv2D", (1, 5, 5, 2), filters=1, kernel_size=(2, 0))
    yield case("kernel-wrong-length", "Conv2D", (1, 5, 5, 2), filters=1, kernel_size=(2, 2, 2))
    yield case("strides0", "Conv1D", (1, 5, 2), filters=1, kernel_size=2, strides=0)
    yield case("strides-and-dilation", "Conv1D", (1, 9, 2), filters=1, kernel_size=2, strides=2, dilation_rate=2)
    yield case(
        "strides-and-dilation-other-axis",
        "Conv2D",
        (1, 9, 9, 2),
        filters=1,
        kernel_size=2,
        strides=(2, 1),
        dilation_rate=(1, 2),
    )
    yield case(
        "strides-and-dilation", "Conv1DTranspose", (1, 9, 2), filters=1, kernel_size=2, strides=2, dilation_rate=2
    )
    yield case("strides-and-dilation", "ConvLSTM1D", (1, 2, 9, 2), filters=1, kernel_size=2, strides=2, dilation_rate=2)
    yield case("causal", "Conv2D", (1, 5, 5, 2), filters=1, kernel_size=2, padding="causal")
    yield case("causal", "Conv1DTranspose", (1, 5, 2), filters=1, kernel_size=2, padding="causal")
    yield case("causal", "SeparableConv1D", (1, 5, 2), filters=1, kernel_size=2, padding="causal")
    yield case("causal", "DepthwiseConv1D", (1, 5, 2), kernel_size=2, padding="causal")
    yield case("full", "Conv1D", (1, 5, 2), filters=1, kernel_size=2, padding="full")
    yield case("groups-filters", "Conv1D", (1, 5, 4), filters=3, kernel_size=2, groups=2)
    yield case("groups-channels", "Conv1D", (1, 5, 3), filters=4, kernel_size=2, groups=2)
    yield case("kernel-longer", "Conv1D", (1, 4, 2), filters=1, kernel_size=5)
    yield case("kernel-longer-dilated", "DepthwiseConv1D", (1, 4, 2), kernel_size=3, dilation_rate=2)
    yield case("kernel-longer", "SeparableConv2D", (1, 4, 4, 2), filters=1, kernel_size=(5, 1))
    yield case("rank", "Conv1D", (1, 5, 5, 2), filters=1, kernel_size=2)
    yield case("output-padding", "Conv1DTranspose", (1, 4, 2), filters=1, kernel_size=3, strides=2, output_padding=2)
    yield case("output-padding-s1", "Conv2DTranspose", (1, 4, 4, 2), filters=1, kernel_size=3, output_padding=1)
    yield case("multiplier0", "DepthwiseConv2D", (1, 4, 4, 2), kernel_size=3, depth_multiplier=0)
    yield case("nothing-left", "Cropping1D", (1, 4, 2), cropping=(2, 2))
    yield case("nothing-left", "Cropping2D", (1, 4, 2, 1), cropping=1)
    yield case("negative", "Cropping3D", (1, 4, 4, 4, 1), cropping=-1)
    yield case("negative", "ZeroPadding1D", (1, 4, 2), padding=-1)
    yield case("size0", "UpSampling2D", (1, 4, 4, 2), size=(2, 0))
    yield case("size-tuple", "UpSampling1D", (1, 4, 2), size=(2,))
    yield case("unknown", "UpSampling2D", (1, 4, 4, 2), interpolation="linear")
    yield case("data-format", "Conv1D", (1, 5, 2), filters=1, kernel_size=2, data_format="NWC")
    yield case("activation", "Conv1D", (1, 5, 2), filters=1, kernel_size=2, activation="ReLU")


def eighths(rng, shape):
    return (rng.integers(-8, 9, shape) / 8).astype("float32")


def torch_gradients(layer, x, output_grads):
    import torch

    x = torch.tensor(x, requires_grad=True)
    outputs = as_list(layer(x))
    total = sum((y * torch.tensor(dy)).sum() for y, dy in zip(outputs, output_grads, strict=True))
    weights = [weight.value for weight in layer.weights]
    return [g.detach().numpy() for g in torch.autograd.grad(total, [x, *weights])]


def jax_gradients(layer, x, output_grads):
    import jax

    return [np.asarray(g) for g in jax.vjp(layer, x)[1](output_grads[0])]


def as_list(outputs):
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def answer(asked, rng):
    """Keras' answer: the completed row for the .json, and its arrays in the order of the .npz."""
    layer = getattr(keras.layers, asked["layer"])(**asked["config"])
    inputs = [eighths(rng, asked["input_shape"]) for _ in range(asked["calls"])]
    layer.build(tuple(asked["input_shape"]))
    weights = [eighths(rng, weight.shape) for weight in layer.weights]
    layer.set_weights(weights)
    outputs = [keras.ops.convert_to_numpy(y) for x in inputs for y in as_list(layer(x))]
    arrays = [*inputs, *weights, *outputs]
    if asked["gradients"]:
        output_grads = [eighths(rng, y.shape) for y in outputs]
        by_backend = {"torch": torch_gradients, "jax": jax_gradients}[keras.backend.backend()]
        arrays += [*output_grads, *by_backend(layer, inputs[0], output_grads)]
    if not all(np.isfinite(a).all() and a.dtype == np.float32 for a in arrays):
        sys.exit(f"{asked['id']}: an array is not finite or not float32")
    row = {
        **asked,
        "weights": {w.path.split("/")[-1]: list(w.shape) for w in layer.weights},
        "output_shapes": [list(y.shape) for y in outputs],
        "computed": keras.tree.map_structure(int, list(map(list, as_shapes(layer, asked["input_shape"])))),
    }
    return row, arrays


def as_shapes(layer, input_shape):
    """compute_output_shape as a list of shapes, one per output."""
    shapes = layer.compute_output_shape(tuple(input_shape))
    return [shapes] if isinstance(shapes[0], int) else shapes


def refusal(asked):
    try:
        getattr(keras.layers, asked["layer"])(**asked["config"])(np.zeros(asked["input_shape"], "float32"))
    except (ValueError, TypeError) as error:
        return {**{k: asked[k] for k in ("id", "layer", "config", "input_shape")}, "error": type(error).__name__}
    sys.exit(f"{asked['id']}: Keras accepts this")


def json_lines(rows):
    """A JSON list with one row a line, so that a change shows as the line it is."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


def main():
    backend = keras.backend.backend()
    rng = np.random.default_rng(20261120)
    families = (convolutions, transposed_convolutions, depthwise_and_separable, convolutional_lstms, reshaping)
    asked = [c for family in families for c in family()] if backend == "torch" else list(without_torch())
    rows, arrays = zip(*(answer(one, rng) for one in asked))
    values = np.concatenate([array.ravel() for of_this_case in arrays for array in of_this_case])
    made_with = json.dumps({"keras": keras.__version__, backend: version(backend)})
    refusals = json_lines(map(refusal, refused())) if backend == "torch" else "[]"
    (HERE / f"{backend}.json").write_text(
        f'{{"made_with": {made_with},\n"cases": {json_lines(rows)},\n"refused": {refusals}}}\n'
    )
    np.savez_compressed(HERE / f"{backend}.npz", values=values)
    print(f"{len(rows)} cases, {values.size} values")


if __name__ == "__main__":
    main()
