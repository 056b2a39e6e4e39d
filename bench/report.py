"""What the records say: ratios, geometric means, worst cells, tables.

A record is a dict: the fields of a `Cell`, its ``variant`` and ``flops``, ``reference_rms`` and
``results``, which maps a competitor to its ``ms``, ``tflops``, ``peak_bytes`` and ``errors``, or to
the reason for which it ``failed``; and ``ratios`` of our speed to that of each other competitor.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Record: TypeAlias = dict[str, Any]

OURS = "flash_cupy"


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """Read the header and the records of a file; older ones are of a time before variants."""
    figures = json.loads(path.read_text(encoding="utf-8"))
    return figures["header"], [{"variant": "", **record} for record in figures["cells"]]


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the n-th root of the product of n ratios."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Our speed over that of each other competitor that was timed; above 1 we are faster."""
    times = {name: result["ms"] for name, result in results.items() if "ms" in result}
    ours = times.pop(OURS, None)
    return {} if ours is None else {name: ms / ours for name, ms in times.items()}


def error_ratio(results: dict[str, dict[str, Any]], peer: str) -> float | None:
    """Largest ratio of our error to a peer's, of the arrays that a pass returns; None if unknown.

    The errors are root mean squares against float64. An exact peer has no ratio.
    """
    ours, theirs = (results.get(name, {}).get("errors", {}) for name in (OURS, peer))
    return max(
        (ours[name]["rms"] / error["rms"] for name, error in theirs.items() if error["rms"]),
        default=None,
    )


def peers_of(records: Sequence[Record]) -> list[str]:
    """Name the other competitors in the order in which they appear."""
    names = dict.fromkeys(name for record in records for name in record["results"])
    return [name for name in names if name != OURS]


def summary(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Geometric mean and worst cell of our ratio to each peer, and of errors.

    By dtype, pass and variant.
    """
    rows = []
    keys = ("dtype", "direction", "variant")
    for values in dict.fromkeys(tuple(record[key] for key in keys) for record in records):
        group = [record for record in records if tuple(record[key] for key in keys) == values]
        for peer in peers_of(group):
            met = [record for record in group if peer in record["ratios"]]
            if not met:
                continue
            worst = min(met, key=lambda record: record["ratios"][peer])
            errors = (error_ratio(record["results"], peer) for record in met)
            known_errors = [error for error in errors if error is not None]
            by_head_dim = {
                str(d): geometric_mean(r["ratios"][peer] for r in met if r["head_dim"] == d)
                for d in sorted({record["head_dim"] for record in met})
            }
            rows.append(
                {
                    **dict(zip(keys, values, strict=True)),
                    "peer": peer,
                    "cells": len(met),
                    "geometric_mean": geometric_mean(r["ratios"][peer] for r in met),
                    "by_head_dim": by_head_dim,
                    "worst": {
                        "ratio": worst["ratios"][peer],
                        **{key: worst[key] for key in ("head_dim", "seqlen", "mask")},
                    },
                    "worst_error_ratio": max(known_errors, default=None),
                }
            )
    return rows


def causal_over_full(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Our time with a causal mask over that without, wherever both were measured."""
    axes = ("batch", "heads", "seqlen", "head_dim", "dtype", "direction", "variant")
    times = {
        (record["mask"], *(record[axis] for axis in axes)): record["results"][OURS]["ms"]
        for record in records
        if "ms" in record["results"][OURS]
    }
    pairs = []
    for (mask, *shape), ms in times.items():
        full = times.get(("full", *shape))
        if mask == "causal" and full is not None:
            pairs.append({**dict(zip(axes, shape, strict=True)), "ratio": ms / full})
    return pairs


def failures(records: Sequence[Record]) -> Counter[tuple[str, str]]:
    """Count the cells in which a competitor failed for a reason."""
    return Counter(
        (name, result["failed"])
        for record in records
        for name, result in record["results"].items()
        if "failed" in result
    )


# ----------------------------------------------------------------------------------------- tables


def failure(result: dict[str, Any]) -> str:
    """Say in a word or two why there is no figure."""
    return "no memory" if out_of_memory(result) else "failed"


def out_of_memory(result: dict[str, Any]) -> bool:
    """Whether memory ran out: the errors of NumPy, CuPy and PyTorch all end in the same words."""
    failed = result.get("failed", "").partition(":")[0]
    return bool(failed.endswith(("MemoryError", "OutOfMemoryError")))


def _figure(record: Record, name: str, quantity: str) -> str:
    result = record["results"].get(name)
    if result is None:
        return "-"
    if quantity not in result:
        return failure(result)
    if quantity == "peak_bytes":
        return f"{result[quantity] / 2**20:,.1f}"
    ratio = f" ({record['ratios'][name]:.2f})" if name in record["ratios"] else ""
    return f"{result[quantity]:.3g}{ratio}"


def table(records: Sequence[Record], quantity: str) -> str:
    """Lay out 'tflops', with our ratio to each peer in brackets, or 'peak_bytes', in MiB."""
    keys = ("dtype", "direction", "head_dim", "mask", "seqlen", "batch", "heads", "variant")
    names = [OURS, *peers_of(records)]
    rows = [["dtype", "pass", "D", "mask", "N", "B", "H", "variant", *names]]
    for record in records:
        cell = [str(record[key]) for key in keys]
        rows.append(cell + [_figure(record, name, quantity) for name in names])
    return align(rows)


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay out a `summary`."""
    head = ["dtype", "pass", "variant", "ours over", "cells", "mean", "worst", "where", "mean by D"]
    lines = [[*head, "our error / theirs"]]
    for row in rows:
        worst, error = row["worst"], row["worst_error_ratio"]
        lines.append(
            [
                *(str(row[key]) for key in ("dtype", "direction", "variant", "peer", "cells")),
                f"{row['geometric_mean']:.2f}",
                f"{worst['ratio']:.2f}",
                f"D{worst['head_dim']} N{worst['seqlen']} {worst['mask']}",
                ", ".join(f"{d}: {mean:.2f}" for d, mean in row["by_head_dim"].items()),
                "-" if error is None else f"{error:.2f}",
            ]
        )
    return align(lines)


def align(rows: Sequence[Sequence[str]]) -> str:
    """Right-align the columns of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True))
        for row in rows
    )
