"""Arrays as kernels see them: addresses, strides and alignment; batch axes merged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import Array
from ..problem import Problem
from .params import ATTENTION_PARAMS, BAND_LIMIT, BATCH_AXES

_AXES_AFTER_HEAD = {"lse": 1, "dlse": 1, "alibi_slopes": 0}
OF_Q_DTYPE = ("q", "k", "v", "o", "do_", "dq", "dk", "dv")


def axes_after_head(name: str) -> int:
    """Count a tensor's axes after its head axis: rows and columns, rows alone, or none."""
    return _AXES_AFTER_HEAD.get(name, 2)


#: The widest access of a kernel, in bytes.
WIDEST_ACCESS = 16


class Layout(NamedTuple):
    """All of a tensor but its address: planning asks no more of an array. Steps are in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]

    @classmethod
    def contiguous(cls, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Layout:
        """Return that of a new array."""
        strides = [math.prod(shape[axis + 1 :]) * dtype.itemsize for axis in range(len(shape))]
        return cls(shape, tuple(strides), dtype)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Strides:
    """Steps of a tensor from element to element; 0 along axes of extent 1 and broadcast ones."""

    batch: tuple[int, ...]
    head: int
    row: int

    @classmethod
    def of(cls, name: str, x: Array, batch_ndim: int) -> Strides:
        """Read them off an array that may lack batch axes and the head axis."""
        after = axes_after_head(name)
        steps = [s // x.itemsize if n > 1 else 0 for s, n in zip(x.strides, x.shape, strict=True)]
        lead = steps[: x.ndim - after]
        lead = [0] * (batch_ndim + 1 - len(lead)) + lead
        return cls(tuple(lead[:-1]), lead[-1], steps[-after] if after else 0)


def merge_batch_axes(
    extents: tuple[int, ...], strides: Mapping[str, Strides]
) -> tuple[tuple[int, ...], dict[str, Strides]]:
    """Fuse neighbouring batch axes that one stride can walk in every tensor."""
    merged: list[int] = []
    steps: dict[str, list[int]] = {name: [] for name in strides}
    for axis, extent in enumerate(extents):
        if extent == 1:
            continue
        fits = bool(merged) and all(
            steps[name][-1] == s.batch[axis] * extent for name, s in strides.items()
        )
        if fits:
            merged[-1] *= extent
        else:
            merged.append(extent)
        for name, s in strides.items():
            if fits:
                steps[name][-1] = s.batch[axis]
            else:
                steps[name].append(s.batch[axis])
    return tuple(merged), {
        name: Strides(tuple(steps[name]), s.head, s.row) for name, s in strides.items()
    }


def fill_params(problem: Problem, tensors: Mapping[str, Array]) -> NDArray[Any]:
    """Return the parameters of a launch, all but the addresses.

    Raises
    ------
    ValueError
        More batch axes remain than kernels have, and no two of them can be merged.
    """
    strides = {name: Strides.of(name, x, len(problem.batch)) for name, x in tensors.items()}
    batch, strides = merge_batch_axes(problem.batch, strides)
    if len(batch) > BATCH_AXES:
        raise ValueError(
            f"q, k and v: got {len(batch)} batch axes of which no two can be walked by one "
            f"stride, takes up to {BATCH_AXES} such axes on the GPU (copy the arrays to make "
            "them contiguous)"
        )
    params = np.zeros(1, ATTENTION_PARAMS)
    record = params[0]
    first = BATCH_AXES - len(batch)
    record["batch"] = 1
    record["batch"][first:] = batch
    for name, s in strides.items():
        record[name]["batch"][first:] = s.batch
        record[name]["head"] = s.head
        record[name]["row"] = s.row
    for name in ("heads", "group", "seqlen_q", "seqlen_k", "head_dim", "head_dim_v"):
        record[name] = getattr(problem, name)
    record["doubles"] = scalars_of(problem)
    with np.errstate(over="ignore"):  # of a float64 problem, which does not take these
        record["floats"] = scalars_of(problem)
    band = problem.band
    record["band_low"] = -BAND_LIMIT if band.left is None else band.offset - band.left
    record["band_high"] = BAND_LIMIT if band.right is None else band.offset + band.right
    return params


def scalars_of(problem: Problem) -> tuple[float, float, float]:
    """Return the scalars of the score policy, `Scalars` in kernels_cu/params.cuh."""
    log2_e = 1 / math.log(2)
    if problem.softcap is None:
        return problem.scale, problem.scale * log2_e, 0.0
    return problem.scale, problem.scale / problem.softcap, problem.softcap * log2_e


def alignment(names: Iterable[str], addresses: Iterable[int]) -> int:
    """Return the addresses of the tensors of q's dtype, modulo `WIDEST_ACCESS`, combined by or."""
    combined = 0
    for name, address in zip(names, addresses, strict=True):
        if name in OF_Q_DTYPE:
            combined |= address
    return combined % WIDEST_ACCESS


def access_bytes(tensors: Mapping[str, Array], addresses: int) -> int:
    """Return the widest access, in bytes, that divides every row of q, k, v, o and their gradients.

    A row's address and its length both count. ``addresses`` is the bitwise or of these tensors'.
    """
    sizes = [addresses]
    for name in OF_Q_DTYPE:
        if name in tensors:
            x = tensors[name]
            sizes.append(x.shape[-1] * x.itemsize)
            sizes += [s for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1]
    return math.gcd(WIDEST_ACCESS, *sizes)
