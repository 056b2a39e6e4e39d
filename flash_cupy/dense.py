"""Dense softmax attention: the plain N x N computation, which specifies all the other engines.

Written to be checked by eye, for NumPy and CuPy arrays alike::

    S = scale * Q K^T        P = softmax(S)        O = P V        L = log(sum(exp(S)))
    dP = dO V^T              dS = P * (dP - D + dL)               D = rowsum(P * dP)
    dQ = scale * dS K        dK = scale * dS^T Q                  dV = P^T dO
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .arrays import Array, namespace, sum_to, to_device, to_kind
from .problem import Device, Options, Problem, Window
from .visible import matmul_visible


def dense_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    device: Device | None = None,
    dtype: Any = None,
) -> Array:
    """Compute `attention` with N x N matrices: slow, large, and easy to believe.

    Parameters
    ----------
    q, k, v, causal, window, scale, softcap, alibi_slopes, device
        As in `attention`.
    dtype
        Dtype to compute in and to return: float64 gives a reference. By default 16-bit arrays
        are computed in float32 and all others in their own dtype, and o has q's dtype.

    Returns
    -------
    o : array, (*batch, H, Nq, Dv)
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device)
    return _forward(Problem.of(q, k, v, options), q, k, v, alibi_slopes, dtype)[0]


def dense_attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    device: Device | None = None,
    dtype: Any = None,
) -> tuple[Array, Array]:
    """Compute `attention_forward` with N x N matrices; parameters as in `dense_attention`.

    Returns
    -------
    o : array, (*batch, H, Nq, Dv)
    lse : array, (*batch, H, Nq)
        Natural logarithm of the sum of exp(S) over the keys in sight.
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device)
    problem = Problem.of(q, k, v, options)
    return _forward(problem, q, k, v, alibi_slopes, dtype)


def dense_attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    *,
    dlse: Array | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    device: Device | None = None,
    dtype: Any = None,
) -> tuple[Array, Array, Array]:
    """Compute the gradients of `dense_attention_forward` by formula.

    Parameters
    ----------
    do : array, (*batch, H, Nq, Dv)
        Gradient with respect to o.
    dlse : array, (*batch, H, Nq), optional
        Gradient with respect to lse; zero by default.
    q, k, v, causal, window, scale, softcap, alibi_slopes, device, dtype
        As in `dense_attention`.

    Returns
    -------
    dq, dk, dv : arrays with the shapes of q, k and v
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device)
    problem = Problem.of(q, k, v, options)
    problem.check_rows({"do": do, "dlse": dlse})
    dense = _dense(problem, q, k, v, alibi_slopes, dtype)
    p, visible = dense.p, dense.visible
    xp = namespace(p)
    rows = problem.rows_shape
    do = to_device(do, problem.device).astype(p.dtype).reshape(*rows, problem.head_dim_v)
    with np.errstate(all="ignore"):
        dp = xp.where(visible, do @ dense.v.mT, 0)
        d = (p * dp).sum(-1, keepdims=True)
        if dlse is not None:
            d = d - to_device(dlse, problem.device).astype(p.dtype).reshape(*rows, 1)
        ds = xp.where(visible, p * (dp - d) * dense.ds_factor, 0)
        dq = problem.scale * matmul_visible(ds, dense.k, visible)
        dk = problem.scale * matmul_visible(ds.mT, dense.q, visible.mT)
        dv = matmul_visible(p.mT, do, visible.mT)
        dk, dv = (_sum_groups(problem, x) for x in (dk, dv))
        dq, dk, dv = (
            to_kind(sum_to(dx, x.shape).astype(dtype or problem.dtype), problem.kind)
            for dx, x in ((dq, q), (dk, k), (dv, v))
        )
    return dq, dk, dv


def _forward(
    problem: Problem, q: Array, k: Array, v: Array, alibi_slopes: Array | None, dtype: Any
) -> tuple[Array, Array]:
    dense = _dense(problem, q, k, v, alibi_slopes, dtype)
    with np.errstate(all="ignore"):
        o = matmul_visible(dense.p, dense.v, dense.visible)
    o_dtype, lse_dtype = (dtype, dtype) if dtype else (problem.dtype, problem.compute_dtype)
    return (
        to_kind(o.reshape(problem.o_shape).astype(o_dtype), problem.kind),
        to_kind(dense.lse.reshape(problem.lse_shape).astype(lse_dtype), problem.kind),
    )


class _Dense(NamedTuple):
    """All N x N matrices of one call, k and v repeated for each query head."""

    q: Array  # (*batch, H, Nq, D)
    k: Array  # (*batch, H, Nk, D)
    v: Array  # (*batch, H, Nk, Dv)
    p: Array  # (*batch, H, Nq, Nk), rows add up to 1, or to 0 where no key is in sight
    lse: Array  # (*batch, H, Nq)
    visible: Array  # (Nq, Nk)
    ds_factor: Array | float  # derivative of the softcap


def _dense(
    problem: Problem, q: Array, k: Array, v: Array, alibi_slopes: Array | None, dtype: Any
) -> _Dense:
    dtype = dtype or problem.compute_dtype
    q, k, v = (to_device(x, problem.device).astype(dtype) for x in (q, k, v))
    xp = namespace(q)
    k, v = (xp.repeat(x, problem.group, axis=-3) if x.ndim > 2 else x for x in (k, v))
    lead = (*problem.batch, problem.heads)
    q, k, v = (xp.broadcast_to(x, lead + x.shape[-2:]) for x in (q, k, v))

    # distance from the diagonal, which ends at the bottom right
    i = xp.arange(problem.seqlen_q)[:, None] + problem.seqlen_k - problem.seqlen_q
    distance = i - xp.arange(problem.seqlen_k)
    visible = xp.ones(distance.shape, bool)
    if problem.band.left is not None:
        visible &= distance <= problem.band.left
    if problem.band.right is not None:
        visible &= distance >= -problem.band.right

    with np.errstate(all="ignore"):
        s = problem.scale * (q @ k.mT)
        ds_factor: Array | float = 1.0
        if problem.softcap is not None:
            t = xp.tanh(s / problem.softcap)
            s, ds_factor = problem.softcap * t, 1 - t * t
        if alibi_slopes is not None:
            slopes = to_device(alibi_slopes, problem.device).astype(dtype)
            s = s - slopes[..., None, None] * abs(distance).astype(dtype)
        s = xp.where(visible, s, -xp.inf)
        m = _row_max(s)
        p = xp.exp(s - m)
        total = p.sum(axis=-1, keepdims=True)
        lse = (m + xp.log(total))[..., 0]
        p = xp.where(visible, p / xp.where(total == 0, 1, total), 0)  # 0 in a row of NaN, too
    return _Dense(q, k, v, p, lse, visible, ds_factor)


def _row_max(s: Array) -> Array:
    """Largest score of each row; 0 in rows that see no key, for which any number would do."""
    xp = namespace(s)
    if s.shape[-1] == 0:
        return xp.zeros((*s.shape[:-1], 1), s.dtype)
    m = s.max(axis=-1, keepdims=True)
    return xp.where(m == -xp.inf, 0, m)


def _sum_groups(problem: Problem, x: Array) -> Array:
    """Add up the query heads that share a key head: (..., H, Nk, .) -> (..., Hkv, Nk, .)."""
    *batch, _, n, d = x.shape
    return x.reshape(*batch, problem.kv_heads, problem.group, n, d).sum(axis=-3)
