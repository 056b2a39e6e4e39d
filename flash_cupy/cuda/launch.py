"""Launches: a kernel with its plan and its parameters, and the machine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from . import compiler, tensor_maps
from .params import ATTENTION_PARAMS
from .plan import Card, KernelPlan
from .tensor_maps import BoxMap

#: Arguments of launches that are remembered by the addresses of the tensors.
MAX_ARGUMENTS = 4096


@dataclass(frozen=True, eq=False)
class Launch:
    """All of a kernel launch but the addresses of its arrays: made once for calls that look alike.

    ``kernel`` is what `Machine.load` returned for ``plan``. ``params`` has size 1; ``tensors`` are
    the names of its tensors, in the order in which `Machine.run` is given their arrays. ``maps``
    are the maps that the kernel takes beside it, by the names of their tensors, with address 0.
    """

    kernel: Any
    plan: KernelPlan
    blocks: int
    params: NDArray[Any]
    tensors: tuple[str, ...]
    maps: tuple[tuple[str, BoxMap], ...]

    def with_addresses(self, addresses: Sequence[int]) -> NDArray[np.void]:
        """Return a copy of the parameters in which the tensors are at these addresses.

        As plain bytes: CuPy spells out a structured dtype in every launch, which takes longer than
        all the rest of a call.
        """
        words = self.params.view(np.uint64).copy()
        words[_address_words(self.tensors)] = addresses
        return words.view(_RAW_PARAMS)


class Machine(Protocol):
    """What runs kernels: the current GPU, or in the tests a simulated one."""

    def device(self) -> int:
        """Return the number of the current device."""

    def card(self) -> Card:
        """Return what plans need to know of the current device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array in the device's memory."""

    def zero(self) -> Array:
        """Allocate an int32 in the device's memory that is 0 when the next kernel starts."""

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""

    def encode_map(self, box_map: BoxMap) -> bytes:
        """Return the 128 bytes by which the device's TMA sees a tensor."""

    def run(self, launch: Launch, arrays: Sequence[Array]) -> None:
        """Run a kernel on the tensors of the launch."""


@lru_cache(MAX_ARGUMENTS)
def arguments(
    launch: Launch, addresses: tuple[int, ...], machine: Machine
) -> tuple[NDArray[np.void], ...]:
    """Return the arguments of a kernel whose tensors are at these addresses.

    They are remembered: a training step finds its arrays where the one before had them.
    """
    params = launch.with_addresses(addresses)
    if not launch.maps:
        return (params,)
    address = dict(zip(launch.tensors, addresses, strict=True))
    encoded = bytearray().join(
        machine.encode_map(box_map._replace(address=address[name])) for name, box_map in launch.maps
    )
    return params, np.frombuffer(encoded, np.dtype((np.void, len(encoded))))


_RAW_PARAMS = np.dtype((np.void, ATTENTION_PARAMS.itemsize))


@cache
def _address_words(tensors: tuple[str, ...]) -> NDArray[np.intp]:
    """Where the addresses stand, counted in 8-byte words of the parameters."""
    fields = ATTENTION_PARAMS.fields
    assert fields is not None
    return np.array([fields[name][1] // 8 for name in tensors], np.intp)


class Gpu:
    """The current CUDA device, on CuPy's current stream and with its current allocator."""

    def device(self) -> int:
        """Return the number of the current device."""
        import cupy

        return int(cupy.cuda.runtime.getDevice())

    def card(self) -> Card:
        """Return what plans need to know of the current device."""
        return _card(self.device())

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array on the current device."""
        import cupy

        return cupy.ndarray(shape, dtype)

    def zero(self) -> Array:
        """Allocate an int32 on the current device that is 0 when the next kernel starts."""
        word = self.empty((1, 1), np.dtype(np.int32))
        word.data.memset_async(0, word.nbytes)
        return word

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""
        return compiler.load(kernel, plan)

    def encode_map(self, box_map: BoxMap) -> bytes:
        """Return the 128 bytes by which the device's TMA sees a tensor."""
        return tensor_maps.encode(box_map)

    def run(self, launch: Launch, arrays: Sequence[Array]) -> None:
        """Launch a kernel on the current stream."""
        plan = launch.plan
        addresses = tuple([x.data.ptr for x in arrays])
        launch.kernel(
            (launch.blocks,),
            (plan.threads,),
            arguments(launch, addresses, self),
            shared_mem=plan.shared_bytes,
        )


@cache
def _card(device: int) -> Card:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    capability = (properties["major"], properties["minor"])
    return Card(
        compute_capability=capability,
        shared_bytes=properties["sharedMemPerBlockOptin"],
        multiprocessors=properties["multiProcessorCount"],
        hopper=capability == (9, 0) and compiler.targets_sm_90a(),
    )
