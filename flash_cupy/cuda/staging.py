"""NumPy arrays on the GPU: heads travel there and back in chunks, through pinned memory.

A chunk is a few key heads of one batch entry with their query heads. Two lanes, each with a stream,
pinned memory and device memory of its own, take turns: while one computes, the other copies. So
the arrays may be larger than the GPU's memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from ..arrays import Array
from ..problem import Problem
from .engine import CudaEngine, full_gradients
from .tensors import axes_after_head

#: Bytes of all the arrays of a chunk; large enough that a copy runs at the bus's full speed.
CHUNK_BYTES = 64 << 20
LANES = 2


class Lane:
    """One of the chunks in flight: a stream, and buffers that are kept from chunk to chunk."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._pinned: dict[str, Array] = {}
        self._device: dict[str, Array] = {}
        self._unfinished: dict[str, Array] = {}  # results by name: where they go on the host

    def upload(self, name: str, x: Array) -> Array:
        """Start copying an array to the device."""
        pinned, device = self._buffers(name, x)
        pinned[...] = x
        device.set(pinned, stream=self.stream)
        return device

    def result(self, name: str, x: Array) -> Array:
        """Return device memory for a result that `download` will bring to x."""
        self._unfinished[name] = x
        return self._buffers(name, x)[1]

    def download(self) -> None:
        """Start copying the results back to pinned memory."""
        for name, x in self._unfinished.items():
            pinned, device = self._buffers(name, x)
            device.get(stream=self.stream, out=pinned, blocking=False)

    def finish(self) -> None:
        """Wait for all that was started, and put the results in their place."""
        self.stream.synchronize()
        for name, x in self._unfinished.items():
            x[...] = self._buffers(name, x)[0]
        self._unfinished.clear()

    def _buffers(self, name: str, x: Array) -> tuple[Array, Array]:
        import cupy
        import cupyx

        found = self._pinned.get(name)
        if found is None or found.shape != x.shape:
            self._pinned[name] = cupyx.empty_pinned(x.shape, x.dtype)
            self._device[name] = cupy.empty(x.shape, x.dtype)
        return self._pinned[name], self._device[name]


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

        with full_gradients(problem, np.empty, dq, dk, dv) as grads:
            outputs = dict(zip(("dq", "dk", "dv"), grads, strict=True))
            _run_in_chunks(problem, inputs, outputs, compute)


def _run_in_chunks(
    problem: Problem,
    inputs: dict[str, Array | None],
    outputs: dict[str, Array],
    compute: Callable[[Problem, dict[str, Array | None]], None],
) -> None:
    """Upload, compute and download chunk by chunk, LANES chunks in flight."""
    lanes = [Lane() for _ in range(LANES)]
    for number, (part, index) in enumerate(_chunks(problem, inputs, outputs)):
        lane = lanes[number % LANES]
        lane.finish()
        with lane.stream:
            on_device: dict[str, Array | None] = {
                name: None if x is None else lane.upload(name, index(name, x))
                for name, x in inputs.items()
            }
            on_device |= {name: lane.result(name, index(name, x)) for name, x in outputs.items()}
            compute(part, on_device)
            lane.download()
    for lane in lanes:
        lane.finish()


def _chunks(
    problem: Problem, inputs: dict[str, Array | None], outputs: dict[str, Array]
) -> Iterator[tuple[Problem, Callable[[str, Array], Array]]]:
    """Cut a problem along batch and key heads.

    Yields the problem of a chunk and a function that takes the chunk's part of a named array.
    """
    entries = math.prod(problem.batch) * problem.kv_heads
    arrays = [x for x in (*inputs.values(), *outputs.values()) if x is not None]
    head_bytes = sum(x.nbytes for x in arrays) // entries
    step = max(1, min(problem.kv_heads, CHUNK_BYTES // max(head_bytes, 1)))
    for batch in np.ndindex(problem.batch):
        for first in range(0, problem.kv_heads, step):
            kv_heads = min(step, problem.kv_heads - first)

            def part_of(
                name: str,
                x: Array,
                batch: tuple[int, ...] = batch,
                first: int = first,
                kv_heads: int = kv_heads,
            ) -> Array:
                after = axes_after_head(name)
                x = x[None] if x.ndim == after else x  # (N, D) is one head
                group = 1 if name in ("k", "v", "dk", "dv") else problem.group
                lead = x.shape[: x.ndim - after - 1]
                own = batch[len(batch) - len(lead) :]
                place = tuple(i if n > 1 else 0 for i, n in zip(own, lead, strict=True))
                return x[(*place, slice(first * group, (first + kv_heads) * group))]

            yield _part(problem, kv_heads), part_of


@lru_cache(maxsize=256)
def _part(problem: Problem, kv_heads: int) -> Problem:
    """Some of a problem's key heads, without batch axes, as CuPy arrays."""
    heads = kv_heads * problem.group
    return replace(
        problem,
        kind="cupy",
        batch=(),
        heads=heads,
        kv_heads=kv_heads,
        o_shape=(heads, problem.seqlen_q, problem.head_dim_v),
    )
