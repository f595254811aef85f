"""Tensor maps: what cuTensorMapEncodeTiled takes, the limits that it enforces, and 128 bytes for the emulator.

The bytes are not those of a driver, which keeps its layout to itself: tensor_copies.cpp mirrors them.
"""

import enum
import struct
from collections.abc import Sequence

SIZE = 128  # bytes
ALIGNMENT = 64  # bytes, of a map in memory
MOST_AXES = 5
MOST_IN_BOX = 256  # elements along an axis
MOST_STEP = 8
LINE = 16  # bytes: what addresses, strides and rows of boxes are multiples of

MAGIC = b"cuconv\0\1"
LAYOUT = struct.Struct("<8sQ4Q5I5H5B4B41x")  # mirrored by TensorMap of tensor_copies.cpp


class TensorMapError(ValueError):
    """The driver makes no tensor map of these numbers."""


class DataType(enum.IntEnum):
    """CUtensorMapDataType."""

    UINT8 = 0
    UINT16 = 1
    UINT32 = 2
    INT32 = 3
    UINT64 = 4
    INT64 = 5
    FLOAT16 = 6
    FLOAT32 = 7
    FLOAT64 = 8
    BFLOAT16 = 9
    FLOAT32_FTZ = 10
    TFLOAT32 = 11
    TFLOAT32_FTZ = 12

    @property
    def nbytes(self) -> int:
        """Of an element."""
        return (1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4)[self]


class Swizzle(enum.IntEnum):
    """CUtensorMapSwizzle."""

    NONE = 0
    BYTES_32 = 1
    BYTES_64 = 2
    BYTES_128 = 3

    @property
    def span(self) -> int:
        """Bytes that a row of a box may have."""
        return 16 << self if self else MOST_IN_BOX * 8


def encode(
    address: int,
    data_type: int,
    sizes: Sequence[int],
    strides: Sequence[int],
    box: Sequence[int],
    steps: Sequence[int] | None = None,
    *,
    interleave: int = 0,
    swizzle: int = Swizzle.NONE,
    l2_promotion: int = 0,
    fill: int = 0,
) -> bytes:
    """The 128 bytes of a map. Axes innermost first.

    Args:
        address: of the element (0, 0, ...), a multiple of 16.
        sizes: of the tensor.
        strides: bytes, of all axes but the innermost, whose elements follow each other.
        box: elements along each axis, before steps: an axis of n elements and a step s brings ceil(n / s) of them.
        steps: between elements of a box, ones by default. That of the innermost axis is ignored.
        fill: 0 brings zeros for what is outside of the tensor, 1 NaN.

    Raises:
        TensorMapError: one of the limits that the driver's manual states is passed.
    """
    rank = len(sizes)
    steps = (1,) * rank if steps is None else steps

    def need(holds: bool, what: str, **received) -> None:
        if not holds:
            raise TensorMapError(f"{what}. Received: {', '.join(f'{key}={value}' for key, value in received.items())}")

    need(data_type in list(DataType), "`data_type` must be one of CUtensorMapDataType", data_type=data_type)
    need(swizzle in list(Swizzle), "`swizzle` must be 0 to 3", swizzle=swizzle)
    need(interleave == 0, "`interleave` must be 0: interleaved tensors are not supported", interleave=interleave)
    need(l2_promotion in range(4), "`l2_promotion` must be 0 to 3", l2_promotion=l2_promotion)
    need(fill in (0, 1), "`fill` must be 0 or 1", fill=fill)
    element = DataType(data_type)
    need(fill == 0 or "FLOAT" in element.name, "`fill` must be 0 for integers", fill=fill, data_type=element.name)
    need(1 <= rank <= MOST_AXES, f"a tensor has 1 to {MOST_AXES} axes", sizes=sizes)
    counts = {"strides": len(strides) + 1, "box": len(box), "steps": len(steps)}
    need(all(n == rank for n in counts.values()), "one stride fewer than axes, a box and steps of all axes", **counts)
    need(address % LINE == 0, f"`address` must be a multiple of {LINE}", address=address)
    for axis, (size, extent, step) in enumerate(zip(sizes, box, steps)):
        need(1 <= size <= 2**32, "a size must be 1 to 2^32", axis=axis, size=size)
        need(1 <= extent <= MOST_IN_BOX, f"a box has 1 to {MOST_IN_BOX} elements along an axis", axis=axis, box=extent)
        need(1 <= step <= MOST_STEP, f"a step must be 1 to {MOST_STEP}", axis=axis, step=step)
    for axis, stride in enumerate(strides, 1):
        need(0 <= stride < 2**40, "a stride must be less than 2^40 bytes", axis=axis, stride=stride)
        need(stride % LINE == 0, f"a stride must be a multiple of {LINE} bytes", axis=axis, stride=stride)
    row = box[0] * element.nbytes
    need(row % LINE == 0, f"a row of a box must be a multiple of {LINE} bytes", row=row)
    span = Swizzle(swizzle).span
    need(row <= span, f"a row of a box must have at most {span} bytes under this swizzle", row=row)

    def padded(values: Sequence[int], count: int, value: int) -> list[int]:
        return [*map(int, values), *(value,) * (count - len(values))]

    return LAYOUT.pack(
        MAGIC,
        address,
        *padded(strides, MOST_AXES - 1, 0),
        *(size - 1 for size in padded(sizes, MOST_AXES, 1)),
        *padded(box, MOST_AXES, 1),
        *padded(steps, MOST_AXES, 1),
        *(rank, element, swizzle, fill),
    )
