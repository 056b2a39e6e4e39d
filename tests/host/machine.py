"""The host device as a machine of the CUDA engine, for arrays of NumPy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash_cupy.arrays import address
from flash_cupy.cuda.compiler import inline_includes, kernel_folder
from flash_cupy.cuda.launch import Work
from flash_cupy.cuda.plan import Card, KernelPlan
from flash_cupy.cuda.tensor_maps import MAP_BYTES, BoxMap

from .device import HERE, HostDevice, HostKernel

POISON = 0xFF

#: The smallest card that the kernels support.
SMALLEST = Card(compute_capability=(8, 0), shared_bytes=163 << 10)
#: A card for the Hopper family; a block that stays has many items, as there are few of them.
HOPPER = Card(compute_capability=(9, 0), shared_bytes=227 << 10, multiprocessors=3, hopper=True)

#: The struct TensorMap of copies.cpp.
TENSOR_MAP = np.dtype(
    {
        "names": ["magic", "address", "strides", "extents", "box_rows"],
        "formats": ["<u8", "<u8", "4<u8", "5<u4", "<u4"],
        "itemsize": MAP_BYTES,
    },
    align=True,
)
MAGIC = 0x70616D2D78656C66


class HostMachine:
    """A `flash_cupy.cuda.launch.Machine` whose arrays are NumPy arrays.

    Every call copies its arrays to the device and back, element by element in their own memory
    layout: what lies between the elements of a strided array is memory that nothing has written.
    Each launch orders its threads in another way.
    """

    def __init__(self, card: Card = SMALLEST) -> None:
        self.host = HostDevice()
        self.launches = 0
        self._card = card

    def card(self) -> Card:
        """Return what plans need to know of the device."""
        return self._card

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Make an array of poison, which counts as not written until a kernel writes it."""
        data = np.full((*shape, dtype.itemsize), POISON, np.uint8)
        return data.view(dtype)[..., 0]

    def device(self) -> int:
        """Return the number of the only device."""
        return 0

    def load(self, kernel: str, plan: KernelPlan) -> HostKernel:
        """Compile a kernel for the device."""
        source = inline_includes(f"{kernel}.cu", (HERE, kernel_folder()))
        return self.host.compile(source, kernel, plan.options())

    def addresses(self, arrays: Iterable[NDArray[Any]]) -> list[int]:
        """Return where arrays begin, in NumPy's memory."""
        return [address(x) for x in arrays]

    def run(self, work: Work, arrays: Iterable[NDArray[Any]], addresses: list[int]) -> None:
        """Run kernels; one that misbehaves is a `HostKernelError`.

        Each tensor of the workspace has memory of its own: a kernel that leaves it is found out.
        All kernels run on the same images, so that the device knows what those before have done.
        """
        given = [Image(self.host, x) for x in arrays]
        workspace = [Image(self.host, self.empty(x.shape, x.dtype)) for x in work.workspace]
        places = [image.address for image in (*given, *workspace)]
        for launch in work.launches:
            launch.kernel(
                (launch.blocks,),
                (launch.plan.threads,),
                launch.arguments(places, encode_map),
                shared_mem=launch.plan.shared_bytes,
                overlaps=launch.overlaps,
                seed=self.launches,
            )
            self.launches += 1
        for image in given:
            image.copy_back()


def encode_map(box_map: BoxMap) -> bytes:
    """Describe a tensor to the host device, with the limits that cuTensorMapEncodeTiled has."""
    steps = (box_map.address, *box_map.strides)
    within = 0 < box_map.box_rows <= 256 and all(0 < n <= 2**32 for n in box_map.extents)
    if any(step % 16 or not 0 <= step < 2**64 for step in steps) or not within:
        raise ValueError(f"no TMA can take {box_map}")
    record = np.zeros((), TENSOR_MAP)
    record["magic"] = MAGIC
    for name in ("address", "strides", "extents", "box_rows"):
        record[name] = getattr(box_map, name)
    return record.tobytes()


class Image:
    """A copy of a NumPy array in the device's memory, in the same layout and equally aligned."""

    ALIGNMENT = 256  # of what the device allocates

    def __init__(self, device: HostDevice, x: NDArray[Any]) -> None:
        self.x = x
        low, high = np.lib.array_utils.byte_bounds(x) if x.size else (0, 0)
        self.offset = low % self.ALIGNMENT
        self.memory = device.empty((self.offset + high - low,), np.uint8)
        self.first = self.offset + (x.ctypes.data - low if x.size else 0)
        self.address = self.memory.address + self.first
        if x.size:
            data = np.full(self.memory.shape, POISON, np.uint8)
            self._elements(data)[...] = x
            written = np.zeros(self.memory.shape, np.bool_)
            self._bytes(written)[...] = (self._bytes(data) != POISON).any(-1, keepdims=True)
            device.write(self.memory.address, data.tobytes(), written.tobytes())

    def copy_back(self) -> None:
        """Bring the array to the state of its image."""
        if self.x.size == 0:
            return
        result = self._elements(self.memory.get())
        if self.x.flags.writeable:
            self.x[...] = result
        elif self.x.tobytes() != result.tobytes():
            raise AssertionError("a kernel has written to an input")

    def _elements(self, memory: NDArray[Any]) -> NDArray[Any]:
        x = self.x
        return np.ndarray(x.shape, x.dtype, memory, self.first, x.strides)

    def _bytes(self, memory: NDArray[Any]) -> NDArray[Any]:
        x = self.x
        shape, strides = (*x.shape, x.itemsize), (*x.strides, 1)
        return np.ndarray(shape, memory.dtype, memory, self.first, strides)
