"""The sampled definition is the oracle's, and no wrong answer passes it."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from suite_rows import ALL, DIFFERENT, answers, case, small

from benchmarks import suite
from benchmarks.truth import Operands, Truth, WrongAnswerError, dtype_of, finite, poison


@pytest.mark.parametrize("row", ALL)
def test_samples_are_the_oracles_values(row):
    row = small(row, "float32")
    operands = Operands.random(row, np, seed=row.number)
    for variant in row.variants:
        truth = Truth(row, variant, operands, seed=1)
        expected = answers(row, operands, variant)
        assert len(truth.samples) == len(expected)
        for sample, right in zip(truth.samples, expected, strict=True):
            np.testing.assert_allclose(sample.values, right[sample.index], rtol=1e-12, atol=1e-12)
            assert sample.values.size >= min(right.size, 8)


@pytest.mark.parametrize("row", DIFFERENT)
def test_sampled_places_are_few_and_differ_by_seed(row):
    """On more positions and channels than are sampled; edges are among the places."""
    row = small(row, "float32")
    row = replace(row, x=(2, *(3 * n for n in row.x[1:-1]), 70), filters=70)
    operands = Operands.random(row, np, seed=0)
    expected = answers(row, operands)
    places = []
    for seed in (1, 2):
        for sample, right in zip(Truth(row, "plain", operands, seed, positions=8).samples, expected, strict=True):
            np.testing.assert_allclose(sample.values, right[sample.index], rtol=1e-11, atol=1e-11)
            assert right.size < 2000 or sample.values.size < right.size / 2
            places.append([np.ravel(i).tolist() for i in sample.index])
    half = len(places) // 2
    assert places[:half] != places[half:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("row", DIFFERENT)
def test_the_right_answer_passes_in_every_dtype(row, dtype):
    row = small(row, dtype)
    operands = Operands.random(row, np, seed=3)
    for variant in row.variants:
        rounded = [right.astype(dtype_of(row)) for right in answers(row, operands, variant)]
        assert Truth(row, variant, operands, seed=4).share(rounded) < 0.5


def shifted(a):
    return np.roll(a, 1)


def without_bias(a):
    return a - a.dtype.type(1)


def one_off(a):
    a.reshape(-1)[-1] += 0.3
    return a


def scaled(a):
    return (a * 1.05).astype(a.dtype)


@pytest.mark.parametrize("spoil", [shifted, without_bias, one_off, scaled])
@pytest.mark.parametrize("row", DIFFERENT)
def test_a_wrong_answer_does_not_pass(row, spoil):
    row = small(row, "float32")
    operands = Operands.random(row, np, seed=5)
    right = [each.astype(np.float32) for each in answers(row, operands)]
    truth = Truth(row, "plain", operands, seed=6)
    for spoilt in range(len(right)):
        given = [spoil(each.copy()) if number == spoilt else each for number, each in enumerate(right)]
        assert truth.share(given) > 1


@pytest.mark.parametrize("padding", ["causal", "same", "valid"])
def test_another_padding_does_not_pass(padding):
    """The answer at most positions would be right; those at the edges are looked at."""
    row = replace(small(suite.ROWS[1], "bfloat16"), x=(2, 4000, 3), padding=padding)
    operands = Operands.random(row, np, seed=7)
    (right,) = answers(row, operands)
    given = right.astype(dtype_of(row))
    truth = Truth(row, "plain", operands, seed=8)
    assert truth.share([given]) < 1
    given[:, -1] = given[:, -2]
    assert truth.share([given]) > 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_one_number_that_is_not_finite_is_seen_anywhere(dtype, value):
    a = np.full((3, 400, 5), ml_dtypes.finfo(dtype).max, dtype)
    assert finite(a) and finite(-a) and finite(a[:, ::2])
    a[1, 222, 3] = value
    assert not finite(a)
    row = replace(suite.ROWS[1], x=(3, 400, 5), filters=5, dtype=np.dtype(dtype).name)
    operands = Operands.random(row, np, seed=9)
    right = answers(row, operands)[0].astype(dtype)
    right[1, 222, 3] = value
    with pytest.raises(WrongAnswerError, match="not finite"):
        Truth(row, "plain", operands, seed=10, positions=4).share([right])


def test_poison_is_nan_in_every_dtype():
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        a = np.zeros((4, 6), dtype)
        poison(a[:, ::2])
        assert np.isnan(a[:, ::2].astype(float)).all() and not np.isnan(a[:, 1::2].astype(float)).any()


@pytest.mark.parametrize("change", [lambda a: a.astype(np.float64), lambda a: a[:, :-1]], ids=["dtype", "shape"])
def test_another_kind_of_array_does_not_pass(change):
    row = small(suite.ROWS[1], "float32")
    operands = Operands.random(row, np, seed=11)
    right = answers(row, operands)[0].astype(np.float32)
    with pytest.raises(WrongAnswerError, match="is expected"):
        Truth(row, "plain", operands, seed=12).share([change(right)])
    with pytest.raises(WrongAnswerError, match="arrays where 1"):
        Truth(row, "plain", operands, seed=12).share([right, right])


def test_tf32_is_allowed_its_rounding_and_float32_is_not():
    row = small(suite.ROWS[3], "float32")
    operands = Operands.random(row, np, seed=13)
    right = answers(row, operands)[0]
    rounded = (right * (1 + 2.0**-10)).astype(np.float32)
    truth = Truth(row, "plain", operands, seed=14)
    assert truth.share([rounded]) > 1
    assert truth.share([rounded], tf32=True) < 1
    assert Truth(replace(row, dtype="tf32"), "plain", operands, seed=14).share([rounded]) < 1


def test_operands_are_what_the_operation_takes_and_answers_are_near_one():
    for param in DIFFERENT:
        row = small(param.values[0], "float32")
        row = replace(row, x=(*row.x[:-1], 16), filters=16)
        operands = Operands.random(row, np, seed=15)
        first = answers(row, operands)[0]
        positions = np.prod(row.y[:-1]) if row.op == "conv_kernel_grad" else 1
        assert 0.3 < first.std() / positions**0.5 < 2, row.name


def test_sample_case_ids_are_unique():
    assert len({each.id for each in ALL}) == len(ALL) and case(suite.ROWS[0]).id == "1 WaveNet gate d=1"
