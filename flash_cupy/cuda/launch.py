"""Launches: a kernel with its plan and its parameters, and the machine that runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from . import compiler
from .params import ATTENTION_PARAMS
from .plan import Card, KernelPlan


@dataclass(frozen=True, eq=False)
class Launch:
    """All of a kernel launch but the addresses of its arrays: made once for calls that look alike.

    ``kernel`` is what `Machine.load` returned for ``plan``. ``params`` has size 1; ``tensors`` are
    the names of its tensors, in the order in which `Machine.run` is given their arrays.
    """

    kernel: Any
    plan: KernelPlan
    blocks: int
    params: NDArray[Any]
    tensors: tuple[str, ...]

    def with_addresses(self, addresses: Sequence[int]) -> NDArray[np.void]:
        """Return a copy of the parameters in which the tensors are at these addresses.

        As plain bytes: CuPy spells out a structured dtype in every launch, which takes longer than
        all the rest of a call.
        """
        words = self.params.view(np.uint64).copy()
        words[_address_words(self.tensors)] = addresses
        return words.view(_RAW_PARAMS)


_RAW_PARAMS = np.dtype((np.void, ATTENTION_PARAMS.itemsize))


@cache
def _address_words(tensors: tuple[str, ...]) -> NDArray[np.intp]:
    """Where the addresses stand, counted in 8-byte words of the parameters."""
    fields = ATTENTION_PARAMS.fields
    assert fields is not None
    return np.array([fields[name][1] // 8 for name in tensors], np.intp)


class Machine(Protocol):
    """What runs kernels: the current GPU, or in the tests a simulated one."""

    def device(self) -> int:
        """Return the number of the current device."""

    def card(self) -> Card:
        """Return what plans need to know of the current device."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Allocate an array in the device's memory."""

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""

    def run(self, launch: Launch, arrays: Sequence[Array]) -> None:
        """Run a kernel on the tensors of the launch."""


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

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        """Return a kernel, compiled for the current device."""
        return compiler.load(kernel, plan)

    def run(self, launch: Launch, arrays: Sequence[Array]) -> None:
        """Launch a kernel on the current stream."""
        plan = launch.plan
        params = launch.with_addresses([x.data.ptr for x in arrays])
        launch.kernel((launch.blocks,), (plan.threads,), (params,), shared_mem=plan.shared_bytes)


@cache
def _card(device: int) -> Card:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    return Card(
        compute_capability=(properties["major"], properties["minor"]),
        shared_bytes=properties["sharedMemPerBlockOptin"],
    )
