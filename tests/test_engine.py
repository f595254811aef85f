"""The whole way of a GPU call but the driver: ops, plans, packing, splits, workspaces and kernels, in the emulator.

Runs the list of `cuconv parity`, against the NumPy path in double precision.
"""

import emulator
import numpy as np
import pytest
from emulated import EmulatedRuntime

from cuconv import ops, parity, reference
from cuconv.cuda.engine import Engine
from cuconv.plan.devices import DEVICES

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


class OnDevice(np.ndarray):
    """An array that ops takes for one of a GPU."""


class Runtime(EmulatedRuntime):
    """Makes arrays of that kind."""

    def empty(self, shape, dtype):
        return super().empty(shape, dtype).view(OnDevice)


@pytest.fixture
def device(monkeypatch):
    """An engine on the emulator for arrays of OnDevice; all arrays of a call must be."""
    engine = Engine(Runtime(DEVICES["H200"], mode="trace", seed=1))

    def place(arrays):
        kinds = {isinstance(array, OnDevice) for array in arrays}
        assert len(kinds) == 1, "arrays of two places in one call"
        return engine if kinds == {True} else reference

    monkeypatch.setattr(ops, "_place", place)
    return engine


def on_device(array):
    return np.ascontiguousarray(array).view(OnDevice)


def sample(cases, share):
    """All cases in float32, and of the other dtypes one in `share`: they differ in arithmetic, not in where it goes."""
    return [case for number, case in enumerate(cases) if case.dtype == "float32" or number % share == 0]


EVERY = sample(parity.cases(), 3)
QUICK = sample(parity.cases(quick=True), 13)[::2]


def chunks(cases, size):
    """Neighbours in the list share kernels, so each test takes some."""
    return [pytest.param(cases[i : i + size], id=f"{i}-{cases[i].operation}") for i in range(0, len(cases), size)]


def check(cases, engine):
    for number, case in enumerate(cases):
        started = len(engine.runtime.launches)
        outcome = parity.check(case, on_device, number)
        assert outcome.passed, f"{case}: {outcome.problem}; {[str(p) for p in engine.runtime.launches[started:]]}"
        assert len(engine.runtime.launches) > started, f"{case}: no kernel ran"


@pytest.mark.parametrize("cases", chunks(QUICK, 24))
def test_parity_list(cases, device):
    check(cases, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cases", chunks(EVERY, 24))
def test_long_parity_list(cases, device):
    check(cases, device)


def test_the_engine_has_the_functions_of_the_reference():
    offered = {name for name in vars(Engine(EmulatedRuntime())) if name != "runtime"}
    assert offered | {"empty"} == set(reference.__all__)
