"""Launches by the driver, here by one that only notes what it is asked for."""

from __future__ import annotations

import ctypes
import sys
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flash_cupy.cuda import driver
from flash_cupy.cuda.driver import PreparedLaunch

ARGUMENTS = (np.array([7], np.int64), np.array([1.5]))


class FakeDriver:
    """Answers launches with an error, or 0, and says which context a thread has."""

    def __init__(self, error: int = 0, version: int = 12080, context: int = 0) -> None:
        self.error = error
        self.version = version
        self.context = context
        self.launches: list[tuple[Any, ...]] = []

    def cuLaunchKernelEx(self, config: Any, function: Any, arguments: Any, extra: None) -> int:
        how = config._obj
        attribute = how.attributes[0] if how.attribute_count else None
        values = [
            ctypes.cast(pointer, ctypes.POINTER(kind))[0]
            for pointer, kind in zip(arguments, (ctypes.c_int64, ctypes.c_double), strict=True)
        ]
        self.launches.append(
            (
                [*how.grid, *how.block, how.shared_bytes, how.stream],
                attribute and (attribute.id, attribute.value),
                function.value,
                values,
            )
        )
        return self.error

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuCtxGetCurrent(self, context: Any) -> int:
        context._obj.value = self.context
        return 0


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a driver in the place of the machine's."""

    def install(fake: FakeDriver) -> FakeDriver:
        monkeypatch.setattr(driver, "library", lambda: fake)
        driver.lets_launches_overlap.cache_clear()
        return fake

    yield install
    driver.lets_launches_overlap.cache_clear()


def launch(overlaps: bool = False) -> PreparedLaunch:
    return PreparedLaunch(42, 5, 96, 1000, ARGUMENTS, 9, overlaps)


def test_layout_is_the_driver_s() -> None:
    """As cuda.h has it: a value of 64 bytes behind an id that is filled up to 8."""
    assert ctypes.sizeof(driver._Attribute) == 72 and driver._Attribute.value.offset == 8
    assert ctypes.sizeof(driver._Config) == 56
    assert (driver._Config.stream.offset, driver._Config.attributes.offset) == (32, 40)


def test_launch_may_be_repeated(install: Any) -> None:
    fake = install(FakeDriver())
    prepared = launch()
    prepared()
    prepared()
    assert fake.launches == [([5, 1, 1, 96, 1, 1, 1000, 9], None, 42, [7, 1.5])] * 2


@pytest.mark.parametrize(("version", "attribute"), [(12030, (6, 1)), (12020, None)])
def test_launches_overlap_if_the_driver_can(install: Any, version: int, attribute: Any) -> None:
    fake = install(FakeDriver(version=version))
    launch(overlaps=True)()
    assert fake.launches[0][1] == attribute


@pytest.mark.parametrize("context", [0, 5])
def test_a_thread_gets_a_context_once_if_it_has_none(
    install: Any, monkeypatch: pytest.MonkeyPatch, context: int
) -> None:
    install(FakeDriver(context=context))
    asked: list[int] = []
    runtime = SimpleNamespace(memGetInfo=lambda: asked.append(threading.get_ident()))
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def enter_twice() -> None:
        driver.enter_thread()
        driver.enter_thread()

    for _ in range(2):
        thread = threading.Thread(target=enter_twice)
        thread.start()
        thread.join()
    assert len(asked) == (0 if context else 2)


def test_an_error_is_raised(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(FakeDriver(error=701))
    # CuPy's own error asks the driver for its text.
    cuda = SimpleNamespace(driver=SimpleNamespace(CUDADriverError=RuntimeError))
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    with pytest.raises(RuntimeError, match=r"^701$"):
        launch()()
