"""Whether this machine has a GPU that the CUDA engine runs on, and if not, why and what to do."""

from __future__ import annotations

from functools import cache

MIN_COMPUTE_CAPABILITY = (8, 0)
# Before 12.9 NVRTC refuses a second -arch; before 12.9.1 its assembler miscompiles causal masks.
MIN_NVRTC = (12, 9)


@cache
def why_no_gpu() -> str | None:
    """Return None where the CUDA engine can run, else a clause that says why it cannot."""
    try:
        import cupy
    except ImportError:
        return (
            "CuPy is not installed (for CUDA 12: pip install 'flash-cupy[cuda12x]', "
            "for CUDA 13: 'flash-cupy[cuda13x]')"
        )
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"CuPy finds no GPU ({error})"
    if count == 0:
        return "CuPy finds no GPU"
    try:
        nvrtc = cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # CuPy raises various types where the library cannot be loaded
        return f"NVRTC cannot be loaded ({error}): install CuPy's [ctk] extra or a CUDA toolkit"
    if nvrtc < MIN_NVRTC:
        return (
            f"NVRTC is {nvrtc[0]}.{nvrtc[1]}, needed is {MIN_NVRTC[0]}.{MIN_NVRTC[1]}.1 or later: "
            "pip install -U nvidia-cuda-nvrtc-cu12"
        )
    capability = divmod(int(cupy.cuda.Device().compute_capability), 10)
    if capability < MIN_COMPUTE_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, needed is "
            f"{MIN_COMPUTE_CAPABILITY[0]}.{MIN_COMPUTE_CAPABILITY[1]} (Ampere) or later"
        )
    return None
