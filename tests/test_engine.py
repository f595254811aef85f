"""The whole way of a GPU call but the driver: ops, tapes, plans, packing, splits, workspaces, kernels, in the emulator.

Runs the list of `cuconv parity`, against the NumPy path in double precision.
"""

import contextlib
import weakref
from types import SimpleNamespace

import emulator
import numpy as np
import pytest
from emulated import EmulatedRuntime

from cuconv import ops, parity, reference
from cuconv.cuda import prepared, runtime
from cuconv.cuda.engine import Engine
from cuconv.plan.devices import DEVICES

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


class OnDevice(np.ndarray):
    """An array that ops takes for one of a GPU, with what it asks of CuPy's."""

    device = contextlib.nullcontext()
    __cuda_array_interface__ = None
    _known = weakref.WeakValueDictionary()  # noqa: RUF012  address -> an array that was asked for it

    @property
    def data(self):
        address = self.ctypes.data
        self._known[address] = self
        return SimpleNamespace(ptr=address, device_id=0)

    @classmethod
    def at(cls, address):
        """An array that begins at an address, None for 0."""
        if address == 0 or address in cls._known:
            return cls._known.get(address)
        for start, array in cls._known.items():
            if start < address < start + array.nbytes and array.flags.c_contiguous:
                return array.reshape(-1).view(np.uint8)[address - start :]
        raise AssertionError(f"a launch at {address:#x}, where no array is")


class Runtime(EmulatedRuntime):
    """Makes arrays of that kind, and launches at addresses as CudaRuntime does."""

    device = 0
    in_one_piece = staticmethod(lambda array: array.flags.c_contiguous)

    def empty(self, shape, dtype):
        return super().empty(shape, dtype).view(OnDevice)

    def constant(self, key, make):
        return super().constant(key, make).view(OnDevice)

    def starter(self, plan, pointers):
        def start(addresses):
            assert len(addresses) == pointers
            self.launch(plan, [OnDevice.at(address) for address in addresses])

        return start


@pytest.fixture
def device(monkeypatch):
    """An engine on the emulator for arrays of OnDevice; all arrays of a call must be."""
    return emulated_device(monkeypatch, Runtime(DEVICES["H200"], mode="trace", seed=1))


def emulated_device(monkeypatch, device):
    engine = Engine(device)
    place = ops._place

    def placed(arrays):
        kinds = {isinstance(array, OnDevice) for array in arrays}
        assert len(kinds) == 1, "arrays of two places in one call"
        return engine if kinds == {True} else place(arrays)

    monkeypatch.setattr(ops, "_place", placed)
    monkeypatch.setattr(runtime, "is_device_array", lambda array: isinstance(array, OnDevice))
    monkeypatch.setattr(runtime, "of", lambda arrays: engine.runtime)
    monkeypatch.setattr(runtime, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(prepared, "_in_one_piece", {})
    for known in knowns():
        known._tapes.clear()
    return engine


def knowns():
    """What each operation remembers of the calls it was asked for."""
    for operation in ops._OPERATIONS.values():
        yield from (c.cell_contents for c in operation.__closure__ if isinstance(c.cell_contents, prepared.Known))


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
        if case.layout == "contiguous":  # and where it is not, nothing is remembered
            remembered = [tape for known in knowns() for tape in known._tapes.values()]
            assert remembered and None not in remembered, f"{case}: what the call does cannot be played"
        for known in knowns():
            known._tapes.clear()


@pytest.mark.parametrize("cases", chunks(QUICK, 24))
def test_parity_list(cases, device):
    check(cases, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("cases", chunks(EVERY, 24))
def test_long_parity_list(cases, device):
    check(cases, device)


def test_calls_of_two_precisions_are_remembered_apart(device):
    rng = np.random.default_rng(0)
    x, w = (on_device(rng.uniform(-1, 1, shape).astype(np.float32)) for shape in ((1, 64, 64), (1, 64, 64)))
    found, answers = [], []
    for precision in ("highest", "high", "highest", "high"):
        answers.append(bytes(ops.conv(x, w, precision=precision)))
        found.append(dict(device.runtime.launches[-1].constants).get("PRECISION"))
    assert found == [None, 1, None, 1], found
    assert answers[0] == answers[2] != answers[1] == answers[3]
    assert sum(len(known._tapes) for known in knowns()) == 2


def test_the_engine_has_the_functions_of_the_reference():
    offered = {name for name in vars(Engine(EmulatedRuntime())) if name != "runtime"}
    assert offered | {"empty"} == set(reference.__all__)
