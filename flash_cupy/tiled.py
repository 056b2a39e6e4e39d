"""The CPU engine: tiled attention in NumPy, and the explanation of the algorithm.

Dense attention holds S = scale * Q K^T, with N^2 entries. Here Q is cut into tiles of rows and K, V
into tiles of columns, and only one tile of S exists at a time.

**Forward** (online softmax). Walking the columns, every row i keeps

- ``m_i``, the largest score so far, and ``l_i``, the sum of ``exp(S_ij - m_i)`` so far,
- ``o_i``, the sum of ``exp(S_ij - m_i) v_j`` so far.

When a tile raises the maximum, what was summed before is off by ``alpha_i = exp(m_old - m_new)``
and is rescaled by it. At the end ``O_i = o_i / l_i``, and the row's log-sum-exp
``L_i = m_i + log l_i`` is kept for the backward pass.

**Backward** (recomputation). Any tile of P is found again from Q, K and L, ``P = exp(S - L)``, and
with ``D_i = sum_d dO_id O_id`` (less ``dL_i``, if L itself has a gradient) a tile contributes::

    dV_j += P^T dO      dS = P * (dO V^T - D)      dQ_i += scale * dS K      dK_j += scale * dS^T Q

The query heads of a group that share a key head are stacked as further rows of one matrix, so the
arrays below are ``(*batch, kv_heads, group * rows, .)`` and ``(*batch, kv_heads, cols, .)``.
All sums are in the compute dtype: float64 for float64, float32 for the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .arrays import sum_to
from .problem import Problem
from .visible import matmul_visible

Floats = NDArray[Any]

# Elements of one tile of S over all heads: little enough for the caches. Below MIN_TILE rows or
# columns the time would go to the interpreter.
TILE_ELEMENTS = 1 << 17
MIN_TILE = 64
MAX_TILE = 512


def forward(
    problem: Problem,
    q: Floats,
    k: Floats,
    v: Floats,
    alibi_slopes: Floats | None,
    o: Floats,
    lse: Floats,
) -> None:
    """Compute the output O and the log-sum-exp L into o and lse."""
    q, k, v = (_computable(problem, x) for x in (q, k, v))
    slopes = _slopes(problem, alibi_slopes)
    o = o.reshape(*problem.rows_shape, problem.head_dim_v)
    lse = lse.reshape(*problem.rows_shape, 1)
    with np.errstate(all="ignore"):
        for rows in _tiles(problem, range(problem.seqlen_q)):
            q_i = problem.scale * _stack(problem, q[..., rows, :])
            o_i, lse_i = _forward_rows(problem, rows, q_i, k, v, slopes)
            o[..., rows, :] = _unstack(problem, o_i)
            lse[..., rows, :] = _unstack(problem, lse_i)


def _forward_rows(
    problem: Problem, rows: slice, q_i: Floats, k: Floats, v: Floats, slopes: Floats | None
) -> tuple[Floats, Floats]:
    """Walk the columns that a tile of rows sees; return its O and L."""
    lead = (*problem.batch, *q_i.shape[-3:-1])
    m = np.full((*lead, 1), -np.inf, q_i.dtype)
    l = np.zeros_like(m)
    o_i = np.zeros((*lead, problem.head_dim_v), q_i.dtype)
    for cols in _tiles(problem, problem.band.keys(_range(rows))):
        s, visible, _ = _scores(problem, rows, cols, q_i, k[..., cols, :], slopes)
        m_new = np.maximum(m, s.max(axis=-1, keepdims=True))
        m_base = np.where(m_new == -np.inf, 0, m_new)  # rows that have seen no key yet
        p = np.exp(np.subtract(s, m_base, out=s), out=s)
        alpha = np.exp(m - m_base)
        l = alpha * l + p.sum(axis=-1, keepdims=True)
        o_i = alpha * o_i + matmul_visible(p, v[..., cols, :], visible)
        m = m_new
    return o_i / np.where(l == 0, 1, l), m + np.log(l)


def backward(
    problem: Problem,
    do: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    o: Floats,
    lse: Floats,
    dlse: Floats | None,
    alibi_slopes: Floats | None,
    dq: Floats,
    dk: Floats,
    dv: Floats,
    deterministic: bool,
) -> None:
    """Compute the gradients into dq, dk and dv, which have the shapes of q, k and v.

    All is summed in a fixed order, so that this is deterministic even where it need not be.
    """
    with np.errstate(all="ignore"):
        d = (do.astype(problem.compute_dtype) * o.astype(problem.compute_dtype)).sum(axis=-1)
        if dlse is not None:
            d = d - dlse
    l = np.where(lse == -np.inf, 0, lse)  # P = 0 in rows that see no key
    d, l = (x.reshape(*problem.rows_shape, 1) for x in (d, l))
    do, q, k, v = (_computable(problem, x) for x in (do, q, k, v))
    slopes = _slopes(problem, alibi_slopes)
    dq_sum = np.zeros(q.shape, q.dtype)  # grows with every tile of columns
    dk, dv = _with_heads(dk), _with_heads(dv)
    with np.errstate(all="ignore"):
        for cols in _tiles(problem, range(problem.seqlen_k)):
            k_j, v_j = k[..., cols, :], v[..., cols, :]
            lead = (*problem.batch, *k_j.shape[-3:-1])
            dk_j = np.zeros((*lead, problem.head_dim), k.dtype)
            dv_j = np.zeros((*lead, problem.head_dim_v), v.dtype)
            for rows in _tiles(problem, problem.band.queries(_range(cols))):
                q_i, do_i, l_i, d_i = (_stack(problem, x[..., rows, :]) for x in (q, do, l, d))
                q_i = problem.scale * q_i
                s, visible, ds_factor = _scores(problem, rows, cols, q_i, k_j, slopes)
                p = _hide(np.exp(np.subtract(s, l_i, out=s), out=s), visible, 0)
                ds = do_i @ v_j.mT
                ds -= d_i
                ds *= p
                ds *= ds_factor
                _hide(ds, visible, 0)
                seen_by = None if visible is None else visible.mT
                dv_j += matmul_visible(p.mT, do_i, seen_by)
                dk_j += matmul_visible(ds.mT, q_i, seen_by)
                dq_i = _unstack(problem, matmul_visible(ds, k_j, visible))
                dq_sum[..., rows, :] += sum_to(dq_i, dq_sum[..., rows, :].shape)
            dk[..., cols, :] = sum_to(dk_j, dk[..., cols, :].shape)
            dv[..., cols, :] = sum_to(dv_j, dv[..., cols, :].shape)
        dq[...] = (problem.scale * dq_sum).reshape(dq.shape)


class _Scores(NamedTuple):
    """A tile of S."""

    s: Floats  # (*batch, kv_heads, group * rows, cols), -inf where not visible
    visible: NDArray[np.bool_] | None  # (group * rows, cols); None where all pairs are in sight
    ds_factor: Floats | float  # derivative of S by scale * Q K^T


def _scores(
    problem: Problem, rows: slice, cols: slice, q_i: Floats, k_j: Floats, slopes: Floats | None
) -> _Scores:
    """Compute one tile of S from scaled queries: softcap, then ALiBi, then the mask."""
    # With all batch axes, of which q and k may have none where v or the slopes have them.
    s = np.broadcast_to(q_i, (*problem.batch, *q_i.shape[-3:])) @ k_j.mT
    ds_factor: Floats | float = 1.0
    if problem.softcap is not None:
        s /= problem.softcap
        np.tanh(s, out=s)
        ds_factor = 1 - s * s
        s *= problem.softcap
    full = problem.band.covers(_range(rows), _range(cols))
    if full and slopes is None:
        return _Scores(s, None, ds_factor)
    i = np.tile(np.arange(rows.start, rows.stop), problem.group)[:, None]
    distance = i + problem.band.offset - np.arange(cols.start, cols.stop)
    if slopes is not None:
        s -= np.repeat(slopes, rows.stop - rows.start, axis=-2) * abs(distance).astype(s.dtype)
    visible = None if full else problem.band.visible(distance)
    return _Scores(_hide(s, visible, -np.inf), visible, ds_factor)


def _hide(x: Floats, visible: NDArray[np.bool_] | None, value: float) -> Floats:
    """Overwrite, in place, the pairs that are not visible."""
    if visible is not None:
        np.copyto(x, value, where=~visible)
    return x


def _tiles(problem: Problem, span: range) -> Iterator[slice]:
    """Cut rows or columns into square tiles of S that keep to TILE_ELEMENTS over all heads."""
    size = math.isqrt(TILE_ELEMENTS // (math.prod(problem.batch) * problem.heads))
    size = max(MIN_TILE, min(MAX_TILE, size // MIN_TILE * MIN_TILE))
    for start in range(span.start, span.stop, size):
        yield slice(start, min(start + size, span.stop))


def _range(tile: slice) -> range:
    return range(tile.start, tile.stop)


def _with_heads(x: Floats) -> Floats:
    """View (N, D) as one head, (1, N, D)."""
    return x if x.ndim > 2 else x[None]


def _computable(problem: Problem, x: Floats) -> Floats:
    """Bring x to the compute dtype; copy what matrix products would not read at full speed."""
    x = _with_heads(x).astype(problem.compute_dtype, copy=False)
    in_rows = x.strides[-1] == x.itemsize and x.strides[-2] >= x.shape[-1] * x.itemsize
    return x if in_rows else np.ascontiguousarray(x)


def _slopes(problem: Problem, alibi_slopes: Floats | None) -> Floats | None:
    """Shape the slopes as columns beside the stacked rows: (..., kv_heads, group, 1)."""
    if alibi_slopes is None:
        return None
    slopes = alibi_slopes.astype(problem.compute_dtype)
    return slopes.reshape(*slopes.shape[:-1], problem.kv_heads, problem.group, 1)


def _stack(problem: Problem, x: Floats) -> Floats:
    """Stack the heads of a group as rows: (..., H, n, d) to (..., kv_heads, group * n, d)."""
    *batch, _, n, d = x.shape
    return x.reshape(*batch, problem.kv_heads, problem.group * n, d)


def _unstack(problem: Problem, x: Floats) -> Floats:
    """Undo `_stack`."""
    *batch, _, n, d = x.shape
    return x.reshape(*batch, problem.heads, n // problem.group, d)
