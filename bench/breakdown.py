"""Where the time of a training step goes: the device's time in each operation of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import cupy
import gemm
from trainer import Trainer
from transformer import bfloat16

_HEAD_START = 30  # products that keep the device busy for about 60 ms
_HEAD_START_SIZE = 8192


class Stopwatch:
    """Events around calls; nothing waits until `milliseconds` is asked for."""

    def __init__(self) -> None:
        self._events: list[tuple[str, Any, Any]] = []

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with events before and after what it launches."""

        def timed(*arguments: Any, **options: Any) -> Any:
            start, end = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            result = function(*arguments, **options)
            end.record()
            self._events.append((name, start, end))
            return result

        return timed

    def milliseconds(self) -> dict[str, float]:
        """Return the sums by name, the longest first."""
        total: dict[str, float] = defaultdict(float)
        for name, start, end in self._events:
            end.synchronize()
            total[name] += cupy.cuda.get_elapsed_time(start, end)
        return dict(sorted(total.items(), key=lambda item: -item[1]))


class _TimedOperations:
    """The module `ops_cupy`, each function with events around it."""

    def __init__(self, ops: Any, watch: Stopwatch) -> None:
        self._ops, self._watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        return found if name == "empty_like" else self._watch.around(name, found)


def breakdown(trainer: Trainer) -> dict[str, float]:
    """Do the trainer's next step kernel by kernel; returns milliseconds by operation.

    The device is kept busy beforehand, so that Python is ahead of it all the time and no event
    waits for a launch.
    """
    watch, model, optimizer = Stopwatch(), trainer.model, trainer.optimizer
    attend = model.attend

    def timed_attend(*arguments: Any, **options: Any) -> Any:
        forward = watch.around("attention", attend)
        o, backprop = forward(*arguments, **options)
        return o, watch.around("attention_backward", backprop)

    kept = model.ops, model.attend, optimizer.adamw, trainer.graph
    shape = (_HEAD_START_SIZE, _HEAD_START_SIZE)
    a, out = cupy.zeros(shape, bfloat16()), cupy.empty(shape, bfloat16())
    model.ops, model.attend = _TimedOperations(model.ops, watch), timed_attend
    optimizer.adamw, trainer.graph = watch.around("adamw", optimizer.adamw), None
    try:
        for _ in range(_HEAD_START):
            gemm.matmul(a, a, out)
        trainer.step()
        return watch.milliseconds()
    finally:
        model.ops, model.attend, optimizer.adamw, trainer.graph = kept
