"""conv_wgmma: its PTX for sm_90a on the CPU, copy engine and warpgroups included, against the oracle; and its plan.

Every case runs under the detector. Sizes are chosen around the edges of a tile and of a step: channels that are no
multiple of 64, filters and positions more than a tile has, boxes across batch items, taps that lie outside.
"""

from contextlib import contextmanager
from dataclasses import replace
from math import prod
from unittest import mock

import disassembly
import emulator
import numpy as np
import oracle
import pytest
from compare import assert_close
from emulated import EmulatedRuntime
from planted import planted
from strategies import uniform
from test_conv_kernels import Case, around, last_blocks, name
from test_static_gates import compiled

from cuconv import geometry
from cuconv.cuda import conv as launching
from cuconv.geometry import conv_shape
from cuconv.plan import wgmma
from cuconv.plan.conv import plan_conv
from cuconv.plan.devices import DEVICES
from cuconv.plan.types import MAP_BOX, PlanError

in_the_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))

# So few blocks that each has several tiles, and both ends of a band.
LIMITS = replace(DEVICES["H200"], multiprocessors=3)
ALIGNED = (0, 0, 0)


@contextmanager
def only(tile):
    """Plans are conv_wgmma's, and find no other tile."""
    with (
        mock.patch.object(wgmma, "TILES", (tile,)),
        mock.patch.object(launching, "plan_conv", wgmma.plan_wgmma.__wrapped__),
    ):
        yield


def trace(seed=1, limits=LIMITS):
    return EmulatedRuntime(limits, mode="trace", seed=seed)


def cases(tile, rank):
    """(x_shape, w_shape, options) that meet every edge of `tile`."""
    bm, bn, *_ = tile

    def shapes(batch, sizes, channels, taps, filters, groups=1):
        return (batch, *sizes, channels), (*taps, channels // groups, filters)

    taps = {1: (3,), 2: (2, 3), 3: (2, 1, 2)}[rank]
    # Positions more than a tile has, more filters, a step of 8 channels besides a whole one, and padding.
    yield *shapes(2, around(rank, bm + 5), 72, taps, bn + 8), {"padding": "same"}
    # Boxes across items; each axis at a stride of its own.
    strides = (3, 2, 5)[:rank]
    yield *shapes(5, around(rank, bm // 2 + 3), 8, taps, 8), {"padding": "same", "strides": strides}
    # Dilation, and groups whose filters end inside a tile.
    yield *shapes(1, around(rank, bm - 3), 128, taps, 48, 2), {"padding": "same", "groups": 2, "dilation_rate": 2}
    # One position, whose other taps are padding.
    yield *shapes(3, (1,) * rank, 16, taps, 16), {"padding": "same"}
    if rank == 1:
        yield *shapes(3, (29,), 24, (3,), 24), {"padding": "causal", "dilation_rate": 11}
        yield *shapes(2, (11,), 8, (2,), 8), {"padding": (3, 4), "strides": 8}


def run_tile(dtype, tile, rank, chosen=range(99)):
    with only(tile):
        for number, (x_shape, w_shape, options) in enumerate(cases(tile, rank)):
            if number not in chosen:
                continue
            runtime = trace(seed=number + 1)
            try:
                Case(x_shape, w_shape, dtype, seed=number, **options).check_forward(runtime)
            except (AssertionError, emulator.EmulationError) as error:
                error.add_note(f"x {x_shape}, w {w_shape}, {options}; {runtime.launches[-1:]}")
                raise
            assert [plan.kernel for plan in runtime.launches] == ["conv_wgmma"]
            assert runtime.launches[0].tile.startswith(name(tile[:2]))


# --- Every tile --------------------------------------------------------------------------------------------------


@in_the_emulator
@pytest.mark.parametrize(
    "dtype, rank, tile", [("bfloat16", 1, wgmma.TILES[-1]), ("float16", 2, wgmma.TILES[2])], ids=name
)
def test_two_tiles(dtype, rank, tile):
    run_tile(dtype, tile, rank)


@in_the_emulator
@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(len(wgmma.TILES)), ids=lambda number: name(wgmma.TILES[number]))
def test_every_tile(number):
    """Each with another rank, so that the small ones have all."""
    dtype = ("float16", "bfloat16")[number % 2]
    for rank in {(number + 2) % 3 + 1, 3} if number == 5 else {(number + 2) % 3 + 1}:
        run_tile(dtype, wgmma.TILES[number], rank)
