"""Limits of the GPUs that plans and predictions are made for without having one."""

from __future__ import annotations

from cuconv.plan.types import DeviceLimits, PlanError

KIB, MIB = 1 << 10, 1 << 20
OLDEST = (7, 5)  # compute capability; NVRTC 13 compiles for nothing older

# name, arch, multiprocessors, shared KiB a block and a multiprocessor, threads a multiprocessor, L2 MiB, then bytes a
# second and tera-operations a second of fp32, fp64, and on the tensor cores of 16-bit numbers (bfloat16 too from sm_80
# on), tf32 and fp64. From NVIDIA's data sheets and the compute-capability table of the CUDA guide.
_TABLE = (
    ("T4", "sm_75", 40, 64, 64, 1024, 4, 0.320e12, 8.1, 0.25, 65, 0, 0),
    ("A100", "sm_80", 108, 163, 164, 2048, 40, 2.039e12, 19.5, 9.7, 312, 156, 19.5),
    ("RTX 3090", "sm_86", 82, 99, 100, 1536, 6, 0.936e12, 35.6, 0.56, 71, 35.6, 0),
    ("L4", "sm_89", 58, 99, 100, 1536, 48, 0.300e12, 30.3, 0.47, 121, 60.5, 0),
    ("RTX 4090", "sm_89", 128, 99, 100, 1536, 72, 1.008e12, 82.6, 1.29, 165, 82.6, 0),
    ("H100", "sm_90", 132, 227, 228, 2048, 50, 3.35e12, 67, 34, 989.5, 494.7, 67),
    ("H200", "sm_90", 132, 227, 228, 2048, 60, 4.8e12, 67, 34, 989.5, 494.7, 67),
    ("B200", "sm_100", 148, 227, 228, 2048, 126, 8.0e12, 75, 37, 2250, 1125, 40),
    ("RTX 5090", "sm_120", 170, 99, 100, 1536, 96, 1.792e12, 104.8, 1.64, 209.5, 104.8, 0),
)

DEVICES = {
    name: DeviceLimits(
        name, arch, sms, block * KIB, sm * KIB, threads, l2 * MIB, bandwidth, *(1e12 * rate for rate in rates)
    )
    for name, arch, sms, block, sm, threads, l2, bandwidth, *rates in _TABLE
}


def device(name: str) -> DeviceLimits:
    """The limits of a GPU by its name in :data:`DEVICES`, capital letters or not.

    Raises:
        PlanError: no such name.
    """
    for known, limits in DEVICES.items():
        if known.lower() == name.lower():
            return limits
    raise PlanError(f"the device must be one of {', '.join(DEVICES)}. Received: {name!r}")
