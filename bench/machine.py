"""The machine that a benchmark runs on: its array module, its name, its versions."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import flash_cupy
from flash_cupy.gpu import why_no_gpu

PACKAGES = (
    "numpy",
    "ml_dtypes",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "torch",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
)


def array_module(device: str | None) -> Any:
    """NumPy for 'cpu', CuPy for 'gpu'; by default CuPy where there is a GPU."""
    missing = why_no_gpu()
    if device == "gpu" and missing is not None:
        raise ValueError(f"--device gpu: {missing}")
    if device == "cpu" or missing is not None:
        return np
    import cupy

    return cupy


def describe(xp: Any) -> dict[str, Any]:
    """Say what a record was measured on."""
    return {
        "device": _cpu_name() if xp is np else _gpu_name(xp),
        "date": datetime.date.today().isoformat(),
        "flash_cupy": flash_cupy.__version__,
        "python": platform.python_version(),
        **_installed(),
        **(_cpu() if xp is np else _gpu(xp)),
    }


def slug(name: str) -> str:
    """Turn a name into one of a folder: 'NVIDIA H200' into 'nvidia-h200'."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _installed() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def _cpu() -> dict[str, Any]:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return {"cores": os.cpu_count(), "blas": f"{blas['name']} {blas['version']}"}


def _gpu_name(cupy: Any) -> str:
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return str(properties["name"].decode())


def _gpu(cupy: Any) -> dict[str, Any]:
    runtime = cupy.cuda.runtime
    version = runtime.driverGetVersion()
    found = {
        "memory_bytes": runtime.memGetInfo()[1],
        "compute_capability": cupy.cuda.Device().compute_capability,
        "driver_cuda": f"{version // 1000}.{version % 1000 // 10}",
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
    }
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        printed = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        found["driver"] = printed.partition("\n")[0]
    return found
