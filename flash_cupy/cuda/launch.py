"""Launches: kernels with their plans and their parameters, and the machine that runs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..gpu import current_device
from . import compiler, tensor_maps
from .driver import PreparedLaunch, enter_thread
from .params import ATTENTION_PARAMS
from .plan import Card, KernelPlan
from .tensor_maps import BoxMap
from .tensors import Layout

#: Calls whose launches are remembered by the stream and the addresses of the tensors.
MAX_PREPARED = 4096

#: The tensors of a workspace begin at multiples of this many bytes, as CuPy's arrays do.
WORKSPACE_ALIGNMENT = 512

#: The arguments of a kernel.
Arguments = tuple[NDArray[np.void], ...]


@dataclass(frozen=True, eq=False)
class Launch:
    """All of a kernel launch but the addresses of its tensors: made once for calls that look alike.

    ``kernel`` is what `Machine.load` returned for ``plan``. ``params`` has size 1; ``tensors`` are
    the names of its tensors, in the order in which `arguments` takes their addresses. ``maps``
    are the maps that the kernel takes beside it, by the names of their tensors, with address 0.
    ``overlaps`` is as in `PreparedLaunch`.
    """

    kernel: Any
    plan: KernelPlan
    blocks: int
    params: NDArray[Any]
    tensors: tuple[str, ...]
    maps: tuple[tuple[str, BoxMap], ...]
    overlaps: bool

    def arguments(
        self, addresses: Sequence[int], encode_map: Callable[[BoxMap], bytes]
    ) -> Arguments:
        """Return the arguments of the kernel where the tensors are at these addresses.

        ``encode_map`` returns the 128 bytes by which the device's TMA sees a tensor.
        """
        params = self.params.copy()
        params.view(np.uint64)[_address_words(self.tensors)] = addresses
        if not self.maps:
            return (params,)
        address = dict(zip(self.tensors, addresses, strict=True))
        encoded = bytearray().join(
            encode_map(box_map._replace(address=address[name])) for name, box_map in self.maps
        )
        return params, np.frombuffer(encoded, np.dtype((np.void, len(encoded))))


@cache
def _address_words(tensors: tuple[str, ...]) -> NDArray[np.intp]:
    """Where the addresses stand, counted in 8-byte words of the parameters."""
    fields = ATTENTION_PARAMS.fields
    assert fields is not None
    return np.array([fields[name][1] // 8 for name in tensors], np.intp)


@dataclass(frozen=True, eq=False)
class Work:
    """The launches of a call, one after the other, made once for calls that look alike.

    All are on the same tensors: first those that the call is given, then those of ``workspace``,
    which last as long as the call and hold anything when the first kernel starts.
    """

    launches: tuple[Launch, ...]
    workspace: tuple[Layout, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where in one piece of memory each tensor of the workspace begins, and its bytes."""
        sizes = (-(-x.nbytes // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT for x in self.workspace)
        return tuple(accumulate(sizes, initial=0))


class Machine(Protocol):
    """What runs kernels: the current GPU, or in the tests a simulated one."""

    def device(self) -> int:
        """Return the number of the current device."""

    def card(self) -> Card:
        """Return what plans need to know of the current device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array in the device's memory."""

    def addresses(self, arrays: Iterable[Array]) -> list[int]:
        """Return where arrays begin."""

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""

    def run(self, work: Work, arrays: Iterable[Array], addresses: list[int]) -> None:
        """Run kernels on the arrays of a call, which begin at these addresses.

        The addresses are all that a GPU needs; a simulated one copies the arrays.
        """


class Gpu:
    """The current CUDA device, on CuPy's current stream and with its current allocator.

    CuPy has been imported by whoever found out that there is one.
    """

    def device(self) -> int:
        """Return the number of the current device."""
        return current_device()

    def card(self) -> Card:
        """Return what plans need to know of the current device."""
        return _card(self.device())

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array on the current device."""
        return sys.modules["cupy"].ndarray(shape, dtype)

    def addresses(self, arrays: Iterable[Array]) -> list[int]:
        """Return where arrays begin."""
        return [x.data.ptr for x in arrays]

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""
        return compiler.load(kernel, plan)

    def run(self, work: Work, arrays: Iterable[Array], addresses: list[int]) -> None:
        """Launch kernels on the current stream, with the whole workspace in one allocation.

        What they no longer use is given back to the allocator, which keeps the stream's order.
        """
        enter_thread()
        cuda = sys.modules["cupy"].cuda
        if work.workspace:
            memory = cuda.alloc(work.offsets[-1])
            addresses = [*addresses, memory.ptr]
        for launch in prepare(work, cuda.get_current_stream().ptr, *addresses):
            launch()


@lru_cache(MAX_PREPARED)
def prepare(work: Work, stream: int, *addresses: int) -> tuple[PreparedLaunch, ...]:
    """Return the launches of a call; the last address is that of the workspace, if any.

    They are remembered: a training step finds its arrays where the one before had them.
    """
    if work.workspace:
        *given, memory = addresses
        addresses = (*given, *(memory + offset for offset in work.offsets[:-1]))
    return tuple(
        PreparedLaunch(
            launch.kernel.kernel.ptr,
            launch.blocks,
            launch.plan.threads,
            launch.plan.shared_bytes,
            launch.arguments(addresses, tensor_maps.encode),
            stream,
            launch.overlaps,
        )
        for launch in work.launches
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
