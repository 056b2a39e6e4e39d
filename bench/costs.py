"""The two attentions that are compared, and what a forward and backward pass of each costs."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm
from transformer import Array, Attend, Config

import flash_cupy

SECONDS = 0.3  # for timing one attention at one context length


def flash_vjp(
    q: Array, k: Array, v: Array, *, out: Array | None = None, **options: Any
) -> tuple[Array, Callable[..., Any]]:
    """Do what `flash_cupy.attention_vjp` does; the gradients too go where the caller says."""
    o, lse = flash_cupy.attention_forward(q, k, v, out=(out, None), **options)

    def backprop(do: Array, out: tuple[Array, ...] | None = None) -> tuple[Array, ...]:
        return flash_cupy.attention_backward(do, q, k, v, o, lse, out=out, **options)

    return o, backprop


def dense_vjp(
    q: Array, k: Array, v: Array, *, out: Array | None = None, **options: Any
) -> tuple[Array, Callable[..., Any]]:
    """Do what `flash_vjp` does by the plain N×N computation."""
    o = placed((flash_cupy.dense_attention(q, k, v, **options),), out if out is None else (out,))[0]

    def backprop(do: Array, out: tuple[Array, ...] | None = None) -> tuple[Array, ...]:
        return placed(flash_cupy.dense_attention_backward(do, q, k, v, **options), out)

    return o, backprop


def placed(results: tuple[Array, ...], out: tuple[Array, ...] | None) -> tuple[Array, ...]:
    """Copy results to the arrays `out`, if any."""
    if out is None:
        return results
    for x, result in zip(out, results, strict=True):
        x[...] = result
    return tuple(out)


ATTENTIONS: dict[str, Attend] = {"flash": flash_vjp, "dense": dense_vjp}


def attention_named(name: str, xp: Any) -> Attend:
    """Choose the attention `name` for arrays of `xp`; NumPy arrays stay on the CPU."""
    return partial(ATTENTIONS[name], device="cpu" if xp is np else "gpu")


def attention_pass(attend: Attend, xp: Any, config: Config, context: int) -> Callable[[], None]:
    """Prepare the forward and backward pass of one layer on one sequence of `context` tokens."""
    rng = np.random.default_rng(0)
    shape = (1, config.heads, context, config.width // config.heads)
    q, k, v, do = (xp.asarray(rng.standard_normal(shape).astype(config.dtype)) for _ in range(4))

    def forward_and_backward() -> None:
        _, backprop = attend(q, k, v, causal=config.causal)
        backprop(do)

    return forward_and_backward


def seconds_taken(call: Callable[[], None], xp: Any) -> float:
    """Time the fastest call of those that fit into SECONDS, one at least."""
    wait = (lambda: None) if xp is np else xp.cuda.Device().synchronize
    times: list[float] = []
    while sum(times) < SECONDS:
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_bytes(call: Callable[[], object], xp: Any) -> int:
    """Find the most memory held at once in a call: NumPy's by tracemalloc, CuPy's by a pool."""
    if xp is np:
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak
    pool = xp.cuda.MemoryPool()  # of its own, so that it grows by all that the call takes
    with xp.cuda.using_allocator(pool.malloc):
        call()
    return int(pool.total_bytes())


def attention_costs(xp: Any, config: Config, contexts: Sequence[int]) -> list[dict[str, Any]]:
    """Measure both attentions at each context length."""
    rows = []
    for context in tqdm(contexts, desc="attention costs", leave=False):
        row: dict[str, Any] = {"context": context}
        for name in ATTENTIONS:
            call = attention_pass(attention_named(name, xp), xp, config, context)
            call()  # compiles, on a GPU
            row[name] = {"seconds": seconds_taken(call, xp), "bytes": peak_bytes(call, xp)}
        rows.append(row)
    return rows


def cost_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay the costs out, one line a context length."""
    lines = [
        f"{'':>8}  {'time forward + backward, ms':^30}  {'peak memory, MiB':^30}",
        f"{'context':>8}  " + 2 * f"{'flash':>10}{'dense':>10}{'ratio':>10}  ",
    ]
    for row in rows:
        line = f"{row['context']:>8}  "
        for quantity, unit in (("seconds", 1e-3), ("bytes", 2**20)):
            flash, dense = (row[name][quantity] / unit for name in ("flash", "dense"))
            line += f"{flash:>10.2f}{dense:>10.2f}{dense / flash:>9.1f}×  "
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)
