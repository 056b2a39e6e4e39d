"""How far results are from the truth: dense attention in float64, of one key head, row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from cells import Cell
from peers import Inputs
from transformer import Array

import flash_cupy

#: Rows of S that the reference holds at a time.
BLOCK_ROWS = 256

#: Longest sequence of which all rows are checked; of longer ones the last BLOCK_ROWS.
WHOLE_SEQLEN = 16384


def reference(x: Inputs, cell: Cell, xp: Any) -> dict[str, Array]:
    """Compute, in float64, the results of the last key head and of the query heads that share it.

    Returns
    -------
    dict
        o, dq, dk and dv as far as the pass returns them, (heads, rows, features) each: all rows, or
        the last ones of a long sequence, to which dk and dv do not restrict and so are left out.
    """
    group = x.q.shape[1] // x.k.shape[1]
    q, do = (array[-1, -group:].astype(np.float64) for array in (x.q, x.do))
    k, v = (array[-1, -1:].astype(np.float64) for array in (x.k, x.v))
    like = {"o": do, "dq": q, "dk": k, "dv": v}
    n = cell.seqlen
    whole = n <= WHOLE_SEQLEN
    names = [name for name in cell.results if whole or name in ("o", "dq")]
    start = 0 if whole else n - BLOCK_ROWS
    results = {name: xp.zeros_like(like[name][:, start:]) for name in names}
    options = {**cell.visible, **({"device": "cpu"} if xp is np else {})}
    for first in range(start, n, BLOCK_ROWS):
        rows = slice(first, min(first + BLOCK_ROWS, n))
        seen = slice(0, rows.stop if cell.causal else n)  # so the block ends on the diagonal
        here = slice(rows.start - start, rows.stop - start)
        if "o" in results:
            results["o"][:, here] = flash_cupy.dense_attention(
                q[:, rows], k[:, seen], v[:, seen], **options
            )
        if "dq" in results:
            dq, dk, dv = flash_cupy.dense_attention_backward(
                do[:, rows], q[:, rows], k[:, seen], v[:, seen], **options
            )
            results["dq"][:, here] = dq
            if whole:
                results["dk"][:, seen] += dk
                results["dv"][:, seen] += dv
    return results


def root_mean_square(x: Array) -> float:
    """Root of the mean of the squares."""
    return math.sqrt(float((x * x).mean()))


def errors(results: dict[str, Array], expected: dict[str, Array]) -> dict[str, dict[str, float]]:
    """Compare results of a cell, (batch, heads, seqlen, features) each, with its `reference`."""
    compared = {}
    for name, truth in expected.items():
        heads, rows, _ = truth.shape
        difference = results[name][-1, -heads:, -rows:].astype(np.float64) - truth
        largest = float(abs(difference).max())
        compared[name] = {"rms": root_mean_square(difference), "max": largest}
    return compared
