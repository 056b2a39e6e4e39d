"""What flash_cupy costs beside its kernels' work: compiling them, loading them, calling them.

**First calls.** A fresh process with an empty cache on disk compiles every kernel; another one
loads them from the cache that the first has left. Both make the calls of `FIRST_CALLS` in turn.

**Calls.** The CPU time of a call is that of a loop of calls of a small problem, whose kernels take
less time than their launches, so that the GPU never keeps Python waiting. Beside it stand the same
loop of bare launches: of the same kernels with the same parameters, by CuPy (`cupy.RawKernel`), and
as flash_cupy launches them (`flash_cupy.cuda.driver`).

``python bench/attention.py --preset overheads`` measures both. Run by itself this file makes the
first calls in its own process, on arrays of the module that it is given, and prints as JSON what
they took.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from cells import DTYPES
from report import align
from timing import Call

import flash_cupy
from flash_cupy.cuda import launch as launching
from flash_cupy.cuda.driver import PreparedLaunch
from flash_cupy.cuda.launch import Gpu, Work

Row: TypeAlias = dict[str, Any]

#: Dtype (a key of DTYPES), head dim and causal mask of the first calls. No two forward passes
#: share a kernel.
FIRST_CALLS = (
    ("bfloat16", 64, False),
    ("bfloat16", 128, True),
    ("bfloat16", 256, True),
    ("float16", 128, True),
    ("float32", 128, True),
    ("tf32", 128, True),
    ("float64", 128, True),
)

#: Rows of the problems: little work, yet more than one tile.
SEQLEN = 256

CALLS = 200  # of a loop: no more launches than a GPU takes in advance
LOOPS = 25


def passes(dtype: str, head_dim: int, causal: bool, xp: Any) -> Iterator[tuple[str, Call]]:
    """Yield the passes of a problem by name; each needs those before it."""
    q, k, v, do = (xp.ones((1, SEQLEN, head_dim), np.dtype(DTYPES[dtype])) for _ in range(4))
    options: dict[str, Any] = {"causal": causal, "device": "cpu" if xp is np else "gpu"}
    if dtype == "tf32":
        options["precision"] = "tf32"
    o, lse = (
        xp.empty_like(q),
        xp.empty(q.shape[:-1], "float64" if dtype == "float64" else "float32"),
    )
    yield "forward", partial(flash_cupy.attention_forward, q, k, v, out=(o, lse), **options)
    backward = partial(flash_cupy.attention_backward, do, q, k, v, o, lse, **options)
    yield "backward", backward
    yield "deterministic", partial(backward, deterministic=True)


def waiter(xp: Any) -> Callable[[], None]:
    """Return what waits until the device has done all that it was given."""
    return (lambda: None) if xp is np else xp.cuda.Device().synchronize


# ------------------------------------------------------------------------------------- first calls


def first_calls(xp: Any) -> list[Row]:
    """Make the first calls in this process; return the seconds that each, and each kernel, took."""
    wait = waiter(xp)
    rows = []
    for dtype, head_dim, causal in FIRST_CALLS:
        for name, call in passes(dtype, head_dim, causal, xp):
            wait()
            with timed_loads() as kernels:
                start = time.perf_counter()
                call()
                wait()
                seconds = time.perf_counter() - start
            row = {"dtype": dtype, "head_dim": head_dim, "causal": causal, "pass": name}
            rows.append({**row, "seconds": seconds, "kernels": kernels})
    return rows


@contextmanager
def timed_loads() -> Iterator[dict[str, float]]:
    """Yield a dict that gets the seconds of every kernel that is compiled or loaded meanwhile."""
    seconds: dict[str, float] = {}
    load = Gpu.load

    def timed(gpu: Gpu, kernel: str, plan: Any) -> Any:
        start = time.perf_counter()
        loaded = load(gpu, kernel, plan)
        seconds[kernel] = time.perf_counter() - start
        return loaded

    with replaced(Gpu, "load", timed):
        yield seconds


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def first_calls_elsewhere(cache: Path, xp: Any) -> list[Row]:
    """Make the first calls in a process of their own that has its cache on disk here."""
    package = Path(flash_cupy.__file__).parent.parent
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, __file__, xp.__name__],
        env={**os.environ, "CUPY_CACHE_DIR": str(cache), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[Row] = json.loads(done.stdout)
    return rows


def compiled_and_cached(xp: Any) -> list[Row]:
    """Return the first calls with their seconds from nothing and from the cache on disk."""
    with tempfile.TemporaryDirectory() as cache:
        compiling, loading = (first_calls_elsewhere(Path(cache), xp) for _ in range(2))
    return [
        {
            **{key: row[key] for key in ("dtype", "head_dim", "causal", "pass")},
            "compiled": {key: row[key] for key in ("seconds", "kernels")},
            "cached": {key: again[key] for key in ("seconds", "kernels")},
        }
        for row, again in zip(compiling, loading, strict=True)
    ]


# ------------------------------------------------------------------------------------------- calls


def call_overheads(xp: Any) -> list[Row]:
    """Return the microseconds of a call, and of the bare launches of its kernels, by pass."""
    rows = []
    for name, call in passes("bfloat16", 128, True, xp):
        by_cupy, prepared = launches_of(call)
        loops = {"call": call, "launches": one_by_one(by_cupy), "prepared": one_by_one(prepared)}
        times = microseconds(loops, waiter(xp))
        over = times["call"] - times["launches"]
        rows.append({"pass": name, "kernels": len(prepared), **times, "over": over})
    return rows


def one_by_one(launches: Sequence[Call]) -> Call:
    """Return all launches as one call."""

    def launch_all() -> None:
        for launch in launches:
            launch()

    return launch_all


def launches_of(call: Call) -> tuple[list[Call], list[Call]]:
    """Return the launches of a call, to be repeated without all that is around them.

    By CuPy, and as the call makes them.
    """
    by_cupy: list[Call] = []
    launches: list[Call] = []
    prepare = launching.prepare

    def noting(work: Work, stream: int, *addresses: int) -> tuple[PreparedLaunch, ...]:
        prepared = prepare(work, stream, *addresses)
        for launch, ready in zip(work.launches, prepared, strict=True):
            # As plain bytes: CuPy would spell out a structured dtype in every launch.
            args = tuple(x.view((np.void, x.nbytes)) for x in ready.arguments)
            plan = launch.plan
            geometry = (launch.blocks,), (plan.threads,), args
            by_cupy.append(partial(launch.kernel, *geometry, shared_mem=plan.shared_bytes))
            launches.append(ready)
        return prepared

    with replaced(launching, "prepare", noting):
        call()
    return by_cupy, launches


def microseconds(calls: dict[str, Call], wait: Callable[[], None]) -> dict[str, float]:
    """Return what a call takes the CPU: the median over loops, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(LOOPS):
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times[name].append((time.perf_counter() - start) / CALLS * 1e6)
    return {name: statistics.median(taken) for name, taken in times.items()}


# ------------------------------------------------------------------------------------------ output


def measure_overheads(xp: Any) -> Iterator[dict[str, list[Row]]]:
    """Measure all of it; yield what is known so far, at the end everything."""
    figures = {"calls": call_overheads(xp)}
    yield figures
    yield {**figures, "first_calls": compiled_and_cached(xp)}


def overheads_table(figures: dict[str, list[Row]]) -> str:
    """Lay it out: seconds of first calls with their slowest kernel, microseconds of all others."""
    first = [
        ["dtype", "D", "mask", "pass", "compiled, s", "slowest kernel", "cached, s", "slowest"]
    ]
    for row in figures["first_calls"]:
        mask = "causal" if row["causal"] else "full"
        line = [row["dtype"], str(row["head_dim"]), mask, row["pass"]]
        for times in (row["compiled"], row["cached"]):
            slowest = max(times["kernels"].values(), default=0)
            line += [f"{times['seconds']:.3f}", f"{slowest:.3f}"]
        first.append(line)
    calls = [["pass", "kernels", "call, µs", "bare by CuPy, µs", "over, µs", "as launched, µs"]]
    for row in figures["calls"]:
        taken = (f"{row[key]:.1f}" for key in ("call", "launches", "over", "prepared"))
        calls.append([row["pass"], str(row["kernels"]), *taken])
    return (
        f"First calls, in processes of their own\n{align(first)}\n\n"
        f"CPU time of later calls\n{align(calls)}"
    )


def main(module: str) -> None:
    """Make the first calls in this process and print what they took."""
    import ml_dtypes  # noqa: F401  gives NumPy the name of bfloat16

    xp = importlib.import_module(module)
    xp.zeros(1)  # a context on the GPU, which is none of the calls' doing
    waiter(xp)()
    json.dump(first_calls(xp), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
