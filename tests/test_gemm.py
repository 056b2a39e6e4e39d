"""Products by cuBLAS: what it is asked for, by a cuBLAS of our own; on a GPU, what comes out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flash_cupy.gpu import why_no_gpu

cupy = pytest.importorskip("cupy")
import gemm  # noqa: E402  needs CuPy

on_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
TRANSPOSED = [(a, b) for a in (False, True) for b in (False, True)]


class FakeCublas:
    """cuBLAS for float32 in the host's memory, by its documentation."""

    def __init__(self) -> None:
        self.streams: list[int] = []

    def cublasCreate_v2(self, handle: Any) -> int:
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: int) -> int:
        self.streams.append(stream)
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, workspace: int, size: int) -> int:
        return 0

    def cublasGemmEx(self, handle: Any, *arguments: Any) -> int:
        *what, alpha, a, a_type, lda, b, b_type, ldb, beta, c, c_type, ldc, compute, algo = (
            arguments
        )
        return self.cublasGemmStridedBatchedEx(
            *(handle, *what, alpha, a, a_type, lda, 0, b, b_type, ldb, 0),
            *(beta, c, c_type, ldc, 0, 1, compute, algo),
        )

    def cublasGemmStridedBatchedEx(
        self, handle: Any, op_a: int, op_b: int, m: int, n: int, k: int, *rest: Any
    ) -> int:
        alpha, a, _, lda, step_a, b, _, ldb, step_b, beta, c, _, ldc, step_c, count, *how = rest
        assert how == [68, -1]
        for i in range(count):
            x = columns(a + 4 * i * step_a, *((k, m) if op_a else (m, k)), lda)
            y = columns(b + 4 * i * step_b, *((n, k) if op_b else (k, n)), ldb)
            z = columns(c + 4 * i * step_c, m, n, ldc)
            product = (x.T if op_a else x) @ (y.T if op_b else y)
            kept = z * beta._obj.value if beta._obj.value else 0  # not even read with β = 0
            z[...] = alpha._obj.value * product + kept
        return 0


def columns(address: int, rows: int, count: int, leading: int) -> np.ndarray:
    """A matrix of cuBLAS: its columns `leading` elements apart, not shorter than a column."""
    assert leading >= rows
    memory = (ctypes.c_float * (leading * (count - 1) + rows)).from_address(address)
    return np.lib.stride_tricks.as_strided(
        np.ctypeslib.as_array(memory), (rows, count), (4, 4 * leading)
    )


class Shared:
    """A NumPy array with the attributes of a CuPy array that `gemm` reads."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.shape, self.strides = array, array.shape, array.strides
        self.dtype, self.itemsize, self.ndim = array.dtype, array.itemsize, array.ndim
        self.data = SimpleNamespace(ptr=array.ctypes.data)


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCublas]:
    fake, stream = FakeCublas(), SimpleNamespace(ptr=7)
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(getDevice=lambda: -1),
        get_current_stream=lambda: stream,
        Memory=lambda size: SimpleNamespace(ptr=1),
    )
    shared = SimpleNamespace(
        cuda=cuda, empty=lambda shape, dtype: Shared(np.full(shape, np.nan, dtype))
    )
    monkeypatch.setattr(gemm, "cupy", shared)
    monkeypatch.setattr(gemm, "_library", lambda: fake)
    gemm._Handle.of_device.cache_clear()
    yield fake
    gemm._Handle.of_device.cache_clear()


def random(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSED)
def test_what_cublas_is_asked_for(
    cublas: FakeCublas, transpose_a: bool, transpose_b: bool, batch: tuple[int, ...]
) -> None:
    a = random(*batch, *((4, 2) if transpose_a else (2, 4)), seed=1)
    b = random(*batch, *((5, 4) if transpose_b else (4, 5)), seed=2)
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    expected = (a.mT if transpose_a else a) @ (b.mT if transpose_b else b)
    if not batch:
        out = gemm.matmul(Shared(a), Shared(b), **how)
        np.testing.assert_allclose(out.array, expected, rtol=1e-5)
    total = np.ones((*batch, 2, 5), np.float32)
    gemm.matmul(Shared(a), Shared(b), Shared(total), accumulate=True, **how)
    np.testing.assert_allclose(total, expected + 1, rtol=1e-5)
    assert cublas.streams == [7]  # set once


def test_columns_of_a_wider_matrix(cublas: FakeCublas) -> None:
    wide, b, out = random(6, 9, seed=1), random(3, 5, seed=2), np.empty((6, 12), np.float32)
    gemm.matmul(Shared(wide[:, 3:6]), Shared(b), Shared(out[:, 4:9]))
    np.testing.assert_allclose(out[:, 4:9], wide[:, 3:6] @ b, rtol=1e-5)


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize(("transpose_a", "transpose_b"), TRANSPOSED)
def test_products(transpose_a: bool, transpose_b: bool, batch: tuple[int, ...], dtype: str) -> None:
    import ml_dtypes  # noqa: F401  gives NumPy the name of the dtype

    a = random(*batch, *((48, 24) if transpose_a else (24, 48)), seed=1).astype(dtype)
    b = random(*batch, *((40, 48) if transpose_b else (48, 40)), seed=2).astype(dtype)
    how = {"transpose_a": transpose_a, "transpose_b": transpose_b}
    x, y = (z.astype(np.float64) for z in (a, b))
    expected = (x.mT if transpose_a else x) @ (y.mT if transpose_b else y)
    got = gemm.matmul(cupy.asarray(a), cupy.asarray(b), **how)
    assert got.dtype == a.dtype
    tolerance = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}[dtype]
    np.testing.assert_allclose(cupy.asnumpy(got).astype(np.float64), expected, atol=20 * tolerance)
    total = cupy.ones(expected.shape, np.float32)
    gemm.matmul(cupy.asarray(a), cupy.asarray(b), total, accumulate=True, **how)
    np.testing.assert_allclose(cupy.asnumpy(total), expected + 1, atol=1e-4)
