"""The CUDA runtime: on a CuPy without CUDA (tests/fake_cupy.py), and as far as the real CuPy goes without a GPU."""

import builtins
import ctypes
import importlib.util
import logging
import os
import struct
import sys
import threading
from dataclasses import replace

import fake_cupy
import numpy as np
import pytest

import cuconv
from cuconv.cuda import cubins, runtime
from cuconv.cuda.arrays import compact, writing
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import LaunchPlan, PlanError, TensorMap, compiled_for

KERNEL = 'extern "C" __global__ void k(const __grid_constant__ Params p) {}\n'


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Puts a fake CuPy in place, with a kernel folder and a cache of its own."""
    monkeypatch.setenv(cubins.FOLDER_VARIABLE, str(tmp_path / "cache"))
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "common.cuh").write_text("#pragma once\n")
    (tmp_path / "kernels" / "k.cu").write_text('#include "common.cuh"\n' + KERNEL)
    monkeypatch.setattr(runtime, "kernel_directory", lambda: tmp_path / "kernels")
    cubins.expanded.cache_clear()
    yield lambda **options: fake_cupy.install(monkeypatch, **options)
    fake_cupy.forget()
    cubins.expanded.cache_clear()


@pytest.fixture
def fake(install):
    return install()


def plan(constants=(("N", 4), ("ELEMENT", "float")), integers=(1, 2, 3), **fields):
    return LaunchPlan("k", constants, integers, **{"grid": (7, 1, 1), "block": (128, 1, 1), **fields})


# --- Launching ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("integers", "index_bytes", "expected"),
    [
        ((1, -2, 3), 4, struct.pack("<iii", 1, -2, 3) + bytes(4)),
        ((5, 2**31 - 1), 4, struct.pack("<ii", 5, 2**31 - 1)),
        ((2**40, -1), 8, struct.pack("<qq", 2**40, -1)),
        ((), 4, b""),
    ],
    ids=["odd", "even", "wide", "none"],
)
def test_a_launch_passes_pointers_and_integers_by_value(fake, integers, index_bytes, expected):
    gpu = runtime.current(0)
    x, y = gpu.empty((3, 4), np.float32), gpu.empty(5, np.float64)
    made = plan(integers=integers, index_bytes=index_bytes)
    for _ in range(2):
        gpu.launch(made, (x, None, y))
    first, second = fake.launches
    assert first.parameters == second.parameters == struct.pack("<QQQ", x.data.ptr, 0, y.data.ptr) + expected
    assert first.parameters == made.parameters((x.data.ptr, 0, y.data.ptr))
    assert (first.kernel, first.grid, first.block, first.shared_bytes) == ("k", (7, 1, 1), (128, 1, 1), 0)
    assert (gpu.address(x), x.shape, x.dtype) == (x.data.ptr, (3, 4), np.float32)


def test_a_launch_goes_to_the_current_stream_and_nobody_waits(fake):
    gpu, stream = runtime.current(), fake.cupy.cuda.Stream(non_blocking=True)
    x = gpu.empty(3, np.float32)
    gpu.launch(plan(), (x,))
    with stream:
        gpu.launch(plan(), (x,))
    assert [launch.stream for launch in fake.launches] == [fake.cupy.cuda.Stream.null, stream]
    assert fake.waits == 0


def test_every_plan_launches_its_own_kernel_and_integers(fake):
    """Plans that come and go may get each other's place in memory."""
    gpu = runtime.current()
    x = gpu.empty(1, np.float32)
    for i in range(300):
        gpu.launch(plan(constants=(("N", i % 3),), integers=(i,), grid=(i + 1, 1, 1)), (x,))
    assert [struct.unpack_from("<i", launch.parameters, 8)[0] for launch in fake.launches] == list(range(300))
    assert [launch.grid[0] for launch in fake.launches] == list(range(1, 301))
    assert len({launch.path for launch in fake.launches[::3]}) == 1 and len(fake.compiled) == 3


def test_a_plan_that_is_launched_again_touches_no_disk_and_compiles_nothing(fake, monkeypatch):
    gpu, made = runtime.current(), plan()
    x = gpu.empty(1, np.float32)
    gpu.launch(made, (x,))

    def forbidden(*args, **kwargs):
        raise AssertionError("the disk is touched")

    for place, name in ((builtins, "open"), (os, "stat"), (os, "replace"), (os, "scandir")):
        monkeypatch.setattr(place, name, forbidden)
    monkeypatch.setattr(LaunchPlan, "__hash__", forbidden)
    gpu.launch(made, (x,))
    monkeypatch.undo()
    assert len(fake.launches) == 2 and len(fake.compiled) == 1


def test_plans_beyond_the_limit_are_forgotten_and_found_again(fake, monkeypatch):
    monkeypatch.setattr(runtime, "REMEMBERED_PLANS", 3)
    gpu = runtime.current()
    x, plans = gpu.empty(1, np.float32), [plan(integers=(i,)) for i in range(8)]
    for made in plans * 2:
        gpu.launch(made, (x,))
    assert len(fake.launches) == 16 and len(fake.compiled) == 1
    assert len(gpu._starters) <= 3


@pytest.mark.parametrize("seed", range(20))
def test_constants_are_copied_once_and_waited_for_on_every_stream(install, seed):
    fake = install(seed=seed, capabilities=[(9, 0), (9, 0)])
    gpu, made = runtime.current(1), []
    values = np.arange(6.0)
    results = []
    for _ in range(6):
        with fake.cupy.cuda.Device(1), fake.cupy.cuda.Stream(non_blocking=True):
            table = gpu.constant(("table", 6), lambda: made.append(1) or values)
            results.append(fake.compute(lambda a: a + 1, table))
    assert len(made) == 1 and table.device.id == 1 and fake.waits == 0
    fake.run_until(fake.idle)
    assert all(np.array_equal(each.get(), values + 1) for each in results)
    assert gpu.constant(("table", 6), None) is table and fake.idle(), "nothing to wait for any more"
    assert runtime.current(0).constant(("table", 6), lambda: values).device.id == 0
    assert gpu.constant("other", lambda: values).device.id == 1 and fake.device == 0


# --- Tensor maps -------------------------------------------------------------------------------------------------


class MapDriver:
    """What a driver has for tensor maps; a map of its is the numbers that it was given, and where it was put."""

    def __init__(self):
        self.made, self.status = [], 0

    def cuTensorMapEncodeTiled(self, place, dtype, rank, address, sizes, strides, box, steps, *codes):  # noqa: N802
        assert place.value % 64 == 0, "the driver refuses a place that is not aligned"
        count = rank.value
        numbers = list(sizes)[:count] + list(strides)[: count - 1] + list(box)[:count] + list(steps)[:count]
        self.made.append((dtype.value, address.value, numbers, [each.value for each in codes]))
        if self.status == 0:
            ctypes.memmove(place.value, struct.pack("<QQ", 0x7E50, address.value).ljust(128, b"m"), 128)
        return self.status


@pytest.fixture
def driver(monkeypatch):
    made = MapDriver()
    monkeypatch.setattr(runtime, "_driver", lambda: made)
    return made


OF_X = TensorMap(0, "bfloat16", (64, 50, 2), (128, 6400), (64, 32, 1), (1, 2, 1))
OF_Y = TensorMap(2, "float16", (64, 8), (128,), (32, 8), (1, 1), 64)


def test_a_launch_passes_tensor_maps_before_its_pointers(fake, driver):
    gpu = runtime.current()
    x, other, y = gpu.empty((2, 50, 64), np.float16), gpu.empty((2, 50, 64), np.float16), gpu.empty((8, 64), np.float16)
    made = plan(maps=(OF_X, OF_Y))
    for each in (x, x, other, x):
        gpu.launch(made, (each, None, y))
    first, second, third, fourth = (launch.parameters for launch in fake.launches)
    assert first == second == fourth != third
    maps = [struct.pack("<QQ", 0x7E50, each.data.ptr).ljust(128, b"m") for each in (x, y)]
    expected = b"".join(maps) + struct.pack("<QQQiii", x.data.ptr, 0, y.data.ptr, 1, 2, 3)
    assert first == expected.ljust(320, b"\0") == made.parameters((x.data.ptr, 0, y.data.ptr), maps)
    assert [address for _, address, _, _ in driver.made] == [x.data.ptr, y.data.ptr, other.data.ptr], "each once"
    assert driver.made[0][0] == 9 and driver.made[1][0] == 6
    assert driver.made[0][2:] == ([64, 50, 2, 128, 6400, 64, 32, 1, 1, 2, 1], [0, 3, 3, 0])
    assert driver.made[1][2:] == ([64, 8, 128, 32, 8, 1, 1], [0, 2, 3, 0])


def test_maps_of_many_addresses_are_forgotten(fake, driver, monkeypatch):
    monkeypatch.setattr(runtime, "REMEMBERED_MAPS", 3)
    gpu, made = runtime.current(), plan(maps=(OF_X,))
    arrays = [gpu.empty((2, 50, 64), np.float16) for _ in range(6)]
    for each in arrays * 2:
        gpu.launch(made, (each,))
    assert len(driver.made) == 12
    assert all(
        struct.unpack_from("<Q", got.parameters, 8)[0] == x.data.ptr for got, x in zip(fake.launches, arrays * 2)
    )


def test_the_driver_refuses_a_map(fake, driver):
    driver.status = 1
    gpu = runtime.current()
    with pytest.raises(runtime.KernelError, match="no tensor map, error 1. Received: TensorMap.*at 0x"):
        gpu.launch(plan(maps=(OF_X,)), (gpu.empty((2, 50, 64), np.float16),))
    assert not fake.launches


def test_a_kernel_of_one_architecture_is_compiled_for_it(fake, monkeypatch, tmp_path):
    (tmp_path / "kernels" / "conv_wgmma.cu").write_text('#include "common.cuh"\n')
    gpu = runtime.current()
    for kernel in ("k", "conv_wgmma"):
        gpu.launch(replace(plan(), kernel=kernel), (gpu.empty(1, np.float32),))
    assert [options[0] for _, options in fake.compiled] == ["-arch=sm_90", "-arch=sm_90a"]
    assert compiled_for("conv_wgmma", "sm_90a") == "sm_90a"


PROBLEMS = {
    "axes": ({"sizes": (8,) * 6}, "6 axes"),
    "size": ({"sizes": (64, 0, 2)}, "sizes"),
    "strides": ({"strides": (120, 6400)}, "multiples of 16"),
    "box": ({"box": (64, 257, 1)}, "box"),
    "steps": ({"steps": (1, 9, 1)}, "steps"),
    "first step": ({"steps": (2, 1, 1)}, "steps"),
    "row": ({"box": (72, 32, 1)}, "144 bytes"),
    "narrow row": ({"box": (4, 32, 1)}, "8 bytes"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_the_driver_would_refuse_a_map_for(name):
    changes, word = PROBLEMS[name]
    assert not OF_X.problem() and word in replace(OF_X, **changes).problem()
    assert OF_X.box_bytes == 64 * 16 * 2


# --- Shared memory -----------------------------------------------------------------------------------------------


def test_more_shared_memory_than_usual_is_asked_for(fake):
    gpu = runtime.current()
    x = gpu.empty(1, np.float32)
    for kib in (40, 48, 100, 64, 200):
        gpu.launch(plan(dynamic_shared_bytes=kib << 10, shared_bytes=kib << 10), (x,))
    assert [launch.shared_bytes >> 10 for launch in fake.launches] == [40, 48, 100, 64, 200]
    gpu.launch(plan(dynamic_shared_bytes=30 << 10, shared_bytes=60 << 10, constants=(("M", 1),)), (x,))
    (first, second) = gpu._kernels.values()
    assert [n >> 10 for n in first.settings] == [100, 200], "never lowered: a plan made before may still need it"
    assert [n >> 10 for n in second.settings] == [30], "static shared memory counts too"


IMPOSSIBLE = {
    "shared": {"dynamic_shared_bytes": 228 << 10},
    "shared-static": {"shared_bytes": 228 << 10},
    "grid-0": {"grid": (0, 1, 1)},
    "grid-x": {"grid": (2**31, 1, 1)},
    "grid-y": {"grid": (1, 65536, 1)},
    "grid-z": {"grid": (1, 1, 65536)},
    "threads": {"block": (1025, 1, 1)},
}


@pytest.mark.parametrize("fields", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_gpu_starts_is_refused_before_anything_is_compiled(fake, fields):
    gpu = runtime.current()
    with pytest.raises(PlanError, match="Received: k: "):
        gpu.launch(plan(**fields), (gpu.empty(1, np.float32),))
    assert not fake.launches and not fake.compiled


def test_the_driver_refuses_a_launch(fake, monkeypatch):
    gpu = runtime.current()
    x = gpu.empty(1, np.float32)
    made = plan(reason="because")

    def refuses(*args):
        raise fake_cupy.CUDADriverError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(gpu, "_function", lambda plan: refuses)
    with pytest.raises(runtime.KernelError, match="GPU 0 does not start k: 7 blocks of 128.*because\n.*OUT_OF_RES"):
        gpu.launch(made, (x,))


# --- Devices -----------------------------------------------------------------------------------------------------


def test_each_gpu_has_one_runtime(install):
    fake = install(capabilities=[(9, 0), (8, 0)])
    first, second = runtime.current(0), runtime.current(1)
    assert runtime.current() is runtime.current(0) is first and second is not first
    assert (first.limits.arch, second.limits.arch) == ("sm_90", "sm_80")
    with fake.cupy.cuda.Device(1):
        assert runtime.current() is second
    with pytest.raises(ValueError, match="0 to 1.*device=2"):
        runtime.current(2)


def test_arrays_of_another_gpu_are_computed_there(install):
    fake = install(capabilities=[(9, 0), (8, 0)])
    gpu = runtime.current(1)
    x = gpu.empty(3, np.float32)
    assert x.device.id == 1 and fake.device == 0
    with fake.cupy.cuda.Device(1):
        stream = fake.cupy.cuda.Stream()
        stream.__enter__()
    made = plan(dynamic_shared_bytes=100 << 10)
    runtime.of([None, x]).launch(made, (x,))
    runtime.current(0).launch(made, (runtime.current(0).empty(1, np.float32),))
    assert [(launch.device, launch.stream) for launch in fake.launches] == [
        (1, stream),
        (0, fake.cupy.cuda.Stream.null),
    ]
    assert fake.device == 0
    assert {options[0] for _, options in fake.compiled} == {"-arch=sm_80", "-arch=sm_90"}


def test_a_gpu_can_be_made_the_current_one(install):
    fake = install(capabilities=[(9, 0), (8, 0)])
    for device in (0, 1):
        with runtime.on(device):
            assert fake.device == device
    assert fake.device == 0


def test_two_gpus_of_a_kind_share_one_file(install):
    fake = install(capabilities=[(9, 0), (9, 0)])
    for device in (0, 1):
        gpu = runtime.current(device)
        gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert len(fake.compiled) == 1 and len(fake.loaded) == 2 and len({launch.path for launch in fake.launches}) == 1


def test_arrays_of_several_gpus_are_refused(install):
    install(capabilities=[(9, 0), (9, 0)])
    x, y = runtime.current(0).empty(1, np.float32), runtime.current(1).empty(1, np.float32)
    assert runtime.of((x, None, x)) is runtime.current(0)
    with pytest.raises(ValueError, match="GPUs 0, 1"):
        runtime.of((x, None, y))


def test_a_gpu_is_found_for_host_arrays(install):
    fake = install(capabilities=[(7, 0), (9, 0), (8, 0)])
    values = np.arange(3.0)
    assert runtime.device_array(values).device.id == 1, "the first that kernels are compiled for"
    assert runtime.device_array(values, 2).device.id == 2
    with fake.cupy.cuda.Device(2):
        assert runtime.device_array(values).device.id == 2
    array = runtime.device_array(values)
    assert runtime.is_device_array(array) and not runtime.is_device_array(values)
    assert np.array_equal(array.get(), values)


def test_launch_code_works_on_these_arrays(fake):
    gpu = runtime.current()
    x = runtime.device_array(np.arange(24, dtype=np.float32).reshape(4, 6))
    assert compact(gpu, x) is x and compact(gpu, None) is None
    assert np.array_equal(compact(gpu, x[:, ::2]).get(), np.arange(0, 24, 2).reshape(4, 3))
    with writing(gpu, x) as out:
        assert out is x


# --- Limits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("properties", [{}, {"clockRate": 0, "memoryClockRate": 0}], ids=["CUDA 12", "CUDA 13"])
def test_the_limits_are_those_the_driver_tells(fake, properties):
    fake.properties = properties
    limits = runtime.current().limits
    assert (limits.arch, limits.capability, limits.multiprocessors) == ("sm_90", (9, 0), 132)
    assert (limits.shared_bytes, limits.shared_bytes_per_multiprocessor) == (227 << 10, 228 << 10)
    assert (limits.threads_per_multiprocessor, limits.l2_bytes) == (2048, 50 << 20)
    assert limits.bandwidth == pytest.approx(4.917e12, rel=1e-3)
    assert limits.fp32_rate == pytest.approx(2 * 128 * 132 * 1.98e9) == 2 * limits.fp64_rate
    rates = limits.fp16_rate, 2 * limits.tf32_rate  # of an H200, the data sheet that is most like it
    assert rates == pytest.approx((limits.fp32_rate * 989.5 / 67,) * 2, rel=1e-3)
    assert limits.dmma_rate == limits.fp32_rate


NAMES = {
    "NVIDIA H200": "H200",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_driver_without_clocks_leaves_the_data_sheet(install, name):
    known = DEVICES[NAMES[name]]
    fake = install(name=name, capabilities=[known.capability])
    fake.properties, fake.attributes = {"memoryClockRate": 0, "clockRate": 0}, {13: 0, 36: 0, 87: 2}
    limits = runtime.current().limits
    assert (limits.bandwidth, limits.fp32_rate, limits.fp64_rate) == (
        known.bandwidth,
        known.fp32_rate,
        known.fp64_rate,
    )


@pytest.mark.parametrize("capability", [(7, 5), (8, 7), (8, 9), (10, 3), (12, 1), (13, 0)])
def test_unknown_gpus_have_rates(install, capability):
    fake = install(capabilities=[capability])
    fake.properties, fake.attributes = {"memoryClockRate": 0, "clockRate": 0}, {13: 0, 36: 0, 87: 2}
    limits = runtime.current().limits
    assert limits.bandwidth > 1e11 and limits.fp32_rate > 1e12 and limits.fp64_rate > 1e11


# --- Compiling ---------------------------------------------------------------------------------------------------


def test_kernels_are_compiled_with_our_options(fake):
    gpu = runtime.current()
    gpu.launch(plan(constants=(("ELEMENT", "complex_t<float>"), ("RANK", 2))), (gpu.empty(1, np.float32),))
    ((name, options),) = fake.compiled
    assert name == "k.cu"
    assert set(options) == {
        "-arch=sm_90",
        "--std=c++17",
        "-lineinfo",
        "-default-device",
        "-DELEMENT=complex_t<float>",
        "-DRANK=2",
    }, "in particular no -ftz"


def test_the_byte_that_cupy_cuts_off_is_put_back(fake):
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    (path,) = fake.loaded
    with open(path, "rb") as stream:
        assert fake_cupy.is_whole(stream.read())


def test_the_next_process_finds_the_kernel(fake, install):
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    later = install()
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert later.compiled == [] and later.loaded == fake.loaded
    newer = install(nvrtc=(13, 1))
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert len(newer.compiled) == 1, "another NVRTC makes another kernel"


def test_a_changed_header_is_seen(fake, install, tmp_path):
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    (tmp_path / "kernels" / "common.cuh").write_text("#pragma once\nstruct Changed {};\n")
    cubins.expanded.cache_clear()
    later = install()
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert len(later.compiled) == 1


def test_a_file_that_the_driver_refuses_is_made_again_once(fake, caplog):
    fake.refuse_to_load = 1
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert len(fake.launches) == 1 and len(fake.compiled) == 2
    assert "could not be loaded" in caplog.text
    fake.refuse_to_load = 2
    with pytest.raises(runtime.KernelError, match="does not load kernel k .*-DN=9.*INVALID_IMAGE"):
        gpu.launch(plan(constants=(("N", 9),)), (gpu.empty(1, np.float32),))


def test_a_kernel_that_does_not_compile(fake, tmp_path):
    (tmp_path / "kernels" / "k.cu").write_text("#error no\n")
    gpu = runtime.current()
    with pytest.raises(runtime.KernelError, match=r"kernel k does not compile with .*-DN=4") as caught:
        gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert "k.cu(7): error: #error" in str(caught.value) and isinstance(caught.value, PlanError)


def test_threads_compile_a_kernel_once(fake):
    gpu, barrier, failed = runtime.current(), threading.Barrier(6), []
    x = gpu.empty(1, np.float32)

    def work():
        try:
            barrier.wait()
            gpu.launch(plan(), (x,))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(fake.compiled) == 1 and len(fake.launches) == 6


@pytest.mark.parametrize(
    ("capability", "arch", "suffix"),
    [
        ((7, 5), "sm_75", ".cubin"),
        ((12, 0), "sm_120", ".cubin"),
        ((8, 7), "compute_86", ".ptx"),
        ((12, 1), "compute_120", ".ptx"),
        ((13, 0), "compute_120", ".ptx"),
    ],
)
def test_a_newer_gpu_than_nvrtc_knows_gets_ptx(install, capability, arch, suffix):
    fake = install(capabilities=[capability])
    gpu = runtime.current()
    gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert fake.compiled[0][1][0] == f"-arch={arch}" and fake.loaded[0].endswith(suffix)
    (device,) = runtime.probe().devices
    assert arch in str(device.target) and ("driver" in str(device.target)) == (suffix == ".ptx")


# --- What can be missing -----------------------------------------------------------------------------------------


MISSING = {
    "driver": ({"driver": 0}, runtime.DriverError, "libcuda is not there"),
    "gpu": ({"capabilities": []}, runtime.DriverError, "no GPU"),
    "nvrtc": ({"supported": None}, runtime.CompilerError, r"NVRTC does not load: .*libnvrtc.*pip install"),
    "old": ({"capabilities": [(7, 0)]}, runtime.ArchitectureError, r"7\.5 is the oldest.*7\.0"),
    "nvrtc-too-new": ({"supported": (80, 90), "capabilities": [(7, 5)]}, runtime.ArchitectureError, "older CUDA.*7.5"),
}


@pytest.mark.parametrize(("options", "error", "text"), MISSING.values(), ids=MISSING)
def test_what_is_missing_has_an_error_of_its_own(install, options, error, text):
    install(**options)

    def launch():
        gpu = runtime.current()
        gpu.launch(plan(), (gpu.empty(1, np.float32),))

    with pytest.raises(error, match=text) as caught:
        launch()
    assert type(caught.value) is error and isinstance(caught.value, PlanError)
    found = runtime.probe()
    assert not found.usable and (found.reason in str(caught.value) or "7.5" in found.reason)


def test_too_little_memory_says_what_was_asked_and_what_helps(install):
    install(memory=1000)
    with pytest.raises(fake_cupy.OutOfMemoryError, match=r"4,000 bytes.*\(10, 100\) of float32.*`workspace`"):
        runtime.current().empty((10, 100), np.float32)


# --- The probe ---------------------------------------------------------------------------------------------------


def test_the_probe_of_a_whole_installation(install):
    install(capabilities=[(7, 0), (9, 0)], driver=12080, nvrtc=(12, 9))
    found = runtime.probe()
    assert found.usable and found.reason == "GPU NVIDIA Test"
    assert (found.cupy_version, found.driver_version, found.nvrtc_version) == ("14.2.0", "12.8", "12.9")
    old, new = found.devices
    assert (old.compute_capability, old.target, old.limits) == ("7.0", None, None) and "7.5" in old.problem
    assert (new.index, str(new.target), new.problem, new.limits.arch) == (1, "sm_90", None, "sm_90")
    assert runtime.is_device_array(cuconv.asarray([1.0, 2.0]))


def test_the_probe_never_raises(install, monkeypatch):
    fake = install()

    def broken(index):
        raise fake_cupy.CUDARuntimeError(999, "cudaErrorUnknown: unknown error")

    fake.cupy.cuda.runtime.getDeviceProperties = broken
    found = runtime.probe()
    assert not found.usable and "unknown error" in found.reason and found.nvrtc_version == "13.0"
    monkeypatch.setitem(sys.modules, "cupy", None)
    runtime.probe.cache_clear()
    assert "CuPy is not installed" in runtime.probe().reason or "does not import" in runtime.probe().reason


# --- The real CuPy, without a GPU --------------------------------------------------------------------------------

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="CuPy is not installed")


@needs_cupy
def test_nvrtc_of_the_real_cupy_makes_whole_cubins():
    compiler = runtime._Compiler()
    source = cubins.expanded(runtime.kernel_directory(), "activations.cuh") + (
        "struct Params { const ELEMENT* x; ELEMENT* y; INDEX n; };\n"
        'extern "C" __global__ void check(const __grid_constant__ Params p) {\n'
        "  for (INDEX i = threadIdx.x; i < p.n; i += STEP) p.y[i] = p.x[i];\n}\n"
    )
    for element in ("float", "half_t", "bfloat_t", "complex_t<double>"):
        constants = (("ELEMENT", element), ("INDEX", "long long"), ("STEP", 128))
        recipe = compiler.recipe("check", source, constants, compiler.target((9, 0)))
        data = compiler.compile(recipe)
        phoff, shoff, *_, phsize, phnum, shsize, shnum = struct.unpack_from("<QQIHHHHH", data, 32)
        assert data[:4] == b"\x7fELF" and len(data) == max(phoff + phsize * phnum, shoff + shsize * shnum)
    target = runtime.Target("compute_90")
    assert b".target sm_90" in compiler.compile(compiler.recipe("check", source, constants, target))


@needs_cupy
def test_the_real_nvrtc_refuses_with_the_line_of_the_file(tmp_path):
    (tmp_path / "b.cuh").write_text("#pragma once\nint ok;\nint wrong = ;\n")
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n')
    compiler = runtime._Compiler()
    recipe = compiler.recipe("a", cubins.expanded(tmp_path, "a.cu"), (), runtime.Target("sm_80"))
    with pytest.raises(runtime.KernelError, match=r"b\.cuh\(3\): error: expected an expression"):
        compiler.compile(recipe)


@needs_cupy
@pytest.mark.parametrize("name", ["ptx.cuh", "common.cuh", "activations.cuh"])
def test_headers_compile_for_the_oldest_and_the_newest(name):
    compiler = runtime._Compiler()
    source = cubins.expanded(runtime.kernel_directory(), name) + 'extern "C" __global__ void check() {}\n'
    for capability in ((7, 5), (99, 0)):
        compiler.compile(compiler.recipe("check", source, (), compiler.target(capability)))


@needs_cupy
def test_without_a_driver_the_real_cupy_says_so():
    if runtime.probe().devices:
        pytest.skip("there is a GPU")
    with pytest.raises(runtime.DriverError, match="driver"):
        runtime.current()
    assert runtime.probe().nvrtc_version and "driver" in runtime.probe().reason


def test_nothing_is_logged_where_all_is_well(fake, caplog):
    with caplog.at_level(logging.WARNING):
        gpu = runtime.current()
        gpu.launch(plan(), (gpu.empty(1, np.float32),))
    assert not caplog.records
