"""The CUDA engine: plans, parameters, compilation and launch of the kernels in kernels_cu/.

Importing it needs neither CuPy nor a GPU: CuPy is imported where a kernel is compiled or launched.
"""

from __future__ import annotations

from functools import cache

from .engine import CudaEngine, force_family
from .launch import Gpu
from .staging import StagedEngine

__all__ = ["force_family", "gpu_engine", "staged_engine"]


@cache
def gpu_engine() -> CudaEngine:
    """Return the engine for CuPy arrays on the current device."""
    return CudaEngine(Gpu())


@cache
def staged_engine() -> StagedEngine:
    """Return the engine for NumPy arrays, which brings them to the current device and back."""
    return StagedEngine(gpu_engine())
