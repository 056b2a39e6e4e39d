"""NumPy and CuPy arrays: telling them apart, and what their memory does."""

from __future__ import annotations

import sys
from functools import cache
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = Any  # numpy.ndarray or cupy.ndarray
Kind = Literal["numpy", "cupy"]


@cache
def dtypes() -> frozenset[np.dtype[Any]]:
    """Element types that q, k and v may have; bfloat16 where ml_dtypes is installed."""
    names = [np.float16, np.float32, np.float64]
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        return frozenset(map(np.dtype, names))
    return frozenset(map(np.dtype, [*names, bfloat16]))


def kind_of(name: str, x: Array) -> Kind:
    """Tell NumPy from CuPy; anything else is a TypeError that names the argument."""
    if isinstance(x, np.ndarray) and not isinstance(x, np.ma.MaskedArray | np.matrix):
        return "numpy"
    # An array of CuPy cannot exist before CuPy was imported.
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        current = cupy.cuda.runtime.getDevice()
        if x.data.device_id != current:
            raise ValueError(
                f"{name}: got an array on GPU {x.data.device_id}, takes arrays on the current "
                f"device, GPU {current} (see cupy.cuda.Device)"
            )
        return "cupy"
    raise TypeError(
        f"{name}: got {type(x).__module__}.{type(x).__qualname__}, takes a NumPy or CuPy array "
        "(arrays of other libraries enter through numpy.asarray or cupy.from_dlpack)"
    )


def common_kind(named: dict[str, Array]) -> Kind:
    """Return the one library that all the arrays are of."""
    kinds = [kind_of(name, x) for name, x in named.items()]
    if len(set(kinds)) > 1:
        got = ", ".join(f"{name} {kind}" for name, kind in zip(named, kinds, strict=True))
        raise TypeError(f"{', '.join(named)}: got a mixture ({got}), takes arrays of one library")
    return kinds[0]


def namespace(x: Array) -> ModuleType:
    """Return numpy or cupy, whichever the array is of."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def address(x: Array) -> int:
    """Return where the first element lies, in the memory of the array's device."""
    return int(x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr)


def writeable(x: Array) -> bool:
    """Whether elements may be assigned; CuPy arrays always can."""
    return bool(getattr(x.flags, "writeable", True))


def overlap(x: Array, y: Array) -> bool:
    """Whether two arrays of one library share memory; exact for all but contrived strides."""
    try:
        return np.shares_memory(_place(x), _place(y), max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Place:
    """Where an array lies, as NumPy's array interface tells it."""

    def __init__(self, x: Array) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address(x), True),
            "shape": x.shape,
            "strides": x.strides,
            "typestr": f"|V{x.itemsize}",
        }


def _place(x: Array) -> NDArray[np.void]:
    """View the addresses of x, never to be read: they may be those of a GPU.

    `cupy.shares_memory` would sort them on the GPU and wait for it.
    """
    return np.asarray(_Place(x))


def overlaps_itself(x: Array) -> bool:
    """Whether two elements of one array may share memory (a broadcast view, say).

    Sorted by stride, an axis is safe if it steps over all that the smaller ones reach.
    """
    reach = x.itemsize
    for stride, extent in sorted((abs(s), n) for s, n in zip(x.strides, x.shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return bool(x.size > 0)
            reach += stride * (extent - 1)
    return False


def to_device(x: Array, device: Literal["cpu", "gpu"]) -> Array:
    """Copy a NumPy array to the current GPU if that is the device; leave all others as they are."""
    if device == "gpu":
        import cupy

        return cupy.asarray(x)
    return x


def to_kind(x: Array, kind: Kind) -> Array:
    """Bring a result back to the library that the inputs came from."""
    return x.get() if kind == "numpy" and not isinstance(x, np.ndarray) else x


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Add up x over the axes along which an array of this shape was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and x.shape[i] != 1)
    return x.sum(axis=axes, keepdims=True) if axes else x
