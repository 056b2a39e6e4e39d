"""NumPy arrays on the GPU: heads travel there and back in chunks, through pinned memory.

A chunk is a box of batch entries and key heads, with their query heads, of about CHUNK_BYTES. Two
lanes, each with a stream, pinned memory and device memory of its own, take turns: while one
computes, the other copies. So the arrays may be larger than the GPU's memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..arrays import Array
from ..problem import Problem
from .engine import CudaEngine, bring, full_shape
from .params import BATCH_AXES
from .tensors import axes_after_head

#: Bytes of all the arrays of a chunk; large enough that a copy runs at the bus's full speed.
CHUNK_BYTES = 64 << 20
LANES = 2


class Lane:
    """One of the chunks in flight: a stream, and buffers that are kept from chunk to chunk."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._buffers: dict[str, tuple[Array, Array]] = {}  # pinned and device memory by name
        self._unfinished: dict[str, Array] = {}  # results by name: where they go on the host

    def upload(self, name: str, x: Array) -> Array:
        """Start copying an array to the device."""
        pinned, device = self._memory(name, x)
        pinned[...] = x
        device.set(pinned, stream=self.stream)
        return device

    def result(self, name: str, x: Array) -> Array:
        """Return device memory for a result that `download` will bring to x."""
        self._unfinished[name] = x
        return self._memory(name, x)[1]

    def download(self) -> None:
        """Start copying the results back to pinned memory."""
        for name, x in self._unfinished.items():
            pinned, device = self._memory(name, x)
            device.get(stream=self.stream, out=pinned, blocking=False)

    def finish(self) -> None:
        """Wait for all that was started, and put the results in their place."""
        self.stream.synchronize()
        for name, x in self._unfinished.items():
            x[...] = self._memory(name, x)[0]
        self._unfinished.clear()

    def _memory(self, name: str, x: Array) -> tuple[Array, Array]:
        """Return pinned and device memory like x; chunks may differ in size."""
        import cupy
        import cupyx

        if name not in self._buffers or self._buffers[name][0].size < x.size:
            self._buffers[name] = cupyx.empty_pinned(x.size, x.dtype), cupy.empty(x.size, x.dtype)
        pinned, device = self._buffers[name]
        return pinned[: x.size].reshape(x.shape), device[: x.size].reshape(x.shape)


class StagedEngine:
    """The CUDA engine for NumPy arrays."""

    def __init__(self, engine: CudaEngine) -> None:
        self.engine = engine

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
        inputs = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}

        def compute(part: Problem, x: dict[str, Array | None]) -> None:
            self.engine.forward(part, x["q"], x["k"], x["v"], x["alibi_slopes"], x["o"], x["lse"])

        _run_in_chunks(problem, inputs, {"o": o, "lse": lse}, compute)

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
        inputs = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "dlse": dlse}
        inputs["alibi_slopes"] = alibi_slopes

        def compute(part: Problem, x: dict[str, Array | None]) -> None:
            self.engine.backward(
                part,
                x["do"],
                x["q"],
                x["k"],
                x["v"],
                x["o"],
                x["lse"],
                x["dlse"],
                x["alibi_slopes"],
                x["dq"],
                x["dk"],
                x["dv"],
                deterministic,
            )

        gradients = {"dq": dq, "dk": dk, "dv": dv}
        full = {
            name: x if (shape := full_shape(problem, x)) == x.shape else np.empty(shape, x.dtype)
            for name, x in gradients.items()
        }
        _run_in_chunks(problem, inputs, full, compute)
        for name, x in gradients.items():
            if full[name] is not x:
                bring(problem, full[name], x)


def _run_in_chunks(
    problem: Problem,
    inputs: dict[str, Array | None],
    outputs: dict[str, Array],
    compute: Callable[[Problem, dict[str, Array | None]], None],
) -> None:
    """Upload, compute and download chunk by chunk, LANES chunks in flight."""
    given = {name: x for name, x in inputs.items() if x is not None}
    lanes = [Lane() for _ in range(LANES)]
    try:
        for number, chunk in enumerate(chunks(problem, given, outputs)):
            lane = lanes[number % LANES]
            lane.finish()
            with lane.stream:
                on_device = dict.fromkeys(inputs) | {
                    name: lane.upload(name, chunk.part_of(name, x)) for name, x in given.items()
                }
                on_device |= {
                    name: lane.result(name, chunk.part_of(name, x)) for name, x in outputs.items()
                }
                compute(chunk.problem, on_device)
                lane.download()
        for lane in lanes:
            lane.finish()
    finally:  # after an error, too: copies in flight use memory that is about to be given back
        for lane in lanes:
            lane.stream.synchronize()


# ------------------------------------------------------------------------------------------ chunks


@dataclass(frozen=True)
class Chunk:
    """Some batch entries and key heads of a problem.

    ``problem`` is that of the chunk, of which ``box`` is the place in the whole: a slice of each
    batch axis and one of the key heads.
    """

    problem: Problem
    box: tuple[slice, ...]

    def part_of(self, name: str, x: Array) -> Array:
        """View the part of a whole array, by its name; axes along which it repeats stay 1 long."""
        after = axes_after_head(name)
        x = x[None] if x.ndim == after else x  # (N, D) is one head
        *batch, heads = self.box
        group = 1 if name in KEY_SIDE else self.problem.group
        own = batch[len(batch) - (x.ndim - after - 1) :]
        place = (slice(None) if n == 1 else part for n, part in zip(x.shape, own, strict=False))
        return x[(*place, slice(heads.start * group, heads.stop * group))]


#: Arrays that have key heads, while all others have query heads.
KEY_SIDE = ("k", "v", "dk", "dv")


def chunks(
    problem: Problem, inputs: Mapping[str, Array], outputs: Mapping[str, Array]
) -> Iterator[Chunk]:
    """Cut a problem into chunks that cover its batch entries and key heads once each."""
    arrays = {**inputs, **outputs}
    lengths = box_lengths(
        (*problem.batch, problem.kv_heads),
        [Extent.of(name, x, problem) for name, x in arrays.items()],
        CHUNK_BYTES,
    )
    axes = zip((*problem.batch, problem.kv_heads), lengths, strict=True)
    for box in itertools.product(*(_cut(extent, length) for extent, length in axes)):
        yield Chunk(_part(problem, tuple(part.stop - part.start for part in box)), box)


def _cut(extent: int, length: int) -> list[slice]:
    """Cut an axis into parts of nearly equal length, the first the longest; `length` at most."""
    count = -(-extent // length)
    edges = [-(-extent * i // count) for i in range(count + 1)]
    return [slice(*edge) for edge in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Extent:
    """Bytes of an array as a chunk grows: those of one entry, and the axes that it repeats along.

    ``own`` tells for each batch axis and the key heads whether the array has entries of its own
    along it; where not, all of a chunk share one.
    """

    entry_bytes: int
    own: tuple[bool, ...]

    @classmethod
    def of(cls, name: str, x: Array, problem: Problem) -> Extent:
        """Read it off a whole array, which may lack batch axes and the head axis."""
        lead = x.shape[: max(x.ndim - axes_after_head(name) - 1, 0)]
        missing = len(problem.batch) - len(lead)
        own = (*[False] * missing, *(n > 1 for n in lead), True)
        return cls(x.nbytes // (math.prod(lead) * problem.kv_heads), own)

    def nbytes(self, lengths: Sequence[int]) -> int:
        """Bytes of the array's part in a box of these lengths."""
        return self.entry_bytes * math.prod(itertools.compress(lengths, self.own))


def box_lengths(extents: tuple[int, ...], arrays: Sequence[Extent], budget: int) -> tuple[int, ...]:
    """Choose how many entries of each batch axis and how many key heads a chunk has.

    It grows from a single head, first along the axes along which most bytes repeat, for what
    repeats is then uploaded less often, then from the last axis to the first, in the order of
    memory. Along each it grows as far as the budget of bytes allows, or until what grows is as
    much as what repeats. Kernels have BATCH_AXES batch axes: no more of them are longer than 1.
    """

    def repeated_bytes(axis: int) -> int:
        return sum(x.entry_bytes for x in arrays if not x.own[axis])

    lengths = [1] * len(extents)
    heads = len(extents) - 1
    for axis in sorted(reversed(range(len(extents))), key=repeated_bytes, reverse=True):
        full = axis != heads and sum(n > 1 for n in lengths[:heads]) == BATCH_AXES
        if full or extents[axis] == 1:
            continue
        growing = sum(x.nbytes(lengths) for x in arrays if x.own[axis])
        repeating = sum(x.nbytes(lengths) for x in arrays if not x.own[axis])
        fitting = (max(budget, 2 * repeating) - repeating) // growing
        lengths[axis] = max(1, min(extents[axis], fitting))
    return tuple(lengths)


@lru_cache(maxsize=256)
def _part(problem: Problem, lengths: tuple[int, ...]) -> Problem:
    """Return the problem of a chunk, on CuPy arrays."""
    *batch, kv_heads = lengths
    heads = kv_heads * problem.group
    return replace(
        problem,
        kind="cupy",
        batch=tuple(batch),
        heads=heads,
        kv_heads=kv_heads,
        o_shape=(*batch, heads, problem.seqlen_q, problem.head_dim_v),
    )
