"""Every shape and padding rule by literal numbers, every shape error by its text, and the rules by exhaustion."""

import itertools
from collections import Counter

import numpy as np
import oracle
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from strategies import examples

from cuconv import geometry
from cuconv.geometry import conv_shape, depthwise_shape, halo, transpose_shape

BIG = 5_000_000_000  # past 2**32; every number below that contains it was worked out by hand

# --- One axis of a convolution -----------------------------------------------------------------------------------

#      id                             n    k  s  d  padding   length  before  after
CONV_AXES = [
    ("valid",                         8,   3, 1, 1, "valid",  6,      0,      0),
    ("valid-exact-fit",               3,   3, 1, 1, "valid",  1,      0,      0),
    ("valid-stride-drops-tail",       8,   3, 4, 1, "valid",  2,      0,      0),
    ("valid-dilated",                 8,   3, 1, 2, "valid",  4,      0,      0),
    ("valid-dilated-strided",         11,  3, 3, 4, "valid",  1,      0,      0),
    ("valid-k1-stride",               7,   1, 3, 1, "valid",  3,      0,      0),
    ("same-odd",                      8,   3, 1, 1, "same",   8,      1,      1),
    ("same-even-extra-at-end",        8,   4, 1, 1, "same",   8,      1,      2),
    ("same-k2",                       8,   2, 1, 1, "same",   8,      0,      1),
    ("same-s2-n8",                    8,   3, 2, 1, "same",   4,      0,      1),
    ("same-s2-n9",                    9,   3, 2, 1, "same",   5,      1,      1),
    ("same-s3-k1-skips-the-end",      8,   1, 3, 1, "same",   3,      0,      0),
    ("same-s4-k2-never-negative",     9,   2, 4, 1, "same",   3,      0,      1),
    ("same-dilated",                  8,   3, 1, 3, "same",   8,      3,      3),
    ("same-dilated-strided",          8,   2, 3, 2, "same",   3,      0,      1),
    ("same-kernel-longer",            3,   7, 1, 1, "same",   3,      3,      3),
    ("same-n1",                       1,   4, 3, 1, "same",   1,      1,      2),
    ("causal",                        8,   3, 1, 1, "causal", 8,      2,      0),
    ("causal-dilated",                8,   3, 1, 4, "causal", 8,      8,      0),
    ("causal-strided-pads-in-full",   7,   4, 2, 1, "causal", 4,      3,      0),
    ("causal-strided-dilated",        9,   2, 4, 3, "causal", 3,      3,      0),
    ("causal-kernel-longer",          2,   5, 1, 1, "causal", 2,      4,      0),
    ("pair",                          8,   3, 1, 1, (2, 1),   9,      2,      1),
    ("pair-one-sided",                8,   3, 2, 1, (0, 1),   4,      0,      1),
    ("pair-beyond-the-kernel",        2,   2, 1, 1, (5, 4),   10,     5,      4),
    ("big-valid",                     BIG, 3, 1, 1, "valid",  4_999_999_998, 0, 0),
    ("big-same-s2",                   BIG, 3, 2, 1, "same",   2_500_000_000, 0, 1),
    ("big-causal-d2**30",             BIG, 3, 1, 2**30, "causal", BIG, 2_147_483_648, 0),
]  # fmt: skip

conv_axes = pytest.mark.parametrize(
    "n, k, s, d, padding, length, before, after", [row[1:] for row in CONV_AXES], ids=[row[0] for row in CONV_AXES]
)


def as_padding(padding, rank=1):
    return padding if isinstance(padding, str) else (padding,) * rank


@conv_axes
def test_conv_length_and_padding(n, k, s, d, padding, length, before, after):
    shape = conv_shape((2, n, 3), (k, 3, 5), strides=s, padding=as_padding(padding), dilation_rate=d)
    assert shape.out_size == (length,)
    assert shape.pad_before == (before,)
    # The last tap of the last window ends `after` past the input, unless positions are skipped there.
    assert max(0, (length - 1) * s - before + (k - 1) * d + 1 - n) == after


@conv_axes
def test_depthwise_has_the_same_rules(n, k, s, d, padding, length, before, after):
    shape = depthwise_shape((2, n, 3), (k, 3, 5), strides=s, padding=as_padding(padding), dilation_rate=d)
    assert (shape.out_size, shape.pad_before) == ((length,), (before,))


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("rank", [2, 3])
def test_every_axis_has_its_own_rule(rank, data_format):
    """Rank 2 and 3 are one-dimensional rules side by side."""
    sizes, taps, strides, rates = (8, 9, 11)[:rank], (3, 2, 3)[:rank], (2, 1, 3)[:rank], (1, 3, 4)[:rank]
    out = {"valid": (3, 6, 1), "same": (4, 9, 4)}
    before = {"valid": (0, 0, 0), "same": (0, 1, 3)}
    for padding in ("valid", "same"):
        x_shape = (4, *sizes, 6) if data_format == "channels_last" else (4, 6, *sizes)
        shape = conv_shape(
            x_shape,
            (*taps, 3, 8),
            strides=strides,
            padding=padding,
            dilation_rate=rates,
            groups=2,
            data_format=data_format,
        )
        assert shape.out_size == out[padding][:rank]
        assert shape.pad_before == before[padding][:rank]
        wanted = (4, *out[padding][:rank], 8) if data_format == "channels_last" else (4, 8, *out[padding][:rank])
        assert shape.y_shape == wanted
        assert shape.x_shape == x_shape


def test_explicit_pairs_may_differ_per_axis():
    shape = conv_shape((1, 5, 6, 2), (3, 2, 2, 4), padding=((2, 0), (0, 3)), strides=(1, 2))
    assert (shape.out_size, shape.pad_before) == ((5, 4), (2, 0))


@pytest.mark.parametrize("padding", [(1, 2), [1, 2], ((1, 2),), [[1, 2]]], ids=str)
def test_rank_1_takes_a_bare_pair(padding):
    shape = conv_shape((1, 5, 2), (3, 2, 4), padding=padding)
    assert (shape.out_size, shape.pad_before) == ((6,), (1,))


@pytest.mark.parametrize("padding", ["VALID", "Valid", "valid"])
def test_names_ignore_case(padding):
    assert conv_shape((1, 3, 5), (3, 3, 4), padding=padding, data_format="Channels_First").out_size == (3,)


# --- Fields of a shape -------------------------------------------------------------------------------------------


def test_conv_shape_holds_every_integer():
    shape = conv_shape(
        (7, 6, 20, 31),
        (3, 5, 2, 9),
        strides=(2, 1),
        padding="same",
        dilation_rate=(1, 4),
        groups=3,
        data_format="channels_first",
    )
    assert (shape.batch, shape.in_channels, shape.filters, shape.groups, shape.rank) == (7, 6, 9, 3, 2)
    assert (shape.kernel_size, shape.strides, shape.dilation_rate, shape.k_eff) == ((3, 5), (2, 1), (1, 4), (3, 17))
    assert (shape.in_size, shape.out_size, shape.pad_before) == ((20, 31), (10, 31), (0, 8))
    assert (shape.x_shape, shape.w_shape, shape.y_shape) == ((7, 6, 20, 31), (3, 5, 2, 9), (7, 9, 10, 31))


def test_depthwise_is_one_group_per_channel():
    shape = depthwise_shape((7, 20, 4), (3, 4, 2), padding="causal", strides=2, dilation_rate=3)
    assert (shape.groups, shape.in_channels, shape.filters, shape.depth_multiplier) == (4, 4, 8, 2)
    assert shape.y_shape == (7, 10, 8)
    assert shape.w_shape == (3, 1, 8)


def test_a_shape_is_frozen_and_hashable():
    shape = conv_shape((1, 5, 2), (3, 2, 4))
    with pytest.raises(AttributeError):
        shape.batch = 2
    assert {shape: 1}[conv_shape((1, 5, 2), (3, 2, 4), padding=(0, 0))] == 1


def test_a_shape_holds_plain_integers():
    """NumPy integers come in (array shapes never, but sizes computed by users) and plain ones are kept."""
    shape = conv_shape((np.int64(1), 5, 2), (3, 2, 4), strides=np.int32(2), dilation_rate=(np.int64(1),))
    assert type(shape.strides[0]) is int and type(shape.dilation_rate[0]) is int


# --- None --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["valid", "same", "causal", (1, 1)], ids=str)
@pytest.mark.parametrize("strides", [1, 2])
def test_unknown_sizes_stay_unknown(padding, strides):
    shape = conv_shape((None, None, 3), (3, 3, 5), padding=as_padding(padding), strides=strides)
    assert shape.y_shape == (None, None, 5)
    assert not shape.is_static


def test_only_what_depends_on_an_unknown_size_is_unknown():
    shape = conv_shape((None, 8, None, 3), (3, 3, 3, 5), padding="same", strides=2)
    assert shape.y_shape == (None, 4, None, 5)
    assert shape.pad_before == (0, None)  # with a stride, "same" depends on the length
    assert conv_shape((2, None, 3), (4, 3, 5), padding="same").pad_before == (1,)
    assert conv_shape((2, None, 3), (4, 3, 5), padding="causal", strides=3).pad_before == (3,)
    assert conv_shape((2, 8, 3), (4, 3, 5)).is_static


def test_unknown_sizes_of_a_transposed_convolution():
    shape = transpose_shape((None, None, 4, 3), (2, 3, 5, 3), strides=(3, 2), padding="same")
    assert (shape.y_shape, shape.x_shape) == ((None, None, 4, 3), (None, None, 8, 5))


def test_an_unknown_length_hides_no_other_error():
    with pytest.raises(ValueError, match="zero or negative"):
        conv_shape((None, None, 2, 3), (3, 3, 3, 5))


# --- Transposed --------------------------------------------------------------------------------------------------

# n = 4. crop: positions of the full product cut off in front.
#      id                    k  s  d  padding  output_padding  length  crop
TRANSPOSE_AXES = [
    ("valid-k2-s3-none",     2, 3, 1, "valid", None,           12,     0),
    ("valid-k2-s3-op0",      2, 3, 1, "valid", 0,              11,     0),
    ("valid-k2-s3-op1",      2, 3, 1, "valid", 1,              12,     0),
    ("valid-k2-s3-op2",      2, 3, 1, "valid", 2,              13,     0),
    ("same-k2-s3-none",      2, 3, 1, "same",  None,           12,     0),
    ("same-k2-s3-op0",       2, 3, 1, "same",  0,              9,      1),
    ("same-k2-s3-op1",       2, 3, 1, "same",  1,              10,     0),
    ("same-k2-s3-op2",       2, 3, 1, "same",  2,              11,     0),
    ("valid-k1-s2-none",     1, 2, 1, "valid", None,           8,      0),
    ("valid-k1-s2-op0",      1, 2, 1, "valid", 0,              7,      0),
    ("valid-k3-s1",          3, 1, 1, "valid", None,           6,      0),
    ("valid-k3-s1-op0",      3, 1, 1, "valid", 0,              6,      0),
    ("same-k4-s1-none",      4, 1, 1, "same",  None,           4,      1),
    ("same-k4-s1-op0",       4, 1, 1, "same",  0,              3,      2),
    ("same-k3-s1-none",      3, 1, 1, "same",  None,           4,      1),
    ("same-k3-s1-op0",       3, 1, 1, "same",  0,              4,      1),
    ("same-k3-s2-none",      3, 2, 1, "same",  None,           8,      0),
    ("same-k3-s2-op0",       3, 2, 1, "same",  0,              7,      1),
    ("same-k3-s2-op1",       3, 2, 1, "same",  1,              8,      0),
    ("same-k5-s2-none",      5, 2, 1, "same",  None,           8,      1),
    ("same-k5-s2-op1",       5, 2, 1, "same",  1,              8,      1),
    ("same-k1-s3-none",      1, 3, 1, "same",  None,           12,     0),
    ("same-k16-s8-none",     16, 8, 1, "same", None,           32,     4),
    ("valid-k3-d2",          3, 1, 2, "valid", None,           8,      0),
    ("same-k3-d2",           3, 1, 2, "same",  None,           4,      2),
    ("same-k2-d3",           2, 1, 3, "same",  None,           4,      1),
    ("valid-k3-s2-d3-op1",   3, 2, 3, "valid", 1,              14,     0),
    ("pair",                 3, 2, 1, (1, 0),  None,           8,      1),
    ("pair-op1",             3, 2, 1, (1, 1),  1,              8,      1),
    ("pair-s3-k2",           2, 3, 1, (0, 2),  None,           9,      0),
]  # fmt: skip


@pytest.mark.parametrize(
    "k, s, d, padding, extra, length, crop",
    [row[1:] for row in TRANSPOSE_AXES],
    ids=[row[0] for row in TRANSPOSE_AXES],
)
def test_transposed_length_and_crop(k, s, d, padding, extra, length, crop):
    shape = transpose_shape(
        (2, 4, 3), (k, 5, 3), strides=s, padding=as_padding(padding), output_padding=extra, dilation_rate=d
    )
    assert shape.in_size == (length,)
    assert shape.pad_before == (crop,)
    assert shape.x_shape == (2, length, 5)  # what the user gets
    assert shape.y_shape == (2, 4, 3)  # what the user gave
    assert (shape.in_channels, shape.filters) == (5, 3)


def test_a_transposed_size_past_32_bits():
    shape = transpose_shape((1, BIG, 1), (4, 1, 1), strides=3)
    assert shape.x_shape == (1, 15_000_000_001, 1)


def test_transposed_groups():
    shape = transpose_shape((2, 6, 4, 3), (3, 2, 5, 6), groups=3, data_format="channels_first")
    assert (shape.x_shape, shape.y_shape, shape.w_shape, shape.groups) == ((2, 15, 6, 4), (2, 6, 4, 3), (3, 2, 5, 6), 3)


# --- By exhaustion, against the oracle's own arithmetic ----------------------------------------------------------


def test_every_small_convolution_axis():
    paddings = ["valid", "same", "causal", (0, 1), (2, 0), (3, 4)]
    for n, k, s, d in itertools.product(range(1, 10), range(1, 6), range(1, 5), range(1, 4)):
        for padding in paddings:
            starts = oracle.window_starts(n, k, s, d, padding)
            if len(starts) == 0:
                with pytest.raises(ValueError, match="zero or negative"):
                    conv_shape((1, n, 1), (k, 1, 1), strides=s, padding=as_padding(padding), dilation_rate=d)
                continue
            shape = conv_shape((1, n, 1), (k, 1, 1), strides=s, padding=as_padding(padding), dilation_rate=d)
            assert shape.out_size == (len(starts),), (n, k, s, d, padding)
            assert shape.pad_before == (-starts[0],), (n, k, s, d, padding)


def test_every_small_transposed_axis():
    for n, k, s, d in itertools.product(range(1, 6), range(1, 6), range(1, 5), range(1, 4)):
        for padding, extra in itertools.product(["valid", "same", (0, 1), (1, 0)], [None, *range(s)]):
            length, crop = oracle.transpose_axis(n, k, s, d, padding, extra)
            if length < 0:
                continue
            shape = transpose_shape(
                (1, n, 1), (k, 1, 1), strides=s, padding=as_padding(padding), dilation_rate=d, output_padding=extra
            )
            assert (shape.in_size, shape.pad_before) == ((length,), (crop,)), (n, k, s, d, padding, extra)


# --- Halo --------------------------------------------------------------------------------------------------------


def test_halo_by_hand():
    """k=3, dilation 4, stride 2, causal: outputs 5..7 read inputs 10-8 .. 12+0."""
    (axis,) = halo(3, 2, 4, "causal")
    assert (axis.stride, axis.extent, axis.before) == (2, 9, 8)
    assert axis.input_range(5, 7) == (2, 13)
    assert axis.output_range(13, 14) == (7, 11)


def test_halo_per_axis():
    first, second = halo((3, 4), (1, 2), (2, 1), ((1, 0), (0, 3)))
    assert (first.extent, first.before, first.stride) == (5, 1, 1)
    assert (second.extent, second.before, second.stride) == (4, 0, 2)


def test_halo_of_same_needs_the_length_only_with_a_stride():
    assert halo(4, padding="same")[0].before == 1
    assert halo(3, 2, padding="same", in_size=9)[0].before == 1
    assert halo(3, 2, padding="same", in_size=8)[0].before == 0
    with pytest.raises(ValueError, match=r"`in_size` must be given.*Received: strides=2"):
        halo(3, 2, padding="same")


@pytest.mark.parametrize("padding", ["valid", "same", "causal", (2, 1)], ids=str)
def test_halo_ranges_are_what_the_taps_say(padding):
    """By exhaustion: the inputs an output range reads, and the outputs an input range reaches, listed tap by tap."""
    for n, k, s, d in itertools.product((9, 12), (1, 2, 4), (1, 2, 3), (1, 2)):
        starts = oracle.window_starts(n, k, s, d, padding)
        (axis,) = halo(k, s, d, as_padding(padding), in_size=n)
        for start, stop in itertools.combinations(range(len(starts) + 1), 2):
            read = [starts[p] + r * d for p in range(start, stop) for r in range(k)]
            assert axis.input_range(start, stop) == (min(read), max(read) + 1)
        for start, stop in itertools.combinations(range(n + 1), 2):
            reached = [p for p, i in enumerate(starts) if i < stop and i + (k - 1) * d >= start]
            first, last = axis.output_range(start, stop)
            assert reached == list(range(max(first, 0), min(last, len(starts)))), (n, k, s, d, start, stop)


def test_an_empty_range_reads_and_reaches_nothing():
    (axis,) = halo(3, 2, 1, "valid")
    assert axis.input_range(4, 4)[0] == axis.input_range(4, 4)[1]
    assert axis.output_range(4, 4)[0] == axis.output_range(4, 4)[1]


@st.composite
def strided_axes(draw):
    """An axis of a convolution with at least one output: n, k, s, d and the padding."""
    n, k, s, d = (draw(st.integers(least, most)) for least, most in ((0, 12), (1, 5), (1, 4), (1, 3)))
    padding = draw(st.sampled_from(("valid", "same", "causal")) | st.tuples(st.integers(0, 15), st.integers(0, 15)))
    assume(len(oracle.window_starts(n, k, s, d, padding)))
    return n, k, s, d, padding


@examples(400)
@given(strided_axes(), st.integers(0, 99), st.integers(0, 99))
@example((3, 2, 1, 1, (9, 9)), 2, 5)  # nothing but zeros in front,
@example((3, 2, 1, 1, (9, 9)), 15, 18)  # and behind
def test_a_piece_is_the_convolution_of_what_it_reads(axis, start, stop):
    n, k, s, d, padding = axis
    x, w = np.arange(1.0, n + 1).reshape(1, n, 1), 10.0 ** np.arange(k).reshape(k, 1, 1)
    whole = oracle.conv(x, w, strides=s, dilation_rate=d, padding=padding)
    (one,) = halo(k, s, d, as_padding(padding), in_size=n)
    start, stop = sorted(end % (whole.shape[1] + 1) for end in (start, stop))
    assume(start < stop)
    (first, last), (before, after) = one.piece(start, stop, n)
    assert 0 <= first <= last <= n and min(before, after) >= 0
    piece = oracle.conv(x[:, first:last], w, strides=s, dilation_rate=d, padding=(before, after))
    np.testing.assert_array_equal(piece, whole[:, start:stop])
    assert before + last - first + after == (stop - start - 1) * s + (k - 1) * d + 1, "not a position too many"


@examples(300)
@given(strided_axes(), st.lists(st.integers(0, 12), max_size=5))
@example((12, 3, 4, 1, "same"), [2, 3, 4])
@example((0, 2, 1, 1, (3, 1)), [0])
def test_out_chunks_go_with_the_input_at_their_stride(axis, cuts):
    n, k, s, d, padding = axis
    chunks = [b - a for a, b in itertools.pairwise((0, *sorted(min(cut, n) for cut in cuts), n))]
    owners = [number for number, length in enumerate(chunks) for _ in range(length)] or [0]
    outputs = len(oracle.window_starts(n, k, s, d, padding))
    counts = Counter(owners[min(p * s, len(owners) - 1)] for p in range(outputs))
    (one,) = halo(k, s, d, as_padding(padding), in_size=n)
    lengths = one.out_chunks(chunks, outputs)
    assert list(lengths) == [counts[number] for number in sorted(counts)]
    if s == 1 and padding in ("same", "causal"):
        assert list(lengths) == [length for length in chunks if length]


def test_no_outputs_are_one_chunk_of_none():
    (one,) = halo(3, 2, 1, "same", in_size=0)
    assert one.out_chunks((0, 0), 0) == (0,)
    assert one.piece(0, 0, 0) == ((0, 0), (0, 0))


# --- Reshaping ---------------------------------------------------------------------------------------------------


def test_reshaped_shapes():
    last, first = "channels_last", "channels_first"
    assert geometry.upsample_shape((None, 4, None, 3), (2, 5), last) == (None, 8, None, 3)
    assert geometry.upsample_shape((2, 3, BIG), (3,), first) == (2, 3, 15_000_000_000)
    assert geometry.pad_shape((2, 4, 5, 3), ((1, 0), (2, 3)), last) == (2, 5, 10, 3)
    assert geometry.pad_shape((2, 3, None, 5), ((1, 0), (2, 3)), first) == (2, 3, None, 10)
    assert geometry.crop_shape((2, 4, 5, 3), ((1, 0), (2, 2)), last) == (2, 3, 1, 3)
    assert geometry.crop_shape((None, 3, 4, None), ((1, 1), (2, 3)), first) == (None, 3, 2, None)


@pytest.mark.parametrize("cropping", [((2, 2),), ((4, 0),), ((0, 5),)], ids=str)
def test_cropping_leaves_at_least_one_position(cropping):
    with pytest.raises(ValueError, match=r"`cropping` must leave.*Received: cropping="):
        geometry.crop_shape((1, 4, 2), cropping, "channels_last")


# --- Normalising -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [2, np.int64(2), (2, 2), [2, 2], (np.int32(2), 2)], ids=repr)
def test_one_integer_or_one_per_axis(value):
    assert geometry.normalize_tuple(value, 2, "strides") == (2, 2)


NOT_SIZES = [0, -1, 2.0, "2", None, True, (2,), (2, 2, 2), (2, 0), (2, -3), (2, 1.5), (2, None), (True, 2), "22", {}]


@pytest.mark.parametrize("value", NOT_SIZES, ids=repr)
def test_what_is_no_size(value):
    with pytest.raises(ValueError, match=r"^`strides` must be .*2.*Received: strides="):
        geometry.normalize_tuple(value, 2, "strides")


def test_zero_where_it_is_allowed():
    assert geometry.normalize_tuple((0, 3), 2, "output_padding", allow_zero=True) == (0, 3)
    with pytest.raises(ValueError, match=r"`output_padding` must be .*>= 0.*Received: output_padding=-1"):
        geometry.normalize_tuple(-1, 1, "output_padding", allow_zero=True)


PAIRS = [
    (2, 2, ((2, 2), (2, 2))),
    ((1, 2), 2, ((1, 1), (2, 2))),
    (((1, 2), (3, 4)), 2, ((1, 2), (3, 4))),
    ((1, (3, 4)), 2, ((1, 1), (3, 4))),
    ((1, 2), 1, ((1, 2),)),
    (((1, 2),), 1, ((1, 2),)),
    ((3,), 1, ((3, 3),)),
    ([0, [1, 2], 3], 3, ((0, 0), (1, 2), (3, 3))),
]


@pytest.mark.parametrize("value, rank, expected", PAIRS, ids=[f"{v}-rank{r}" for v, r, _ in PAIRS])
def test_amounts_as_pairs(value, rank, expected):
    assert geometry.normalize_pairs(value, rank, "cropping") == expected


@pytest.mark.parametrize(
    "value", [-1, (1,), (1, 2, 3), ((1, 2),), ((1, 2, 3), (1, 2)), ((1, -2), (0, 0)), 1.5, "11", None, True], ids=repr
)
def test_what_is_no_pair(value):
    with pytest.raises(ValueError, match=r"^`cropping` must be .*Received: cropping="):
        geometry.normalize_pairs(value, 2, "cropping")


@pytest.mark.parametrize("padding", ["full", "", "causal", None, 1, 1.0, np.array([1, 1])], ids=repr)
def test_what_is_no_padding_at_rank_2(padding):
    with pytest.raises(ValueError, match=r"`padding` must be one of \"valid\", \"same\".*Received: padding="):
        geometry.normalize_padding(padding, 2)


def test_causal_only_where_it_is_allowed():
    assert geometry.normalize_padding("Causal", 1) == "causal"
    with pytest.raises(ValueError, match=r"Received: padding='causal'"):
        geometry.normalize_padding("causal", 1, causal=False)


@pytest.mark.parametrize("data_format", ["NHWC", "", 1, "last"], ids=repr)
def test_unknown_data_format(data_format):
    with pytest.raises(ValueError, match=r"`data_format` must be \"channels_last\".*Received: data_format="):
        geometry.normalize_data_format(data_format)


def test_no_data_format_is_channels_last():
    assert geometry.normalize_data_format(None) == "channels_last"
    assert geometry.normalize_data_format("CHANNELS_FIRST") == "channels_first"


# --- Errors of the families --------------------------------------------------------------------------------------


def error_case(name, function, text, x_shape, w_shape, **options):
    return pytest.param(function, text, x_shape, w_shape, options, id=f"{function.__name__}-{name}")


ERRORS = [
    error_case("kernel-longer", conv_shape, "zero or negative", (1, 4, 2), (5, 2, 3)),
    error_case("kernel-longer-dilated", conv_shape, "zero or negative", (1, 4, 2), (3, 2, 3), dilation_rate=2),
    error_case("kernel-longer-one-axis", conv_shape, "zero or negative", (1, 9, 2, 2), (3, 3, 2, 3)),
    error_case("pair-too-small", conv_shape, "zero or negative", (1, 2, 2), (5, 2, 3), padding=((1, 1),)),
    error_case("kernel-longer", depthwise_shape, "zero or negative", (1, 4, 2), (5, 2, 1)),
    error_case("channels", conv_shape, "4 channels", (1, 9, 3), (3, 4, 3)),
    error_case("channels-first", conv_shape, "4 channels", (1, 9, 4), (3, 4, 3), data_format="channels_first"),
    error_case("channels-groups", conv_shape, "8 channels", (1, 9, 4), (3, 4, 6), groups=2),
    error_case("channels-unknown", conv_shape, "4 channels", (1, 9, None), (3, 4, 3)),
    error_case("channels", depthwise_shape, "as many channels", (1, 9, 3), (3, 4, 3)),
    error_case("channels", transpose_shape, "3 channels", (1, 9, 4), (3, 4, 3)),
    error_case("groups-filters", conv_shape, "`groups` must divide", (1, 9, 4), (3, 2, 3), groups=2),
    error_case("groups-channels", transpose_shape, "`groups` must divide", (1, 9, 3), (3, 2, 3), groups=2),
    *(
        error_case(f"groups-{value!r}", function, "`groups` must be an integer", (1, 9, 4), (3, 4, 4), groups=value)
        for value in (0, -1, 2.0, None, True, (1,))
        for function in (conv_shape, transpose_shape)
    ),
    *(
        error_case(f"{name}-{value!r}", function, f"`{name}` must be", (1, 9, 4), (3, 4, 4), **{name: value})
        for name in ("strides", "dilation_rate")
        for value in (0, -1, 1.5, True, None, (1, 1), "1")
        for function in (conv_shape, depthwise_shape, transpose_shape)
    ),
    error_case("rank-input", conv_shape, "3 axes", (1, 9, 9, 4), (3, 4, 4)),
    error_case("rank-kernel", conv_shape, "1 to 3 spatial axes", (1, 4), (4, 4)),
    error_case("rank-4", conv_shape, "1 to 3 spatial axes", (1, 5, 5, 5, 5, 4), (1, 1, 1, 1, 4, 4)),
    error_case("kernel-0", conv_shape, "at least 1", (1, 9, 4), (0, 4, 4)),
    error_case("filters-0", conv_shape, "at least 1", (1, 9, 4), (3, 4, 0)),
    error_case("causal-rank-2", conv_shape, "`padding` must be", (1, 9, 9, 4), (3, 3, 4, 4), padding="causal"),
    error_case("causal", transpose_shape, "`padding` must be", (1, 9, 4), (3, 4, 4), padding="causal"),
    error_case("pairs-of-wrong-rank", conv_shape, "`padding` must be", (1, 9, 9, 4), (3, 3, 4, 4), padding=((1, 1),)),
    error_case("negative-pair", conv_shape, "`padding` must be", (1, 9, 4), (3, 4, 4), padding=((-1, 1),)),
    error_case("output-padding-s1", transpose_shape, "smaller than the stride", (1, 9, 4), (3, 4, 4), output_padding=1),
    error_case("output-padding-one-axis", transpose_shape, "smaller than the stride", (1, 9, 9, 4), (3, 3, 4, 4),
               strides=(3, 2), output_padding=(2, 2)),
    error_case("output-padding-negative", transpose_shape, "`output_padding` must be", (1, 9, 4), (3, 4, 4),
               strides=2, output_padding=-1),
    error_case("cropped-away", transpose_shape, "negative", (1, 2, 4), (3, 4, 4), padding=((4, 4),)),
    error_case("data-format", conv_shape, "`data_format` must be", (1, 9, 4), (3, 4, 4), data_format="NWC"),
    error_case("data-format", depthwise_shape, "`data_format` must be", (1, 9, 4), (3, 4, 4), data_format=3),
]  # fmt: skip


@pytest.mark.parametrize("function, text, x_shape, w_shape, options", ERRORS)
def test_every_shape_error_says_what_it_received(function, text, x_shape, w_shape, options):
    with pytest.raises(ValueError) as error:
        function(x_shape, w_shape, **options)
    assert text in str(error.value)
    assert "Received: " in str(error.value)
