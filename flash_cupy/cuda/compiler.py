"""From the files of kernels_cu/ to kernels on a device.

A kernel is compiled from one flat source text, its local headers inlined: CuPy's disk cache keys
on the source text and not on the contents of included files.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .plan import KernelPlan

_INCLUDE = re.compile(r'#include "([^"]+)"')

#: What every compilation gets beside the plan's macros and the architecture. CuPy adds -ftz=true.
OPTIONS = ("-std=c++17",)


@cache
def kernel_folder() -> Path:
    """Return the folder of the kernels' sources: in the package if installed, else beside it."""
    package = Path(__file__).resolve().parent.parent
    candidates = (package / "kernels_cu", package.parent / "kernels_cu")
    for folder in candidates:
        if folder.is_dir():
            return folder
    raise RuntimeError(
        f"the kernels' sources are missing: neither {candidates[0]} nor {candidates[1]} is a folder"
    )


def inline_includes(name: str, search_path: Sequence[Path]) -> str:
    """Return the source `name` with its local headers inlined, each once, as one text.

    Parameters
    ----------
    name
        File name of a source, looked up like the headers it includes.
    search_path
        Folders, the first that has a file wins.

    Returns
    -------
    str
        Source in which ``#line`` directives name the file and line that each part comes from.
    """
    seen: set[str] = set()

    def expand(name: str) -> list[str]:
        seen.add(name)
        path = next((folder / name for folder in search_path if (folder / name).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, search_path))}")
        lines = [f'#line 1 "{name}"']
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = _INCLUDE.fullmatch(line.strip())
            if include:
                if include[1] not in seen:
                    lines += [*expand(include[1]), f'#line {number + 1} "{name}"']
                else:
                    lines.append("")
            else:
                lines.append("" if line.strip() == "#pragma once" else line)
        return lines

    return "\n".join(expand(name)) + "\n"


@cache
def source(kernel: str) -> str:
    """Return the flat source of a kernel: the file and the function in it bear the same name."""
    return inline_includes(f"{kernel}.cu", (kernel_folder(),))


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel for one architecture, and what its assembler said of it."""

    code: bytes
    log: str

    @property
    def registers(self) -> int:
        """Registers of a thread."""
        return self._number(r"Used (\d+) registers")

    @property
    def stack_bytes(self) -> int:
        """Local memory of a thread; 0 where everything stays in registers."""
        return self._number(r"(\d+) bytes stack frame")

    @property
    def spill_bytes(self) -> int:
        """Bytes that are stored because registers ran out."""
        return self._number(r"(\d+) bytes spill stores")

    def _number(self, pattern: str) -> int:
        match = re.search(pattern, self.log)
        if match is None:
            raise ValueError(f"the compiler's log says nothing like {pattern!r}: {self.log!r}")
        return int(match[1])


@cache
def targets_sm_90a() -> bool:
    """Whether CuPy can compile for sm_90a, the features of compute capability 9.0 alone.

    CuPy appends its own ``-arch=sm_90``; NVRTC accepts both from version 12.9 on.
    """
    from cupy.cuda import nvrtc

    return tuple(nvrtc.getVersion()) >= (12, 9)


@cache
def compile_cubin(kernel: str, plan: KernelPlan, arch: str) -> Cubin:
    """Compile a kernel for an architecture such as ``"sm_90a"``; this needs no GPU.

    Remembered here, but not in NVRTC's cache on disk, which has no log for what it finds there.

    Raises
    ------
    RuntimeError
        The source does not compile; the message is the compiler's log.
    """
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source(kernel), f"{kernel}.cu", [], [])
    how = (f"-arch={arch}", "-ftz=true", "--ptxas-options=-v", "--no-cache")
    options = (*how, *OPTIONS, *plan.options())
    try:
        nvrtc.compileProgram(program, options)
        code = nvrtc.getCUBIN(program) + b"\0"  # CuPy takes its last byte for the end of a string
        return Cubin(code, nvrtc.getProgramLog(program))
    except nvrtc.NVRTCError as error:
        raise RuntimeError(nvrtc.getProgramLog(program)) from error
    finally:
        nvrtc.destroyProgram(program)


_kernels: dict[tuple[int, str, KernelPlan], Any] = {}
_lock = threading.Lock()


def load(kernel: str, plan: KernelPlan) -> Any:
    """Return the `cupy.RawKernel` of a plan on the current device, compiled on the first call.

    Calls from several threads compile each kernel once.
    """
    import cupy

    key = (cupy.cuda.runtime.getDevice(), kernel, plan)
    found = _kernels.get(key)
    if found is None:
        with _lock:
            found = _kernels.get(key)
            if found is None:
                options = (*OPTIONS, *plan.target, *plan.options())
                module = cupy.RawModule(code=source(kernel), options=options)
                found = module.get_function(kernel)
                found.max_dynamic_shared_size_bytes = plan.shared_bytes
                _kernels[key] = found
    return found
