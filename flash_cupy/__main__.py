"""``python -m flash_cupy``: what is on this machine, and a self-check of every engine.

Each engine runs forward and backward beside dense attention, with the float64 specification as the
reference. The exit status is 1 if an error is larger than twice that of dense attention in the same
dtype (plus a few roundings).
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import (
    __version__,
    attention_backward,
    attention_forward,
    dense_attention_backward,
    dense_attention_forward,
)
from .arrays import Array, dtypes
from .gpu import nvrtc_build, why_no_cuda, why_no_gpu
from .problem import Device

HEADS, SEQLEN, HEAD_DIM = 1, 1024, 64

OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal, window, softcap": {"causal": True, "window": (600, None), "softcap": 5.0},
}

#: What an error may be beyond twice that of dense attention, which for float64 is the reference.
ROUNDINGS = {"float16": 2**-9, "bfloat16": 2**-6, "float32": 2**-21, "float64": 1e-12}


@dataclass(frozen=True)
class Cost:
    """What a run took beside its inputs."""

    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Check:
    """One engine, dtype and set of options, forward and backward."""

    name: str
    error: float  # largest, relative to the largest entry of each result
    allowed: float
    ours: Cost
    dense: Cost

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.error <= self.allowed


def main() -> int:
    """Print what is here, run the checks, return the exit status."""
    print(f"flash_cupy {__version__} on Python {platform.python_version()}, {_versions()}")
    for line in _gpus():
        print(line)
    devices: list[Device] = ["cpu"] if why_no_gpu() is not None else ["cpu", "gpu"]
    print(f"engines: {', '.join(devices)}\n")
    print(
        f"Forward and backward, {HEADS} head(s), N {SEQLEN}, D {HEAD_DIM}, beside dense attention:"
    )
    print(f"{'':40}{'error':>9}{'allowed':>9}{'ms':>9}{'dense ms':>10}{'MB':>7}{'dense MB':>10}")
    failures = 0
    for check in _checks(devices):
        failures += not check.passed
        print(
            f"{check.name:40}{check.error:9.1e}{check.allowed:9.1e}"
            f"{check.ours.seconds * 1e3:9.1f}{check.dense.seconds * 1e3:10.1f}"
            f"{check.ours.peak_bytes / 1e6:7.1f}{check.dense.peak_bytes / 1e6:10.1f}"
            f"  {'ok' if check.passed else 'FAILED'}"
        )
    print(f"\n{'all checks passed' if not failures else f'{failures} checks FAILED'}")
    return 1 if failures else 0


def _versions() -> str:
    found = [f"NumPy {np.__version__}"]
    for package in ("cupy-cuda12x", "cupy-cuda13x", "ml_dtypes"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def _gpus() -> Iterator[str]:
    """Say what CUDA this is and which GPUs there are, or why the CUDA engine cannot use them."""
    reason = why_no_cuda()
    if reason is not None:
        yield f"GPU: none, because {reason}"
        return
    import cupy

    runtime = cupy.cuda.runtime
    driver, nvrtc = runtime.driverGetVersion(), ".".join(map(str, nvrtc_build()))
    yield f"CUDA: driver for {driver // 1000}.{driver % 1000 // 10}, NVRTC {nvrtc}"
    for number in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(number)
        with cupy.cuda.Device(number):
            unfit = why_no_gpu()
        yield (
            f"GPU {number}: {properties['name'].decode()}, compute capability "
            f"{properties['major']}.{properties['minor']}"
            + ("" if unfit is None else f"; not used, because {unfit}")
        )


def _checks(devices: list[Device]) -> Iterator[Check]:
    for device in devices:
        for dtype in sorted(dtypes(), key=lambda d: (d.itemsize, str(d))):
            for name, options in OPTIONS.items():
                yield _check(f"{device} {dtype} {name}", device, dtype, options)


def _check(name: str, device: Device, dtype: np.dtype[Any], options: dict[str, Any]) -> Check:
    rng = np.random.default_rng(0)
    q, k, v, do = (
        rng.standard_normal((HEADS, SEQLEN, HEAD_DIM), np.float32).astype(dtype) for _ in range(4)
    )

    def ours() -> tuple[Array, ...]:
        o, lse = attention_forward(q, k, v, device=device, **options)
        return (o, *attention_backward(do, q, k, v, o, lse, device=device, **options))

    def dense(dtype: Any = None) -> tuple[Array, ...]:
        q_, k_, v_, do_ = (x if dtype is None else x.astype(dtype) for x in (q, k, v, do))
        given: dict[str, Any] = {**options, "device": device}
        o, _ = dense_attention_forward(q_, k_, v_, **given)
        return (o, *dense_attention_backward(do_, q_, k_, v_, **given))

    reference = dense(np.float64)
    return Check(
        name=name,
        error=_error(ours(), reference),
        allowed=2 * _error(dense(), reference) + ROUNDINGS[dtype.name],
        ours=_cost(ours, device),
        dense=_cost(dense, device),
    )


def _error(got: tuple[Array, ...], expected: tuple[Array, ...]) -> float:
    """Largest error of any entry, relative to the largest entry of its array."""
    return max(
        float(abs(x.astype(np.float64) - y).max() / abs(y).max())
        for x, y in zip(got, expected, strict=True)
    )


def _cost(run: Callable[[], object], device: Device) -> Cost:
    """Time and peak memory of a second run, in which nothing is compiled any more."""
    run()
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return Cost(seconds, _gpu_peak(run) if device == "gpu" else _cpu_peak(run))


def _cpu_peak(run: Callable[[], object]) -> int:
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _gpu_peak(run: Callable[[], object]) -> int:
    import cupy

    pool = cupy.cuda.MemoryPool()
    with cupy.cuda.using_allocator(pool.malloc):
        run()
    peak = int(pool.total_bytes())
    pool.free_all_blocks()  # while it lives: split blocks of a pool that is gone stay allocated
    return peak


if __name__ == "__main__":
    sys.exit(main())
