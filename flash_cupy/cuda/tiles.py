"""The table of tiles: every tuning constant of the kernels, by element type and head dim.

A row is chosen for a call by plan.py. kernels_cu/NOTES.md gives the reasons behind the rows.
"""

from __future__ import annotations

from typing import NamedTuple


class ForwardTiles(NamedTuple):
    """The tuned part of a `ForwardPlan`."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    blocks_per_sm: int
    dim_unroll: int = 16
    dim_v_group: int = 16


# By element and largest head dim; of each list the first row of which blocks_per_sm blocks fit in
# a multiprocessor's shared memory, or else the first of which one does.
_FORWARD_16BIT = {
    32: [ForwardTiles(128, 64, 4, 2, 2)],
    64: [ForwardTiles(128, 128, 4, 1, 1), ForwardTiles(128, 64, 4, 1, 2)],
    96: [ForwardTiles(128, 64, 4, 1, 2), ForwardTiles(128, 32, 4, 1, 2)],
    128: [
        ForwardTiles(128, 64, 4, 1, 2, dim_unroll=4),
        ForwardTiles(128, 64, 8, 1, 1),
    ],
    160: [ForwardTiles(128, 64, 8, 1, 1)],
    192: [ForwardTiles(128, 64, 8, 1, 1), ForwardTiles(64, 64, 4, 1, 1)],
    256: [
        ForwardTiles(128, 128, 8, 1, 1, dim_unroll=2),
        ForwardTiles(128, 64, 8, 1, 1),
        ForwardTiles(64, 64, 4, 1, 1),
    ],
}
_FORWARD_32BIT_WIDE = {
    128: [
        ForwardTiles(128, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
        ForwardTiles(64, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
        ForwardTiles(128, 32, 8, 1, 1, dim_unroll=1, dim_v_group=2),
    ],
    160: [ForwardTiles(64, 32, 4, 1, 1, dim_unroll=1, dim_v_group=2)],
    192: [ForwardTiles(64, 32, 4, 1, 1, dim_unroll=1, dim_v_group=2)],
    256: [
        ForwardTiles(64, 32, 4, 1, 1, dim_unroll=1, dim_v_group=2),
        ForwardTiles(64, 16, 4, 1, 1, dim_unroll=1, dim_v_group=2),
    ],
}
FORWARD_TILES: dict[str, dict[int, list[ForwardTiles]]] = {
    "float16": _FORWARD_16BIT,
    "bfloat16": _FORWARD_16BIT,
    "tensorfloat32": {
        32: [ForwardTiles(128, 64, 4, 1, 2)],
        64: [
            ForwardTiles(128, 64, 4, 1, 2, dim_unroll=1, dim_v_group=2),
            ForwardTiles(64, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
        ],
        96: [
            ForwardTiles(128, 32, 4, 1, 2, dim_unroll=1),
            ForwardTiles(128, 32, 8, 1, 1, dim_unroll=1),
        ],
        **_FORWARD_32BIT_WIDE,
    },
    "float": {
        32: [ForwardTiles(128, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2)],
        64: [
            ForwardTiles(128, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
            ForwardTiles(64, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
        ],
        96: [
            ForwardTiles(128, 32, 4, 1, 2, dim_unroll=1, dim_v_group=2),
            ForwardTiles(128, 32, 8, 1, 1, dim_unroll=1, dim_v_group=2),
        ],
        **_FORWARD_32BIT_WIDE,
    },
    "double": {
        32: [ForwardTiles(64, 32, 4, 1, 2)],
        64: [ForwardTiles(64, 64, 4, 1, 1), ForwardTiles(64, 32, 4, 1, 1)],
        96: [ForwardTiles(64, 16, 4, 1, 2), ForwardTiles(64, 16, 4, 1, 1)],
        128: [
            ForwardTiles(128, 16, 8, 1, 1),
            ForwardTiles(64, 16, 4, 1, 1),
        ],
        160: [ForwardTiles(64, 16, 4, 1, 1), ForwardTiles(32, 16, 2, 1, 1)],
        192: [ForwardTiles(64, 16, 4, 1, 1), ForwardTiles(32, 16, 2, 1, 1)],
        256: [
            ForwardTiles(64, 16, 4, 1, 1),
            ForwardTiles(32, 16, 2, 1, 1),
            ForwardTiles(16, 16, 1, 1, 1),
        ],
    },
}

#: Widest slice of o that one block computes, where not all of it fits in registers.
MAX_SLICE = {"double": 128}


class BackwardTiles(NamedTuple):
    """The tuned part of a `BackwardPlan`."""

    tile_m: int
    tile_n: int
    warps: int
    key_warps: int
    dq_row_warps: int
    stages: int
    blocks_per_sm: int = 1
    unroll: int = 16


class BackwardDqTiles(NamedTuple):
    """The tuned part of a `BackwardDqPlan`."""

    tile_m: int
    tile_n: int
    warps: int
    stages: int
    blocks_per_sm: int = 1
    unroll: int = 16


# By element and largest head dim; of each list the first row that fits the card's shared memory.
_BACKWARD_16BIT = {
    32: [BackwardTiles(32, 128, 4, 4, 2, 2, 2)],
    64: [BackwardTiles(32, 128, 4, 4, 2, 2, 2)],
    96: [BackwardTiles(64, 128, 8, 4, 4, 2), BackwardTiles(64, 64, 4, 2, 2, 1)],
    128: [
        BackwardTiles(64, 128, 8, 4, 2, 2),
        BackwardTiles(64, 128, 8, 4, 2, 1),
        BackwardTiles(64, 64, 4, 2, 2, 1),
    ],
    192: [
        BackwardTiles(64, 64, 8, 2, 2, 2),
        BackwardTiles(64, 64, 8, 2, 2, 1),
        BackwardTiles(32, 32, 4, 2, 2, 1),
    ],
    256: [
        BackwardTiles(64, 64, 8, 2, 2, 2),
        BackwardTiles(64, 64, 8, 2, 2, 1),
        BackwardTiles(32, 32, 4, 2, 2, 1),
    ],
}
_BACKWARD_32BIT = {
    32: [BackwardTiles(64, 64, 4, 2, 2, 1, 2, unroll=1)],
    64: [
        BackwardTiles(64, 64, 4, 2, 4, 1, 2, unroll=1),
        BackwardTiles(32, 64, 4, 2, 2, 1, unroll=1),
    ],
    96: [
        BackwardTiles(32, 128, 8, 4, 2, 1, unroll=1),
        BackwardTiles(64, 64, 4, 2, 2, 1, unroll=1),
        BackwardTiles(32, 32, 4, 2, 2, 1, unroll=1),
    ],
    128: [
        BackwardTiles(32, 128, 8, 4, 2, 1, unroll=1),
        BackwardTiles(64, 64, 8, 2, 4, 1, unroll=1),
        BackwardTiles(32, 64, 8, 4, 2, 2, unroll=1),
        BackwardTiles(32, 32, 4, 2, 2, 1, unroll=1),
    ],
    192: [
        BackwardTiles(32, 64, 8, 4, 2, 1, unroll=1),
        BackwardTiles(32, 32, 4, 2, 2, 1, unroll=1),
        BackwardTiles(16, 32, 4, 2, 1, 1, unroll=1),
    ],
    256: [
        BackwardTiles(32, 64, 8, 4, 2, 1, unroll=1),
        BackwardTiles(32, 32, 4, 2, 2, 1, unroll=1),
        BackwardTiles(16, 16, 4, 1, 1, 1, unroll=1),
    ],
}
BACKWARD_TILES: dict[str, dict[int, list[BackwardTiles]]] = {
    "float16": _BACKWARD_16BIT,
    "bfloat16": _BACKWARD_16BIT,
    "tensorfloat32": _BACKWARD_32BIT,
    "float": _BACKWARD_32BIT,
    "double": {
        32: [BackwardTiles(32, 64, 4, 4, 2, 1, 2, unroll=2)],
        64: [
            BackwardTiles(32, 64, 8, 4, 2, 2, unroll=2),
            BackwardTiles(32, 64, 8, 4, 2, 1, unroll=2),
            BackwardTiles(32, 32, 4, 2, 2, 1, unroll=2),
        ],
        96: [
            BackwardTiles(32, 64, 8, 4, 2, 1, unroll=2),
            BackwardTiles(32, 32, 4, 2, 2, 1, unroll=2),
            BackwardTiles(16, 16, 2, 1, 1, 1, unroll=2),
        ],
        128: [
            BackwardTiles(16, 32, 4, 2, 1, 1, unroll=2),
            BackwardTiles(16, 16, 2, 1, 1, 1, unroll=2),
        ],
        192: [
            BackwardTiles(32, 32, 8, 2, 2, 1, unroll=1),
            BackwardTiles(32, 16, 4, 1, 2, 1, unroll=1),
            BackwardTiles(16, 16, 4, 1, 1, 1, unroll=1),
        ],
        256: [
            BackwardTiles(32, 16, 8, 1, 2, 1, unroll=1),
            BackwardTiles(16, 16, 4, 1, 1, 1, unroll=1),
        ],
    },
}
_BACKWARD_DQ_16BIT = {
    64: [BackwardDqTiles(128, 64, 4, 2, 2, unroll=2), BackwardDqTiles(128, 64, 4, 1, 2, unroll=2)],
    96: [BackwardDqTiles(128, 32, 4, 2, 2)],
    128: [BackwardDqTiles(128, 32, 4, 2, 2), BackwardDqTiles(128, 32, 4, 1)],
    192: [BackwardDqTiles(128, 64, 8, 1), BackwardDqTiles(64, 32, 4, 1)],
    256: [BackwardDqTiles(128, 64, 8, 1), BackwardDqTiles(64, 32, 4, 1)],
}
_BACKWARD_DQ_32BIT = {
    64: [BackwardDqTiles(128, 16, 4, 2, 2, unroll=1)],
    96: [BackwardDqTiles(64, 32, 4, 1, 2, unroll=1)],
    128: [
        BackwardDqTiles(64, 32, 4, 1, 2, unroll=1),
        BackwardDqTiles(64, 16, 4, 1, unroll=1),
    ],
    192: [BackwardDqTiles(64, 16, 4, 1, unroll=1), BackwardDqTiles(32, 16, 2, 1, unroll=1)],
    256: [BackwardDqTiles(64, 16, 4, 1, unroll=1), BackwardDqTiles(32, 16, 2, 1, unroll=1)],
}
BACKWARD_DQ_TILES: dict[str, dict[int, list[BackwardDqTiles]]] = {
    "float16": _BACKWARD_DQ_16BIT,
    "bfloat16": _BACKWARD_DQ_16BIT,
    "tensorfloat32": _BACKWARD_DQ_32BIT,
    "float": _BACKWARD_DQ_32BIT,
    "double": {
        64: [BackwardDqTiles(64, 32, 4, 1, 2, unroll=2)],
        96: [BackwardDqTiles(64, 16, 4, 1, unroll=2), BackwardDqTiles(32, 16, 2, 1, unroll=2)],
        128: [BackwardDqTiles(64, 16, 4, 1, unroll=2), BackwardDqTiles(32, 16, 2, 1, unroll=2)],
        192: [BackwardDqTiles(32, 16, 2, 1, unroll=2), BackwardDqTiles(16, 16, 1, 1, unroll=2)],
        256: [BackwardDqTiles(32, 16, 2, 1, unroll=2), BackwardDqTiles(16, 16, 1, 1, unroll=2)],
    },
}
