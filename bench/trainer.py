"""Training without waiting: data and constants of all steps are on the device beforehand.

On a GPU a step is recorded once as a CUDA graph and then replayed: a launch a step instead of
hundreds. Activations come from a memory pool, which hands the blocks of one layer to the next and
of one step to the next, so that after the first step nothing is allocated any more.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from optimizer import AdamW, Schedule
from transformer import Attend, Config, Transformer
from workloads import Batch

EAGER_STEPS = 3  # before a step is recorded: kernels are compiled, the pool has grown


class Trainer:
    """A model, its optimizer, and the data of all its steps.

    Parameters
    ----------
    config, attend, seed
        Of the `Transformer`.
    data
        Of all steps, as `workloads.stacked` returns it.
    schedule
        The learning rate.
    xp
        `numpy` or `cupy`. With CuPy all runs on the current stream, which is to be not the null
        stream, and takes its memory from the current allocator.
    """

    def __init__(
        self,
        config: Config,
        attend: Attend,
        data: Batch,
        schedule: Schedule,
        xp: Any,
        seed: int = 0,
    ) -> None:
        self.xp, self.steps = xp, len(data.tokens)
        self.model = Transformer(config, attend, xp, seed)
        parameters = self.model.parameters
        self.optimizer = AdamW(
            parameters.value, parameters.grad, parameters.matrix_size, parameters.work
        )
        constants = [self.optimizer.constants(i, schedule(i)) for i in range(self.steps)]
        self._tables = [xp.asarray(x) for x in (*data, np.array(constants)) if x is not None]
        # What a step reads and writes is always at the same place, or it could not be recorded.
        self._inputs = [table[0].copy() for table in self._tables]
        *batch, self._constants = self._inputs
        self._batch = Batch(*batch, *([None] if data.rows is None else []))
        self._loss = xp.zeros((), config.dtype)
        self.losses = xp.zeros(self.steps, config.dtype)
        self.graph: Any = None
        self.done = 0

    def step(self) -> None:
        """Do the next step; `losses[i]` is that of step i."""
        for now, table in zip(self._inputs, self._tables, strict=True):
            now[...] = table[self.done]
        if self.graph is None:
            self._compute()
        else:
            self.graph.launch(self.xp.cuda.get_current_stream())
        self.losses[self.done] = self._loss
        self.done += 1

    def record(self) -> None:
        """Record a step as a CUDA graph; it must have run before."""
        stream = self.xp.cuda.get_current_stream()
        stream.begin_capture()
        try:
            self._compute()
        finally:
            graph = stream.end_capture()
        self.graph = graph

    def _compute(self) -> None:
        self._loss[...] = self.model.gradients(*self._batch)
        self.optimizer.apply(self._constants)


@contextmanager
def own_memory(cupy: Any) -> Iterator[Any]:
    """Give what is inside a stream and a memory pool of its own, freed in the end; yields the pool.

    What the pool has taken from the device in the end is the most that was needed at once, with
    what was lost between its blocks.
    """
    pool, stream = cupy.cuda.MemoryPool(), cupy.cuda.Stream(non_blocking=True)
    cupy.get_default_memory_pool().free_all_blocks()
    with cupy.cuda.using_allocator(pool.malloc), stream:
        try:
            yield pool
        finally:
            stream.synchronize()
            gc.collect()
            pool.free_all_blocks()


def losses_of(trainer: Trainer) -> list[float]:
    """Losses of the steps done, on the host."""
    return [float(loss) for loss in trainer.losses[: trainer.done].tolist()]
