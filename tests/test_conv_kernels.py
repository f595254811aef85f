"""conv_simt, pack_weights, kernel_grad_simt and reduce_splits: their real PTX on the CPU, against the oracle.

Every case computes the forward pass, the input gradient (which is the transposed convolution) and the kernel gradient
of one convolution, under the detector. Sizes are chosen around the edges of the tile that is tested: a position less or
more than a block has, a filter more, a sum that ends inside a step.
"""

from contextlib import contextmanager
from math import prod
from unittest import mock

import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close, poisoned
from emulated import EmulatedRuntime
from strategies import uniform

from cuconv import activations, geometry, ops
from cuconv.cuda.conv import conv, kernel_grad
from cuconv.cuda.runtime import CudaRuntime, current, device_array, probe
from cuconv.cuda.transpose import conv_transpose
from cuconv.plan import conv as plan_conv_module
from cuconv.plan import mma, simt, transpose
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import ELEMENTS, WARP, PlanError


@pytest.fixture(autouse=True)
def where_it_can_run(request):
    """A machine with a GPU need not have what the emulator takes."""
    if emulator.missing() and not request.node.get_closest_marker("gpu"):
        pytest.skip(emulator.missing())


LIMITS = DEVICES["H200"]


@contextmanager
def only(dtype: str, tile):
    """Plans find no other tile than this one: of the ordinary units, or of tensor cores, with its step and stages."""
    simt_tiles, choose = {ELEMENTS[dtype].sum_bytes: (tile,)}, lambda *arguments: simt.choose_tile(*arguments[:-1])
    if on_tensor_cores(tile):
        simt_tiles, choose = {}, mma.choose_tile
    no_other = mock.Mock(side_effect=PlanError("only that tile"))
    gradients = plan_conv_module.plan_on_tensor_cores if on_tensor_cores(tile) else no_other
    with (
        mock.patch.dict(simt.TILES, simt_tiles),
        mock.patch.object(mma, "TILES", (tile[:4],)),
        mock.patch.object(mma, "STEPS", (tile[4:],)),
        mock.patch.object(mma, "LEAST_DEPTH", 1),
        mock.patch.object(plan_conv_module, "_choose", choose),
        mock.patch.object(plan_conv_module, "PARTS", ()),
        mock.patch.object(plan_conv_module, "plan_narrow", no_other),
        mock.patch.object(plan_conv_module, "plan_halo", no_other),
        mock.patch.object(plan_conv_module, "plan_taps", no_other),
        mock.patch.object(plan_conv_module, "plan_wgmma", no_other),
        mock.patch.object(plan_conv_module, "plan_wgmma_first", no_other),
        mock.patch.object(plan_conv_module, "plan_on_tensor_cores", gradients),
        mock.patch.object(plan_conv_module, "plan_on_warpgroups", no_other),
    ):
        forget_plans()
        try:
            yield
        finally:  # or the tests behind one that fails would find its tile
            forget_plans()


def on_tensor_cores(tile) -> bool:
    return len(tile) == 6


def forget_plans():
    plans = (plan_conv_module.plan_conv, plan_conv_module.plan_conv_parts, plan_conv_module.plan_kernel_grad)
    for function in (*plans, transpose.plan_transpose, simt.choose_tile, mma.choose_tile):
        function.cache_clear()


def to_runtime(runtime, value):
    """An array where those of a runtime live; anything else as it is."""
    return device_array(value) if isinstance(value, np.ndarray) and isinstance(runtime, CudaRuntime) else value


class Case:
    """A convolution with random arrays, and its three passes on a runtime."""

    workspace = 1 << 20
    precision = "highest"

    def __init__(self, x_shape, w_shape, dtype="float32", seed=0, **options):
        self.dtype, self.options = dtype, options
        self.shape = geometry.conv_shape(x_shape, w_shape, **options)
        rng = np.random.default_rng(seed)
        shapes = (self.shape.x_shape, w_shape, (w_shape[-1],), self.shape.y_shape)
        self.x, self.w, self.bias, self.dy = (uniform(rng, shape, dtype) for shape in shapes)

    def run(self, runtime, function, out_shape, *arguments):
        """The output of an engine function, which gets it full of NaN; arrays go where the runtime's live and back."""
        out = to_runtime(runtime, poisoned(out_shape, self.dtype))
        arguments = (to_runtime(runtime, each) for each in arguments)
        function(runtime, self.shape, *arguments, out, self.workspace, self.precision)
        return ops.to_numpy(out)

    def forward(self, runtime, activation=None, bias=True):
        bias = self.bias if bias else None
        function = activations.get(activation) if activation else None
        return self.run(runtime, conv, self.shape.y_shape, self.x, self.w, bias, function)

    def input_grad(self, runtime):
        return self.run(runtime, conv_transpose, self.shape.x_shape, self.dy, self.w.conj(), None, None)

    def kernel_grad(self, runtime):
        return self.run(runtime, kernel_grad, self.shape.w_shape, self.x, self.dy)

    def check_forward(self, runtime, activation=None, bias=True):
        expected = oracle.conv(
            self.x, self.w, self.bias if bias else None, activation=activation or "linear", **self.options
        )
        actual = self.forward(runtime, activation, bias)
        assert_close(actual, expected, dtype=self.dtype, terms=prod(self.w.shape[:-1]), what="conv")

    def check_input_grad(self, runtime):
        expected = oracle.conv_input_grad(self.dy, self.w, self.x.shape, **self.options)
        terms = prod(self.w.shape[:-2]) * self.w.shape[-1]
        assert_close(self.input_grad(runtime), expected, dtype=self.dtype, terms=terms, what="input gradient")

    def check_kernel_grad(self, runtime):
        expected = oracle.conv_kernel_grad(self.x, self.dy, self.w.shape, **self.options)
        terms = max(1, self.dy.size // self.w.shape[-1])
        assert_close(self.kernel_grad(runtime), expected, dtype=self.dtype, terms=terms, what="kernel gradient")

    def check(self, runtime):
        self.check_forward(runtime)
        self.check_input_grad(runtime)
        self.check_kernel_grad(runtime)


def trace(seed=1):
    return EmulatedRuntime(LIMITS, mode="trace", seed=seed)


# --- Every tile --------------------------------------------------------------------------------------------------

TILES = [
    (dtype, tile) for dtype in ("float32", "float64", "complex128") for tile in simt.TILES[ELEMENTS[dtype].sum_bytes]
]
TENSOR_TILES = [(*tile, *step) for tile in mma.TILES for step in mma.STEPS]


def around(rank: int, count: int) -> tuple[int, ...]:
    """Sizes of `rank` axes with about `count` positions in all, none a multiple of another."""
    return {1: (count,), 2: (3, -(-count // 3)), 3: (2, 3, -(-count // 6))}[rank]


def tile_cases(tile, rank, data_format):
    """(x_shape, w_shape, options) that meet every edge of `tile`, wide accesses first."""
    bm, bn, *_ = tile
    first = data_format == "channels_first"

    def shapes(batch, sizes, channels, taps, filters, groups=1):
        x = (batch, channels, *sizes) if first else (batch, *sizes, channels)
        return x, (*taps, channels // groups, filters)

    base = {"data_format": data_format}
    taps = (3, 2, 2)[-rank:] if rank < 3 else (2, 1, 2)
    # One position more than a block, one vector of filters more, sums of 12 to 24 products: not a multiple of a step.
    yield *shapes(1, around(rank, bm + 1), 4, taps, bn + 4), {**base, "padding": "same"}
    yield *shapes(2, around(rank, bm // 2), 8, (1,) * rank, bn), {**base, "padding": "valid"}
    # Nothing fits: odd channels, one filter more, stride, dilation, groups.
    yield *shapes(2, around(rank, bm + 3), 3, taps, bn + 1), {**base, "padding": "same", "strides": 2}
    yield *shapes(1, around(rank, bm - 1), 6, taps, 10, 2), {**base, "padding": "same", "groups": 2, "dilation_rate": 2}
    yield *shapes(1, (1,) * rank, 1, (1,) * rank, 1), {**base, "padding": "valid"}
    if rank == 1:
        yield *shapes(2, (5,), 2, (3,), 2), {**base, "padding": "causal", "dilation_rate": 7}
        yield *shapes(1, (11,), 2, (2,), 3), {**base, "padding": (3, 4), "strides": 5}


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of 11 significant bits, ties away from zero."""
    return ((np.ascontiguousarray(x, np.float32).view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32)


def run_tile(dtype, tile, rank, data_format, make_runtime=trace, cases=range(99), precision="highest"):
    """TF32 products are held to the error of float32 on inputs rounded to TF32."""
    ran = 0
    with only(dtype, tile):
        for number, (x_shape, w_shape, options) in enumerate(tile_cases(tile, rank, data_format)):
            if number not in cases:
                continue
            case = Case(x_shape, w_shape, dtype, seed=number, **options)
            case.precision = precision
            if precision == "high":
                case.x, case.w, case.dy = map(rounded_to_tf32, (case.x, case.w, case.dy))
            runtime = make_runtime(seed=number + 1)
            try:
                case.check_forward(runtime)
                case.check_input_grad(runtime)
                if not on_tensor_cores(tile):  # there, kernel gradients have tiles and tests of their own
                    case.check_kernel_grad(runtime)
                assert_tile(tile, runtime)
                ran += 1
            except PlanError as error:  # accesses too narrow for the registers of a large tile
                if not on_tensor_cores(tile) or "registers a thread" not in str(error):
                    raise
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
                raise
    assert ran, f"{tile} had no case of rank {rank}, {data_format}"


def assert_tile(tile, runtime):
    """The kernels that the tile is of had no other."""
    kernels = ("conv_mma",) if on_tensor_cores(tile) else ("conv_simt", "kernel_grad_simt")
    constants = [dict(plan.constants) for plan in getattr(runtime, "launches", ()) if plan.kernel in kernels]
    assert {(each["BM"], each["BN"]) for each in constants} == {tile[:2]} or isinstance(runtime, CudaRuntime)


def name(value):
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("tile", simt.TILES[4][::3], ids=name)
def test_large_and_small_tiles(tile):
    run_tile("float32", tile, 1, "channels_last")


@pytest.mark.parametrize(
    "dtype, rank, data_format",
    [
        ("float16", 1, "channels_last"),
        ("bfloat16", 2, "channels_first"),
        ("bfloat16", 3, "channels_last"),
        ("float16", 1, "channels_first"),
    ],
)
@pytest.mark.parametrize("tile", TENSOR_TILES[-2:], ids=name)
def test_tensor_cores(dtype, rank, data_format, tile):
    run_tile(dtype, tile, rank, data_format)


# Element and precision of tensor cores that are not for 16 bits; rows of double have 128 bytes.
KINDS = (("float32", "high"), ("float32", "highest"), ("float64", "highest"))


def tensor_tiles(dtype):
    return [tile for tile in TENSOR_TILES if dtype != "float64" or (tile[4] == 128 and tile[0] * tile[1] < 128 * 256)]


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_tensor_cores_in_32_and_64_bits(dtype, precision, data_format):
    run_tile(dtype, tensor_tiles(dtype)[-1], 1, data_format, precision=precision)


@pytest.mark.parametrize("rank, data_format", [(2, "channels_last"), (3, "channels_first")])
def test_every_rank(rank, data_format):
    run_tile("float32", (32, 32, 4, 4), rank, data_format)


@pytest.mark.parametrize(
    "dtype, data_format",
    [
        ("float16", "channels_last"),
        ("bfloat16", "channels_first"),
        ("float64", "channels_last"),
        ("complex64", "channels_first"),
        ("complex128", "channels_last"),
    ],
)
def test_every_dtype(dtype, data_format):
    run_tile(dtype, simt.TILES[ELEMENTS[dtype].sum_bytes][-1], 1, data_format)


FORMATS = ("channels_last", "channels_first")


@pytest.mark.parametrize(
    "x_shape, w_shape, options",
    [
        ((2, 21, 128), (3, 128, 40), {"padding": "same", "dilation_rate": 2}),
        ((1, 3, 7, 64), (2, 2, 64, 40), {"strides": 2, "padding": "same"}),
        ((2, 64, 21), (3, 64, 40), {"padding": "same", "data_format": "channels_first"}),
    ],
    ids=name,
)
def test_channels_of_whole_steps(x_shape, w_shape, options):
    """Where all copies of a step have the same tap, it changes between passes of the loop."""
    with only("float16", TENSOR_TILES[-1]):
        runtime = trace()
        Case(x_shape, w_shape, "float16", **options).check_forward(runtime)
    assert dict(runtime.launches[0].constants)["WHOLE"] == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("number", range(len(TILES)), ids=lambda number: "-".join(map(name, TILES[number])))
def test_every_tile_of_every_kind(number, data_format):
    """Every tile in both data formats, which share its threads out differently, and with ranks by turns.

    Positions and filters that fit nothing, and wide accesses where channels are neighbours: what else a case adds does
    not depend on the tile.
    """
    first = FORMATS.index(data_format)
    run_tile(*TILES[number], (number + first) % 3 + 1, data_format, cases=((0, 2), (2,))[first])


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(TENSOR_TILES)), ids=lambda number: name(TENSOR_TILES[number]))
def test_every_tile_of_tensor_cores(number):
    """Every tile in both data formats, one for each of its steps, and every rank with several tiles.

    Small tiles have the higher ranks, for which large ones have no registers; in channels_first, where x is copied
    position by position, the largest has none at all.
    """
    first = number % 2 and TENSOR_TILES[number][:4] != mma.TILES[0]
    turn = number // 2 % 2  # edges or groups
    cases = (2 + turn,) if first else (0, 2 + turn)
    run_tile(("float16", "bfloat16")[turn], TENSOR_TILES[number], number // 6 + 1, FORMATS[first], cases=cases)


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(TENSOR_TILES)), ids=lambda number: name(TENSOR_TILES[number]))
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_every_tile_of_tensor_cores_in_32_and_64_bits(dtype, precision, number):
    """Every tile, each in one rank and data format; those that need more registers than there are have no plan."""
    tile = TENSOR_TILES[number]
    large, three = tile[0] * tile[1] >= 128 * 128, dtype == "float32" and precision == "highest"
    if tile not in tensor_tiles(dtype) or (three and (tile[2] * tile[3] > 64 * WARP or tile[0] * tile[4] > 128 * 128)):
        pytest.skip("no plan has it")
    data_format = FORMATS[0 if large and three else number // 2 % 2]
    run_tile(dtype, tile, number % 2 + 1, data_format, cases=(0,) if large else (0, 2), precision=precision)


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "dtype, tile", [*TILES, ("bfloat16", simt.TILES[4][0]), ("complex64", simt.TILES[8][0])], ids=name
)
def test_every_tile_on_a_gpu(dtype, tile, rank, data_format):
    run_tile(dtype, tile, rank, data_format, lambda seed: current())


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype, rank, data_format", [
    ("float16", 2, "channels_first"),
    ("float16", 3, "channels_last"),
    ("bfloat16", 2, "channels_last"),
    ("bfloat16", 3, "channels_first"),
    ("complex64", 2, "channels_last"),
    ("complex64", 3, "channels_first"),
])  # fmt: skip
def test_every_dtype_at_every_rank(dtype, rank, data_format):
    run_tile(dtype, simt.TILES[ELEMENTS[dtype].sum_bytes][-1], rank, data_format, cases=(2, 3))


# --- What tiles do not show --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "tanh", "hard_sigmoid"])
def test_fused_activation(name):
    case = Case((2, 9, 4), (3, 4, 8), padding="same")
    case.check_forward(trace(), name)
    case.check_forward(trace(), name, bias=False)


def test_splits_are_added_in_their_order():
    """Many positions and few weights: the gradient is split, and every workspace gives an answer."""
    case = Case((3, 700, 2), (3, 2, 4), padding="same")
    for case.workspace, splits in ((1 << 20, True), (0, False), (24 * 4 * 3, True)):
        runtime = trace()
        with only("float32", simt.TILES[4][-1]):
            case.check_kernel_grad(runtime)
        assert [plan.kernel for plan in runtime.launches] == ["kernel_grad_simt", "reduce_splits"][: 1 + splits]
        if splits:
            assert runtime.launches[1].integers[0] * 24 * 4 <= case.workspace


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_the_same_bits_in_any_order_of_threads(dtype):
    case = Case((3, 300, 2), (3, 2, 4), dtype, padding="same", strides=2)
    results = []
    for seed in (0, 1, 2, 3):
        runtime = EmulatedRuntime(LIMITS, seed=seed)
        arrays = (case.forward(runtime), case.input_grad(runtime), case.kernel_grad(runtime))
        results.append(b"".join(array.tobytes() for array in arrays))
    assert len(set(results)) == 1


@pytest.mark.parametrize("device", ["T4", "RTX 4090", "B200"])
def test_other_architectures(device):
    runtime = EmulatedRuntime(DEVICES[device], mode="trace", seed=1)
    Case((2, 30, 4), (3, 4, 8), "bfloat16", padding="same").check(runtime)


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("strides, dilation_rate", [(2, 1), (3, 2), (2, 2), (4, 6), (1, 3), (7, 1)])
def test_phases_of_a_transposed_convolution(strides, dilation_rate, data_format):
    """Strides and dilations with and without a common factor, strides beyond the kernel, taps that reach nothing."""
    x_shape = (2, 17, 2) if data_format == "channels_last" else (2, 2, 17)
    for padding in ("same", "valid", (5, 1)):
        options = {"strides": strides, "dilation_rate": dilation_rate, "padding": padding, "data_format": data_format}
        Case(x_shape, (3, 2, 2), **options).check_input_grad(trace())


def test_phases_of_two_axes():
    for options in ({"strides": (2, 3)}, {"strides": (2, 3), "dilation_rate": (3, 1)}, {"strides": (1, 4)}):
        Case((1, 9, 10, 2), (3, 2, 2, 2), padding="same", **options).check_input_grad(trace())


@pytest.mark.parametrize("merge", [True, False])
def test_phases_are_the_definition(merge):
    """Every (p, r) that reaches an output is met by exactly one phase, at the place where it belongs."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        k, s, d, n = (int(rng.integers(1, high)) for high in (6, 7, 7, 12))
        pad = (int(rng.integers(0, 4)), int(rng.integers(0, 4)))
        if (merge and s > 1 and d > 1) or (k - 1) * d + 1 > n + sum(pad):
            continue
        shape = geometry.conv_shape((1, n, 1), (k, 1, 1), strides=s, dilation_rate=d, padding=pad)
        found = set()
        written = []
        for phase in transpose.axis_phases(shape, 0, merge):
            for q in range(phase.count):
                for rho in range(phase.phases):
                    u = q * phase.up + rho + phase.shift
                    if not 0 <= u < n:
                        continue
                    written.append(u)
                    for a in range(phase.taps):
                        p = q + a * phase.dilation - phase.pad
                        r = phase.first + rho + (phase.taps - 1 - a) * phase.step
                        if r < k and 0 <= p < shape.out_size[0]:
                            found.add((u, p, r))
        assert sorted(written) == list(range(n)), shape
        _, reads = oracle.reads((n,), (k,), s, (pad,), d)
        assert found == {(i[0], p[0], r[0]) for p, r, i in reads}, shape


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_arrays_that_begin_anywhere(offset):
    """Contiguous views that a 16-byte access could not start at."""

    def shifted(array):
        base = np.full(array.size + offset, np.nan, array.dtype)
        view = base[offset:].reshape(array.shape)
        view[...] = array
        return view

    case = Case((2, 9, 8), (3, 8, 8), padding="same")
    case.x, case.w, case.dy = shifted(case.x), shifted(case.w), shifted(case.dy)
    runtime = trace()
    case.check(runtime)
    (vector,) = {value for key, value in runtime.launches[0].constants if key == "VECX"}
    assert vector == (2 if offset == 2 else 1)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "x_shape, w_shape, options, channels",
    [
        ((2, 6, 32, 3), (2, 4, 3, 24), {"strides": (2, 4)}, 12),  # patches
        ((2, 24, 2), (8, 2, 20), {"strides": 8, "padding": ((0, 9),)}, 16),  # an output that reads padding
        ((2, 25, 2), (8, 2, 20), {"strides": 8}, 2),  # an input that is left over in a row
        ((2, 24, 2), (8, 2, 20), {"strides": 8, "padding": ((1, 7),)}, 2),
        ((2, 24, 4), (8, 2, 20), {"strides": 8, "groups": 2}, 2),
    ],
)
def test_windows_side_by_side_are_runs_of_channels(x_shape, w_shape, options, channels, dtype):
    case = Case(x_shape, w_shape, dtype, **options)
    planned = plan_conv_module._whole_windows(case.shape)
    assert planned.in_channels // planned.groups == channels
    assert prod(planned.x_shape) == prod(x_shape) and planned.y_shape == case.shape.y_shape
    case.check_forward(trace())


def test_inputs_that_no_output_reads_do_not_matter():
    case = Case((1, 23, 4), (2, 4, 8), strides=4)
    never = np.ones(23, bool)
    for _, _, i in oracle.reads((23,), (2,), 4, "valid", 1)[1]:
        never[i] = False
    case.x[:, never] = np.nan
    assert never.sum() > 8
    y, dw = case.forward(trace()), case.kernel_grad(trace())
    case.x[:, never] = 0
    assert_close(y, oracle.conv(case.x, case.w, case.bias, strides=4), dtype="float32", terms=8)
    assert_close(dw, oracle.conv_kernel_grad(case.x, case.dy, case.w.shape, strides=4), dtype="float32", terms=6)


def test_an_input_of_no_positions():
    """Padding alone: every output is the bias."""
    case = Case((2, 0, 3), (2, 3, 4), padding=(2, 1))
    runtime = trace()
    assert np.array_equal(case.forward(runtime), np.broadcast_to(case.bias, case.shape.y_shape))
    assert not case.kernel_grad(runtime).any()


def last_blocks(plan):
    return [plan.grid[0] - 1]


@pytest.mark.parametrize("tile", [(128, 64, 8, 8), (64, 64, 32, 32, 64, 4)], ids=name)
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_indices_beyond_32_bits(data_format, tile):
    """x and y have 2**31 elements and more; only the last block runs, on memory that exists where it is touched."""
    first = data_format == "channels_first"
    n, c = 2**29 + 77, 4
    x_shape = (1, c, n) if first else (1, n, c)
    shape = geometry.conv_shape(x_shape, (3, c, c), padding="same", data_format=data_format)
    x, y = np.zeros(x_shape, np.float16), np.zeros(shape.y_shape, np.float16)
    rng = np.random.default_rng(0)
    w = uniform(rng, (3, c, c), "float16")
    tail = (slice(None), slice(None), slice(n - 300, n)) if first else (slice(None), slice(n - 300, n))
    x[tail] = uniform(rng, x[tail].shape, "float16")
    runtime = EmulatedRuntime(LIMITS, blocks=last_blocks)
    with only("float16", tile):
        conv(runtime, shape, x, w, None, None, y, 0)
    (plan,) = runtime.launches
    assert plan.index_bytes == 8
    whole = oracle.conv(x[tail], w, padding="same", data_format=data_format)
    tile = dict(plan.constants)["BM"]
    rows = n % tile
    actual, expected = (np.moveaxis(a, 1, -1) if first else a for a in (y[tail], whole))
    assert_close(actual[:, -rows:], expected[:, -rows:], dtype="float16", terms=12)
    assert not actual[:, : 300 - rows - tile].any()


@pytest.mark.parametrize("tile", [(128, 64, 8, 8), (32, 32, 4, 4)], ids=name)
@pytest.mark.parametrize("x_shape, data_format", [
    ((2, 64, 16), "channels_last"),
    ((2, 64, 9), "channels_last"),
    ((2, 9, 64), "channels_first"),
])  # fmt: skip
def test_no_bank_conflicts(x_shape, data_format, tile):
    channels = x_shape[1 if data_format == "channels_first" else 2]
    case = Case(x_shape, (3, channels, 64), padding="same", data_format=data_format)
    with only("float32", tile):
        for run in (case.forward, case.input_grad, case.kernel_grad):
            runtime = trace(seed=0)
            run(runtime)
            for plan, result in zip(runtime.launches, runtime.results):
                conflicts = [row for row in result.traffic if row.space == "shared" and row.bank_conflicts]
                assert not conflicts, (plan, conflicts)


@pytest.mark.parametrize("dtype, precision, tile", [
    ("float32", "high", (64, 64, 32, 32, 128, 3)),
    ("float32", "highest", (32, 64, 16, 32, 64, 4)),
    ("float64", "highest", (64, 64, 32, 32, 128, 3)),
])  # fmt: skip
def test_no_bank_conflicts_on_tensor_cores(dtype, precision, tile):
    """Of copies of whole vectors, and of fragments in both data formats; and global memory in whole sectors.

    Results are not looked at: of the pairs that wait in shared memory the compiler takes some apart.
    """
    for data_format, kinds in (("channels_last", ("ld", "cp", "st.global")), ("channels_first", ("ld",))):
        case = Case((2, 64, 64), (1, 64, 64), dtype, data_format=data_format)
        case.precision = precision
        with only(dtype, tile):
            runtime = trace(seed=0)
            case.forward(runtime, bias=False)
        found = [row for row in runtime.traffic if row.instruction.startswith(kinds)]
        wrong = [row for row in found if row.bank_conflicts or row.sectors != row.least_sectors]
        assert {row.space for row in found} >= {"shared"} and not wrong, "\n".join(map(str, wrong))


def test_memory_is_read_in_full_sectors():
    """16-byte accesses, no bank conflicts, and no byte of x, w or y fetched in vain."""
    case = Case((2, 256, 16), (1, 16, 64), padding="same")
    with only("float32", (128, 64, 8, 8)):
        runtime = trace(seed=0)
        case.check_forward(runtime)
    shared = [row for row in runtime.traffic if row.space == "shared"]
    assert shared and not sum(row.bank_conflicts for row in shared)
    wide = [row for row in runtime.traffic if row.space == "global" and row.bytes // row.requests == 16 * 32]
    assert sum(row.bytes for row in wide) >= case.x.nbytes + case.w.nbytes + case.dy.nbytes
    assert all(row.sectors == row.least_sectors for row in wide)


# --- Plans -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ELEMENTS)
def test_plans_for_every_device(dtype, device):
    """Blocks cover the result, limits hold, wide indices where sizes need them, a reason and rejected alternatives."""
    shapes = [
        geometry.conv_shape((8, 16384, 128), (2, 128, 256), padding="causal", dilation_rate=512),
        geometry.conv_shape((64, 56, 56, 64), (3, 3, 64, 64), padding="same"),
        geometry.conv_shape((1, 3, 300, 300, 300), (3, 3, 3, 3, 8), data_format="channels_first", padding="same"),
        geometry.conv_shape((1, 70000, 65536), (3, 1, 65536), groups=65536, padding="same"),
        geometry.conv_shape((2**31, 4, 1), (2, 1, 1)),
        geometry.conv_shape((1, 10, 3), (2, 3, 5)),
    ]
    limits = DEVICES[device]
    for shape in shapes:
        plan = plan_conv_module.plan_conv(shape, dtype, "relu", (0, 0, 0), limits)
        constants = dict(plan.constants)
        if plan.kernel in ("conv_simt", "conv_mma"):
            rows = -(-shape.batch * prod(shape.out_size) // constants["BM"])
            columns = -(-(shape.filters // shape.groups) // constants["BN"])
            assert prod(plan.grid) == rows * columns * shape.groups
        assert plan.grid[0] < 2**31 and plan.shared_bytes <= limits.shared_bytes and plan.threads <= 1024
        elements = max(prod(shape.x_shape), prod(shape.y_shape))
        assert plan.index_bytes == 8 if elements >= 2**31 else True
        assert plan.reason and plan.rejected and str(plan)
        assert plan.cost.flops >= plan.cost.least_flops > 0 and np.isfinite(plan.cost.seconds)
        grad = plan_conv_module.plan_kernel_grad(shape, dtype, (0, 0, 0), 64 << 20, limits)
        splits = 1 if grad.reduce is None else grad.reduce.integers[0]
        whole, chunk = grad.grad.integers[:2]  # of positions, or of boxes of them
        assert whole == shape.batch * prod(shape.out_size) or grad.grad.kernel == "kernel_grad_wgmma"
        assert (splits - 1) * chunk < whole <= splits * chunk
        assert grad.partial * ELEMENTS[dtype].sum_bytes <= 64 << 20
        assert transpose.plan_transpose(shape, dtype, "linear", (0, 0, 0), limits).parts


def test_plans_depend_on_what_they_are_told():
    """A narrow problem gets a narrow tile, a small one small tiles; channels and alignment set the accesses' width."""

    def constants(x_shape, w_shape, aligned=(0, 0, 0), **options):
        shape = geometry.conv_shape(x_shape, w_shape, **options)
        return dict(plan_conv_module.plan_conv(shape, "float32", "linear", aligned, LIMITS).constants)

    large = constants((64, 2048, 128), (3, 128, 128))
    assert (large["BM"], large["BN"], large["VECX"], large["VECW"], large["VECY"]) == (128, 128, 4, 4, 4)
    assert constants((64, 2048, 128), (3, 128, 16))["BN"] == 16
    small = constants((1, 1500, 64), (3, 64, 64))
    assert small["BM"] * small["BN"] < 128 * 128
    assert constants((64, 2048, 126), (3, 126, 128))["VECX"] == 2
    assert constants((64, 2048, 128), (3, 128, 128), aligned=(2, 1, 3))["VECX"] == 2
    assert constants((64, 128, 2048), (3, 128, 128), data_format="channels_first")["VECX"] == 1
