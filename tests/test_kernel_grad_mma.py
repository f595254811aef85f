"""kernel_grad_mma: its real PTX on the CPU, against the oracle; its mistakes; what ptxas makes of it.

Sizes are chosen around the edges of the tile that is tested: rows of taps and channels, filters, and positions that end
inside a step, in one split and in several. TF32 products are held to the error of float on inputs rounded to TF32, so a
wrong rounding shows as much as a wrong product.
"""

import dataclasses
import functools
import math
from contextlib import contextmanager
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from planted import WRONG, planted, what_catches
from test_conv_kernels import Case, around, name

import cuconv.cuda.conv as engine
from cuconv.cuda.runtime import current, kernel_directory, probe
from cuconv.geometry import CHANNELS_LAST, ConvShape, conv_shape
from cuconv.plan import conv as conv_plans
from cuconv.plan.conv import LEAST_CHUNK, KernelGradPlan
from cuconv.plan.devices import DEVICES
from cuconv.plan.reduce import plan_reduce
from cuconv.plan.simt import Product
from cuconv.plan.types import ELEMENTS, MAX_GRID_X, WARP, DeviceLimits, LaunchPlan, PlanError, vector


@pytest.fixture(autouse=True)
def where_it_can_run(request):
    """A machine with a GPU need not have what the emulator takes."""
    if emulator.missing() and not request.node.get_closest_marker("gpu"):
        pytest.skip(emulator.missing())


# --- The plan ----------------------------------------------------------------------------------------------------

# Rows and columns of a block's tile, then of a warp's.
TILES = (
    (128, 128, 64, 32),  # 256 threads, 64 sums each
    (128, 64, 64, 32),  # 128 threads: narrow, and as many sums a thread
    (64, 64, 32, 32),  # 128 threads, more blocks
    (64, 32, 32, 16),  # few filters
)
LARGE = (128, 256, 64, 64)  # 256 threads of 128 sums: for 16-bit copies of pairs at least, others spill
MOST_TAPS = 4  # rows of a thread whose taps fit its registers


def plan_kernel_grad_mma(
    shape: ConvShape,
    dtype: str,
    aligned: tuple[int, ...],
    workspace: int,
    limits: DeviceLimits,
    asked: str = "highest",
    *,
    tile: tuple[int, int, int, int],
    precision: int = 1,
    splits: int | None = None,
    stages: int | None = None,
    step_bytes: int | None = None,
) -> KernelGradPlan:
    """The plan of a kernel gradient on tensor cores; arguments as :func:`cuconv.plan.conv.plan_kernel_grad`.

    Args:
        tile: one of TILES, or LARGE.
        precision: of float32: 1 for TF32, 3 for three products of it.
        splits: parts of the positions, at most; None lets the number of blocks decide.
        stages: of shared memory; None: 4, or 3 where two blocks would not fit a multiprocessor.
        step_bytes: of the positions of one step, 64 or 128; None: 128 of double, which needs them, 64 of all others.
    """
    step_bytes = step_bytes or (128 if dtype == "float64" else 64)
    if limits.capability < (8, 0):
        raise PlanError(f"`limits` must be of a device with capability 8.0 or newer. Received: {limits.name}")
    with mock.patch.object(conv_plans, "plan_on_warpgroups", side_effect=PlanError("by warps")):
        simt = conv_plans.plan_kernel_grad.__wrapped__(shape, dtype, aligned, workspace, limits).grad
    known, element = dict(simt.constants), ELEMENTS[dtype]
    last = shape.data_format == CHANNELS_LAST
    bm, bn, wm, wn = tile
    bk, threads = step_bytes // element.bytes, bm // wm * (bn // wn) * WARP
    if tile == TILES[0] and element.bytes == 4 and precision == 3 and simt.index_bytes == 8:
        raise PlanError(f"`tile` must be smaller for wide indices and precision 3: registers. Received: {tile}")
    channels, columns = shape.in_channels // shape.groups, shape.filters // shape.groups
    rows, positions = math.prod(shape.kernel_size) * channels, shape.batch * math.prod(shape.out_size)
    count = rows * shape.filters

    # Where taps and padding move nothing, all axes are one.
    in_size, out_size = shape.in_size, shape.out_size
    if max(shape.kernel_size) == 1 and max(shape.strides) == 1 and in_size == out_size:
        in_size = out_size = (*(1 for _ in in_size[1:]), math.prod(in_size))
    if last:
        vector_x = vector(element.bytes, channels, aligned[0])
        vector_d = vector(element.bytes, columns, aligned[1])
    else:
        # Neighbouring positions are one access where taps, padding and rows keep it whole and on its boundary.
        shift = shape.dilation_rate[-1] if shape.kernel_size[-1] > 1 else 0
        vector_x = vector(element.bytes, in_size[-1], out_size[-1], shape.pad_before[-1], shift, aligned[0])
        vector_x = vector_x if shape.strides[-1] == 1 else 1
        vector_d = vector(element.bytes, math.prod(out_size), aligned[1])

    if tile == LARGE and (element.bytes != 2 or simt.index_bytes == 8 or min(vector_x, vector_d) < 2):
        raise PlanError(f"`tile` must be smaller for {dtype}, wide indices or narrow copies. Received: {tile}")
    blocks_m, blocks_n = -(-rows // bm), -(-columns // bn)
    blocks = blocks_m * blocks_n * shape.groups
    if splits is None:
        most = max(1, min(positions // LEAST_CHUNK, workspace // (count * element.sum_bytes)))
        splits = Product(rows, columns, positions, shape.groups, most).splits(blocks, limits)
    chunk = -(-positions // (splits * bk)) * bk
    splits = -(-positions // chunk)
    target_bytes, target_aligned = (element.sum_bytes, 0) if splits > 1 else (element.bytes, aligned[2])

    if blocks * splits > MAX_GRID_X:
        raise PlanError(f"{blocks * splits} blocks are more than a grid has")
    one_tap = channels % bm == 0
    thread_rows = bm * bk // (vector_x * threads)
    table = 0
    if not one_tap and thread_rows > MOST_TAPS:
        table = bm // (vector_x if last else 1) * simt.index_bytes * (2 if shape.rank == 1 else 4)
    stage = bk * (bm + bn) * element.bytes
    if stages is None:
        stages = 4 if 2 * (4 * stage + table + 1024) <= limits.shared_bytes_per_multiprocessor else 3
    shared_bytes = stages * stage + table
    # With 128 registers two blocks of 256 threads are resident; 16-bit copies of whole vectors leave that many.
    wide = last and element.bytes == 2 and simt.index_bytes == 4 and min(vector_x, vector_d) >= 4
    min_blocks = 2 if threads == 256 and wide and tile != LARGE else 1
    grad = LaunchPlan(
        kernel="kernel_grad_mma",
        constants=(
            *((key, known[key]) for key in ("ELEMENT", "INDEX", "RANK", "CHANNELS_FIRST")),
            ("SPLIT", int(splits > 1)),
            ("ONE_TAP", int(one_tap)),
            ("BM", bm),
            ("BN", bn),
            ("BK", bk),
            ("WM", wm),
            ("WN", wn),
            ("PRECISION", precision),
            ("STAGES", stages),
            ("VECX", vector_x),
            ("VECD", vector_d),
            ("VECW", vector(target_bytes, columns, target_aligned)),
            ("MIN_BLOCKS", min_blocks),
        ),
        integers=(
            positions,
            chunk,
            rows,
            columns,
            blocks_m,
            blocks_n,
            shape.groups,
            channels,
            *in_size,
            *out_size,
            *shape.kernel_size,
            *shape.strides,
            *shape.dilation_rate,
            *shape.pad_before,
        ),
        grid=(blocks * splits, 1, 1),
        block=(threads, 1, 1),
        index_bytes=simt.index_bytes,
        shared_bytes=shared_bytes,
        dynamic_shared_bytes=shared_bytes,
        reason=f"tile {bm}x{bn}, {wm}x{wn} a warp; {splits} parts of {chunk} positions",
    )
    if splits == 1:
        return KernelGradPlan(grad, None, 0)
    return KernelGradPlan(grad, plan_reduce(dtype, splits, count, aligned[2], limits), splits * count)


@contextmanager
def on_tensor_cores(tile, precision=1, splits=1, stages=3, step_bytes=None):
    """The engine's kernel gradient runs on tensor cores, with this tile."""
    options = {"precision": precision, "splits": splits, "stages": stages, "step_bytes": step_bytes}
    plan = functools.partial(plan_kernel_grad_mma, tile=tile, **options)
    with mock.patch.object(engine, "plan_kernel_grad", plan):
        yield


# --- Parity ------------------------------------------------------------------------------------------------------

A100 = DEVICES["A100"]
KINDS = (("float16", 1), ("bfloat16", 1), ("float32", 1), ("float32", 3), ("float64", 1))  # dtype, precision
FORMATS = ("channels_last", "channels_first")


def trace(seed=1, limits=A100):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def rounded_to_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest numbers of 11 significant bits, ties away from zero."""
    return ((np.ascontiguousarray(x, np.float32).view(np.uint32) + 0x1000) & ~np.uint32(0x1FFF)).view(np.float32)


def check(case: Case, runtime, precision: int) -> np.ndarray:
    """The kernel gradient of the engine, after it was compared with the oracle's."""
    x, dy = case.x, case.dy
    if case.dtype == "float32" and precision == 1:
        x, dy = rounded_to_tf32(x), rounded_to_tf32(dy)
    expected = oracle.conv_kernel_grad(x.astype(np.float64), dy.astype(np.float64), case.w.shape, **case.options)
    actual = case.kernel_grad(runtime)
    terms = max(1, case.dy.size // case.w.shape[-1])
    assert_close(actual, expected, dtype=case.dtype, terms=terms, what="kernel gradient")
    return actual


def tile_cases(tile, rank, data_format):
    """(x_shape, w_shape, splits, options) that meet every edge of `tile`, wide copies first."""
    bm, bn, *_ = tile
    first = data_format == "channels_first"

    def shapes(batch, sizes, channels, taps, filters, groups=1):
        x = (batch, channels, *sizes) if first else (batch, *sizes, channels)
        return x, (*taps, channels // groups, filters)

    base = {"data_format": data_format}
    taps = (3, 2, 2)[-rank:] if rank < 3 else (2, 1, 2)
    count = math.prod(taps)
    # Rows of several taps in a tile, a vector more than it has; a vector of filters more; two splits end inside a step.
    yield *shapes(2, around(rank, 43), bm // count // 8 * 8 + 8, taps, bn + 8), 2, {**base, "padding": "same"}
    # Every tile of rows has one tap; all even.
    yield *shapes(2, around(rank, 48), bm, (1,) * (rank - 1) + (2,), bn), 1, {**base, "padding": "same"}
    # Neighbouring positions that stay together in channels_first: no taps, and taps and padding of whole vectors.
    yield *shapes(1, (2,) * (rank - 1) + (40,), bm + 8, (1,) * rank, bn), 1, base
    yield *shapes(2, (3,) * (rank - 1) + (64,), 24, (2,) * (rank - 1) + (3,), 16), 2, {
        **base, "padding": "same", "dilation_rate": (1,) * (rank - 1) + (8,)
    }  # fmt: skip
    # Nothing fits: odd channels, one filter more, strides; pairs of channels, groups, dilation.
    yield *shapes(2, around(rank, 75), bm // count | 1, taps, bn + 1), 3, {**base, "padding": "same", "strides": 2}
    yield *shapes(1, around(rank, 37), 12, taps, 20, 2), 1, {**base, "padding": "same", "groups": 2, "dilation_rate": 2}
    # A step has many times the positions of a batch item; one position.
    yield *shapes(50, (2,) * rank, 4, (2,) * rank, 4), 2, {**base, "padding": "same"}
    yield *shapes(1, (1,) * rank, 1, (1,) * rank, 1), 1, base
    if rank == 1:
        yield *shapes(2, (5,), 2, (3,), 2), 1, {**base, "padding": "causal", "dilation_rate": 7}
        yield *shapes(1, (11,), 2, (2,), 3), 1, {**base, "padding": (3, 4), "strides": 5}
        yield *shapes(1, (16 * 9 + 3,), 8, (3,), 8), 1, {**base, "strides": 8, "padding": (8, 0)}


def run_tile(dtype, precision, tile, rank, data_format, seeds=None, only=slice(None), make_runtime=trace, **plan):
    """Every case under `seeds`, by default each under one of its own; `plan`: arguments of on_tensor_cores."""
    for number, (x_shape, w_shape, splits, options) in list(enumerate(tile_cases(tile, rank, data_format)))[only]:
        case = Case(x_shape, w_shape, dtype, seed=number, **options)
        bits = set()
        for seed in seeds or (number + 1,):
            runtime = make_runtime(seed)
            try:
                with on_tensor_cores(tile, precision, splits, **plan):
                    bits.add(check(case, runtime, precision).tobytes())
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {getattr(runtime, 'launches', ())[-1:]}")
                raise
            if isinstance(runtime, EmulatedRuntime):
                kernels = ["kernel_grad_mma", "reduce_splits"][: 1 + dict(runtime.launches[0].constants)["SPLIT"]]
                assert [each.kernel for each in runtime.launches] == kernels
        assert len(bits) == 1, f"x {x_shape}, w {w_shape}, {options}: other bits with another order of threads"


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_every_edge(dtype, precision, data_format):
    run_tile(dtype, precision, TILES[-1], 1, data_format)


@pytest.mark.parametrize("tile", TILES[:-1], ids=name)
@pytest.mark.parametrize("dtype, precision", [KINDS[1], KINDS[3]])
def test_every_tile(dtype, precision, tile):
    run_tile(dtype, precision, tile, 1, "channels_last", only=slice(0, 5, 4))


def test_the_large_tile():
    run_tile("bfloat16", 1, LARGE, 1, "channels_last", only=slice(0, 2))
    run_tile("float16", 1, LARGE, 2, "channels_first", only=slice(2, 4))
    with pytest.raises(PlanError, match="`tile` must be smaller for float32"):
        run_tile("float32", 1, LARGE, 1, "channels_last", only=slice(0, 1))


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("data_format", FORMATS)
def test_every_rank(rank, data_format):
    run_tile("bfloat16", 1, TILES[-1], rank, data_format, only=slice(0, 7))


@pytest.mark.parametrize("stages", [2, 4])
def test_every_number_of_stages(stages):
    run_tile("float16", 1, TILES[-1], 1, "channels_last", only=slice(0, 1), stages=stages)


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype, precision", KINDS[1:4])
def test_longer_steps(dtype, precision, data_format):
    run_tile(dtype, precision, TILES[2], 2, data_format, only=slice(0, 5, 2), step_bytes=128)


@pytest.mark.exhaustive
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("number", range(len(TILES)), ids=lambda number: name(TILES[number]))
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_every_tile_of_every_kind(dtype, precision, number, data_format):
    """Every rank with some tile: it is compiling that takes time."""
    run_tile(dtype, precision, TILES[number], number % 3 + 1, data_format)


@pytest.mark.gpu
@pytest.mark.skipif(not probe().usable, reason=probe().reason)
@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("tile", TILES, ids=name)
@pytest.mark.parametrize("dtype, precision", KINDS)
def test_every_tile_on_a_gpu(dtype, precision, tile, rank, data_format):
    run_tile(dtype, precision, tile, rank, data_format, make_runtime=lambda seed: current())


@pytest.mark.parametrize("data_format", FORMATS)
@pytest.mark.parametrize("dtype, precision", KINDS[1:])
def test_the_same_bits_in_any_order_of_threads(dtype, precision, data_format):
    run_tile(dtype, precision, TILES[-1], 1, data_format, seeds=(1, 2, 3, 4), only=slice(0, 1))


@pytest.mark.parametrize("device", ["RTX 4090", "H200", "B200"])
def test_other_architectures(device):
    case = Case((2, 61, 24), (3, 24, 40), "bfloat16", padding="same")
    with on_tensor_cores(TILES[2], splits=2):
        check(case, trace(limits=DEVICES[device]), 1)


def test_no_plan_for_older_devices():
    with pytest.raises(PlanError, match="`limits` must be of a device with capability 8.0 or newer. Received: T4"):
        plan_kernel_grad_mma(conv_shape((1, 9, 8), (3, 8, 8)), "float16", (0, 0, 0), 0, DEVICES["T4"], tile=TILES[0])


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_arrays_that_begin_anywhere(offset):
    """Contiguous views that a 16-byte copy could not start at."""

    def shifted(array):
        base = np.full(array.size + offset, np.nan, array.dtype)
        view = base[offset:].reshape(array.shape)
        view[...] = array
        return view

    case = Case((2, 29, 8), (3, 8, 8), "bfloat16", padding="same")
    case.x, case.dy = shifted(case.x), shifted(case.dy)
    runtime = trace()
    with on_tensor_cores(TILES[-1]):
        check(case, runtime, 1)
    constants = dict(runtime.launches[0].constants)
    assert constants["VECX"] == constants["VECD"] == offset


def test_indices_of_64_bits(monkeypatch):
    monkeypatch.setattr(conv_plans, "index_bytes", lambda *extents: 8)
    conv_plans.plan_kernel_grad.cache_clear()
    try:
        for data_format in FORMATS:
            run_tile("bfloat16", 1, TILES[-1], 3, data_format, only=slice(0, 5, 4))
    finally:
        conv_plans.plan_kernel_grad.cache_clear()


def test_numbers_of_other_splits_do_not_matter():
    """An infinity belongs to the sums of its own split, and of the taps that meet it."""
    case = Case((1, 90, 4), (1, 4, 8), "bfloat16")
    case.x[0, 40, 1] = np.inf
    case.dy[0, 40] = 1
    with on_tensor_cores(TILES[-1], splits=3):
        actual = case.kernel_grad(trace())
    assert np.isposinf(actual[0, 1].astype(np.float32)).all()
    assert np.isfinite(actual[0, [0, 2, 3]].astype(np.float32)).all()


# --- Accuracy ----------------------------------------------------------------------------------------------------


def over_magnitudes(rng, shape) -> np.ndarray:
    """Numbers of both signs between 1e-6 and 1e6, as many in every decade."""
    return (rng.choice([-1, 1], shape) * 10.0 ** rng.uniform(-6, 6, shape)).astype(np.float32)


def errors(case: Case, precision: int | None) -> tuple[float, float]:
    """The largest error against float64, and its root mean square, of sums of absolute products; None: SIMT."""
    x, dy = case.x.astype(np.float64), case.dy.astype(np.float64)
    expected = oracle.conv_kernel_grad(x, dy, case.w.shape, **case.options)
    size = oracle.conv_kernel_grad(abs(x), abs(dy), case.w.shape, **case.options)
    runtime = EmulatedRuntime(A100)
    if precision is None:
        actual = case.kernel_grad(runtime)
    else:
        with on_tensor_cores(TILES[2], precision):
            actual = case.kernel_grad(runtime)
    off = np.abs(actual - expected) / size
    return float(off.max()), float(np.sqrt(np.mean(off**2)))


@pytest.mark.parametrize("data", ["uniform", "magnitudes"])
def test_three_products_are_as_exact_as_float(data, record_property):
    """With sums of mma in float, one product after the other; a GPU's tensor cores have rules of their own."""
    case = Case((2, 200, 32), (3, 32, 64), "float32", padding="same")
    case.workspace = 0
    if data == "magnitudes":
        rng = np.random.default_rng(5)
        case.x, case.dy = over_magnitudes(rng, case.x.shape), over_magnitudes(rng, case.dy.shape)
    found = {which: errors(case, which) for which in (None, 3, 1)}
    record_property("errors", found)
    print(data, found)
    assert found[3][0] <= found[None][0] and found[3][1] <= found[None][1], found
    assert found[1][0] > 20 * found[3][0], found


# --- Memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits, step_bytes", [(1, 64), (2, 64), (1, 128)])
@pytest.mark.parametrize("tile", (*TILES, LARGE), ids=name)
@pytest.mark.parametrize("dtype, precision, data_format", [
    ("bfloat16", 1, "channels_last"),
    ("float32", 1, "channels_last"),
    ("bfloat16", 1, "channels_first"),
    ("float32", 3, "channels_first"),
    ("float64", 1, "channels_last"),
    ("float64", 1, "channels_first"),
])  # fmt: skip
def test_no_bank_conflicts_and_whole_sectors(dtype, precision, data_format, tile, splits, step_bytes):
    """Of copies, fragments and results; and every sector that is moved is moved whole."""
    bm, bn, *_ = tile
    x_shape, taps = ((2, 64, bm), (3,)) if data_format == CHANNELS_LAST else ((2, bm, 64), (1,))
    if (tile == LARGE and dtype.endswith(("32", "64"))) or (dtype == "float64" and step_bytes == 64):
        pytest.skip("not for this dtype")
    case = Case(x_shape, (*taps, bm, bn), dtype, padding="same", data_format=data_format)
    runtime = trace(seed=0)
    with on_tensor_cores(tile, precision, splits, step_bytes=step_bytes):
        check(case, runtime, precision)
    traffic = runtime.results[0].traffic
    assert {row.space for row in traffic} == {"shared", "global"}
    wrong = [row for row in traffic if row.bank_conflicts or row.sectors != row.least_sectors]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("dtype, channels", [("bfloat16", 4), ("float32", 2), ("bfloat16", 12), ("bfloat16", 2)])
@pytest.mark.parametrize("tile", TILES[::3], ids=name)
def test_no_bank_conflicts_of_narrow_copies(tile, dtype, channels):
    """Copies of 4 and 8 bytes, and the table of taps."""
    case = Case((2, 64, channels), (9, channels, tile[1]), dtype, padding="same")
    runtime = trace(seed=0)
    with on_tensor_cores(tile):
        check(case, runtime, 1)
    wrong = [row for row in runtime.traffic if row.bank_conflicts]
    assert not wrong, "\n".join(map(str, wrong))


# --- Planted bugs ------------------------------------------------------------------------------------------------

FILE = "kernel_grad_mma.cu"
BARRIER = "    ptx::copy_async_wait<STAGES - 2>();\n    __syncthreads();\n"

# What is wrong: file, text, what becomes of it, dtype, and what must catch it.
PLANTS = {
    "waits for one group too few": (FILE, "copy_async_wait<STAGES - 2>", "copy_async_wait<STAGES - 1>", "bfloat16",
                                    {"race"}),
    "copies too early": (FILE, BARRIER + "    const bool more = left >= STAGES;\n    if (more) fetch(ahead);\n",
                         "    const bool more = left >= STAGES;\n    if (more) fetch(ahead);\n" + BARRIER, "bfloat16",
                         {"race"}),
    "no barrier in the loop": (FILE, BARRIER, BARRIER.replace("    __syncthreads();\n", ""), "bfloat16", {"race"}),
    "no barrier behind the table": (FILE, "i * TOGETHER);\n    __syncthreads();",
                                    "i * TOGETHER);", "odd", {"race"}),
    "no barrier before the results": (FILE, "    __syncthreads();\n    const auto ys", "    const auto ys", "results",
                                      {"race"}),
    "no barrier behind the results": (FILE, "    __syncthreads();\n    for (int at", "    for (int at", "bfloat16",
                                      {"race"}),
    "one stage too few": (FILE, "ahead = (STAGES - 1) * STAGE_BYTES;", "ahead = (STAGES - 2) * STAGE_BYTES;",
                          "bfloat16", {"race"}),
    "stored into what is read": (FILE, "if (more) put(ahead);", "if (more) put(stage);", "odd", {"race"}),
    "no zero fill of x": (FILE, "p.x + (origin + offset), inside)", "p.x + (origin + offset), true)", "bfloat16",
                          {"bounds"}),
    "no zero fill of dy": (FILE, "d_from + i * D_STEP * d_pitch, inside)", "d_from + i * D_STEP * d_pitch, true)",
                           "bfloat16", {"bounds"}),
    "positions of the next split": (FILE, "bool inside = x_left > 0;", "bool inside = true;", "bfloat16", {"bounds"}),
    "x is not swizzled": (FILE, "return swizzle<XS_ROW, WORDS>(k, row0 * int(sizeof(E))) ^ i",
                          "return (k * XS_ROW + row0 * int(sizeof(E))) ^ i", "bfloat16", {WRONG}),
    "words of x are swizzled as chunks": (FILE, "return swizzle<XS_ROW, WORDS>(k, row0",
                                          "return swizzle<XS_ROW>(k, row0", "float32", {WRONG}),
    "dy is not swizzled": (FILE, "X_BYTES + swizzle<WS_ROW, WORDS>(d_row + turned, d_column * int(sizeof(E)))",
                           "X_BYTES + (d_row + turned) * WS_ROW + d_column * int(sizeof(E))", "bfloat16", {WRONG}),
    "fragments of x not transposed": (FILE, "ptx::load_matrices_transposed(a[i]", "ptx::load_matrices(a[i]", "bfloat16",
                                      {WRONG}),
    "an axis that never carries": (FILE, "(carry ? p.stride[a] : 0)", "0", "two axes", {"bounds"}),
    "a carry that stays in its row": (FILE, "if (carry) window[a] -= back[a], origin += wrap[a];",
                                      "if (carry) window[a] -= back[a];", "strided", {"bounds"}),
    "two columns exchanged": (FILE, "[i % 2 * 2 + (e + u) / W_RUN]", "[i % 2 * 2 + 1 - (e + u) / W_RUN]", "float32",
                              {WRONG}),
    "one row too many": (FILE, "if (m >= p.rows || n >= p.columns) continue;",
                         "if (m > p.rows || n >= p.columns) continue;", "bfloat16", {"bounds"}),
    "the small products forgotten": ("mma.cuh", "ptx::multiply_tf32(sum, a[q][i], rest_b[q]);", "", "3xTF32", {WRONG}),
    "words of double as chunks": (FILE, "swizzle<XS_ROW, WORDS>(row0 + turned,", "swizzle<XS_ROW>(row0 + turned,",
                                  "double", {WRONG}),
    "two rows of double exchanged": (FILE, "a[i / 2][i % 2 + half * 2] = word", "a[i / 2][1 - i % 2 + half * 2] = word",
                                     "double", {WRONG}),
    "one split lost": ("parts.cuh", "s < splits", "s < splits - 1", "split", {WRONG}),
    "a split in another's place": (FILE, "p.dw + part * p.rows * filters", "p.dw + part / 2 * p.rows * filters",
                                   "split", {"race"}),
}  # fmt: skip

# Every kind of plant has a case: arguments of Case, splits, precision.
PLANT_CASES = {
    "bfloat16": (((2, 141, 24), (3, 24, 40), "bfloat16"), {}, 1, 1),
    "results": (((2, 109, 24), (3, 24, 40), "bfloat16"), {}, 1, 1),
    "strided": (((2, 141, 24), (3, 24, 40), "bfloat16"), {"strides": 2}, 1, 1),
    "odd": (((2, 141, 7), (3, 7, 9), "bfloat16"), {}, 1, 1),
    "two axes": (((2, 11, 9, 24), (3, 2, 24, 40), "bfloat16"), {}, 1, 1),
    "float32": (((2, 70, 24), (3, 24, 40), "float32"), {}, 1, 1),
    "3xTF32": (((2, 70, 24), (3, 24, 40), "float32"), {}, 1, 3),
    "split": (((2, 141, 24), (3, 24, 40), "bfloat16"), {}, 3, 1),
    "double": (((2, 24, 70), (3, 24, 40), "float64"), {"data_format": "channels_first"}, 1, 1),
}


def run_planted(kind, limits=A100):
    arguments, options, splits, precision = PLANT_CASES[kind]
    case = Case(*arguments, padding="same", **options)
    with on_tensor_cores(TILES[-1], precision, splits):
        check(case, EmulatedRuntime(limits, mode="trace", seed=1, timeout=5.0), precision)


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_bug_is_caught(plant):
    file, right, wrong, kind, expected = PLANTS[plant]
    with planted(file, right, wrong):
        caught = what_catches(run_planted, kind)
    assert expected <= caught, caught


@pytest.mark.parametrize("kind", PLANT_CASES)
def test_without_a_bug_nothing_is_caught(kind):
    assert what_catches(run_planted, kind) == set()


def test_a_split_that_is_not_launched():
    """Its partial sums are what the reduction finds uninitialised."""
    right = plan_kernel_grad_mma

    def lost(*arguments, **options):
        plan = right(*arguments, **options)
        blocks = plan.grad.grid[0] // plan.reduce.integers[0]
        return dataclasses.replace(plan, grad=dataclasses.replace(plan.grad, grid=(plan.grad.grid[0] - blocks, 1, 1)))

    case = Case((2, 141, 24), (3, 24, 40), "bfloat16", padding="same")
    with (
        mock.patch.object(engine, "plan_kernel_grad", functools.partial(lost, tile=TILES[-1], splits=3)),
        pytest.raises(emulator.EmulationError) as caught,
    ):
        case.kernel_grad(trace())
    assert {report.kind for report in caught.value.reports} == {"uninitialised"}


# --- Machine code ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Gate:
    """What must hold for a tile and a kind: registers at most, and the share of HMMA in the main loop at least."""

    dtype: str
    precision: int
    tile: tuple[int, int, int, int]
    registers: int
    share: float


GATES = (
    Gate("bfloat16", 1, TILES[0], 128, 0.29),
    Gate("bfloat16", 1, LARGE, 232, 0.42),
    Gate("bfloat16", 1, TILES[1], 168, 0.26),
    Gate("bfloat16", 1, TILES[2], 128, 0.18),
    Gate("bfloat16", 1, TILES[3], 96, 0.09),
    Gate("float32", 1, TILES[0], 168, 0.08),
    Gate("float32", 3, TILES[0], 248, 0.20),  # one block of 256 threads a multiprocessor, as with 256
    Gate("float32", 3, TILES[2], 160, 0.12),
)


def compiled(shape: ConvShape, gate: Gate, limits: DeviceLimits):
    plan = plan_kernel_grad_mma(
        shape, gate.dtype, (0, 0, 0), 1 << 30, limits, tile=gate.tile, precision=gate.precision, stages=4
    ).grad
    cubin = emulator.compile_cubin(kernel_directory() / f"{plan.kernel}.cu", limits.arch, dict(plan.constants))
    return plan, disassembly.functions(cubin)[plan.kernel]


@pytest.mark.skipif(disassembly.missing() is not None, reason=str(disassembly.missing()))
@pytest.mark.parametrize("device", ["A100", "RTX 4090", "H200"])
@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.dtype} {gate.precision} {name(gate.tile)}")
def test_gate(gate, device):
    """3 x 3, rows of one tap and rows of many, 16 bytes a copy: no stack, copies ahead, one barrier a step."""
    for channels in (256, 96):
        shape = conv_shape((32, 64, 64, channels), (3, 3, channels, 256), padding="same")
        plan, function = compiled(shape, gate, DEVICES[device])
        loop = function.main_loop("HMMA")
        assert not function.stack_bytes and not function.spills, plan
        assert function.registers <= gate.registers, (plan, function.registers)
        assert loop.share("HMMA") >= gate.share, (plan, loop.share("HMMA"), loop.mix())
        copies, steps = loop.count("LDGSTS", "128"), loop.count("BAR")
        assert copies == loop.count("LDGSTS") and copies and not loop.count("LDG") and not loop.count("STS"), loop.mix()
        if gate.dtype == "float32":
            assert loop.count("LDS") == loop.count("LDS", "128") + loop.count("LDS", "64") > 0, loop.mix()
        else:
            assert loop.count("LDSM", "MT88") == loop.count("LDSM") > 0, loop.mix()
        # It waits for the oldest of the groups under way and no other: all but STAGES - 2.
        waits = [each.operands.replace(" ", "") for each in loop.instructions if each.name == "DEPBAR"]
        assert waits == ["SB0,0x2"] * steps, waits
