"""Whether this machine has a GPU that the CUDA engine runs on, and if not, why and what to do."""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import Any

MIN_COMPUTE_CAPABILITY = (8, 0)

#: NVRTC of CUDA 12.9.1. Before 12.9 it refuses a second -arch; the assembler of 12.9.0, which is
#: build 41, miscompiles causal masks.
MIN_NVRTC = (12, 9, 86)

#: Drivers that CuPy's CUDA runtimes, by their major version, are content with.
MIN_DRIVERS = {12: "525.60", 13: "580"}

_INSUFFICIENT_DRIVER = 35  # cudaErrorInsufficientDriver


def why_no_gpu() -> str | None:
    """Return None where the CUDA engine runs on the current device, else say why not, in a clause.

    Each device is looked at once, so that a call may ask this as often as it likes.
    """
    reason = why_no_cuda()
    return _why_not_on(current_device()) if reason is None else reason


def current_device() -> int:
    """Return the number of the current GPU. CuPy has been imported by whoever asks."""
    device: int = sys.modules["cupy"].cuda.runtime.getDevice()
    return device


@cache
def why_no_cuda() -> str | None:
    """Return None where CuPy, driver and NVRTC are what the CUDA engine takes, else what is not."""
    try:
        import cupy
    except Exception as error:  # of various types: a read-only home is one cause
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            return (
                "CuPy is not installed (for CUDA 12: pip install 'flash-cupy[cuda12x]', "
                "for CUDA 13: 'flash-cupy[cuda13x]')"
            )
        return f"CuPy cannot be imported ({error})"
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        if error.status == _INSUFFICIENT_DRIVER:
            return _driver_too_old(runtime.driverGetVersion(), runtime.runtimeGetVersion())
        return f"CuPy finds no GPU ({error})"
    if count == 0:
        return "CuPy finds no GPU"
    return _why_no_nvrtc(cupy.cuda.nvrtc)


def _driver_too_old(driver: int, runtime: int) -> str:
    """Say what to do about a driver for CUDA `driver` (12080 is 12.8; 0: there is none)."""
    if driver == 0:
        return (
            "CuPy finds no NVIDIA driver (a GPU needs one, and a container needs access to it: "
            "docker run --gpus all)"
        )
    (driver_major, driver_minor), (major, minor) = (
        (version // 1000, version % 1000 // 10) for version in (driver, runtime)
    )
    update = f"update it to {MIN_DRIVERS[major]} or later" if major in MIN_DRIVERS else "update it"
    other = f", or install 'flash-cupy[cuda{driver_major}x]'" if 12 <= driver_major < major else ""
    return (
        f"the NVIDIA driver is too old: it is for CUDA {driver_major}.{driver_minor}, CuPy's "
        f"runtime is CUDA {major}.{minor}; {update}{other}"
    )


def _why_no_nvrtc(nvrtc: Any) -> str | None:
    try:
        version = nvrtc.getVersion()
        if version == MIN_NVRTC[:2]:
            version = nvrtc_build()
    except Exception as error:  # CuPy raises various types where the library cannot be loaded
        return f"NVRTC cannot be loaded ({error}): install CuPy's [ctk] extra or a CUDA toolkit"
    if version < MIN_NVRTC:
        got, needed = (".".join(map(str, numbers)) for numbers in (version, MIN_NVRTC))
        return (
            f"NVRTC is {got}, needed is {needed} (of CUDA 12.9.1) or later: pip install -U "
            f"'nvidia-cuda-nvrtc-cu12>={needed}', or update the CUDA toolkit"
        )
    return None


@cache
def nvrtc_build() -> tuple[int, int, int]:
    """Return NVRTC's version with its build number, the third part of its wheel's version.

    `nvrtc.getVersion` has the first two parts alone. The third stands in the comment at the head of
    any PTX that NVRTC writes; writing some takes a few hundredths of a second.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram("", "empty.cu", [], [])
    try:
        nvrtc.compileProgram(program, ())
        ptx = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    written = re.search(rb"Cuda compilation tools, .* V(\d+)\.(\d+)\.(\d+)", ptx)
    major, minor, build = map(int, written.groups()) if written else (*nvrtc.getVersion(), 0)
    return major, minor, build


@cache
def _why_not_on(device: int) -> str | None:
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    capability = properties["major"], properties["minor"]
    if capability < MIN_COMPUTE_CAPABILITY:
        return (
            f"GPU {device}, {properties['name'].decode()}, has compute capability "
            f"{capability[0]}.{capability[1]}, needed is {MIN_COMPUTE_CAPABILITY[0]}."
            f"{MIN_COMPUTE_CAPABILITY[1]} (Ampere) or later"
        )
    return None
