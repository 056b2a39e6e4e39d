"""Matrix products of CuPy arrays by cuBLAS: 16-bit operands, float sums, batches, accumulation.

cuBLAS is called by ctypes and not through `cupy.matmul`, which of two bfloat16 arrays adds to no
third, takes no batches of them, and refuses to be recorded in a CUDA graph. The workspace is our
own for the sake of graphs too: without one cuBLAS would record an allocation with every product.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import cupy

Array = Any

WORKSPACE_BYTES = 32 << 20  # what cuBLAS recommends for Hopper

# Names and numbers of cublas_api.h and library_types.h.
_OPERATION = {False: 0, True: 1}  # CUBLAS_OP_N, CUBLAS_OP_T
_CUDA_TYPE = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_32F = 68
_DEFAULT_ALGORITHM = -1


def matmul(
    a: Array,
    b: Array,
    out: Array | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
) -> Array:
    """Compute `op(a) @ op(b)`, with `accumulate` added to out.

    Parameters
    ----------
    a, b
        Matrices, or (G, ., .) contiguous batches of them, of one dtype: float32, float16 or
        bfloat16; their rows are contiguous.
    out
        Where the product goes, of that dtype or float32; by default a new array like a.
    transpose_a, transpose_b
        Whether op swaps the matrix's two axes.
    """
    m, k = a.shape[:-3:-1] if transpose_a else a.shape[-2:]
    n = b.shape[-2] if transpose_b else b.shape[-1]
    if out is None:
        out = cupy.empty((*a.shape[:-2], m, n), a.dtype)
    assert (b.shape[-1] if transpose_b else b.shape[-2]) == k
    assert out.shape == (*a.shape[:-2], m, n)
    assert a.dtype == b.dtype
    # To cuBLAS, which counts down columns, a matrix of ours is its transpose: it is asked for
    # outᵀ = op(b)ᵀ op(a)ᵀ.
    _Handle.of_device(cupy.cuda.runtime.getDevice()).product(
        _OPERATION[transpose_b],
        _OPERATION[transpose_a],
        (n, m, k),
        (b, a, out),
        batch=a.shape[0] if a.ndim == 3 else None,
        beta=float(accumulate),
    )
    return out


class _Handle:
    """A cuBLAS handle with the product that this module needs."""

    def __init__(self) -> None:
        self._cublas = _library()
        self._handle = ctypes.c_void_p()
        _check(self._cublas.cublasCreate_v2(ctypes.byref(self._handle)))
        self._workspace = cupy.cuda.Memory(WORKSPACE_BYTES)  # not of a pool: it stays
        self._stream: int | None = None

    @classmethod
    @cache
    def of_device(cls, device: int) -> _Handle:
        """Return the handle of the device, which is the current one."""
        return cls()

    def product(
        self,
        operation_a: int,
        operation_b: int,
        shape: tuple[int, int, int],
        matrices: tuple[Array, Array, Array],
        batch: int | None,
        beta: float,
    ) -> None:
        """Compute c = op(a) op(b) + beta·c, all as cuBLAS sees them, on the current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        if stream != self._stream:
            _check(self._cublas.cublasSetStream_v2(self._handle, stream))
            workspace = self._workspace.ptr, WORKSPACE_BYTES
            _check(self._cublas.cublasSetWorkspace_v2(self._handle, *workspace))
            self._stream = stream
        one, factor = ctypes.c_float(1.0), ctypes.c_float(beta)
        a, b, c = map(_matrix, matrices)
        how = (*(() if batch is None else (batch,)), _COMPUTE_32F, _DEFAULT_ALGORITHM)
        cublas = self._cublas
        gemm = cublas.cublasGemmEx if batch is None else cublas.cublasGemmStridedBatchedEx
        what = (self._handle, operation_a, operation_b, *shape)
        _check(gemm(*what, ctypes.byref(one), *a, *b, ctypes.byref(factor), *c, *how))


def _matrix(x: Array) -> tuple[int, ...]:
    """Address, type, leading dimension and, of a batch, the step to the next matrix."""
    assert x.strides[-1] == x.itemsize
    steps = (stride // x.itemsize for stride in x.strides[-2::-1])
    return x.data.ptr, _CUDA_TYPE[x.dtype.name], *steps


@cache
def _library() -> Any:
    """Load the cuBLAS that CuPy uses and declare the functions called here."""
    _ = cupy.cuda.cublas  # loads the library, wherever it is installed
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    cublas = ctypes.CDLL(f"libcublas.so.{major}")
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
    matrix, shape = (pointer, integer, integer), (integer,) * 5
    cublas.cublasCreate_v2.argtypes = [pointer]
    cublas.cublasSetStream_v2.argtypes = [pointer, pointer]
    cublas.cublasSetWorkspace_v2.argtypes = [pointer, pointer, ctypes.c_size_t]
    cublas.cublasGemmEx.argtypes = [
        *(pointer, *shape, pointer, *matrix, *matrix, pointer, *matrix, integer, integer)
    ]
    batched = (*matrix, long)
    cublas.cublasGemmStridedBatchedEx.argtypes = [
        *(pointer, *shape, pointer, *batched, *batched, pointer, *batched),
        *(integer, integer, integer),
    ]
    return cublas


def _check(status: int) -> None:
    if status != 0:
        raise RuntimeError(f"cuBLAS: status {status} (see cublasStatus_t in cublas_api.h)")
