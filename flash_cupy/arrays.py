"""NumPy and CuPy arrays: telling them apart, and what their memory does."""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from types import ModuleType
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .gpu import current_device

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
    kind = _kind_of_type(type(x))  # type: ignore[arg-type]  # types are hashable
    if kind is None:
        raise TypeError(
            f"{name}: got {type(x).__module__}.{type(x).__qualname__}, takes a NumPy or CuPy array "
            "(arrays of other libraries enter through numpy.asarray or cupy.from_dlpack)"
        )
    return kind


@lru_cache(maxsize=256)
def _kind_of_type(cls: type) -> Kind | None:
    if issubclass(cls, np.ndarray) and not issubclass(cls, np.ma.MaskedArray | np.matrix):
        return "numpy"
    # An array of CuPy cannot exist before CuPy was imported.
    cupy = sys.modules.get("cupy")
    return "cupy" if cupy is not None and issubclass(cls, cupy.ndarray) else None


def common_kind(named: dict[str, Array]) -> Kind:
    """Return the one library that all the arrays are of; those of CuPy on the current device."""
    kinds = [kind_of(name, x) for name, x in named.items()]
    if kinds.count(kinds[0]) < len(kinds):
        got = ", ".join(f"{name} {kind}" for name, kind in zip(named, kinds, strict=True))
        raise TypeError(f"{', '.join(named)}: got a mixture ({got}), takes arrays of one library")
    if kinds[0] == "cupy":
        check_device(named)
    return kinds[0]


def check_device(named: dict[str, Array]) -> None:
    """Check that arrays of CuPy are on the current device."""
    current = current_device()
    for name, x in named.items():
        if x.data.device_id != current:
            raise ValueError(
                f"{name}: got an array on GPU {x.data.device_id}, takes arrays on the current "
                f"device, GPU {current} (see cupy.cuda.Device)"
            )


def namespace(x: Array) -> ModuleType:
    """Return numpy or cupy, whichever the array is of."""
    return np if isinstance(x, np.ndarray) else sys.modules["cupy"]


def address(x: Array) -> int:
    """Return where the first element lies, in the memory of the array's device."""
    first: int = x.ctypes.data if isinstance(x, np.ndarray) else x.data.ptr
    return first


def writeable(x: Array) -> bool:
    """Whether elements may be assigned; CuPy arrays always can."""
    return not isinstance(x, np.ndarray) or x.flags.writeable


#: Which memory an array takes, on its device: address, shape, strides and size of an element, all
#: in bytes. A plain tuple, for a call makes one of each of its arrays.
Place: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...], int]


def place(x: Array) -> Place:
    """Read off an array which memory it takes."""
    return address(x), x.shape, x.strides, x.itemsize


#: Sets of places that are remembered: a training step writes where the one before wrote.
MAX_PLACES = 4096


@lru_cache(MAX_PLACES)
def first_overlap(outputs: tuple[Place, ...], inputs: tuple[Place, ...]) -> tuple[int, int] | None:
    """Find an output that shares memory with an input or with an output before it.

    Returns
    -------
    (i, j) or None
        Output i overlaps entry j of the inputs followed by the outputs; j is i's own entry where
        elements of one output share memory.
    """
    places = (*inputs, *outputs)
    for i, output in enumerate(outputs):
        own = len(inputs) + i
        if overlaps_itself(output):
            return i, own
        for j, place in enumerate(places[:own]):
            if overlap(output, place):
                return i, j
    return None


def overlap(x: Place, y: Place) -> bool:
    """Whether two places share memory; exact for all but contrived strides."""
    try:
        return np.shares_memory(_view(x), _view(y), max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


class _Interface:
    """A place as NumPy's array interface tells it."""

    def __init__(self, place: Place) -> None:
        address, shape, strides, itemsize = place
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": shape,
            "strides": strides,
            "typestr": f"|V{itemsize}",
        }


def _view(place: Place) -> NDArray[np.void]:
    """View the addresses of a place, never to be read: they may be those of a GPU.

    `cupy.shares_memory` would sort them on the GPU and wait for it.
    """
    return np.asarray(_Interface(place))


def overlaps_itself(x: Place) -> bool:
    """Whether two elements of one array may share memory (a broadcast view, say).

    Sorted by stride, an axis is safe if it steps over all that the smaller ones reach.
    """
    _, shape, strides, reach = x
    for stride, extent in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True)):
        if extent > 1:
            if stride < reach:
                return 0 not in shape
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
