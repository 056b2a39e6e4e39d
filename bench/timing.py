"""How long calls take, alternating between the competitors, on the CPU and on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
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


#: Notes the clock of multiprocessor 0; of two blocks for each at least one runs there.
_NOTE_CLOCK = r"""
extern "C" __global__ void note_clock(long long* clock) {
    unsigned multiprocessor;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(multiprocessor));
    if (multiprocessor == 0 && threadIdx.x == 0) *clock = clock64();
}
"""


def clock_timer(xp: Any) -> Timer:
    """Return a timer of calls on a GPU that counts clocks: in units of 10^9, so about a second."""
    kernel = xp.RawKernel(_NOTE_CLOCK, "note_clock")
    blocks = 2 * xp.cuda.Device().attributes["MultiProcessorCount"]

    def timer(call: Call) -> Callable[[], float]:
        start, end = xp.zeros((2, 1), xp.int64)
        kernel((blocks,), (32,), (start,))
        call()
        kernel((blocks,), (32,), (end,))
        return lambda: float(end[0] - start[0]) * 1e-9

    return timer


def timer_for(xp: Any) -> Timer:
    """Choose the timer for calls on arrays of `xp`."""
    return gpu_timer if xp.__name__ == "cupy" else cpu_timer


#: Bytes of each of the arrays that `gpu_filler` copies, and the most seconds of copies: more would
#: fill the queue of launches.
FILLER_BYTES = 64 << 20
MOST_FILLING = 0.02

#: Seconds that launching a round may take, before one has been launched.
FIRST_LAUNCHING = 0.002


def gpu_filler(xp: Any) -> Callable[[float], None]:
    """Return a function that gives the GPU work for so many seconds or a little more.

    What is launched meanwhile follows without gaps, however long launching takes.
    """
    a, b = xp.zeros((2, FILLER_BYTES), xp.uint8)

    def copy() -> None:
        xp.copyto(a, b)

    copy()
    once = gpu_timer(copy)()

    def fill(seconds: float) -> None:
        for _ in range(int(min(seconds, MOST_FILLING) / once) + 1):
            copy()

    return fill


def each_after_each(names: Sequence[str]) -> list[str]:
    """Return an order, to be repeated, in which each comes directly behind each other one, once.

    It is an Eulerian circuit of all ordered pairs, found by Hierholzer's algorithm.
    """
    followers = {name: [other for other in names if other != name] for name in names}
    path, order = [names[0]], []
    while path:
        if followers[path[-1]]:
            path.append(followers[path[-1]].pop())
        else:
            order.append(path.pop())
    return order[1:] or order  # it ends where it began


def alternate(
    calls: Mapping[str, Call], xp: Any, seconds: float, timer: Timer | None = None
) -> dict[str, float]:
    """Time warmed-up calls in turn; return their medians in seconds, or what `timer` gives.

    Turns give all the same share of whatever happens to the machine meanwhile: its clock follows
    its temperature and its power. A call meets the clock that the one before it leaves behind,
    behind one that draws little power a higher one: so in a round each follows each other once, but
    for the first call. A GPU is kept busy while a round is launched, so that no time of the CPU
    counts. `seconds` is what each may take in all on average.
    """
    timer = timer or timer_for(xp)
    fill = gpu_filler(xp) if xp.__name__ == "cupy" else None
    order = each_after_each(list(calls))
    turns = len(order) // len(calls)  # of each in a round
    marks: dict[str, list[Callable[[], float]]] = {name: [] for name in calls}

    def launch_round(number: int, launching: float) -> float:
        """Start a round at another turn each time; return the seconds that launching it took."""
        if fill:
            fill(2 * launching)
        first = number % len(order)
        start = time.perf_counter()
        for name in order[first:] + order[:first]:
            marks[name].append(timer(calls[name]))
        return time.perf_counter() - start

    launching = launch_round(0, FIRST_LAUNCHING)
    once = sum(wait() for waits in marks.values() for wait in waits)
    repeats = min(int(seconds * len(order) / once), MOST_REPEATS)
    rounds = -(-max(repeats, LEAST_REPEATS[xp.__name__]) // turns)
    for number in range(1, rounds):
        launching = launch_round(number, launching)
    return {name: statistics.median(wait() for wait in waits) for name, waits in marks.items()}
