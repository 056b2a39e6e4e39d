"""Pictures of end-to-end training: speed and memory over length, and the loss curves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "flash": "black",
    "dense": "tab:red",
    "torch": "tab:blue",
    "torch compiled": "tab:green",
    "torch dense": "tab:orange",
}
LABELS = {"flash": "flash_cupy", "dense": "dense, CuPy"}


def save_pictures(path: Path, figures: dict[str, Any]) -> list[Path]:
    """Draw all that a JSON file gives and save it beside the file."""
    saved = []
    for name, figure in _pictures(figures):
        saved.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(saved[-1], dpi=120)
    return saved


def _pictures(figures: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    records = figures["records"]
    if records:
        yield "speed", _over_length(figures, records)
    longest = max(records, key=lambda record: record["steps"], default=None)
    if longest is not None:
        yield "loss", _losses(figures, longest)


def _over_length(figures: dict[str, Any], records: list[dict[str, Any]]) -> Figure:
    """Tokens a second and peak memory, a line for each competitor."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{figures['header']['device']}: training {figures['config']}")
    quantities = (("tokens_per_second", "tokens/s", 1), ("peak_bytes", "peak GiB", 2**30))
    lengths = sorted({record["seqlen"] for record in records})
    for axes, (quantity, label, unit) in zip(figure.subplots(1, 2), quantities, strict=True):
        for name, colour in COLOURS.items():
            points = {
                record["seqlen"]: record["results"][name][quantity] / unit
                for record in records
                if quantity in record["results"].get(name, {})
            }
            if points:
                axes.plot(*zip(*sorted(points.items()), strict=True), "o-", color=colour)
                axes.lines[-1].set_label(LABELS.get(name, name))
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [str(n) for n in lengths], fontsize="small")
        axes.minorticks_off()
        axes.set(xlabel="tokens a sequence", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    return figure


def _losses(figures: dict[str, Any], record: dict[str, Any]) -> Figure:
    """Loss of every step, a line for each competitor; those that coincide are drawn dashed."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    title = f"{figures['config']}, {record['batch']} × {record['seqlen']} tokens"
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss, nats")
    for name, colour in COLOURS.items():
        losses = record["results"].get(name, {}).get("losses")
        if losses:
            style = "-" if name == "flash" else "--"
            axes.plot(range(1, len(losses) + 1), losses, style, color=colour, linewidth=1)
            axes.lines[-1].set_label(LABELS.get(name, name))
    difference = record.get("largest_loss_difference")
    if difference is not None:
        axes.set_xlabel(f"step (dense and flash_cupy differ by {difference:.1e} nats at most)")
    axes.legend()
    axes.grid(alpha=0.3)
    return figure
