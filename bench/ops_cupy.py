"""The transformer's arithmetic in CuPy: matrix products by cuBLAS, all else by fused kernels.

The functions, their arguments and their results are those of `ops_numpy`, which says what each one
computes; fused.cu computes it. Nothing here waits for the device, and all of it can be recorded in
a CUDA graph. Activations are bfloat16 or float32, parameters float32; arrays are contiguous, widths
and numbers of logits multiples of 8, and tokens int32.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np
from gemm import matmul

Array = Any

PACK = 8  # elements that a thread moves at once
WARPS = 4  # of blocks with a warp a row
WARP = 32
SUM_ROWS = 8
LOSS_WARPS = 16

#: Of the logits that exist at once: 0.5 GB in bfloat16.
LOGITS = 1 << 28

_ELEMENT = {"bfloat16": "__nv_bfloat16", "float32": "float"}

empty_like = cupy.empty_like


# ---------------------------------------------------------------------------------- launching


def options(dtype: str, width: int) -> tuple[str, ...]:
    """Return what NVRTC is to be told for a dtype of activations and a model's width."""
    return ("-std=c++17", f"-DELEMENT={_ELEMENT[dtype]}", f"-DWIDTH={width}")


def source() -> str:
    """Return the kernels' source."""
    return (Path(__file__).parent / "fused.cu").read_text(encoding="utf-8")


@cache
def _kernel(name: str, dtype: str, width: int, device: int) -> Any:
    return _module(dtype, width, device).get_function(name)


@cache
def _module(dtype: str, width: int, device: int) -> Any:
    return cupy.RawModule(code=source(), options=options(dtype, width))


def launch(
    name: str,
    dtype: np.dtype[Any],
    width: int,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    *arguments: Any,
) -> None:
    """Launch a kernel; its parameters are pointers (None: null), `Index` and float."""
    kernel = _kernel(name, dtype.name, width, cupy.cuda.runtime.getDevice())
    kernel(grid, block, tuple(map(_argument, arguments)))


def _argument(x: Any) -> Any:
    if isinstance(x, cupy.ndarray):
        assert x.flags.c_contiguous, f"an array of shape {x.shape} with strides {x.strides}"
        x = x.data.ptr
    return np.float32(x) if isinstance(x, float) else np.int64(x or 0)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@cache
def _multiprocessors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


def _blocks(most: int, per_multiprocessor: int) -> int:
    """As many blocks as fill the device, no more than there is work for."""
    device = cupy.cuda.runtime.getDevice()
    return min(most, per_multiprocessor * _multiprocessors(device))


def _over_packs(name: str, like: Array, count: int, *arguments: Any) -> None:
    """Launch a kernel with a thread for each pack of `count` rows like those of x."""
    threads = 256
    grid = (_ceil(count * like.shape[1] // PACK, threads),)
    launch(name, like.dtype, like.shape[1], grid, (threads,), *arguments)


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    """As `cupy.zeros`, but never by a launch of a kernel."""
    x = cupy.empty(shape, dtype)
    x.data.memset_async(0, x.nbytes)
    return x


_ANY_WIDTH = PACK  # of kernels whose rows are not tokens


# ---------------------------------------------------------------------------------- embedding


def embed(tokens: Array, table: Array, positions: Array | None, context: int) -> Array:
    """See `ops_numpy`."""
    x = cupy.empty((len(tokens), table.shape[1]), table.dtype)
    tokens = tokens.astype(np.int32, copy=False)
    _over_packs("embed", x, len(x), tokens, table, positions, x, len(x), context)
    return x


def embed_backward(
    dx: Array, tokens: Array, table_grad: Array, positions_grad: Array | None, context: int
) -> None:
    """See `ops_numpy`."""
    tokens = tokens.astype(np.int32, copy=False)
    arguments = (dx, tokens, table_grad, positions_grad, len(dx), context)
    _over_packs("embed_backward", dx, len(dx), *arguments)


def gather(x: Array, rows: Array) -> Array:
    """See `ops_numpy`."""
    y = cupy.empty((len(rows), x.shape[1]), x.dtype)
    _over_packs("gather", x, len(rows), x, rows.astype(np.int32, copy=False), y, len(rows))
    return y


def scatter(dy: Array, rows: Array, count: int) -> Array:
    """See `ops_numpy`."""
    dx = _zeros((count, dy.shape[1]), dy.dtype)
    _over_packs("scatter", dy, len(rows), dy, rows.astype(np.int32, copy=False), dx, len(rows))
    return dx


# ------------------------------------------------------------------------ residual and LayerNorm


def add_norm(
    x: Array, y: Array | None, bias: Array | None, gain: Array, shift: Array
) -> tuple[Array, Array, Array]:
    """See `ops_numpy`; the statistics are one array, (T, 2)."""
    rows, width = x.shape
    total = x if y is None else cupy.empty_like(x)
    normal, statistics = cupy.empty_like(x), cupy.empty((rows, 2), np.float32)
    launch(
        *("add_norm", x.dtype, width, (_ceil(rows, WARPS),), (WARPS * WARP,)),
        *(x, y, bias, gain, shift, total, normal, statistics, rows),
    )
    return total, normal, statistics


def add_norm_backward(
    dnormal: Array,
    dx: Array | None,
    x: Array,
    statistics: Array,
    gain: Array,
    gain_grad: Array,
    shift_grad: Array,
    bias_grad: Array | None,
) -> Array:
    """See `ops_numpy`; the result takes the memory of dx, or of dnormal where there is no dx."""
    rows, width = x.shape
    dsum = dnormal if dx is None else dx
    launch(
        *("add_norm_backward", x.dtype, width),
        *((_blocks(_ceil(rows, WARPS), per_multiprocessor=3),), (WARPS * WARP,)),
        *(dnormal, dx, x, statistics, gain, dsum, gain_grad, shift_grad, bias_grad, rows),
    )
    return dsum


# ------------------------------------------------------------------------------------ linear maps


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """See `ops_numpy`."""
    y = matmul(x, weight)
    if bias is not None:
        packs = y.size // PACK
        grid = (_ceil(packs, 256),)
        launch("add_bias", y.dtype, _ANY_WIDTH, grid, (256,), y, bias, packs, y.shape[1])
    return y


def linear_backward(
    dy: Array, x: Array, weight: Array, weight_grad: Array, bias_grad: Array | None
) -> Array:
    """See `ops_numpy`."""
    matmul(x, dy, weight_grad, transpose_a=True, accumulate=True)
    if bias_grad is not None:
        _sum_columns("column_sums", dy, dy, bias_grad)
    return matmul(dy, weight, transpose_b=True)


def _sum_columns(name: str, like: Array, *arguments: Any) -> None:
    """Launch a kernel that sums over rows, with enough blocks to fill the device four times."""
    rows, columns = like.shape
    stripes = _ceil(columns, WARP * PACK)
    parts = _ceil(_blocks(stripes * _ceil(rows, SUM_ROWS), per_multiprocessor=4), stripes)
    grid, block = (stripes, parts), (WARP, SUM_ROWS)
    launch(name, like.dtype, _ANY_WIDTH, grid, block, *arguments, rows, columns)


def bias_gelu(u: Array, bias: Array) -> Array:
    """See `ops_numpy`."""
    y, packs = cupy.empty_like(u), u.size // PACK
    grid = (_ceil(packs, 256),)
    launch("bias_gelu", u.dtype, _ANY_WIDTH, grid, (256,), u, bias, y, packs, u.shape[1])
    return y


def bias_gelu_backward(dy: Array, u: Array, bias: Array, bias_grad: Array) -> Array:
    """See `ops_numpy`; the result takes the memory of dy."""
    _sum_columns("bias_gelu_backward", dy, dy, u, bias, bias_grad)
    return dy


# ---------------------------------------------------------------------------------- cross-entropy


def logits(x: Array, table: Array) -> Array:
    """See `ops_numpy`."""
    return matmul(x, table, transpose_b=True)


def cross_entropy(x: Array, table: Array, targets: Array) -> Array:
    """See `ops_numpy`."""
    return _cross_entropy(x, table, targets, None)[0]


def cross_entropy_backward(
    x: Array, table: Array, targets: Array, table_grad: Array
) -> tuple[Array, Array]:
    """See `ops_numpy`."""
    return _cross_entropy(x, table, targets, table_grad)


def _cross_entropy(
    x: Array, table: Array, targets: Array, table_grad: Array | None
) -> tuple[Array, Array]:
    """Part by part of the rows, so that the logits of all of them never exist at once."""
    rows, outputs = len(x), len(table)
    assert outputs % PACK == 0, f"{outputs} logits a row: a multiple of {PACK} is needed"
    loss = _zeros((), np.float32)
    dx = cupy.empty_like(x)
    targets = targets.astype(np.int32, copy=False)
    parts = _ceil(rows * outputs, LOGITS)
    step = _ceil(rows, parts)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        scores = logits(x[part], table)
        launch(
            *("cross_entropy", x.dtype, _ANY_WIDTH, (len(scores),), (LOSS_WARPS * WARP,)),
            *(scores, targets[part], loss, outputs, 1 / rows, table_grad is not None),
        )
        if table_grad is not None:
            matmul(scores, x[part], table_grad, transpose_a=True, accumulate=True)
            matmul(scores, table, dx[part])
    return loss, dx


# -------------------------------------------------------------------------- dense attention


def dense_attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    out: Array,
    causal: bool = False,
    alibi_slopes: None = None,
) -> tuple[Array, Any]:
    """Attention with N×N matrices as a careful user of CuPy writes it; see `transformer.Attend`.

    Five batched products and, in place, one kernel for the softmax of each direction; P is kept
    for the backward pass. The heads of q, k and v, (B, H, N, D), are first brought together.
    """
    batch = (-1, *q.shape[2:])  # (B·H, N, D)
    q, k, v = (cupy.ascontiguousarray(x).reshape(batch) for x in (q, k, v))
    p = matmul(q, k, transpose_b=True)
    rows, columns = p.shape[0] * p.shape[1], p.shape[2]
    assert columns % PACK == 0, f"{columns} keys: dense attention takes a multiple of {PACK}"
    geometry = (p.dtype, _ANY_WIDTH, (_ceil(rows, WARPS),), (WARPS * WARP,))
    how = (rows, columns, 1 / math.sqrt(q.shape[2]), causal)
    launch("softmax", *geometry, p, *how)
    _product_into(out, p, v)

    def backprop(do: Array, out: tuple[Array, Array, Array]) -> None:
        do = cupy.ascontiguousarray(do).reshape(batch)
        dq, dk, dv = out
        _product_into(dv, p, do, transpose_a=True)
        ds = matmul(do, v, transpose_b=True)
        launch("softmax_backward", *geometry, p, ds, *how)
        _product_into(dq, ds, k)
        _product_into(dk, ds, q, transpose_a=True)

    return out, backprop


def _product_into(out: Array, a: Array, b: Array, transpose_a: bool = False) -> None:
    """Put the batched product where the heads of a model are, (B, H, N, D) of any strides."""
    if out.flags.c_contiguous:
        matmul(a, b, out.reshape(-1, *out.shape[2:]), transpose_a=transpose_a)
    else:
        out[...] = matmul(a, b, transpose_a=transpose_a).reshape(out.shape)


# -------------------------------------------------------------------------------------- AdamW


def adamw(
    value: Array,
    grad: Array,
    mean: Array,
    square: Array,
    work: Array,
    constants: Array,
    *,
    decayed: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    clip: float,
) -> None:
    """See `ops_numpy`."""
    assert value.size % PACK == 0
    assert decayed % PACK == 0
    threads, packs = 256, value.size // PACK
    total = _zeros((), np.float32)
    blocks = _blocks(_ceil(packs, threads), per_multiprocessor=8)
    how = (work.dtype, _ANY_WIDTH)
    launch("square_sum", *how, (blocks,), (threads,), grad, total, value.size)
    launch(
        *("adamw", *how, (_ceil(packs, threads),), (threads,)),
        *(value, grad, mean, square, work, constants, total, value.size, decayed),
        *(beta1, beta2, epsilon, decay, clip),
    )
