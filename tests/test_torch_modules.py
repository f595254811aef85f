"""Modules of the bridge to torch, and models that change over, before, in and after training."""

import copy
import inspect
import itertools

import pytest
from torch_cases import poisoned, torch  # noqa: F401

import cuconv.interop.torch as bridge
from cuconv import reference
from cuconv.interop.torch import replacing

nn = torch.nn
prune = pytest.importorskip("torch.nn.utils.prune")
pytestmark = [
    pytest.mark.bridges,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning"),
]

NAMES = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
ARGUMENTS = (
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"dilation": 2, "groups": 2, "padding": 1},
    {"groups": 4, "stride": 2},
    {"dtype": torch.float64, "device": "cpu"},
)
CONV_ARGUMENTS = (
    {"padding": "same"},
    {"padding": "valid"},
    *({"padding_mode": mode, "padding": 1, "stride": 2} for mode in ("reflect", "replicate", "circular")),
    {"padding_mode": "circular", "padding": "same", "dilation": 2},
)
CASES = [
    (name, arguments)
    for name in NAMES
    for arguments in (*ARGUMENTS, *(() if "Transpose" in name else CONV_ARGUMENTS), {"output_padding": 1, "stride": 2})
    if "Transpose" in name or "output_padding" not in arguments
]


def pair(name, arguments, seed=0):
    """A module of torch's and one of ours, made alike."""
    made = []
    for library in (nn, bridge):
        torch.manual_seed(seed)
        made.append(getattr(library, name)(4, 8, 3, **arguments))
    return made


def signal(module, last=False):
    rank = len(module.kernel_size)
    x = torch.randn(2, 4, *(7, 6, 5)[:rank], dtype=module.weight.dtype)
    return x.movedim(1, -1).contiguous() if last else x


# --- Modules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, arguments", CASES)
def test_modules_are_torchs_by_name_weights_and_answer(name, arguments):
    theirs, ours = pair(name, arguments)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for a, b in zip(ours.parameters(), theirs.parameters()):  # the same seed, the same initial values
        assert torch.equal(a, b)
    x = signal(theirs)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))
    channels_last = getattr(bridge, name)(4, 8, 3, **arguments, data_format="channels_last")
    channels_last.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(channels_last(x.movedim(1, -1).contiguous()), theirs(x).movedim(1, -1))
    theirs.load_state_dict(pair(name, arguments, seed=1)[1].state_dict())
    assert not torch.equal(ours.weight, theirs.weight)


@pytest.mark.parametrize("name", NAMES)
def test_positional_arguments_are_in_torchs_order(name):
    order = (4, 8, 3, 2, 1, 1, 2, True, 2) if "Transpose" in name else (4, 8, 3, 2, 1, 2, 2, False, "circular")
    theirs, ours = getattr(nn, name)(*order), getattr(bridge, name)(*order)
    assert repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    x = signal(theirs)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_are_torchs_with_two_keywords_more(name):
    theirs, ours = (inspect.signature(getattr(library, name)).parameters for library in (nn, bridge))
    assert [(each.name, each.default) for each in theirs.values()] == [
        (each.name, each.default) for each in list(ours.values())[:-2]
    ]
    assert list(ours)[-2:] == ["data_format", "precision"]
    assert nn.utils.skip_init(getattr(bridge, name), 4, 8, 3).weight.shape[2:] == (3,) * int(name[-2])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
def test_output_size_of_transposed_modules(rank, last):
    theirs = getattr(nn, f"ConvTranspose{rank}d")(4, 8, 3, stride=3)
    ours = getattr(bridge, f"ConvTranspose{rank}d")(
        4, 8, 3, stride=3, data_format="channels_last" if last else "channels_first"
    )
    ours.load_state_dict(theirs.state_dict())
    x = signal(theirs)
    for extra in (0, 2):
        size = [3 * n + extra for n in x.shape[2:]]
        expected = theirs(x, output_size=size)
        for given in (size, [2, *size, 8] if last else [2, 8, *size]):
            actual = ours(x.movedim(1, -1) if last else x, output_size=given)
            torch.testing.assert_close(actual.movedim(-1, 1) if last else actual, expected)
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x.movedim(1, -1) if last else x, output_size=[99] * rank)


@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_causal_modules_do_not_look_ahead(mode):
    layer = bridge.Conv1d(3, 5, 3, dilation=4, padding="causal", padding_mode=mode)
    x = torch.randn(2, 3, 20)
    later = x.clone()
    later[..., 12:] += 1
    assert torch.equal(layer(x)[..., :12], layer(later)[..., :12])
    assert not torch.equal(layer(x)[..., 12:], layer(later)[..., 12:])
    padded = nn.functional.pad(x, (8, 0), mode="constant" if mode == "zeros" else mode)
    torch.testing.assert_close(layer(x), nn.functional.conv1d(padded, layer.weight, layer.bias, dilation=4))
    assert "padding=causal" in repr(layer)
    with pytest.raises(ValueError, match='`padding="causal"` needs one spatial axis'):
        bridge.Conv2d(3, 5, 3, padding="causal")


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1, "depth_multiplier": 2}, {"padding": 1, "padding_mode": "reflect"}]
)
def test_separable_modules_have_the_weights_of_two(rank, last, options):
    layout = "channels_last" if last else "channels_first"
    layer = getattr(bridge, f"SeparableConv{rank}d")(4, 6, 3, **options, data_format=layout)
    conv, multiplier = getattr(nn, f"Conv{rank}d"), options.get("depth_multiplier", 1)
    window = {name: value for name, value in options.items() if name != "depth_multiplier"}
    two = nn.Sequential()
    two.add_module("depthwise", conv(4, 4 * multiplier, 3, groups=4, bias=False, **window))
    two.add_module("pointwise", conv(4 * multiplier, 6, 1))
    assert list(layer.state_dict()) == list(two.state_dict())
    layer.load_state_dict(two.state_dict())
    x = signal(two.depthwise)
    actual = layer(x.movedim(1, -1) if last else x)
    torch.testing.assert_close(actual.movedim(-1, 1) if last else actual, two(x))
    two.load_state_dict(layer.state_dict())


def test_options_are_checked_and_shown():
    assert repr(bridge.Conv1d(1, 2, 3, data_format="channels_last", precision="high")).endswith(
        "data_format='channels_last', precision='high')"
    )
    assert "SeparableConv1d(\n  data_format='channels_last'\n" in repr(
        bridge.SeparableConv1d(1, 2, 3, data_format="channels_last")
    )
    with pytest.raises(ValueError, match="`data_format` must be .*Received: data_format='NHWC'"):
        bridge.Conv2d(1, 2, 3, data_format="NHWC")
    with pytest.raises(ValueError, match="`precision` must be .*Received: precision='medium'"):
        bridge.ConvTranspose2d(1, 2, 3, precision="medium")


@pytest.mark.parametrize("name", ["Conv1d", "ConvTranspose1d", "SeparableConv1d"])
def test_the_precision_reaches_every_pass(name, monkeypatch):
    seen = []

    def spied(function):
        def spy(*arguments, **keywords):
            seen.append(inspect.signature(function).bind(*arguments, **keywords).arguments.get("precision"))
            return function(*arguments, **keywords)

        return spy

    for function in ("conv", "conv_transpose", "kernel_grad", "separable_conv", "separable_input_grad"):
        monkeypatch.setattr(reference, function, spied(getattr(reference, function)))
    monkeypatch.setattr(reference, "separable_kernel_grad", spied(reference.separable_kernel_grad))
    for precision in ("highest", "high"):
        x = torch.randn(2, 4, 9, requires_grad=True)
        layer = getattr(bridge, name)(4, 6, 3, precision=precision)
        layer(x).square().sum().backward()
        assert seen == [precision] * 3
        seen.clear()


def test_modules_are_copied_and_moved_like_torchs():
    layer = bridge.Conv1d(2, 3, 3, data_format="channels_last")
    twin = copy.deepcopy(layer).double()
    x = torch.randn(2, 9, 2, dtype=torch.float64)
    assert twin(x).dtype == torch.float64 and layer.weight.dtype == torch.float32
    assert bridge.Conv2d(2, 3, 3, device="meta")(torch.empty(1, 2, 5, 5, device="meta")).shape == (1, 3, 3, 3)


# --- Changing over -----------------------------------------------------------------------------------------------


class Causal(nn.Module):
    """A residual block of a temporal convolutional network; its second half is the first one again."""

    def __init__(self, channels, dilation, norm):
        super().__init__()
        self.pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv = norm(nn.Conv1d(channels, channels, 3, dilation=dilation))

    def forward(self, x):
        y = self.conv(self.pad(x)).relu()
        return x + self.conv(self.pad(y)).relu()


class TCN(nn.Module):
    def __init__(self, norm=lambda module: module):
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 1)
        self.blocks = nn.Sequential(*(Causal(8, 2**level, norm) for level in range(3)))
        self.decode = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1)
        self.head = nn.Conv1d(4, 2, 5, padding="same", padding_mode="reflect")

    def forward(self, x):
        return self.head(self.decode(self.blocks(self.stem(x)))).mean(-1)


def mobile_net():
    def block(c, f, stride):
        return nn.Sequential(
            nn.Conv2d(c, c, 3, stride=stride, padding=1, groups=c, bias=False),
            nn.BatchNorm2d(c),
            nn.ReLU6(),
            nn.Conv2d(c, f, 1, bias=False),
            nn.BatchNorm2d(f),
            nn.ReLU6(),
        )

    stem = (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
    blocks = (block(8, 12, 1), block(12, 16, 2), block(16, 16, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))


def weight_normed():
    return TCN(nn.utils.parametrizations.weight_norm)


MODELS = {"TCN": TCN, "TCN with weight_norm": weight_normed, "MobileNet": mobile_net}
SWAPPED = {"TCN": 6, "TCN with weight_norm": 6, "MobileNet": 7}


def trained(model, optimizer, x, labels, steps):
    """The loss of every step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def task(name, dtype, memory=torch.contiguous_format):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    x = torch.randn(8, 3, 24) if name.startswith("TCN") else torch.randn(8, 3, 16, 16).to(memory_format=memory)
    return model, x.to(dtype), torch.arange(8) % 2


LAYOUTS = [(name, torch.contiguous_format) for name in MODELS] + [("MobileNet", torch.channels_last)]


@pytest.mark.parametrize("name, memory", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_training_goes_on_as_if_nothing_had_happened(name, memory, dtype):
    """30 steps of SGD with momentum by torch, against 10 by torch, 10 by cuconv, 10 by torch."""
    losses = []
    for changes in (False, True):
        model, x, labels = task(name, dtype, memory)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        parts = [trained(model, optimizer, x, labels, 10)]
        if changes:
            report = bridge.replace(model)
            assert len(report.swapped) == SWAPPED[name] and not report.left
        parts.append(trained(model, optimizer, x, labels, 10))
        if changes:
            assert len(bridge.restore(model).swapped) == SWAPPED[name]
        parts.append(trained(model, optimizer, x, labels, 10))
        losses.append(torch.cat(parts))
    assert losses[0][-1] < 0.7 * losses[0][0], "nothing was learned"
    close = {"rtol": 1e-13, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(losses[1], losses[0], **close)


@pytest.mark.parametrize("name", MODELS)
def test_the_swapped_modules_are_computed_by_cuconv(name, monkeypatch):
    model, x, _ = task(name, torch.float32)
    expected = model.eval()(x)
    bridge.replace(model)
    calls = itertools.count()
    for function in ("conv", "conv_transpose", "separable_conv"):
        own = getattr(replacing.modules.functional, function)
        monkeypatch.setattr(
            replacing.modules.functional, function, lambda *a, own=own, **k: (next(calls), own(*a, **k))[1]
        )
    for function in ("conv1d", "conv2d", "conv_transpose1d"):
        monkeypatch.setattr(nn.functional, function, None)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert next(calls) == SWAPPED[name] + 3 * name.startswith("TCN")  # every block's convolution is used twice


def test_everything_but_forward_stays():
    model = TCN().eval()
    before = {name: (module, vars(module).copy()) for name, module in model.named_modules()}
    parameters = list(model.parameters())
    seen = []
    model.stem.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.head.train()
    keys, text = list(model.state_dict()), repr(model)
    bridge.replace(model)
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert all(before[name][0] is module for name, module in model.named_modules())
    assert (list(model.state_dict()), repr(model)) == (keys, text)
    assert model.head.training and not model.stem.training
    model(torch.randn(1, 3, 9))
    assert seen == [(1, 8, 9)]
    assert type(model.stem) is bridge.Conv1d
    bridge.restore(model)
    assert type(model.stem) is nn.Conv1d and repr(model) == text
    for name, module in model.named_modules():
        assert set(vars(module)) == set(before[name][1])


def test_a_model_that_is_a_convolution_itself_is_swapped():
    layer = nn.Conv2d(3, 4, 3)
    report = bridge.replace(layer, precision="high")
    assert type(layer) is bridge.Conv2d and layer.precision == "high"
    assert report.swapped[0].names == ("",) and "(the model)" in str(report)


def test_shared_modules_are_swapped_once_under_all_their_names():
    layer = nn.Conv1d(2, 2, 3)
    model = nn.ModuleDict({"a": layer, "b": nn.Sequential(nn.ReLU(), layer)})
    report = bridge.replace(model)
    assert [swap.names for swap in report.swapped] == [("a", "b.1")]
    assert "a, b.1" in str(report) and "1 swapped, 0 left" in str(report)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_what_is_left_is_left_with_a_reason():
    patched = nn.Conv1d(2, 2, 3)
    patched.forward = lambda x: x
    scripted = torch.jit.script(nn.Conv1d(2, 2, 3))
    model = nn.ModuleDict(
        {
            "subclass": Standardized(3, 4, 3),
            "patched": patched,
            "lazy": nn.LazyConv1d(4, 3),
            "scripted": scripted,
            "quantized": torch.ao.nn.quantized.Conv1d(2, 2, 3),
            "qat": torch.ao.nn.qat.Conv2d(2, 2, 3, qconfig=torch.ao.quantization.default_qconfig),
            "float8": nn.Conv1d(2, 2, 3).to(torch.float8_e5m2),
            "ours": bridge.Conv1d(2, 2, 3),
            "separable": bridge.SeparableConv1d(2, 2, 3),
            "parametrized subclass": nn.utils.parametrizations.weight_norm(Standardized(3, 4, 3)),
            "linear": nn.Linear(2, 3),
            "eligible": nn.Conv1d(2, 2, 3),
        }
    )
    kinds = {name: type(module) for name, module in model.items()}
    report = bridge.replace(model)
    reasons = {swap.names[0]: swap.reason for swap in report.left}
    beginnings = {
        "subclass": "a class of its own (test_torch_modules.Standardized)",
        "patched": "its forward was assigned",
        "lazy": "lazy: run the model once",
        "scripted": "compiled by torch.jit",
        "quantized": "quantized (torch.ao.nn.quantized",
        "qat": "a class of its own (torch.ao.nn.qat",
        "float8": "cuconv has no float8_e5m2",
        "ours": "cuconv's already",
        "separable": "cuconv's already",
        "parametrized subclass": "a class of its own (test_torch_modules.Standardized)",
    }
    assert reasons.keys() == beginnings.keys()
    for name, beginning in beginnings.items():
        assert reasons[name].startswith(beginning), (name, reasons[name])
        assert type(model[name]) is kinds[name]
        assert name in str(report)
    assert [swap.names for swap in report.swapped] == [("eligible",)]
    back = bridge.restore(model)
    assert {swap.names[0] for swap in back.swapped} == {"ours", "eligible"}
    assert [(swap.names[0], swap.reason) for swap in back.left] == [("separable", "torch has no SeparableConv1d")]


def test_devices_and_gpus_without_cupy_are_reasons(monkeypatch):
    layer = nn.Conv1d(2, 2, 3)
    device = type("Elsewhere", (), {"type": "mps"})()
    elsewhere = type("P", (), {"dtype": torch.float32, "device": device, "is_cuda": False})()
    monkeypatch.setattr(layer, "parameters", lambda: [elsewhere], raising=False)
    assert bridge.replace(layer).left[0].reason == "cuconv does not compute on mps"
    elsewhere.device.type, elsewhere.is_cuda = "cuda", True
    unusable = replacing.runtime.Probe(False, "no CuPy; `pip install cuconv[cuda12x]`")
    monkeypatch.setattr(replacing.runtime, "probe", lambda: unusable)
    report = bridge.replace(layer)
    assert report.left[0].reason == unusable.reason and unusable.reason in str(report)


class Gated(bridge.Conv1d):
    def forward(self, x):
        return super().forward(x).sigmoid()


def test_what_torch_has_not_is_not_restored():
    model = nn.Sequential(
        bridge.Conv1d(2, 2, 3, padding="causal"), bridge.Conv1d(2, 2, 3, data_format="channels_last"), Gated(2, 2, 3)
    )
    report = bridge.restore(model)
    assert [swap.reason for swap in report.left] == [
        "torch has no padding='causal'",
        "torch has no data_format='channels_last'",
        "a class of its own (test_torch_modules.Gated), its forward may be another one",
    ]
    assert [type(module) for module in model] == [bridge.Conv1d, bridge.Conv1d, Gated]


def test_parametrized_modules_stay_apart_from_their_copies():
    layer = nn.utils.parametrizations.spectral_norm(nn.Conv1d(2, 3, 3)).eval()
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 2, 9)
    expected = layer(x)
    bridge.replace(layer)
    assert isinstance(layer, bridge.Conv1d) and not isinstance(twin, bridge.Conv1d)
    torch.testing.assert_close(layer(x), expected)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is bridge.Conv1d
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute():
    for prepare in (nn.utils.weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)):
        layer = prepare(nn.Conv1d(4, 3, 3))
        x = torch.randn(1, 4, 9)
        expected = layer(x)
        assert len(bridge.replace(layer).swapped) == 1
        torch.testing.assert_close(layer(x), expected)
        layer(x).sum().backward()


def test_a_replaced_model_is_compiled_whole():
    torch._dynamo.reset()
    model, x, _ = task("MobileNet", torch.float32)
    expected = model.eval()(x)
    bridge.replace(model)
    torch.testing.assert_close(
        torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected, rtol=1e-4, atol=1e-5
    )
    torch._dynamo.reset()


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="`model` must be a torch.nn.Module. Received: dict"):
        bridge.replace({})
    with pytest.raises(ValueError, match="`precision` must be .*Received: precision='fast'"):
        bridge.replace(nn.Conv1d(1, 1, 1), precision="fast")
