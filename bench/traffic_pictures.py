"""Picture of traffic.json: bytes over sequence length, predicted and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save_picture(path: Path, figures: dict[str, Any]) -> Path:
    """Draw a row for each head dim and a column for each pass, and save it beside the file."""
    records = figures["records"]
    tokens = records[0]["batch"] * records[0]["seqlen"]
    # All but the setting of the paper, which has more.
    grid = [record for record in records if record["batch"] * record["seqlen"] == tokens]
    head_dims = sorted({record["head_dim"] for record in grid})
    directions = list(dict.fromkeys(record["direction"] for record in grid))
    size = (5 * len(directions), 3.6 * len(head_dims))
    figure = Figure(figsize=size, layout="constrained")
    heads = f"{grid[0]['heads']} heads, {tokens:,} tokens"
    figure.suptitle(f"{figures['header']['device']}: attention's traffic, bfloat16, {heads}")
    panels = figure.subplots(len(head_dims), len(directions), squeeze=False, sharex=True)
    for row, head_dim in zip(panels, head_dims, strict=True):
        for axes, direction in zip(row, directions, strict=True):
            chosen = [r for r in grid if (r["head_dim"], r["direction"]) == (head_dim, direction)]
            _draw(axes, chosen)
            axes.set(title=f"head dim {head_dim}, {direction}", ylabel="GB")
    for axes in panels[-1]:
        axes.set_xlabel("sequence length")
    panels[0][0].legend(fontsize="small")
    saved = path.with_name(f"{path.stem}.png")
    figure.savefig(saved, dpi=120)
    return saved


def _draw(axes: Axes, records: list[dict[str, Any]]) -> None:
    """Lines are formulas, marks are counts."""
    lines = (
        ("dense", "tab:red", "-", "dense, formula"),
        ("tiled", "black", "-", "tiled without cache, formula"),
        ("least", "black", ":", "every array once"),
    )
    lengths = [record["seqlen"] for record in records]
    for name, colour, style, label in lines:
        if all(name in record["predicted"] for record in records):
            values = [record["predicted"][name] * 1e-9 for record in records]
            axes.plot(lengths, values, style, color=colour, label=label)
    for name, colour in (("dense", "tab:red"), ("flash", "black")):
        for keys, mark, where in (
            (("dram_read", "dram_written"), "o", "DRAM"),
            (("l2",), "x", "L2"),
        ):
            points = [
                (record["seqlen"], sum(record["results"][name][key] for key in keys) * 1e-9)
                for record in records
                if keys[0] in record["results"][name]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), mark, color=colour)
                axes.lines[-1].set_label(f"{name}, counted, {where}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [str(n) for n in lengths], fontsize="small")
    axes.minorticks_off()
    axes.grid(alpha=0.3)
