"""Hypothesis strategies: attention problems of every shape, dtype, option and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
from ml_dtypes import bfloat16

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = map(np.dtype, ("float16", bfloat16, "float32", "float64"))
DTYPES = (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)

# 1, primes, and the neighbours of every tile size in use.
SEQLENS = (1, 2, 3, 13, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 131)
HEAD_DIMS = (1, 2, 3, 8, 16, 24, 31, 32, 40, 64)


@dataclass(frozen=True)
class Case:
    """The inputs of one forward and backward call, as contiguous NumPy arrays."""

    q: Any
    k: Any
    v: Any
    do: Any
    dlse: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        return self.q.dtype

    def astype(self, dtype: np.dtype) -> Case:
        """The same numbers in another dtype (dlse excepted, which follows compute dtype)."""
        lse_dtype = FLOAT64 if dtype == FLOAT64 else FLOAT32
        arrays = {name: getattr(self, name).astype(dtype) for name in ("q", "k", "v", "do")}
        return replace(self, **arrays, dlse=self.dlse.astype(lse_dtype))


def make_case(
    batch: tuple[int, ...],
    heads: int,
    kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    head_dim: int,
    head_dim_v: int,
    dtype: np.dtype,
    seed: int,
    alibi: bool = False,
    **options: Any,
) -> Case:
    """Normal random inputs for the given shapes."""
    rng = np.random.default_rng(seed)
    if alibi:
        slopes = rng.uniform(0, 0.5, (*batch, heads) if seed % 2 else (heads,))
        options["alibi_slopes"] = slopes.astype(FLOAT32)
    q, k, v, do = (
        rng.standard_normal((*batch, h, n, d)).astype(dtype)
        for h, n, d in (
            (heads, seqlen_q, head_dim),
            (kv_heads, seqlen_k, head_dim),
            (kv_heads, seqlen_k, head_dim_v),
            (heads, seqlen_q, head_dim_v),
        )
    )
    dlse = rng.standard_normal((*batch, heads, seqlen_q))
    dlse = dlse.astype(FLOAT64 if dtype == FLOAT64 else FLOAT32)
    return Case(q, k, v, do, dlse, options)


#: Powers of 2 by which the scores of `growing_case` grow: kernels that follow the largest score
#: notice it late, at once, and when exponentials overflow.
GROWTHS = (0.0, 3.0, 9.0, 300.0)


def growing_case(
    seqlen: int, head_dim: int, dtype: np.dtype, growth: float, **options: Any
) -> Case:
    """Scores that grow from every 64 keys to the 64 before them, for some queries.

    For two of three, and none of every other 16, so that warps differ, and rows of a warp.
    """
    case = make_case((), 1, 1, seqlen, seqlen, head_dim, head_dim, dtype, seed=9, **options)
    q, k = case.q.copy(), case.k.copy()
    places = np.arange(seqlen)
    q[..., 0] = 8 * (places // 16 % 2) * (places % 3 > 0)
    k[..., 0] = places[::-1] // 64 * growth * np.log(2) * np.sqrt(head_dim) / 8
    return replace(case, q=q, k=k)


NONFINITE = ("-inf", "nan in q", "nan in k", "inf in q", "overflow")


def nonfinite_case(seqlen: int, head_dim: int, dtype: np.dtype, what: str, **options: Any) -> Case:
    """Scores of long rows that are not finite, or exponentials that are not, for some queries."""
    case = make_case((), 1, 1, seqlen, seqlen, head_dim, head_dim, dtype, seed=3, **options)
    q, k = case.q.copy(), case.k.copy()
    if what == "-inf":  # in all tiles but the last ones, and +inf for a third of the queries
        q[..., 3] = np.where(np.arange(seqlen) % 3 == 0, -1, 1)
        k[0, 150:, 3] = -np.inf
    elif what == "nan in q":
        q[0, [5, 77, 300], 2] = np.nan
    elif what == "nan in k":
        k[0, [20, 333], 2] = np.nan
    elif what == "inf in q":
        q[0, [5, 77, 300], 2] = np.inf
    else:
        q[0, ::7] *= 3000
        k[0, :200] *= 3000
    return replace(case, q=q, k=k)


def seqlens(smallest: int = 0) -> st.SearchStrategy[int]:
    return st.sampled_from([n for n in (0, *SEQLENS) if n >= smallest])


@st.composite
def windows(draw: st.DrawFn) -> tuple[int | None, int | None] | None:
    side = st.none() | st.integers(0, 5) | st.integers(0, 150)
    return draw(st.none() | st.tuples(side, side))


@st.composite
def options(draw: st.DrawFn) -> dict[str, Any]:
    """Every option but alibi_slopes, whose shape depends on the heads."""
    chosen: dict[str, Any] = {"causal": draw(st.booleans()), "window": draw(windows())}
    chosen["scale"] = draw(st.none() | st.sampled_from([0.0, 0.1, 1.0]))
    chosen["softcap"] = draw(st.none() | st.sampled_from([0.5, 5.0]))
    return chosen


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[np.dtype, ...] = DTYPES,
    smallest: int = 0,
    max_seqlen: int = SEQLENS[-1],
) -> Case:
    """Draw a problem; sequence lengths from ``smallest`` on."""
    kv_heads = draw(st.integers(1, 3))
    lengths = seqlens(smallest).filter(lambda n: n <= max_seqlen)
    return make_case(
        batch=draw(
            st.sampled_from([(), (1,), (2,), (2, 1), (0,)] if smallest == 0 else [(), (2,)])
        ),
        heads=kv_heads * draw(st.sampled_from([1, 1, 2, 3])),
        kv_heads=kv_heads,
        seqlen_q=draw(lengths),
        seqlen_k=draw(lengths),
        head_dim=draw(st.sampled_from(HEAD_DIMS)),
        head_dim_v=draw(st.sampled_from(HEAD_DIMS)),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**32 - 1)),
        alibi=draw(st.booleans()),
        **draw(options()),
    )


# Memory layouts: each gives an array of the same values in other memory, for NumPy and CuPy alike.

Layout = Callable[[Any, Any], Any]


def _swapped(xp: Any, x: Any) -> Any:
    """The (B, N, H, D) memory order of a (B, H, N, D) array."""
    return xp.ascontiguousarray(x.swapaxes(-3, -2)).swapaxes(-3, -2)


def _sliced(xp: Any, x: Any) -> Any:
    """Every second row and the middle columns of a larger array."""
    *lead, n, d = x.shape
    big = xp.full((*lead, 2 * n, d + 5), float("nan"), x.dtype)
    view = big[..., ::2, 2 : d + 2]
    view[...] = x
    return view


def _strided_features(xp: Any, x: Any) -> Any:
    """Every third element of a larger last axis."""
    big = xp.full((*x.shape[:-1], 3 * x.shape[-1]), float("nan"), x.dtype)
    big[..., ::3] = x
    return big[..., ::3]


def _reversed(xp: Any, x: Any) -> Any:
    """Negative strides on every axis."""
    flip = (slice(None, None, -1),) * x.ndim
    return xp.ascontiguousarray(x[flip])[flip]


def _fortran(xp: Any, x: Any) -> Any:
    return xp.asfortranarray(x)


def _read_only(xp: Any, x: Any) -> Any:
    x = x.copy()
    if xp is np:
        x.flags.writeable = False
    return x


LAYOUTS: tuple[Layout, ...] = (
    _swapped,
    _sliced,
    _strided_features,
    _reversed,
    _fortran,
    _read_only,
)
layouts = st.sampled_from(LAYOUTS)
