"""`ops_cupy` on the host device: NumPy arrays for CuPy's, the simulated device for the GPU.

What is tested then is all but cuBLAS and the launch itself: the kernels, their grids, and the
arguments that they are given.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from host.device import HostArray, HostDevice

#: CUDA's words that the kernels of fused.cu use beside those of host/cuda.hpp.
PRELUDE = """
#include <cmath>
#include <cstring>
#define __shared__ static  // blocks run one after the other, their threads in one
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

struct __nv_bfloat16 {
    unsigned short bits;
    __nv_bfloat16() = default;
    __nv_bfloat16(float x) {  // to the nearest, ties to even; no NaN comes here
        unsigned word;
        std::memcpy(&word, &x, 4);
        bits = (word + 0x7FFF + (word >> 16 & 1)) >> 16;
    }
    operator float() const {
        const unsigned word = unsigned(bits) << 16;
        float x;
        std::memcpy(&x, &word, 4);
        return x;
    }
};
struct __nv_bfloat162 { __nv_bfloat16 x, y; };
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {pair.x, pair.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
"""


class Host:
    """Where arrays are and kernels run: a device of the tests, like `Gpu` in test_ops_cupy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ops_cupy

        self.device = HostDevice()
        flat = ops_cupy.source().replace("#include <cuda_bf16.h>", PRELUDE)

        def launch(
            name: str, dtype: np.dtype, width: int, grid: Any, block: Any, *arguments: Any
        ) -> None:
            macros = [x for x in ops_cupy.options(dtype.name, width) if x.startswith("-D")]
            kernel = self.device.compile(flat, name, macros)
            there: dict[int, tuple[np.ndarray, HostArray]] = {}
            kernel(grid, block, [self._argument(x, there) for x in arguments])
            for x, image in there.values():
                x[...] = image.get()

        monkeypatch.setattr(ops_cupy, "launch", launch)
        monkeypatch.setattr(ops_cupy, "matmul", matmul)
        monkeypatch.setattr(ops_cupy, "_zeros", np.zeros)
        monkeypatch.setattr(ops_cupy, "_blocks", lambda most, per_multiprocessor: min(most, 3))
        words = ("empty", "empty_like", "ascontiguousarray")
        numpy_as_cupy = SimpleNamespace(**{word: getattr(np, word) for word in words})
        monkeypatch.setattr(ops_cupy, "cupy", numpy_as_cupy)
        monkeypatch.setattr(ops_cupy, "empty_like", np.empty_like)

    def _argument(self, x: Any, there: dict[int, tuple[np.ndarray, HostArray]]) -> Any:
        """Bring an array to the device, one that is given twice only once."""
        if isinstance(x, np.ndarray):
            assert x.flags.c_contiguous
            key = x.__array_interface__["data"][0]
            if key not in there:
                there[key] = x, self.device.asarray(x)
            return there[key][1]
        return np.float32(x) if isinstance(x, float) else np.int64(x or 0)

    def asarray(self, x: np.ndarray) -> np.ndarray:
        return x.copy()

    def asnumpy(self, x: np.ndarray) -> np.ndarray:
        return x

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        return np.zeros(shape, dtype)

    def close(self) -> None:
        self.device.close()


def matmul(
    a: np.ndarray,
    b: np.ndarray,
    out: np.ndarray | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> np.ndarray:
    """`gemm.matmul` in NumPy."""
    wide_a, wide_b = a.astype(np.float32), b.astype(np.float32)
    product = (wide_a.mT if transpose_a else wide_a) @ (wide_b.mT if transpose_b else wide_b)
    if out is None:
        return product.astype(a.dtype)
    out[...] = out + product if accumulate else product
    return out
