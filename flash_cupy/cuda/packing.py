"""Short queries of grouped heads, packed into the rows of one head.

The query heads of a group see the same keys. Where no mask or slope tells their rows apart, they
are rows of one longer sequence: tiles fill up, and each key is read once for all of them. The same
memory in another layout, without a copy.
"""

from __future__ import annotations

from dataclasses import replace

from ..arrays import Array
from ..band import Band
from ..problem import Problem
from .tensors import Layout, axes_after_head

#: Queries of a head up to which heads are packed: longer ones fill tiles by themselves.
MAX_PACKED_ROWS = 64

#: Tensors with a row for each query.
OF_QUERIES = ("q", "o", "lse", "do_", "dlse", "dq")


def pack_groups(
    problem: Problem, tensors: dict[str, Array | Layout]
) -> tuple[Problem, dict[str, Array | Layout]]:
    """Return a call with the heads of each group packed, or the call as it is."""
    band = problem.band
    if (
        problem.group == 1
        or problem.seqlen_q > MAX_PACKED_ROWS
        or band.left is not None
        or band.right is not None
        or "alibi_slopes" in tensors
    ):
        return problem, tensors
    rows = {name: tensors[name] for name in OF_QUERIES if name in tensors}
    if not all(_rows_follow_heads(name, x) for name, x in rows.items()):
        return problem, tensors
    return packed(problem), tensors | {
        name: _pack(name, x, problem.kv_heads) for name, x in rows.items()
    }


def packed(problem: Problem) -> Problem:
    """Return the problem of the packed call."""
    rows = problem.group * problem.seqlen_q
    *lead, _, _, head_dim_v = problem.o_shape
    return replace(
        problem,
        heads=problem.kv_heads,
        seqlen_q=rows,
        band=Band(rows, problem.seqlen_k, None, None),
        o_shape=(*lead, problem.kv_heads, rows, head_dim_v),
    )


def _rows_follow_heads(name: str, x: Array) -> bool:
    """Whether one stride walks the rows of all heads."""
    head = x.ndim - 1 - axes_after_head(name)
    length, stride = x.shape[head + 1], x.strides[head + 1]
    return bool(length == 1 or x.strides[head] == length * stride)


def _pack(name: str, x: Array, kv_heads: int) -> Layout:
    head = x.ndim - 1 - axes_after_head(name)
    heads, length = x.shape[head : head + 2]
    rows = heads * length // kv_heads
    row = x.strides[head + (length > 1)]  # rows of length 1 are as far apart as their heads
    return Layout(
        (*x.shape[:head], kv_heads, rows, *x.shape[head + 2 :]),
        (*x.strides[:head], row * rows, row, *x.strides[head + 2 :]),
        x.dtype,
    )
