"""Pictures of the records: speed over length, and memory over length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cells import MASKS
from machine import slug
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import OURS, Record, out_of_memory, peers_of

#: One colour for each competitor in all pictures.
COLOURS = {
    OURS: "black",
    "flash_cupy portable": "tab:brown",
    "default backward": "tab:gray",
    "torch cuDNN": "tab:green",
    "torch flash": "tab:blue",
    "flash-attn-4": "tab:cyan",
    "torch efficient": "tab:purple",
    "torch math": "tab:orange",
    "dense": "tab:red",
    "dense_attention": "tab:red",
}


def save_pictures(path: Path, header: dict[str, Any], records: Sequence[Record]) -> list[Path]:
    """Draw all that the records of a JSON file give and save it beside the file."""
    saved = []
    for name, figure in [*_speed(header, records), *_memory(header, records)]:
        saved.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(saved[-1], dpi=120)
    return saved


def _grouped(
    records: Sequence[Record], keys: tuple[str, ...]
) -> Iterator[tuple[tuple[Any, ...], list[Record]]]:
    """Split records by the values of some keys; leave out groups of a single length."""
    for values in dict.fromkeys(tuple(record[key] for key in keys) for record in records):
        group = [r for r in records if tuple(r[key] for key in keys) == values]
        if len({record["seqlen"] for record in group}) > 1:
            yield values, group


def _speed(header: dict[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """One picture for each dtype, pass and variant: a row a mask, a column a head dim."""
    timed = [record for record in records if any("ms" in r for r in record["results"].values())]
    for values, group in _grouped(timed, ("dtype", "direction", "variant")):
        name = " ".join(values).rstrip()
        masks = [mask for mask in MASKS if any(r["mask"] == mask for r in group)]
        head_dims = sorted({record["head_dim"] for record in group})
        figure, grid = _figure(f"{header['device']}: {name}", group, len(masks), len(head_dims))
        for row, mask in enumerate(masks):
            for column, head_dim in enumerate(head_dims):
                axes = grid[row][column]
                panel = [r for r in group if (r["mask"], r["head_dim"]) == (mask, head_dim)]
                _draw(axes, panel, "tflops")
                axes.set(title=f"head dim {head_dim}, {mask}", ylabel="TFLOP/s")
                axes.set_ylim(bottom=0)
        grid[0][0].legend(fontsize="small")
        yield slug(name), figure


def _memory(header: dict[str, Any], records: Sequence[Record]) -> Iterator[tuple[str, Figure]]:
    """One picture for each shape but for its length: a row for each mask, a column a pass."""
    shape = ("dtype", "head_dim", "batch", "heads", "variant")
    for (dtype, head_dim, batch, heads, variant), group in _grouped(records, shape):
        masks = [mask for mask in MASKS if any(r["mask"] == mask for r in group)]
        directions = list(dict.fromkeys(record["direction"] for record in group))
        title = f"{header['device']}: {dtype}, head dim {head_dim}, {batch} × {heads} heads"
        title += variant and f", {variant}"
        figure, grid = _figure(title, group, len(masks), len(directions))
        for row, mask in enumerate(masks):
            for column, direction in enumerate(directions):
                axes = grid[row][column]
                panel = [r for r in group if (r["mask"], r["direction"]) == (mask, direction)]
                _draw(axes, panel, "peak_bytes", scale=2**-30)
                _draw_limit(axes, panel, header.get("memory_bytes"))
                axes.set(title=f"{direction}, {mask}", ylabel="peak memory, GiB", yscale="log")
        grid[0][0].legend(fontsize="small")
        yield slug(f"memory {dtype} d{head_dim} b{batch} h{heads} {variant}"), figure


def _figure(title: str, records: Sequence[Record], rows: int, columns: int) -> tuple[Figure, Any]:
    """Make panels that share an axis of all the records' lengths."""
    figure = Figure(figsize=(4.5 * columns, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    lengths = sorted({record["seqlen"] for record in records})
    ticks = [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in lengths]
    for axes in grid.flat:
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, ticks, fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("sequence length")
    return figure, grid


def _draw(axes: Axes, panel: Sequence[Record], quantity: str, scale: float = 1) -> None:
    """Draw a line for each competitor that has the quantity."""
    for name in [*peers_of(panel), OURS]:
        points = [
            (record["seqlen"], record["results"][name][quantity] * scale)
            for record in panel
            if quantity in record["results"].get(name, {})
        ]
        if points:
            (line,) = axes.plot(*zip(*sorted(points), strict=True), "o-", markersize=4)
            line.set(label=name, color=COLOURS[name], linewidth=2.5 if name == OURS else 1.5)


def _draw_limit(axes: Axes, panel: Sequence[Record], memory_bytes: int | None) -> None:
    """Mark, at the device's memory, the lengths for which a competitor ran out of it."""
    if memory_bytes is None:
        return
    limit = memory_bytes / 2**30
    axes.axhline(limit, color="0.5", linestyle=":", label="memory of the device")
    for name in peers_of(panel):
        lengths = [r["seqlen"] for r in panel if out_of_memory(r["results"].get(name, {}))]
        if lengths:
            (crosses,) = axes.plot(lengths, [limit] * len(lengths), "x", markersize=8)
            crosses.set(label=f"{name}: out of memory", color=COLOURS[name])
