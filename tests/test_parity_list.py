"""`cuconv.parity` and the command: the list covers what there is, and a wrong engine fails."""

import dataclasses
import functools
import json

import fake_cupy
import numpy as np
import pytest

from cuconv import cli, ops, parity
from cuconv.cuda import runtime

WITHOUT = ("float64", "complex128")


class Placed(np.ndarray):
    """An array of an engine under test; ops compute with it as with any other."""


def place(array):
    return array.view(Placed)


def first(operation, dtype="float32", **wanted):
    """A case of that operation with those options."""
    return next(
        case
        for case in parity.cases()
        if (case.operation, case.dtype) == (operation, dtype)
        and all(case.options.get(name) == value for name, value in wanted.items())
    )


# --- The list ----------------------------------------------------------------------------------------------------


def test_every_operation_is_in_the_list_in_every_way():
    listed = parity.cases()
    computing = set(ops._OPERATIONS)
    assert {case.operation for case in listed} == computing
    for operation in computing:
        own = [case for case in listed if case.operation == operation]
        dtypes = parity.REAL if "lstm" in operation else tuple(parity.DTYPES)
        for dtype in dtypes:
            of_dtype = [case for case in own if case.dtype == dtype]
            found = {(len(case.shapes[0]), case.options.get("data_format")) for case in of_dtype}
            for rank in (1, 2, 3):
                for data_format in ("channels_last", "channels_first"):
                    assert (rank + 2, data_format) in found, (operation, dtype, rank, data_format)
    for family in ("conv", "conv_transpose", "depthwise_conv"):
        for member in (family, f"{family}_input_grad", f"{family}_kernel_grad"):
            own = [case.options for case in listed if case.operation == member]
            assert {1, 2, 3} <= {options.get("strides", 1) for options in own}
            assert {1, 2} <= {options.get("dilation_rate", 1) for options in own}
            assert any(options.get("strides", 1) > 1 and options.get("dilation_rate", 1) > 1 for options in own)
            assert any(isinstance(options.get("padding"), tuple) for options in own)
            assert "depthwise" in member or {1, 2} <= {options.get("groups", 1) for options in own}
            layouts = {case.layout for case in listed if case.operation == member}
            assert layouts == set(parity.LAYOUTS)
    assert len({str(case) for case in listed}) == len(listed)


def test_the_quick_list_is_a_part_of_the_whole():
    quick, whole = parity.cases(quick=True), parity.cases()
    assert {str(case) for case in quick} < {str(case) for case in whole} and 3 * len(quick) < len(whole)
    assert {case.dtype for case in quick} == set(parity.DTYPES)
    assert {case.dtype for case in parity.cases(without=WITHOUT)} == set(parity.DTYPES) - set(WITHOUT)


def test_the_numpy_path_passes():
    listed = parity.cases(without=WITHOUT)[::5]
    outcomes = list(parity.run(listed, np.asarray))
    assert [f"{outcome.case}: {outcome.problem}" for outcome in outcomes if not outcome.passed] == []
    assert all(0 <= outcome.share <= 1 for outcome in outcomes)
    assert sum(outcome.share > 0 for outcome in outcomes) > 0.9 * len(outcomes), "really compared"


# --- Wrong engines -----------------------------------------------------------------------------------------------


def edit(change):
    """A wrong engine that changes the answer of a right one."""

    def engine(real, *arrays, **options):
        y = np.array(real(*arrays, **options))
        out = options.get("out")
        y = change(y)
        if out is not None and out.shape == y.shape:
            out[...] = y
            return out
        return y

    return engine


def assign(y, index, value):
    y[index] = value
    return y


def drop_first_tap(real, x, w, *more, **options):
    w = w.copy()
    w[0] = 0
    return real(x, w, *more, **options)


def fails(real, *arrays, **options):
    raise MemoryError("no workspace")


WRONG = {
    "scaled": edit(lambda y: y * y.dtype.type(1.001)),
    "last-element": edit(lambda y: assign(y, (-1,) * y.ndim, 0)),
    "nan": edit(lambda y: assign(y, (0,) * y.ndim, np.nan)),
    "infinite": edit(lambda y: assign(y, (0,) * y.ndim, np.inf)),
    "shifted": edit(lambda y: np.roll(y, 1, axis=1)),
    "swapped": edit(lambda y: y[::-1]),
    "zeros": edit(lambda y: y * 0),
    "cut": edit(lambda y: y[:, :-1]),
    "wide": edit(lambda y: y.astype(np.float64)),
    "half": edit(lambda y: y.astype(np.float16).astype(y.dtype)),
    "tap": drop_first_tap,
    "bias": lambda real, x, w, bias, **options: real(x, w, **options),
    "raises": fails,
    "nothing-written": lambda real, *arrays, out=None, **options: real(*arrays, **options) if out is None else out,
}


@pytest.mark.parametrize("operation", ["conv", "conv_transpose", "depthwise_conv"])
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_engine_fails(monkeypatch, operation, wrong):
    case, real = first(operation), getattr(ops, operation)
    assert parity.check(case, place, 1).passed

    @functools.wraps(real)
    def engine(*arrays, **options):
        return (functools.partial(wrong, real) if isinstance(arrays[0], Placed) else real)(*arrays, **options)

    monkeypatch.setattr(ops, operation, engine)
    outcomes = [parity.check(case, place, number) for number in (0, 1)]
    assert not all(outcome.passed for outcome in outcomes)
    bad = next(outcome for outcome in outcomes if not outcome.passed)
    assert bad.problem and bad.share > 1


DOUBLE = {
    "as-float32": ("float64", edit(lambda y: y.astype(np.float32).astype(y.dtype))),
    "not-conjugated": ("complex64", edit(np.conj)),
    "real-part": ("complex128", edit(lambda y: y.real.astype(y.dtype))),
}


@pytest.mark.parametrize("operation", ["conv_kernel_grad", "conv_input_grad", "upsample", "bias_grad"])
@pytest.mark.parametrize(("dtype", "wrong"), DOUBLE.values(), ids=DOUBLE)
def test_wrong_numbers_of_other_dtypes_fail(monkeypatch, operation, dtype, wrong):
    interpolation = {"interpolation": "bilinear"} if operation == "upsample" else {}
    case, real = first(operation, dtype, **interpolation), getattr(ops, operation)
    assert parity.check(case, place, 0).passed

    @functools.wraps(real)
    def engine(*arrays, **options):
        return (functools.partial(wrong, real) if isinstance(arrays[0], Placed) else real)(*arrays, **options)

    monkeypatch.setattr(ops, operation, engine)
    assert not parity.check(case, place, 0).passed


def test_each_of_several_results_is_compared(monkeypatch):
    case, real = first("separable_conv_kernel_grad"), ops.separable_conv_kernel_grad

    def engine(*arrays, **options):
        first, second = real(*arrays, **options)
        return (first, second * 2) if isinstance(arrays[0], Placed) else (first, second)

    monkeypatch.setattr(ops, "separable_conv_kernel_grad", engine)
    assert not parity.check(case, place).passed
    monkeypatch.setattr(
        ops, "separable_conv_kernel_grad", lambda *a, **o: real(*a, **o)[: 1 + (type(a[0]) is not Placed)]
    )
    assert not parity.check(case, place).passed


def test_views_are_what_the_case_says():
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    strided, offset = (parity._placed(values, layout, np.asarray) for layout in ("strided", "offset"))
    assert np.array_equal(strided, values) and not strided.flags.c_contiguous
    assert np.array_equal(offset, values) and offset.flags.c_contiguous and offset.base is not None
    assert (offset.ctypes.data - offset.base.ctypes.data) % 16 == 4


def test_expected_values_that_are_not_finite_prove_nothing():
    case = dataclasses.replace(first("upsample"), scale=np.inf)
    with np.errstate(invalid="ignore"):
        outcome = parity.check(case, place)
    assert not outcome.passed and "not finite" in outcome.problem


def test_the_summary_counts():
    good, bad = first("conv"), first("upsample", "float16")
    outcomes = [
        parity.Outcome(good, 0.5, None, 1),
        parity.Outcome(good, 0.25, None, 1),
        parity.Outcome(bad, float("inf"), "wrong", 1),
    ]
    found = parity.summary(outcomes)
    assert (found["cases"], found["failed"]) == (3, 1)
    assert found["operations"]["conv"]["float32"] == {"cases": 2, "failed": 0, "share": 0.5}
    assert found["operations"]["upsample"]["float16"] == {"cases": 1, "failed": 1, "share": 0.0}
    assert found["failures"] == [{"case": str(bad), "problem": "wrong"}]
    json.dumps(found, allow_nan=False)


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch):
    """A list of a few cases."""
    whole = parity.cases
    monkeypatch.setattr(parity, "cases", lambda quick, without=(): whole(quick, without)[::100])


def test_the_command_on_the_cpu(short, capsys):
    assert cli.main(["parity", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    count = len(parity.cases(False, WITHOUT))
    assert f"all {count} cases passed" in shown.out and "conv_transpose" in shown.out and "NumPy" in shown.out
    assert "float64" not in shown.out, "nothing to compare with"
    assert shown.err == "", "no progress bar where stderr is no terminal"


def test_the_command_as_json(short, capsys):
    assert cli.main(["parity", "--json", "--quick", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    report = json.loads(shown.out)
    assert (
        report["failed"] == 0
        and report["cases"] == len(parity.cases(True, WITHOUT))
        and report["seconds"] > 0
        and "NumPy" in report["device"]
    )


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_the_command_fails_where_something_is_wrong(short, monkeypatch, capsys, as_json):
    real = ops.conv
    monkeypatch.setattr(
        ops, "conv", functools.wraps(real)(lambda x, *a, **o: real(x, *a, **o) * (1 if x.dtype == np.float64 else 2))
    )
    assert cli.main(["parity", "--device", "cpu", *["--json"] * as_json]) == 1
    shown = capsys.readouterr().out
    if as_json:
        assert json.loads(shown)["failures"][0]["problem"]
    else:
        assert "elements differ" in shown and "cases failed" in shown


@pytest.fixture
def gpus(monkeypatch):
    yield lambda **options: fake_cupy.install(monkeypatch, **options)
    fake_cupy.forget()


def test_without_a_gpu_the_exit_code_is_2(gpus, capsys):
    gpus(driver=0)
    assert cli.main(["parity"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "libcuda is not there" in shown.err and "--device cpu" in shown.err
    assert cli.main(["parity", "--json", "--device", "0"]) == 2
    assert "libcuda" in json.loads(capsys.readouterr().out)["error"]


def test_the_gpu_is_the_one_asked_for(gpus, capsys, monkeypatch):
    """And the current one, since CuPy's own functions compute there."""
    fake = gpus(capabilities=[(7, 0), (9, 0), (8, 0)])
    seen = []

    def run(listed, place):
        seen.append((fake.device, place(np.zeros(3)).device.id))
        yield parity.Outcome(listed[0], 0.5, None, 0)

    monkeypatch.setattr(parity, "run", run)
    for arguments, device in (([], 1), (["--device", "1"], 1), (["--device", "2"], 2)):
        assert cli.main(["parity", *arguments]) == 0
        assert f"GPU {device} (NVIDIA Test, sm_{90 if device == 1 else 80})" in " ".join(
            capsys.readouterr().out.split()
        )
        assert seen.pop() == (device, device) and fake.device == 0
    for device, text in ((0, "7.5 is the oldest"), (3, "no GPU 3")):
        assert cli.main(["parity", "--device", str(device)]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("given", ["tpu", "-1", "1.5", ""])
def test_wrong_devices_are_wrong_usage(capsys, given):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["parity", f"--device={given}"])
    assert stopped.value.code == 2 and "number of a GPU or cpu" in capsys.readouterr().err


def test_the_doctor_knows_the_gpus_and_the_compiled_kernels(gpus, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("CUCONV_CACHE_DIR", str(tmp_path / "cache"))
    fake = gpus(capabilities=[(7, 0), (9, 0), (12, 1)])
    runtime.cubin_cache().obtain(runtime.cubins.Recipe("k", "", (), "", ".cubin"), lambda: bytes(3 << 20))
    assert cli.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    old, good, new = found["gpus"]
    assert old["limits"] is None and "7.5" in old["problem"] and good["problem"] is None
    assert good["limits"]["multiprocessors"] == 132 and good["kernels_as"] == "sm_90"
    assert "compute_120" in new["kernels_as"]
    assert found["compiled"]["files"] == 1 and found["compiled"]["path"] == str(tmp_path / "cache")
    assert found["compiling"]["target"] == "sm_90" and found["compiling"]["problem"] is None
    assert fake.compiled[-1][0] == "check.cu"
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for fact in ("GPU 0", "227 KiB", "4.92 TB/s", "kernels as sm_90", "1 file(s), 3.0 of", "common.cuh for sm_90"):
        assert fact in text, fact


def test_the_doctor_fails_where_kernels_do_not_compile(gpus, capsys, monkeypatch, tmp_path):
    (tmp_path / "common.cuh").write_text("#error\n")
    monkeypatch.setattr(runtime, "kernel_directory", lambda: tmp_path)
    gpus()
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["healthy"] and "does not compile" in found["compiling"]["problem"]
    assert cli.main(["doctor"]) == 1
    assert "fails: kernel check does not compile" in capsys.readouterr().out
