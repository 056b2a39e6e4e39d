"""The kernels' argument struct as NumPy dtypes: the mirror of kernels_cu/params.cuh.

A size-1 array of `ATTENTION_PARAMS` is what a kernel takes; CuPy passes it by value.
"""

from __future__ import annotations

import numpy as np

BATCH_AXES = 4

#: Bounds of the band are clamped to this, further than any sequence is long.
BAND_LIMIT = 2**30

TENSOR = np.dtype(
    [
        ("data", np.uint64),
        ("batch", np.int64, (BATCH_AXES,)),
        ("head", np.int64),
        ("row", np.int64),
    ],
    align=True,
)

ATTENTION_PARAMS = np.dtype(
    [
        ("q", TENSOR),
        ("k", TENSOR),
        ("v", TENSOR),
        ("o", TENSOR),
        ("lse", TENSOR),
        ("alibi_slopes", TENSOR),
        ("do_", TENSOR),
        ("dlse", TENSOR),
        ("row_dots", TENSOR),
        ("dq", TENSOR),
        ("dk", TENSOR),
        ("dv", TENSOR),
        ("dq_sum", TENSOR),
        ("batch", np.int32, (BATCH_AXES,)),
        ("heads", np.int32),
        ("group", np.int32),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("head_dim", np.int32),
        ("head_dim_v", np.int32),
        ("band_low", np.int32),
        ("band_high", np.int32),
        ("scale", np.float64),
        ("softcap", np.float64),
    ],
    align=True,
)


def band(
    seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int | None, int | None] | None
) -> tuple[int, int]:
    """Bounds (low, high) of the band i + low <= j <= i + high of keys j that query i sees.

    Both are clamped to +-BAND_LIMIT; a side without a limit is at the clamp.
    """
    shift = seqlen_k - seqlen_q
    left, right = window if window is not None else (None, None)
    if causal:
        right = 0 if right is None else min(right, 0)
    low = -BAND_LIMIT if left is None else shift - left
    high = BAND_LIMIT if right is None else shift + right
    return max(low, -BAND_LIMIT), min(high, BAND_LIMIT)
