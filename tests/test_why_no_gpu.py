"""What stands between a call and a GPU: each reason, told apart, with what to do about it."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flash_cupy import gpu


class RuntimeFailure(Exception):
    """In place of CuPy's CUDARuntimeError."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class FakeCupy:
    """As much of CuPy as is asked: a driver, NVRTC and some GPUs."""

    def __init__(self) -> None:
        self.driver, self.built_for = 12080, 12090
        self.capabilities = [(9, 0)]
        self.current = 0
        self.failure: RuntimeFailure | None = None
        self.nvrtc_version: tuple[int, int] | Exception = (12, 9)
        self.ptx = b"//\n// Cuda compilation tools, release 12.9, V12.9.86\n//\n.version 8.8\n"
        self.asked: list[int] = []
        runtime = SimpleNamespace(
            CUDARuntimeError=RuntimeFailure,
            getDeviceCount=self.count,
            getDevice=lambda: self.current,
            getDeviceProperties=self.properties,
            driverGetVersion=lambda: self.driver,
            runtimeGetVersion=lambda: self.built_for,
        )
        nvrtc = SimpleNamespace(
            getVersion=self.version,
            createProgram=lambda *args: "program",
            compileProgram=lambda program, options: None,
            getPTX=lambda program: self.ptx,
            destroyProgram=lambda program: None,
        )
        self.cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc, Device=self.device)

    def count(self) -> int:
        if self.failure is not None:
            raise self.failure
        return len(self.capabilities)

    def properties(self, number: int) -> dict[str, Any]:
        self.asked.append(number)
        major, minor = self.capabilities[number]
        return {"name": f"Card {number}".encode(), "major": major, "minor": minor}

    def version(self) -> tuple[int, int]:
        if isinstance(self.nvrtc_version, Exception):
            raise self.nvrtc_version
        return self.nvrtc_version

    def device(self, number: int) -> Any:
        outer = self

        class Device:
            def __enter__(self) -> None:
                self.before, outer.current = outer.current, number

            def __exit__(self, *error: object) -> None:
                outer.current = self.before

        return Device()


CACHED = (gpu.why_no_cuda, gpu.nvrtc_build, gpu._why_not_on)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setitem(sys.modules, "cupy.cuda", fake.cuda)
    for function in CACHED:
        function.cache_clear()
    yield fake
    for function in CACHED:
        function.cache_clear()


def test_all_is_there(cupy: FakeCupy) -> None:
    assert gpu.why_no_gpu() is None
    assert gpu.nvrtc_build() == (12, 9, 86)


def refuse_import(error: Exception) -> Callable[..., Any]:
    real = builtins.__import__

    def refuse(name: str, *args: Any) -> Any:
        if name == "cupy":
            raise error
        return real(name, *args)

    return refuse


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module named 'cupy'", name="cupy"), "CuPy is not installed (for"),
        (
            ModuleNotFoundError("No module named 'fastrlock'", name="fastrlock"),
            "CuPy cannot be imported (No module named 'fastrlock')",
        ),
        (ImportError("libcudart.so.12"), "CuPy cannot be imported (libcudart.so.12)"),
        (PermissionError("read-only home"), "CuPy cannot be imported (read-only home)"),
    ],
)
def test_cupy_cannot_be_imported(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    monkeypatch.setattr(builtins, "__import__", refuse_import(error))
    assert (gpu.why_no_gpu() or "").startswith(reason)


NO_DRIVER = RuntimeFailure(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient")


@pytest.mark.parametrize(
    "driver, runtime, reason",
    [
        (0, 12090, "CuPy finds no NVIDIA driver (a GPU needs one, and a container needs access"),
        (
            11040,
            12090,
            "the NVIDIA driver is too old: it is for CUDA 11.4, CuPy's runtime is CUDA 12.9; "
            "update it to 525.60 or later",
        ),
        (
            12080,
            13000,
            "the NVIDIA driver is too old: it is for CUDA 12.8, CuPy's runtime is CUDA 13.0; "
            "update it to 580 or later, or install 'flash-cupy[cuda12x]'",
        ),
        (13000, 14010, "the NVIDIA driver is too old: it is for CUDA 13.0, CuPy's runtime is CUDA"),
    ],
)
def test_driver(cupy: FakeCupy, driver: int, runtime: int, reason: str) -> None:
    """CuPy has one error for both: no driver, and one that is too old."""
    cupy.failure, cupy.driver, cupy.built_for = NO_DRIVER, driver, runtime
    got = gpu.why_no_gpu() or ""
    assert got.startswith(reason)
    assert got == reason or driver in (0, 13000)


def test_no_gpu_beside_a_driver(cupy: FakeCupy) -> None:
    cupy.failure = RuntimeFailure(100, "cudaErrorNoDevice: no CUDA-capable device is detected")
    assert gpu.why_no_gpu() == (
        "CuPy finds no GPU (cudaErrorNoDevice: no CUDA-capable device is detected)"
    )


def test_none_of_the_gpus_is_visible(cupy: FakeCupy) -> None:
    cupy.capabilities = []
    assert gpu.why_no_gpu() == "CuPy finds no GPU"


@pytest.mark.parametrize(
    "version, build, got",
    [
        ((12, 9), "V12.9.41", "12.9.41"),
        ((12, 8), "V12.8.93", "12.8"),
        ((11, 8), "V11.8.89", "11.8"),
        ((12, 9), "no version that one could read", "12.9.0"),
    ],
)
def test_nvrtc_that_miscompiles(
    cupy: FakeCupy, version: tuple[int, int], build: str, got: str
) -> None:
    """That of CUDA 12.9.0 and that of 12.9.1 both say 12.9; only their PTX tells them apart."""
    cupy.nvrtc_version = version
    cupy.ptx = f"//\n// Cuda compilation tools, release, {build}\n".encode()
    assert gpu.why_no_gpu() == (
        f"NVRTC is {got}, needed is 12.9.86 (of CUDA 12.9.1) or later: pip install -U "
        "'nvidia-cuda-nvrtc-cu12>=12.9.86', or update the CUDA toolkit"
    )


@pytest.mark.parametrize("version", [(12, 10), (13, 0)])
def test_newer_nvrtc_is_not_asked_for_its_build(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    cupy.nvrtc_version = version
    monkeypatch.setattr(gpu, "nvrtc_build", lambda: 1 / 0)
    assert gpu.why_no_gpu() is None


def test_nvrtc_that_is_not_there(cupy: FakeCupy) -> None:
    cupy.nvrtc_version = RuntimeError("libnvrtc.so.12: cannot open")
    assert gpu.why_no_gpu() == (
        "NVRTC cannot be loaded (libnvrtc.so.12: cannot open): install CuPy's [ctk] extra or a "
        "CUDA toolkit"
    )


def test_each_gpu_is_looked_at_once(cupy: FakeCupy) -> None:
    cupy.capabilities = [(8, 0), (7, 5)]
    for _ in range(3):
        cupy.current = 0
        assert gpu.why_no_gpu() is None
        cupy.current = 1
        assert gpu.why_no_gpu() == (
            "GPU 1, Card 1, has compute capability 7.5, needed is 8.0 (Ampere) or later"
        )
    assert cupy.asked == [0, 1]


def test_build_of_the_nvrtc_that_is_here() -> None:
    """No GPU is needed for this one."""
    from cupy.cuda import nvrtc

    build = gpu.nvrtc_build()
    assert build[:2] == nvrtc.getVersion() and build >= gpu.MIN_NVRTC
