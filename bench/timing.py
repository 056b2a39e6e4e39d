"""How long calls take, alternating between the competitors, on the CPU and on the GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Call: TypeAlias = Callable[[], object]

#: Runs a call and returns a function that waits for its end and gives the seconds it took.
Timer: TypeAlias = Callable[[Call], Callable[[], float]]

LEAST_REPEATS = {"numpy": 3, "cupy": 5}
MOST_REPEATS = 30


def cpu_timer(call: Call) -> Callable[[], float]:
    """Time a call by the clock."""
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return lambda: seconds


def gpu_timer(call: Call) -> Callable[[], float]:
    """Time what a call does on CuPy's current stream by events around it.

    Nothing waits: while earlier calls still run, Python is ahead of the GPU, and the events
    enclose the work of the GPU and not the time to launch it.
    """
    import cupy

    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    call()
    end.record()

    def seconds() -> float:
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, end)) * 1e-3

    return seconds


def timer_for(xp: Any) -> Timer:
    """Choose the timer for calls on arrays of `xp`."""
    return gpu_timer if xp.__name__ == "cupy" else cpu_timer


#: Bytes of each of the arrays that `gpu_filler` copies.
FILLER_BYTES = 64 << 20


def gpu_filler(xp: Any) -> Callable[[float], None]:
    """Return a function that gives the GPU work for at least so many seconds, and waits for none.

    What is launched meanwhile follows without gaps, however long launching takes.
    """
    a, b = xp.zeros((2, FILLER_BYTES), xp.uint8)

    def copy() -> None:
        xp.copyto(a, b)

    copy()
    once = gpu_timer(copy)()

    def fill(seconds: float) -> None:
        for _ in range(int(seconds / once)):
            copy()

    return fill


def alternate(calls: Mapping[str, Call], xp: Any, seconds: float) -> dict[str, float]:
    """Time warmed-up calls, one of each a round; return their medians in seconds.

    Rounds give all the same share of whatever happens to the machine meanwhile: its clock follows
    its temperature and its power. The order within a round is random, for a call meets the clock
    that the one before it leaves behind: behind one that draws little power a higher one. A GPU is
    kept busy while a round is launched, so that no time of the CPU counts. `seconds` is what each
    may take in all on average.
    """
    timer = timer_for(xp)
    fill = gpu_filler(xp) if xp.__name__ == "cupy" else None
    order = random.Random(0)
    launching = 0.0  # seconds, in the round before

    def one_round() -> dict[str, Callable[[], float]]:
        nonlocal launching
        if fill:
            fill(2 * launching)
        start = time.perf_counter()
        marks = {name: timer(calls[name]) for name in order.sample(list(calls), len(calls))}
        launching = time.perf_counter() - start
        return marks

    rounds = [one_round()]
    once = sum(wait() for wait in rounds[0].values())
    repeats = min(int(seconds * len(calls) / once), MOST_REPEATS)
    rounds += [one_round() for _ in range(max(repeats, LEAST_REPEATS[xp.__name__]) - 1)]
    return {name: statistics.median(marks[name]() for marks in rounds) for name in calls}
