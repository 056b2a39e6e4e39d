"""Measure attention: speed, memory and error of flash_cupy beside other implementations.

``python bench/attention.py`` measures a preset of cells on the GPU where there is one, else on the
CPU, beside the preset's peers, as far as this machine has them; options replace the preset's axes.
In a cell all competitors work on the same random arrays. Each first runs once, which warms it up
and gives its memory and its errors; then they are timed in turn, call by call. Those that hold N×N
matrices between passes are timed after that, one by one.

All figures go to ``bench/results/<device>/<preset>.json`` after each cell, pictures beside it.

``--preset overheads`` is another measurement: what compiling, loading and calling cost, see
overheads.py.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from accuracy import errors, reference, root_mean_square
from cells import DIRECTIONS, DTYPES, INPUTS, MASKS, PRESETS, Cell, Grid, Preset
from machine import array_module, describe, slug
from overheads import measure_overheads, overheads_table
from peers import Competitor, Inputs, competitors, random_inputs
from pictures import save_pictures
from report import (
    OURS,
    Record,
    causal_over_full,
    failures,
    ratios,
    read,
    summary,
    summary_table,
    table,
)
from timing import alternate
from tqdm import tqdm
from transformer import Array

Results = dict[str, dict[str, Any]]

# -------------------------------------------------------------------------------------- measuring


def measure(cell: Cell, present: Sequence[Competitor], seconds: float) -> Record:
    """Measure one cell; without `seconds` for timing only memory and errors."""
    xp = present[0].xp
    x = random_inputs(cell, xp)
    expected = reference(x, cell, xp)
    results: Results = {}
    for competitor in present:
        release(present)
        try:
            results[competitor.name] = trial(competitor, x, cell, expected)
        except Exception as error:  # whatever a peer raises is part of the record
            results[competitor.name] = {"failed": reason(error)}
    working = [c for c in present if "failed" not in results[c.name]]
    together = [c for c in working if not c.apart]
    for group in [together, *([c] for c in working if c.apart)] if seconds else []:
        release(present)
        try:
            times = time_group(group, x, cell, seconds)
        except Exception as error:
            for competitor in group:
                results[competitor.name]["failed"] = reason(error)
        else:
            for name, time in times.items():
                results[name] |= {"ms": time * 1e3, "tflops": cell.flops / time * 1e-12}
    return {
        **asdict(cell),
        "variant": cell.variant,
        "flops": cell.flops,
        "reference_rms": {name: root_mean_square(truth) for name, truth in expected.items()},
        "results": results,
        "ratios": ratios(results),
    }


def trial(
    competitor: Competitor, x: Inputs, cell: Cell, expected: dict[str, Array]
) -> dict[str, Any]:
    """Run a pass once, with all that comes before it, for its peak memory and its errors."""
    returned: list[Any] = []
    peak = competitor.peak_bytes(lambda: returned.extend(competitor.prepare(x, cell)()))
    arrays = dict(zip(cell.results, map(competitor.array, returned), strict=True))
    return {"peak_bytes": peak, "errors": errors(arrays, expected)}


def time_group(
    group: Sequence[Competitor], x: Inputs, cell: Cell, seconds: float
) -> dict[str, float]:
    """Time competitors in turn."""
    calls = {competitor.name: competitor.prepare(x, cell) for competitor in group}
    return alternate(calls, group[0].xp, seconds) if calls else {}


def release(present: Sequence[Competitor]) -> None:
    """Free what the memory pools hold unused: a pool cannot use what another one keeps."""
    gc.collect()  # what failed half-way may hang in the cycles of its traceback
    for competitor in present:
        competitor.release()


def reason(error: Exception) -> str:
    """Write an error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def measure_all(
    path: Path,
    header: dict[str, Any],
    preset: Preset,
    present: Sequence[Competitor],
    seconds: float,
) -> list[Record]:
    """Measure the cells of a preset behind a progress bar, saving after each.

    A competitor that runs out of memory, or fails otherwise, has the reason on record in the cell.
    """
    records: list[Record] = []
    with tqdm(preset.cells(), unit="cell", mininterval=1) as bar:
        for cell in bar:
            bar.set_description(str(cell), refresh=False)
            release(present)  # before the inputs: they can be had from one pool alone
            chosen = [
                competitor
                for competitor in present
                if competitor.takes(cell)
                and (preset.peers is None or competitor.name in (OURS, *preset.peers))
            ]
            records.append(measure(cell, chosen, seconds if preset.timed else 0))
            save(path, header, records)
    return records


# ----------------------------------------------------------------------------------------- output


def save(path: Path, header: dict[str, Any], records: list[Record]) -> None:
    """Write all that is known so far; a run that is killed leaves a whole file."""
    figures = {
        "header": header,
        "summary": summary(records),
        "causal_over_full": causal_over_full(records),
        "cells": records,
    }
    write_json(path, figures)


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write a file, all of it or none."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def print_report(records: list[Record], timed: bool) -> None:
    """Print the tables."""
    if timed:
        print(f"TFLOP/s (and our speed over theirs)\n{table(records, 'tflops')}\n")
    print(f"Peak memory beside q, k, v and do, MiB\n{table(records, 'peak_bytes')}\n")
    if timed:
        print(f"Our speed over theirs, geometric means\n{summary_table(summary(records))}\n")
        causal = [pair["ratio"] for pair in causal_over_full(records)]
        if causal:
            print(f"Our time causal over full: {min(causal):.2f} to {max(causal):.2f}")
    for (name, failed), count in failures(records).items():
        print(f"{name} failed in {count} of {len(records)} cells: {failed}")


# ------------------------------------------------------------------------------------ the program

#: The preset that measures no cells.
OVERHEADS = "overheads"


def parser() -> argparse.ArgumentParser:
    """Define the options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("--device", choices=("cpu", "gpu"), help="default: gpu where there is one, else cpu")
    add("--preset", choices=[*PRESETS, OVERHEADS], help="default: peers on the GPU, cpu on the CPU")
    add("--head-dims", type=int, nargs="+")
    add("--seqlens", type=int, nargs="+")
    add("--masks", choices=MASKS, nargs="+")
    add("--dtypes", choices=list(DTYPES), nargs="+")
    add("--directions", choices=list(DIRECTIONS), nargs="+", help="the passes")
    add("--peers", nargs="*", metavar="NAME", help="'torch flash', say; none: flash_cupy alone")
    add("--batch", type=int, help="default: the preset's, or what makes 16k tokens")
    add("--heads", type=int, help="default: the preset's, or what makes 2048 features")
    add("--kv-heads", type=int, help="fewer heads of keys than of queries (default: as many)")
    add("--window", type=int, help="keys that a query sees in a causal cell (default: all)")
    add("--head-dim-v", type=int, help="features of v and o (default: the head dim)")
    add("--inputs", choices=INPUTS, help="the entries (default: normal)")
    add("--seconds", type=float, default=0.3, help="to time one competitor in one cell (0.3)")
    add("--out", type=Path, default=Path(__file__).parent / "results", help="(bench/results)")
    add("--pictures-only", type=Path, nargs="+", metavar="JSON", help="draw these results, no more")
    return options


def chosen_axes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the axes of a `Grid` that options replace."""
    given = {field.name: getattr(args, field.name) for field in fields(Grid)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in given.items()
        if value is not None
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, save, print and draw; the status is 1 when flash_cupy failed in a cell."""
    options = parser()
    args = options.parse_args(argv)
    if args.pictures_only:
        for path in args.pictures_only:
            print(*save_pictures(path, *read(path)), sep="\n")
        return 0
    try:
        xp = array_module(args.device)
    except ValueError as error:
        options.error(str(error))

    header = describe(xp)
    folder = args.out / slug(header["device"])
    folder.mkdir(parents=True, exist_ok=True)
    if args.preset == OVERHEADS:
        path = folder / f"{OVERHEADS}.json"
        for figures in measure_overheads(xp):
            write_json(path, {"header": header, **figures})
        print(f"{overheads_table(figures)}\nwritten {path}")
        return 0

    name = args.preset or ("cpu" if xp.__name__ == "numpy" else "peers")
    present = competitors(xp)
    unknown = set(args.peers or ()) - {competitor.name for competitor in present}
    if unknown:
        options.error(
            f"--peers: {', '.join(sorted(unknown))}: not one of those on this machine, "
            + ", ".join(competitor.name for competitor in present)
        )
    preset, axes = PRESETS[name], chosen_axes(args)
    preset = replace(preset, grids=tuple(replace(grid, **axes) for grid in preset.grids))
    if args.peers is not None:
        preset = replace(preset, peers=tuple(args.peers))
    try:
        preset.cells()
    except ValueError as error:  # a window without a causal mask, say
        options.error(str(error))
    custom = axes or args.peers is not None
    path = folder / f"{'custom' if custom else name}.json"

    records = measure_all(path, header, preset, present, args.seconds)
    print_report(records, preset.timed)
    for written in (path, *save_pictures(path, header, records)):
        print(f"written {written}")
    return int(any("failed" in record["results"][OURS] for record in records))


if __name__ == "__main__":
    raise SystemExit(main())
