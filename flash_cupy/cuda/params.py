"""The kernels' argument struct as NumPy dtypes: the mirror of kernels_cu/params.cuh.

A size-1 array of `ATTENTION_PARAMS` is what a kernel takes by value.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BATCH_AXES = 4

#: A side of the band without a limit, further than any sequence is long.
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


def _scalars(real: type[np.floating[Any]]) -> np.dtype[Any]:
    return np.dtype([(name, real) for name in ("scale", "to_log2", "softcap")], align=True)


ATTENTION_PARAMS = np.dtype(
    [
        ("q", TENSOR),
        ("k", TENSOR),
        ("v", TENSOR),
        ("o", TENSOR),
        ("lse", TENSOR),
        ("alibi_slopes", TENSOR),
        ("tickets", TENSOR),
        ("do_", TENSOR),
        ("dlse", TENSOR),
        ("row_dots", TENSOR),
        ("dq", TENSOR),
        ("dk", TENSOR),
        ("dv", TENSOR),
        ("dq_sum", TENSOR),
        ("dq_turns", TENSOR),
        ("dq_counts", TENSOR),
        ("batch", np.int32, (BATCH_AXES,)),
        ("heads", np.int32),
        ("group", np.int32),
        ("seqlen_q", np.int32),
        ("seqlen_k", np.int32),
        ("head_dim", np.int32),
        ("head_dim_v", np.int32),
        ("band_low", np.int32),
        ("band_high", np.int32),
        ("dq_heads", np.int32),
        ("section", np.int32),
        ("dq_lag", np.int32),
        ("dq_pieces", np.int32),
        ("doubles", _scalars(np.float64)),
        ("floats", _scalars(np.float32)),
    ],
    align=True,
)
