"""Tensor maps: how the tensor memory accelerator (TMA) of a GPU sees a tensor.

A map says where a tensor lies and which boxes of it are copied between global and shared memory,
see kernels_cu/tma.cuh and hopper_maps.cuh. The driver encodes it in 128 bytes, which kernels take
by value.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import numpy as np

from .driver import library

MAP_BYTES = 128

#: Columns of a box of 16-bit elements: a row of it is what the swizzle permutes.
BOX_COLUMNS = 64
SWIZZLE_BYTES = 128

#: The largest stride of a map, in bytes, is below this.
STRIDE_LIMIT = 2**40


class BoxMap(NamedTuple):
    """A tensor of 16-bit elements with five axes, cut into boxes.

    A box has `BOX_COLUMNS` columns, ``box_rows`` rows and extent 1 along the other axes. In shared
    memory its rows are `SWIZZLE_BYTES` (128) bytes each, without gaps, from an address that is a
    multiple of 1024; bits 4..6 of an element's address there are XORed with bits 7..9 (chunk c of
    row r is at place ``c ^ (r % 8)``). A box may reach beyond the tensor at any of its sides: what
    is loaded from there is zero, what would be stored there is left out. A copy to shared memory
    counts all bytes of the box.

    This is all that a simulated device needs to make 128 bytes of its own for
    `flash_cupy.cuda.launch.Launch.arguments`.

    Attributes
    ----------
    address
        Of the first element, a multiple of 16.
    element
        "float16" or "bfloat16".
    extents
        Five: columns, rows, heads, and the two batch axes, the inner one first: the order of
        coordinates in the instructions of kernels_cu/tma.cuh.
    strides
        Four: bytes from one row, head and batch entry to the next, multiples of 16, 0 where an axis
        is broadcast. Columns are contiguous.
    box_rows
        Up to 256.
    """

    address: int
    element: str
    extents: tuple[int, ...]
    strides: tuple[int, ...]
    box_rows: int


# Numbers of the driver's API, from cuda.h.
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE = 0
_SWIZZLE_128B = 3
_L2_PROMOTION_256B = 3
_FILL_WITH_ZEROS = 0


def encode(box_map: BoxMap) -> bytes:
    """Return a map as the driver encodes it for the GPU.

    Raises
    ------
    RuntimeError
        The driver refuses the map.
    """
    rank = len(box_map.extents)
    memory = np.zeros(MAP_BYTES + 64, np.uint8)
    first = -memory.ctypes.data % 64  # where the driver wants its result
    error = library().cuTensorMapEncodeTiled(
        ctypes.c_void_p(memory.ctypes.data + first),
        ctypes.c_int(_DATA_TYPES[box_map.element]),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(box_map.address),
        (ctypes.c_uint64 * rank)(*box_map.extents),
        (ctypes.c_uint64 * (rank - 1))(*box_map.strides),
        (ctypes.c_uint32 * rank)(BOX_COLUMNS, box_map.box_rows, 1, 1, 1),
        (ctypes.c_uint32 * rank)(1, 1, 1, 1, 1),
        ctypes.c_int(_INTERLEAVE_NONE),
        ctypes.c_int(_SWIZZLE_128B),
        ctypes.c_int(_L2_PROMOTION_256B),
        ctypes.c_int(_FILL_WITH_ZEROS),
    )
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {box_map}")
    return memory[first : first + MAP_BYTES].tobytes()
