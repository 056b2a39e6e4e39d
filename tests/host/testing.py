"""What the tests of the host device share: machines to run small kernels on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import DTypeLike, NDArray

from flash_cupy.cuda import tensor_maps
from flash_cupy.cuda.compiler import inline_includes, kernel_folder
from flash_cupy.cuda.tensor_maps import BoxMap
from flash_cupy.gpu import why_no_gpu

from .device import HERE, HostArray, HostDevice, missing_compiler
from .machine import encode_map


class Gpu:
    """A real GPU behind the methods of a HostDevice: what it computes, the host device must."""

    def compile(self, source: str, name: str, options: Sequence[str] = ()) -> Any:
        import cupy

        return cupy.RawKernel(source, name, options=("-std=c++17", *options))

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        import cupy

        return cupy.empty(shape, dtype)

    def asarray(self, values: NDArray) -> Any:
        import cupy

        return cupy.asarray(values)


Machine = HostDevice | Gpu


@pytest.fixture(scope="module")
def device() -> Iterator[HostDevice]:
    """Give the host device, for what a GPU does not do: reports, and an order by seed."""
    if reason := missing_compiler():
        pytest.skip(reason)
    device = HostDevice()
    yield device
    device.close()


@pytest.fixture(params=["host", "gpu"])
def machine(request: pytest.FixtureRequest) -> Machine:
    """Give the host device and, where there is one, a GPU, which computes the same."""
    if request.param == "host":
        return request.getfixturevalue("device")
    if reason := why_no_gpu():
        pytest.skip(reason)
    return Gpu()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def tensor_map(machine: Machine, array: Any, x: NDArray, box_rows: int) -> NDArray[np.void]:
    """Return the tensor map of a device array that has the layout of x, which has five axes.

    The last axis of x are the columns, the one before the rows; it is 2 bytes an element.
    """
    on_host = isinstance(array, HostArray)
    box_map = BoxMap(
        address=array.address if on_host else array.data.ptr,
        element="float16",
        extents=x.shape[::-1],
        strides=x.strides[-2::-1],
        box_rows=box_rows,
    )
    encoded = encode_map(box_map) if on_host else tensor_maps.encode(box_map)
    return np.frombuffer(encoded, f"V{len(encoded)}")


def run(
    machine: Machine,
    parameters: str,
    body: str,
    *args: Any,
    headers: Sequence[str] = ("ptx.cuh",),
    arch: str | None = None,
    grid: int = 1,
    block: int = 32,
    **options: int,
) -> None:
    """Run a kernel with this body, whose first line is line 1 of "test.cu"."""
    includes = "\n".join(f'#include "{header}"' for header in headers)
    text = f"""{includes}
extern "C" __global__ void test({parameters}) {{
#line 1 "test.cu"
{body}
}}
"""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "test.cu").write_text(text)
        twins = (HERE,) if isinstance(machine, HostDevice) else ()
        source = inline_includes("test.cu", (Path(folder), *twins, kernel_folder()))
    if isinstance(machine, HostDevice):
        kernel = machine.compile(source, "test")
    else:
        kernel = machine.compile(source, "test", [f"-arch={arch}"] if arch else [])
        options.pop("seed", None)  # of the host's scheduler
        kernel.max_dynamic_shared_size_bytes = options.get("shared_mem", 1024)
    kernel((grid,), (block,), args, **{"shared_mem": 1024, **options})
