"""The CUDA driver, called by ctypes: launches that overlap, which CuPy does not offer."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

from numpy.typing import NDArray

# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, from cuda.h.
_PROGRAMMATIC_STREAM_SERIALIZATION = 6

#: The first driver that lets CUDA graphs capture launches that overlap: 12.3.
_OVERLAPS_IN_GRAPHS = 12030


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which the value has 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_int),
        ("padding", ctypes.c_int),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_int * 15),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@cache
def library() -> ctypes.CDLL:
    """Return the driver's library."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


_thread = threading.local()


def enter_thread() -> None:
    """See to it that this thread has a context, without which the driver refuses all it is asked.

    CuPy leaves that to CUDA's runtime, which gives a thread one when it first needs it.
    """
    if getattr(_thread, "entered", False):
        return
    context = ctypes.c_void_p()
    library().cuCtxGetCurrent(ctypes.byref(context))
    if not context.value:
        sys.modules["cupy"].cuda.runtime.memGetInfo()
    _thread.entered = True


@cache
def lets_launches_overlap() -> bool:
    """Return whether the driver takes launches that overlap, in CUDA graphs too."""
    version = ctypes.c_int()
    library().cuDriverGetVersion(ctypes.byref(version))
    return version.value >= _OVERLAPS_IN_GRAPHS


class PreparedLaunch:
    """The launch of a kernel with all its arguments, which may be repeated, by any thread.

    It takes the CPU a fraction of what CuPy's takes, which goes through the arguments every time.

    Parameters
    ----------
    function
        Handle of the kernel (CUfunction).
    blocks, threads, shared_bytes
        Blocks of the grid, threads of a block, bytes of its dynamic shared memory.
    arguments
        NumPy arrays of size 1, which the kernel takes by value.
    stream
        Handle of the stream (CUstream).
    overlaps
        Whether blocks may start before the kernel ahead of it in the stream has ended: as soon as
        each block of that one has ended or called `launch_dependents` (kernels_cu/ptx.cuh). The
        kernel waits itself for what it needs of the other. Drivers before 12.3 do without.
    """

    def __init__(
        self,
        function: int,
        blocks: int,
        threads: int,
        shared_bytes: int,
        arguments: Sequence[NDArray[Any]],
        stream: int,
        overlaps: bool,
    ) -> None:
        self.arguments = tuple(arguments)
        self._overlap = _Attribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = _Config(
            (blocks, 1, 1),
            (threads, 1, 1),
            shared_bytes,
            stream,
            ctypes.pointer(self._overlap),
            overlaps and lets_launches_overlap(),
        )
        pointers = (ctypes.c_void_p * len(arguments))(*(x.ctypes.data for x in arguments))
        self._how = ctypes.byref(self._config), ctypes.c_void_p(function), pointers, None

    def __call__(self) -> None:
        """Launch the kernel, in a thread that has a context, see `enter_thread`.

        Raises
        ------
        cupy.cuda.driver.CUDADriverError
            The driver refuses the launch.
        """
        error = library().cuLaunchKernelEx(*self._how)
        if error:
            raise sys.modules["cupy"].cuda.driver.CUDADriverError(error)
