"""What attention moves through device memory, dense and tiled: predicted, measured, and the time.

    python bench/traffic.py

Dense attention writes the N×N matrices S and P to memory and reads them again: Θ(ND + N²) elements
a head. Tiled attention keeps tiles of them on chip; each tile of tile_m queries reads all of K and
V, which is N/tile_m·2ND elements, and as tile_m·D is what fits into M elements of on-chip memory,
Θ(N²D²/M). Much of that is served by the L2 cache: from memory itself come at least the arrays.

The bytes are counted by the hardware through Nsight Compute where `ncu` is found: those of device
memory and those of the L2 cache. Nsight Compute runs this script a second time, with `--profiled`.
All figures go to ``<output>/<device>/traffic.json``, a picture beside it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from attention import reason
from cells import Cell
from costs import flash_vjp
from machine import array_module, describe, slug
from report import align
from timing import Call, alternate
from tqdm import tqdm
from traffic_pictures import save_picture
from transformer import bfloat16

ATTENTIONS = ("dense", "flash")
DIRECTIONS = ("forward", "backward")
ELEMENT, FLOAT = 2, 4  # bytes of bfloat16 and of sums

#: Nsight Compute's name for each quantity, in bytes.
METRICS = {
    "dram_read": "dram__bytes_read.sum",
    "dram_written": "dram__bytes_write.sum",
    "l2": "lts__t_bytes.sum",
}

#: The setting of figure 2 (left) of Dao et al. (2022), forward and backward, and their figures, of
#: an A100. How they count operations is not said; ours are those of all matrix products.
PAPER_SHAPE: dict[str, Any] = {"batch": 64, "heads": 16, "seqlen": 1024, "head_dim": 64}
PAPER = {
    "dense": {"gflop": 66.6, "gigabytes": 40.3, "ms": 41.7},
    "flash": {"gflop": 75.2, "gigabytes": 4.4, "ms": 7.3},
}

# -------------------------------------------------------------------------------------- predicted


def products(name: str, direction: str) -> int:
    """Matrix products of N×N×D: the tiled backward pass computes S a second time."""
    return 2 if direction == "forward" else 4 + (name == "flash")


def operations(name: str, cell: Cell) -> float:
    """Operations of all matrix products."""
    heads = cell.batch * cell.heads
    return products(name, cell.direction) * 2.0 * heads * cell.seqlen**2 * cell.head_dim


def predicted(cell: Cell, tile: int | None) -> dict[str, float]:
    """Bytes read and written, by formula.

    dense
        S is written, read and written again as P, and read (4N²); the backward pass reads P, writes
        dP, reads both and writes dS, and reads dS twice (7N²). Beside it the products' other
        operands: 4ND and 8ND.
    tiled
        Without any cache: with tiles of `tile` queries (forward), or keys (backward), against all
        keys or queries. The backward pass adds its part of dQ to float sums in memory, for each
        tile, and reads O and dO to begin and the sums of dQ in the end.
    least
        Every array once.
    """
    n, nd = cell.seqlen, cell.seqlen * cell.head_dim
    if cell.direction == "forward":
        dense, least = 4 * nd + 4 * n**2, 4 * nd
        found = {"dense": dense * ELEMENT, "least": least * ELEMENT + n * FLOAT}
        if tile is not None:
            found["tiled"] = 2 * nd * ELEMENT * (1 + -(-n // tile)) + n * FLOAT
    else:
        dense, least = 8 * nd + 7 * n**2, 8 * nd
        found = {"dense": dense * ELEMENT, "least": least * ELEMENT + n * FLOAT}
        if tile is not None:
            each = 2 * nd * ELEMENT + nd * FLOAT + 2 * n * FLOAT  # Q, dO; dQ; L, D
            once = (4 + 2 + 1) * nd * ELEMENT + 2 * nd * FLOAT  # K V dK dV; O dO; dQ; its sums
            found["tiled"] = once + -(-n // tile) * each
    heads = cell.batch * cell.heads
    return {name: float(heads * size) for name, size in found.items()}


# --------------------------------------------------------------------------------------- measured


def prepare(name: str, cell: Cell, xp: Any) -> Call:
    """Do what comes before a pass; the function returned is the pass itself."""
    from ops_cupy import dense_attention_vjp

    vjp = flash_vjp if name == "flash" else dense_attention_vjp
    rng = np.random.default_rng(0)
    drawn = xp.asarray(rng.standard_normal((4, cell.seqlen, cell.head_dim), np.float32))
    q, k, v, do, o, dq, dk, dv = (xp.empty(cell.shape, bfloat16()) for _ in range(8))
    for x, one_head in zip((q, k, v, do), drawn, strict=True):
        x[...] = one_head  # the same numbers in all heads
    _, backprop = vjp(q, k, v, out=o)
    if cell.direction == "forward":
        del backprop
        return lambda: vjp(q, k, v, out=o)
    return lambda: backprop(do, out=(dq, dk, dv))


def tile_of(call: Call, direction: str) -> int | None:
    """Rows (forward) or keys (backward) of the tiles of the kernel that a pass launches."""
    from flash_cupy.cuda import gpu_engine

    plans: list[Any] = []
    with replaced_run(gpu_engine().machine, plans):
        call()
    name = "tile_m" if direction == "forward" else "tile_n"
    tiles = [getattr(plan, name) for plan in plans if hasattr(plan, name)]
    return tiles[0] if tiles else None


@contextmanager
def replaced_run(machine: Any, plans: list[Any]) -> Iterator[None]:
    """Note the plan of every launch meanwhile."""
    run = machine.run

    def noting(work: Any, *arguments: Any) -> None:
        plans.extend(launch.plan for launch in work.launches)
        run(work, *arguments)

    machine.run = noting
    try:
        yield
    finally:
        del machine.run


MARKER = "traffic_marker"


def profiled(path: Path) -> None:
    """Under Nsight Compute: run each pass of the list once, behind a kernel that marks it."""
    import cupy

    marker = cupy.RawKernel(f'extern "C" __global__ void {MARKER}() {{}}', MARKER)
    for name, fields in json.loads(path.read_text(encoding="utf-8")):
        call = prepare(name, Cell(**fields), cupy)
        call()
        marker((1,), (1,), ())
        cupy.cuda.Device().synchronize()
        cupy.cuda.runtime.profilerStart()
        marker((1,), (1,), ())
        call()
        cupy.cuda.Device().synchronize()
        cupy.cuda.runtime.profilerStop()
        del call
        cupy.get_default_memory_pool().free_all_blocks()


def counted(passes: Sequence[tuple[str, Cell]], scratch: Path) -> list[dict[str, float]]:
    """Count each pass's bytes by the hardware.

    Raises
    ------
    RuntimeError
        There is no Nsight Compute, or it may not or cannot count here.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise RuntimeError("Nsight Compute (ncu) is not on the PATH")
    scratch.write_text(json.dumps([(name, asdict(cell)) for name, cell in passes]))
    command = [
        *(ncu, "--csv", "--page", "raw", "--print-units", "base", "--profile-from-start", "off"),
        *("--cache-control", "none", "--clock-control", "none"),
        *("--metrics", ",".join(METRICS.values())),
        *(sys.executable, str(Path(__file__).resolve()), "--profiled", str(scratch)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    scratch.unlink()
    try:
        found = read_counts(done.stdout)
    except (LookupError, ValueError) as error:
        raise RuntimeError(f"ncu printed what cannot be read: {error!r}") from error
    if done.returncode or len(found) != len(passes):
        said = [x for x in (done.stdout + done.stderr).splitlines() if "==ERROR==" in x]
        said = said or (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"ncu counted {len(found)} of {len(passes)} passes: {' '.join(said)}")
    return found


def read_counts(printed: str) -> list[dict[str, float]]:
    """Sum the counts of the kernels from each marker to the next; `printed` is ncu's raw page."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: list[dict[str, float]] = []
    for row in csv.DictReader(lines[start:]):
        if not row["ID"].isdigit():  # the line of units, ncu's own remarks
            continue
        if row["Kernel Name"].startswith(MARKER):
            found.append({**dict.fromkeys(METRICS, 0.0), "kernels": 0})
            continue
        for quantity, metric in METRICS.items():
            found[-1][quantity] += float(row[metric].replace(",", ""))
        found[-1]["kernels"] += 1
    return found


def measure(cells: Sequence[Cell], xp: Any, seconds: float) -> list[dict[str, Any]]:
    """Time each cell's passes and predict their traffic."""
    records = []
    for cell in tqdm(cells, unit="cell"):
        record: dict[str, Any] = {**asdict(cell), "results": {name: {} for name in ATTENTIONS}}
        tile = None
        for name, result in record["results"].items():
            try:
                call = prepare(name, cell, xp)
                call()
                if name == "flash":
                    tile = tile_of(call, cell.direction)
                result["ms"] = alternate({name: call}, xp, seconds)[name] * 1e3
                del call
            except Exception as error:  # out of memory, most likely
                result["failed"] = reason(error)
            result["gflop"] = operations(name, cell) * 1e-9
            xp.get_default_memory_pool().free_all_blocks()
        record |= {"tile": tile, "predicted": predicted(cell, tile)}
        records.append(record)
    return records


def paper_table(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Forward and backward together in the setting of the paper, beside its figures."""
    passes = [r for r in records if all(r[key] == value for key, value in PAPER_SHAPE.items())]
    rows = []
    for name in ATTENTIONS if len(passes) == 2 else ():
        results = [record["results"][name] for record in passes]
        row: dict[str, Any] = {"attention": name, "paper": PAPER[name]}
        row["gflop"] = sum(result["gflop"] for result in results)
        if all("ms" in result for result in results):
            row["ms"] = sum(result["ms"] for result in results)
        if all("dram_read" in result for result in results):
            read_and_written = ("dram_read", "dram_written")
            row["gigabytes"] = sum(r[key] for r in results for key in read_and_written) * 1e-9
        formula = "dense" if name == "dense" else "least"
        row["predicted_gigabytes"] = sum(r["predicted"][formula] for r in passes) * 1e-9
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------- output


def table(records: Sequence[dict[str, Any]]) -> str:
    """Lay the records out; bytes in MB."""
    rows = [["D", "N", "pass", "", "ms", "GFLOP", "DRAM MB", "L2 MB", "predicted MB", "least"]]
    for record in records:
        for name, result in record["results"].items():
            dram = result.get("dram_read", 0) + result.get("dram_written", 0)
            formula = record["predicted"].get("dense" if name == "dense" else "tiled")
            rows.append(
                [
                    *(str(record[key]) for key in ("head_dim", "seqlen", "direction")),
                    *(name, f"{result['ms']:.3f}" if "ms" in result else "failed"),
                    f"{result['gflop']:,.0f}",
                    f"{dram * 1e-6:,.0f}" if "dram_read" in result else "",
                    f"{result['l2'] * 1e-6:,.0f}" if "l2" in result else "",
                    "" if formula is None else f"{formula * 1e-6:,.0f}",
                    f"{record['predicted']['least'] * 1e-6:,.0f}",
                ]
            )
    return align(rows)


def save(path: Path, figures: dict[str, Any]) -> None:
    """Write all that is known so far."""
    figures["paper"] = paper_table(figures["records"])
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ the program


def parser() -> argparse.ArgumentParser:
    """Define the options."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    seqlens = [512, 1024, 2048, 4096, 8192]
    add("--seqlens", type=int, nargs="+", default=seqlens, help="(512 to 8192)")
    add("--head-dims", type=int, nargs="+", default=[64, 128], help="(64 128)")
    add("--heads", type=int, default=16, help="(16)")
    add("--tokens", type=int, default=16384, help="in all sequences together (16384)")
    add("--seconds", type=float, default=0.1, help="to time one pass (0.1)")
    add("--no-counters", action="store_true", help="predict and time, without Nsight Compute")
    add("--output", type=Path, default=Path(__file__).parent / "results", help="(bench/results)")
    add("--profiled", type=Path, help=argparse.SUPPRESS)
    add("--pictures-only", type=Path, metavar="JSON", help="draw these results, no more")
    return options


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """Return the grid and the setting of the paper."""
    shapes = [
        (max(1, args.tokens // seqlen), args.heads, seqlen, head_dim)
        for head_dim in args.head_dims
        for seqlen in args.seqlens
    ]
    paper = Cell(**PAPER_SHAPE, mask="full", dtype="bfloat16", direction="forward").shape
    return [
        Cell(*shape, mask="full", dtype="bfloat16", direction=direction)
        for shape in dict.fromkeys([*shapes, paper])
        for direction in DIRECTIONS
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Predict, time, count, and write it down."""
    options = parser()
    args = options.parse_args(argv)
    if args.profiled:
        profiled(args.profiled)
        return 0
    if args.pictures_only:
        print(save_picture(args.pictures_only, json.loads(args.pictures_only.read_text())))
        return 0
    try:
        xp = array_module("gpu")
    except ValueError as error:
        options.error(str(error).removeprefix("--device gpu: "))
    header = describe(xp)
    path = args.output / slug(header["device"]) / "traffic.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {"header": header, "counters": "not asked for"}
    figures["records"] = records = measure(cells_of(args), xp, args.seconds)
    save(path, figures)
    if not args.no_counters:
        working = [
            (name, record)
            for record in records
            for name in ATTENTIONS
            if "failed" not in record["results"][name]
        ]
        fields = asdict(cells_of(args)[0]).keys()
        passes = [(name, Cell(**{key: r[key] for key in fields})) for name, r in working]
        print(f"counting the bytes of {len(passes)} passes by Nsight Compute", flush=True)
        try:
            counts = counted(passes, path.with_suffix(".passes"))
        except RuntimeError as error:
            figures["counters"] = f"failed: {error}"
        else:
            figures["counters"] = "Nsight Compute"
            for (name, record), count in zip(working, counts, strict=True):
                record["results"][name] |= count
        save(path, figures)
    print(f"{table(records)}\ncounters: {figures['counters']}")
    print(json.dumps(figures["paper"], indent=1))
    print(f"written {path}, {save_picture(path, figures)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
