"""What is special to the CPU engine: its memory, and the tiles that it skips."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from engines import available_engines
from errors import NAMES, dense
from ml_dtypes import finfo
from strategies import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, make_case

import flash_cupy
from flash_cupy import tiled
from flash_cupy.problem import Options, Problem


def peak_bytes(function: Callable[[], object]) -> int:
    function()  # caches and imports
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_memory_grows_with_n_and_not_with_n_squared(dtype: str) -> None:
    """Beyond a tile of S, forward and backward hold a few arrays like q."""

    def peak(seqlen: int) -> int:
        case = make_case((), 2, 1, seqlen, seqlen, 16, 16, np.dtype(dtype), 0, causal=True)

        def run() -> None:
            o, lse = flash_cupy.attention_forward(case.q, case.k, case.v, causal=True, device="cpu")
            flash_cupy.attention_backward(
                case.do, case.q, case.k, case.v, o, lse, causal=True, device="cpu"
            )

        return peak_bytes(run)

    short, middle, long = (peak(n) for n in (512, 1024, 2048))
    rows = 2 * 2048 * 16 * np.dtype("float64" if dtype == "float64" else "float32").itemsize
    assert long - middle < 2.2 * (middle - short) + 100_000
    assert long < 14 * rows + 8 * 8 * tiled.TILE_ELEMENTS
    # The matrix of scores alone would not fit into that.
    assert long < 2 * 2048**2 * np.dtype(dtype).itemsize


@pytest.mark.parametrize(
    "options, share",
    [
        ({}, 1.0),
        ({"causal": True}, 0.5),
        ({"window": (63, 0)}, 0.06),
        ({"window": (None, 0)}, 0.5),
        ({"window": (0, 63)}, 0.06),
    ],
    ids=str,
)
def test_tiles_out_of_sight_are_skipped(
    monkeypatch: pytest.MonkeyPatch, options: dict, share: float
) -> None:
    """Counts the scores that are computed at all, as a share of N^2."""
    monkeypatch.setattr(tiled, "MAX_TILE", 64)
    computed = 0
    scores = tiled._scores

    def counting(problem, rows, cols, *args):
        nonlocal computed
        computed += (rows.stop - rows.start) * (cols.stop - cols.start)
        return scores(problem, rows, cols, *args)

    monkeypatch.setattr(tiled, "_scores", counting)
    case = make_case((), 1, 1, 2048, 2048, 8, 8, FLOAT32, seed=0)
    o, lse = flash_cupy.attention_forward(case.q, case.k, case.v, device="cpu", **options)
    assert share <= computed / 2048**2 <= share * 1.1
    computed = 0
    flash_cupy.attention_backward(case.do, case.q, case.k, case.v, o, lse, device="cpu", **options)
    assert share <= computed / 2048**2 <= share * 1.1


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_16_bit_results_are_rounded_once(monkeypatch: pytest.MonkeyPatch, dtype: np.dtype) -> None:
    """All sums over tiles are in float32, however many tiles there are."""
    monkeypatch.setattr(tiled, "MIN_TILE", 16)
    monkeypatch.setattr(tiled, "MAX_TILE", 16)
    case = make_case((), 1, 1, 800, 800, 16, 16, dtype, seed=0)
    reference = dense(case.astype(FLOAT64), FLOAT64)
    for results in (available_engines()[0].run(case), dense(case)):
        for name, got, expected in zip(NAMES, results, reference, strict=True):
            allowed = 0.6 * float(finfo(dtype).eps) * abs(expected).max()
            assert abs(got.astype(FLOAT64) - expected).max() <= allowed, name


@pytest.mark.parametrize("batch, heads", [((), 1), ((), 8), ((4,), 16), ((100,), 100)])
def test_tiles_share_their_size_among_the_heads(batch: tuple[int, ...], heads: int) -> None:
    x = np.empty((*batch, heads, 1024, 1), np.float32)
    rows = next(tiled._tiles(Problem.of(x, x, x, Options(device="cpu")), range(1024)))
    size = rows.stop - rows.start
    assert tiled.MIN_TILE <= size <= tiled.MAX_TILE
    assert size == tiled.MIN_TILE or math.prod(batch) * heads * size**2 <= tiled.TILE_ELEMENTS
