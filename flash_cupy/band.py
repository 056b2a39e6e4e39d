"""Which keys a query sees: one band around the diagonal, and how tiles lie in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Band:
    """Query i sees key j where ``i + offset - left <= j <= i + offset + right``.

    ``offset = seqlen_k - seqlen_q`` puts the diagonal at the bottom right. ``left`` and ``right``
    count keys, inclusive; None is unlimited. Causal attention is ``right = 0``.
    Ranges of rows (queries) and columns (keys) are half-open and not empty.
    """

    seqlen_q: int
    seqlen_k: int
    left: int | None
    right: int | None

    @classmethod
    def of(
        cls, seqlen_q: int, seqlen_k: int, causal: bool, window: tuple[int | None, int | None]
    ) -> Band:
        """Combine causal and window; a side that hides no key at all becomes None."""
        left, right = window
        if causal:
            right = 0 if right is None else min(right, 0)
        if left is not None and left >= seqlen_k - 1:
            left = None
        if right is not None and right >= seqlen_q - 1:
            right = None
        return cls(seqlen_q, seqlen_k, left, right)

    @property
    def offset(self) -> int:
        """Column of the diagonal in row 0."""
        return self.seqlen_k - self.seqlen_q

    def keys(self, rows: range) -> range:
        """Return the columns that at least one of the rows sees; all others can be skipped."""
        start, stop = 0, self.seqlen_k
        if self.left is not None:
            start = max(start, rows[0] + self.offset - self.left)
        if self.right is not None:
            stop = min(stop, rows[-1] + self.offset + self.right + 1)
        return range(start, max(start, stop))

    def queries(self, cols: range) -> range:
        """Return the rows that see at least one of the columns."""
        start, stop = 0, self.seqlen_q
        if self.right is not None:
            start = max(start, cols[0] - self.offset - self.right)
        if self.left is not None:
            stop = min(stop, cols[-1] - self.offset + self.left + 1)
        return range(start, max(start, stop))

    def covers(self, rows: range, cols: range) -> bool:
        """Whether every one of the rows sees every one of the columns."""
        return (self.left is None or cols[0] >= rows[-1] + self.offset - self.left) and (
            self.right is None or cols[-1] <= rows[0] + self.offset + self.right
        )

    def visible(self, distance: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Mask of the pairs in sight, from ``distance = i + offset - j``."""
        mask = np.ones(distance.shape, bool)
        if self.left is not None:
            mask &= distance <= self.left
        if self.right is not None:
            mask &= distance >= -self.right
        return mask
