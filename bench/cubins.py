"""Machine code of versions' kernels in a folder, for GPUs of compute capability 9.0.

Compiling takes longer than measuring, and needs no GPU: what versions.py compiles here, it need not
compile on a machine that has one.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cells import DTYPES, Cell

ARCH = "sm_90a"

#: What `cuda.plan.Card` is made of for an H100 or H200 with all its multiprocessors.
HOPPER = {"compute_capability": (9, 0), "shared_bytes": 227 << 10}
HOPPER |= {"multiprocessors": 132, "hopper": True}

#: wgmma that the compiler makes wait for each other, and register counts that it ignores.
BAD_WARNINGS = re.compile(r"C75(?:08|1[0-4]|20)")


def submodule(version: ModuleType, name: str) -> Any:
    """Return a module of a version's package."""
    return importlib.import_module(f"{version.__name__}.{name}")


def kernels_of(version: ModuleType, cell: Cell) -> list[tuple[str, Any]]:
    """Return the kernels of a cell's pass, and of what comes before it, with their plans."""
    engine, layouts = submodule(version, "cuda.engine"), submodule(version, "cuda.tensors")
    found: list[tuple[str, Any]] = []

    class Recorder:
        """A machine that loads nothing."""

        def card(self) -> Any:
            return submodule(version, "cuda.plan").Card(**HOPPER)

        def load(self, kernel: str, plan: Any) -> str:
            found.append((kernel, plan))
            return kernel

    submodule(version, "arrays").dtypes()  # lets NumPy understand 'bfloat16'
    dtype = np.dtype(DTYPES[cell.dtype])
    # Arrays of these shapes with no memory to speak of: only the layouts count.
    q, k, v, do = (
        np.lib.stride_tricks.as_strided(np.empty(8, dtype), shape, (0,) * len(shape))
        for shape in cell.shapes
    )
    types = submodule(version, "problem")
    problem = types.Problem.of(q, k, v, types.Options(device="cpu", **cell.visible))
    contiguous = layouts.Layout.contiguous
    tensors = {name: contiguous(x.shape, dtype) for name, x in zip("qkv", (q, k, v), strict=True)}
    gradients = {f"d{name}": layout for name, layout in tensors.items()}
    tensors["o"] = contiguous(problem.o_shape, dtype)
    tensors["lse"] = contiguous(problem.lse_shape, np.dtype(np.float32))
    engine.make_work(engine.Call(problem, tensors, 0), False, Recorder())
    if cell.direction != "forward":
        tensors = {"do_": contiguous(do.shape, dtype), **tensors, **gradients}
        deterministic = cell.direction == "deterministic"
        engine.make_work(engine.Call(problem, tensors, 0), deterministic, Recorder())
    return found


def path_of(folder: Path, version: ModuleType, kernel: str, plan: Any) -> Path:
    """Return where the machine code of a kernel belongs."""
    compiler = submodule(version, "cuda.compiler")
    parts = (ARCH, kernel, compiler.source(kernel), *plan.target, *sorted(plan.options()))
    return folder / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:32]}.cubin"


def compile_missing(folder: Path, version: ModuleType, cells: Iterable[Cell]) -> list[str]:
    """Compile what a version's cells need and the folder lacks; return a line on each kernel."""
    compiler = submodule(version, "cuda.compiler")
    lines = []
    for cell in cells:
        for kernel, plan in kernels_of(version, cell):
            path = path_of(folder, version, kernel, plan)
            if path.exists():
                continue
            cubin = compiler.compile_cubin(kernel, plan, ARCH)
            path.write_bytes(cubin.code)
            warnings = sorted(set(BAD_WARNINGS.findall(cubin.log)))
            said = f"{cubin.registers} registers, {cubin.stack_bytes} bytes of stack"
            lines.append(" ".join([f"{cell}: {kernel}: {said}", *warnings]))
    return lines


def load_from(folder: Path, version: ModuleType) -> None:
    """Let a version take its kernels from the folder, where it has them."""
    import cupy

    compiler = submodule(version, "cuda.compiler")
    compile_and_load = compiler.load

    @cache
    def load(kernel: str, plan: Any) -> Any:
        path = path_of(folder, version, kernel, plan)
        if not path.exists():
            return compile_and_load(kernel, plan)
        function = cupy.RawModule(path=str(path)).get_function(kernel)
        function.max_dynamic_shared_size_bytes = plan.shared_bytes
        return function

    compiler.load = load
