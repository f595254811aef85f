"""Types that plans are made of."""

from __future__ import annotations


class PlanError(RuntimeError):
    """No kernel of cuconv computes this configuration on this device."""


# Codes of the pointwise activations that kernels apply themselves; mirrored by the ACT_ constants of
# kernels/common.cuh.
ACTIVATION_CODES = {
    "linear": 0,
    "relu": 1,
    "relu6": 2,
    "leaky_relu": 3,
    "sigmoid": 4,
    "tanh": 5,
    "silu": 6,
    "gelu": 7,
    "elu": 8,
    "selu": 9,
    "softplus": 10,
    "softsign": 11,
    "exponential": 12,
    "hard_sigmoid": 13,
    "hard_silu": 14,
}
