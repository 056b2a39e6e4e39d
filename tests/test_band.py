"""The band of visible keys, against the definition written out pair by pair."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import windows

from flash_cupy.band import Band

lengths = st.integers(1, 40)


def definition(seqlen_q: int, seqlen_k: int, causal: bool, window) -> np.ndarray:
    """Whether query i sees key j, as the documentation of `attention` says it."""
    mask = np.ones((seqlen_q, seqlen_k), bool)
    for i in range(seqlen_q):
        for j in range(seqlen_k):
            diagonal = i + seqlen_k - seqlen_q
            if causal and not j <= diagonal:
                mask[i, j] = False
            if window is not None:
                left, right = window
                if left is not None and not diagonal - left <= j:
                    mask[i, j] = False
                if right is not None and not j <= diagonal + right:
                    mask[i, j] = False
    return mask


@given(lengths, lengths, st.booleans(), windows(), st.data())
def test_band_equals_definition(seqlen_q, seqlen_k, causal, window, data) -> None:
    mask = definition(seqlen_q, seqlen_k, causal, window)
    band = Band.of(seqlen_q, seqlen_k, causal, window or (None, None))
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
    np.testing.assert_array_equal(band.visible(i + band.offset - j), mask)

    def tile(n: int) -> range:
        start = data.draw(st.integers(0, n - 1))
        return range(start, data.draw(st.integers(start + 1, n)))

    rows, cols = tile(seqlen_q), tile(seqlen_k)
    seen = np.flatnonzero(mask[rows.start : rows.stop].any(axis=0))
    assert list(band.keys(rows)) == list(seen)
    seeing = np.flatnonzero(mask[:, cols.start : cols.stop].any(axis=1))
    assert list(band.queries(cols)) == list(seeing)
    assert band.covers(rows, cols) == mask[rows.start : rows.stop, cols.start : cols.stop].all()


@pytest.mark.parametrize("causal", [False, True])
def test_every_window_of_short_sequences(causal: bool) -> None:
    """So that no window just short of a whole sequence is missed."""
    sides = (None, *range(6))
    for seqlen_q, seqlen_k, *window in itertools.product(range(1, 5), range(1, 5), sides, sides):
        band = Band.of(seqlen_q, seqlen_k, causal, tuple(window))
        i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_k)
        mask = definition(seqlen_q, seqlen_k, causal, window)
        np.testing.assert_array_equal(band.visible(i + band.offset - j), mask)


@given(lengths, lengths, st.booleans(), windows())
def test_a_side_that_hides_nothing_is_dropped(seqlen_q, seqlen_k, causal, window) -> None:
    """So that, say, causal decoding of one token runs without a mask."""
    band = Band.of(seqlen_q, seqlen_k, causal, window or (None, None))
    if definition(seqlen_q, seqlen_k, causal, window).all():
        assert (band.left, band.right) == (None, None)
