"""What an engine is, and which one computes a problem."""

from __future__ import annotations

from typing import Protocol

from . import cuda, tiled
from .arrays import Array
from .problem import Problem


class Engine(Protocol):
    """Computes problems that are not empty, on checked arrays, into arrays that it is given."""

    def forward(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        alibi_slopes: Array | None,
        o: Array,
        lse: Array,
    ) -> None:
        """Compute the output O and the log-sum-exp L into o and lse."""

    def backward(
        self,
        problem: Problem,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        dlse: Array | None,
        alibi_slopes: Array | None,
        dq: Array,
        dk: Array,
        dv: Array,
        deterministic: bool,
    ) -> None:
        """Compute the gradients into dq, dk and dv, which have the shapes of q, k and v."""


def engine_for(problem: Problem) -> Engine:
    """Choose by where the problem is computed and what its arrays are."""
    if problem.device == "cpu":
        return tiled
    return cuda.gpu_engine() if problem.kind == "cupy" else cuda.staged_engine()
