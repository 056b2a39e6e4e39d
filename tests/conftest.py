"""Fixtures and hypothesis profiles that every test file shares."""

from __future__ import annotations

import os
from collections.abc import Iterator

import gpu_report
import hypothesis
import pytest
from engines import HOST, Engine, available_engines

from flash_cupy import tiled
from flash_cupy.cuda.engine import CudaEngine
from flash_cupy.gpu import why_no_gpu

# Examples are the same in every run of CI; FLASH_CUPY_EXAMPLES=1000 searches further.
hypothesis.settings.register_profile(
    "default",
    max_examples=int(os.environ.get("FLASH_CUPY_EXAMPLES", "40")),
    deadline=None,
    derandomize="FLASH_CUPY_EXAMPLES" not in os.environ,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(params=available_engines(), ids=lambda engine: engine.name)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """Each engine in turn. The CPU engine gets tiles so small that short sequences have many."""
    monkeypatch.setattr(tiled, "MIN_TILE", 16)
    monkeypatch.setattr(tiled, "MAX_TILE", 32)
    return request.param


@pytest.fixture(scope="session")
def host_cuda_engine() -> Iterator[CudaEngine]:
    """The CUDA engine with a simulated device in place of a GPU."""
    from host.device import missing_compiler
    from host.machine import HostMachine

    reason = missing_compiler()
    if reason is not None:
        pytest.skip(reason)
    machine = HostMachine()
    yield CudaEngine(machine)
    machine.host.close()


@pytest.fixture
def host_engine(host_cuda_engine: CudaEngine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The simulated device in place of the CPU engine."""
    monkeypatch.setattr("flash_cupy.engine.tiled", host_cuda_engine)
    return HOST


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    """Say what is known of the GPU; record a complete run on one."""
    complete = (
        exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        and config.args == config.getini("testpaths")
        and config.option.markexpr == "not slow"
        and not (
            config.option.keyword or getattr(config.option, "lf", False) or config.option.maxfail
        )
    )
    if why_no_gpu() is None and complete:
        passed, failed, errors, skipped = (
            len(terminalreporter.stats.get(outcome, ()))
            for outcome in ("passed", "failed", "error", "skipped")
        )
        gpu_report.write(passed, failed + errors, skipped)
    terminalreporter.write_line(gpu_report.describe())
