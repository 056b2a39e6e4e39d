"""Compare versions of flash_cupy on one machine: their times and, on a GPU, their clocks.

``python bench/versions.py ../former ../trial --head-dims 128 --masks causal`` measures this
checkout and two others, folders that hold flash_cupy and kernels_cu (``git worktree add`` makes
one), in cells as of attention.py. The results of each are held to this one's.

With ``--cubins FOLDER`` kernels are compiled before all cells, for compute capability 9.0, and kept
there; without a GPU that is all that is done (see cubins.py).

Clocks are those of one multiprocessor during a call. A GPU at its power limit changes its clock all
the time: times of equal calls then differ by percents, clocks by a thousandth.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cubins
import numpy as np
from cells import DTYPES, MASKS, Cell, Grid
from machine import array_module
from peers import Inputs, random_inputs
from timing import alternate, clock_timer
from transformer import Array

DIRECTIONS = ("forward", "backward", "deterministic")

#: Of the largest entry: what the results of two versions may differ by before it is worth a word.
TOLERANCE = 0.02


def load_version(folder: Path, name: str) -> ModuleType:
    """Import the flash_cupy of a folder under another name; it finds its own kernels_cu.

    Raises
    ------
    FileNotFoundError
        There is none in the folder.
    """
    package = folder.resolve() / "flash_cupy"
    spec = importlib.util.spec_from_file_location(
        name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    for loaded in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[loaded]  # of another folder
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def prepare(version: Any, cell: Cell, x: Inputs, xp: Any) -> Callable[[], tuple[Array, ...]]:
    """Do what comes before a version's pass; the function returned is the pass itself."""
    options = dict(cell.visible, device="cpu" if xp is np else None)
    if cell.direction == "forward":
        return lambda: tuple(version.attention_forward(x.q, x.k, x.v, **options))
    o, lse = version.attention_forward(x.q, x.k, x.v, **options)
    options["deterministic"] = cell.direction == "deterministic"
    return lambda: tuple(version.attention_backward(x.do, x.q, x.k, x.v, o, lse, **options))


def largest_difference(results: Sequence[Array], expected: Sequence[Array]) -> float:
    """Return how far results are apart, each as a share of its largest entry; NaN is far."""

    def share(x: Array, y: Array) -> float:
        x, y = x.astype(np.float64), y.astype(np.float64)
        return float(abs(x - y).max() / max(float(abs(y).max()), 1e-300))

    shares = [share(x, y) for x, y in zip(results, expected, strict=True)]
    return float("inf") if any(np.isnan(shares)) else max(shares)


def compare(cell: Cell, versions: dict[str, Any], xp: Any, seconds: float) -> str:
    """Measure a cell; return a line on it: the first version, and by how much others are faster.

    In time, and on a GPU in clocks.
    """
    x = random_inputs(cell, xp)
    calls = {name: prepare(version, cell, x, xp) for name, version in versions.items()}
    first, *others = calls
    expected = calls[first]()
    wrong = [n for n in others if largest_difference(calls[n](), expected) > TOLERANCE]
    times = alternate(calls, xp, seconds)
    clocks = {} if xp is np else alternate(calls, xp, seconds, clock_timer(xp))
    line = [f"{cell}: {cell.flops / times[first] * 1e-12:.3g} TFLOP/s"]
    for name in others:
        gains = [f"{taken[first] / taken[name] - 1:+.1%}" for taken in (times, clocks) if taken]
        line.append(" ".join([name, *gains, *["WRONG"] * (name in wrong)]))
    return "  ".join(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a line a cell."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = options.add_argument
    add("folders", type=Path, nargs="+", help="of other versions, beside this checkout")
    add("--device", choices=("cpu", "gpu"), help="default: gpu where there is one, else cpu")
    add("--head-dims", type=int, nargs="+", default=(64, 128, 256))
    add("--seqlens", type=int, nargs="+", default=(512, 2048, 8192))
    add("--masks", choices=MASKS, nargs="+", default=MASKS)
    add("--dtype", choices=[x for x in DTYPES if x != "tf32"], help="default: bfloat16, or float32")
    add("--directions", choices=DIRECTIONS, nargs="+", default=DIRECTIONS[:2])
    add("--batch", type=int, help="default: what makes 16k tokens")
    add("--heads", type=int, help="default: what makes 2048 features")
    add("--head-dim-v", type=int, help="features of v and o (default: the head dim)")
    add("--seconds", type=float, default=0.3, help="to time one version in one cell (0.3)")
    add("--cubins", type=Path, metavar="FOLDER", help="to keep kernels compiled for Hopper")
    args = options.parse_args(argv)
    try:
        xp = array_module(args.device)
        folders = {"this": Path(__file__).resolve().parent.parent}
        folders |= {str(folder): folder for folder in args.folders}
        versions = {
            name: load_version(folder, f"flash_cupy_version_{number}")
            for number, (name, folder) in enumerate(folders.items())
        }
    except (ValueError, FileNotFoundError) as error:
        options.error(str(error))
    grid = Grid(
        tuple(args.head_dims),
        tuple(args.seqlens),
        tuple(args.masks),
        (args.dtype or ("float32" if xp is np and args.cubins is None else "bfloat16"),),
        tuple(args.directions),
        batch=args.batch,
        heads=args.heads,
        head_dim_v=args.head_dim_v,
    )
    if args.cubins is not None:
        args.cubins.mkdir(parents=True, exist_ok=True)
        for name, version in versions.items():
            for line in cubins.compile_missing(args.cubins, version, grid.cells()):
                print(f"{name}: {line}", flush=True)
            if xp is not np:
                cubins.load_from(args.cubins, version)
        if xp is np:
            return 0
    print("By how much others are faster than this version: time" + ", clocks" * (xp is not np))
    for cell in grid.cells():
        print(compare(cell, versions, xp, args.seconds), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
