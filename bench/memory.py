"""Peak memory of attention over sequence length: dense, and tiled by flash_cupy.

    python bench/memory.py

One sequence of the attention of GPT-2 small (12 heads of 64, bfloat16), forward alone and forward
with backward. Counted is what a pass takes beside q, k, v and do: its results and all between, as
the device's memory pool sees it. Dense attention is the careful one of `ops_cupy`. Figures go to
``<output>/<device>/memory_over_length.json``, a picture beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attention import reason
from costs import flash_vjp, peak_bytes
from machine import array_module, describe, slug
from matplotlib.figure import Figure
from report import align
from timing import Call
from tqdm import tqdm
from transformer import Attend, bfloat16

PASSES = ("forward", "forward and backward")
STYLES = {"dense": ("tab:red", "dense, CuPy"), "flash": ("black", "flash_cupy")}
SEQLENS = tuple(2**n for n in range(9, 18))


def one_pass(attend: Attend, shape: tuple[int, ...], backward: bool, xp: Any) -> Call:
    """Prepare a pass; the call allocates all that it needs beside the inputs."""
    q, k, v, do = (xp.zeros(shape, bfloat16()) for _ in range(4))

    def call() -> None:
        _, backprop = attend(q, k, v, out=xp.empty_like(q))
        if backward:
            backprop(do, out=tuple(xp.empty_like(x) for x in (q, k, v)))

    return call


def measure(seqlens: Sequence[int], heads: int, head_dim: int, xp: Any) -> list[dict[str, Any]]:
    """Return the peaks in bytes, or for what reason there is none."""
    from ops_cupy import dense_attention_vjp

    attentions: dict[str, Attend] = {"dense": dense_attention_vjp, "flash": flash_vjp}
    one_pass(flash_vjp, (1, heads, 64, head_dim), True, xp)()  # compiles; loads cuBLAS
    one_pass(dense_attention_vjp, (1, heads, 64, head_dim), True, xp)()
    records = []
    for seqlen in tqdm(seqlens, unit="length"):
        for name, attend in attentions.items():
            for backward, direction in enumerate(PASSES):
                xp.get_default_memory_pool().free_all_blocks()
                record: dict[str, Any] = {"seqlen": seqlen, "attention": name, "pass": direction}
                try:
                    call = one_pass(attend, (1, heads, seqlen, head_dim), bool(backward), xp)
                    record["peak_bytes"] = peak_bytes(call, xp)
                    del call
                except Exception as error:  # out of memory
                    record["failed"] = reason(error)
                records.append(record)
    return records


def by_length(records: Sequence[dict[str, Any]], name: str, direction: str) -> dict[int, int]:
    """Peaks of an attention and a pass."""
    return {
        record["seqlen"]: record["peak_bytes"]
        for record in records
        if (record["attention"], record["pass"]) == (name, direction) and "peak_bytes" in record
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """Lay the peaks out in MiB, with the ratio of dense to tiled."""
    rows = [["N", *(f"{p}: {x}" for p in PASSES for x in ("dense", "flash_cupy", "ratio"))]]
    for seqlen in sorted({record["seqlen"] for record in records}):
        row = [str(seqlen)]
        for direction in PASSES:
            dense, flash = (by_length(records, x, direction).get(seqlen) for x in STYLES)
            row += ["-" if x is None else f"{x / 2**20:,.1f}" for x in (dense, flash)]
            row.append("-" if dense is None or flash is None else f"{dense / flash:.1f}×")
        rows.append(row)
    return align(rows)


def save_picture(path: Path, figures: dict[str, Any]) -> Path:
    """Draw a panel for each pass beside the JSON file."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    heads = f"{figures['heads']} heads of {figures['head_dim']}, one sequence, bfloat16"
    figure.suptitle(f"{figures['header']['device']}: {heads}")
    lengths = sorted({record["seqlen"] for record in figures["records"]})
    for axes, direction in zip(figure.subplots(1, 2, sharey=True), PASSES, strict=True):
        for name, (colour, label) in STYLES.items():
            peaks = by_length(figures["records"], name, direction)
            axes.plot(peaks.keys(), [peak / 2**30 for peak in peaks.values()], "o-", color=colour)
            axes.lines[-1].set_label(label)
        axes.axhline(figures["header"]["memory_bytes"] / 2**30, color="0.5", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [str(n) for n in lengths], fontsize="x-small", rotation=45)
        axes.minorticks_off()
        axes.set(title=direction, xlabel="sequence length", ylabel="peak memory, GiB")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    saved = path.with_suffix(".png")
    figure.savefig(saved, dpi=120)
    return saved


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write it down."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("--seqlens", type=int, nargs="+", default=SEQLENS, help="(512 to 131072)")
    add("--heads", type=int, default=12, help="(12)")
    add("--head-dim", type=int, default=64, help="(64)")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="(bench/results)")
    args = options.parse_args(argv)
    try:
        xp = array_module("gpu")
    except ValueError as error:
        options.error(str(error).removeprefix("--device gpu: "))
    header = describe(xp)
    path = args.output / slug(header["device"]) / "memory_over_length.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    records = measure(args.seqlens, args.heads, args.head_dim, xp)
    sizes = {"heads": args.heads, "head_dim": args.head_dim}
    figures = {"header": header, **sizes, "records": records}
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(f"{table(records)}\nwritten {path}, {save_picture(path, figures)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
