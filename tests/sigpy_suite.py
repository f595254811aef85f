"""Runs sigpy's own tests, from a checkout of sigpy, with its GPU code on our functions; needs no GPU.

    git clone https://github.com/mikgroup/sigpy
    python tests/sigpy_suite.py sigpy               # a cupy that is NumPy underneath, and `enable`
    python tests/sigpy_suite.py sigpy --without     # without `enable`: what CuPy 14 alone gives
    python tests/sigpy_suite.py sigpy --kernels     # through the kernels, in the emulator; convolutions and operators

Each of sigpy's tests runs for the CPU and, as it finds a CuPy, for GPU 0. Those that need CUDA code of sigpy's, or a
torch with CUDA, cannot pass here. What failed is counted by test; the exit code is 1 where a convolution did.
"""

import argparse
import io
import sys
import unittest
from collections import Counter

import numpy as np
import posing_cupy
import pytest
from test_engine import DEVICES, OnDevice, Runtime, emulated_device

from cuconv.cuda import runtime


def run(checkout: str, without: bool, kernels: bool, patch: pytest.MonkeyPatch) -> int:
    kind, engine = posing_cupy.Posing, None
    if kernels:
        kind, engine = OnDevice, emulated_device(patch, Runtime(DEVICES["H200"]))
        patch.setattr(OnDevice, "get", lambda self: np.array(self), raising=False)
        patch.setattr(OnDevice, "device", posing_cupy.Device())
    else:
        patch.setattr(runtime, "is_device_array", lambda array: False)
    patch.syspath_prepend(checkout)
    with posing_cupy.installed(posing_cupy.module(kind), "sigpy", "tests"):
        if not without:
            from cuconv.compat.sigpy import enable

            assert enable()
        tests = unittest.defaultTestLoader
        suite = (
            tests.loadTestsFromNames(["tests.test_conv", "tests.test_linop"]) if kernels else tests.discover(checkout)
        )
        result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    failed = Counter(getattr(test, "test_case", test).id() for test, _ in result.errors + result.failures)
    print(f"{result.testsRun} tests, {len(failed)} of them failed, in {sum(failed.values())} cases")
    for name, cases in sorted(failed.items()):
        print(f"{cases:5d} {name}")
    if engine:
        launched = Counter(plan.kernel for plan in engine.runtime.launches)
        print("launches:", ", ".join(f"{count} of {kernel}" for kernel, count in sorted(launched.items())))
    return int(not result.testsRun or any("convol" in name.lower() for name in failed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="sigpy's own tests on cuconv")
    parser.add_argument("checkout", help="folder of sigpy's sources")
    parser.add_argument("--without", action="store_true", help="do not call cuconv.compat.sigpy.enable")
    parser.add_argument("--kernels", action="store_true", help="run the kernels in the emulator")
    with pytest.MonkeyPatch.context() as patch:
        sys.exit(run(**vars(parser.parse_args()), patch=patch))
