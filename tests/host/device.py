"""A CUDA device in plain C++: it runs the files of ``kernels_cu`` on a machine without a GPU.

Kernels are compiled by g++ against the headers of this folder, which stand in place of those of the
same name in kernels_cu, and run in a worker process, which holds the device's memory. What a GPU
would let pass or answer with garbage ends the worker with a report and raises `HostKernelError`
here: accesses out of bounds or misaligned, reads of what nothing wrote, missing waits for
asynchronous copies and matrix products, missing fences, races between threads, copies and products,
races with a kernel that may still run, barriers and collectives that not all threads reach,
deadlocks, integer overflow and indices beyond an array. The next use of the device starts a fresh
worker with empty memory.

Most reports do not depend on the order in which threads happen to run: memory.hpp knows who has
written each byte and which barriers lie between.

>>> device = HostDevice()
>>> source = '''
... extern "C" __global__ void add(float* x, const float* y, float scale) {
...     x[threadIdx.x] += scale * y[threadIdx.x];
... }'''
>>> kernel = device.compile(source, "add")
>>> x = device.asarray(np.ones(32, np.float32))
>>> y = device.asarray(np.arange(32, dtype=np.float32))
>>> kernel((1,), (32,), (x, y, np.float32(2)))
>>> float(x.get()[3])
7.0
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

HERE = Path(__file__).parent
COMPILER = "g++"
WORKER_SOURCES = (
    "worker.cpp",
    "block.cpp",
    "clocks.cpp",
    "memory.cpp",
    "access.cpp",
    "barriers.cpp",
    "copies.cpp",
    "wgmma.cpp",
)
WORKER_FLAGS = ("-std=c++17", "-O3", "-g", "-rdynamic")
KERNEL_FLAGS = (
    "-std=c++17",
    "-O1",
    "-g",
    "-fPIC",
    "-fno-exceptions",
    "-fno-strict-aliasing",
    # Loads and stores call the worker's checks, see access.cpp.
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=undefined",
    "-fno-sanitize-recover=all",
    # Registers that nothing wrote hold a pattern, not what happens to lie on the stack.
    "-ftrivial-auto-var-init=pattern",
    "-Wno-unknown-pragmas",
    "-include",
    str(HERE / "cuda.hpp"),
)
# Not -fsanitize=thread, which would bring the checks of another runtime.
KERNEL_LINK_FLAGS = ("-shared", "-Wl,-Bsymbolic,--wrap=memcpy,--wrap=memset", "-lubsan", "-lm")


class HostKernelError(RuntimeError):
    """A kernel did something forbidden: what, in which thread and on which line of source."""


def missing_compiler() -> str | None:
    """Say why kernels cannot run on this machine; None if they can."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler: {COMPILER} is not on the PATH"
    command = [COMPILER, "-dumpversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if int(version.split(".")[0]) < 12:
        return f"{COMPILER} {version} is too old: the host device takes version 12 or newer"
    return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "flash_cupy" / "host_device"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _run_compiler(arguments: Sequence[str], target: Path) -> None:
    """Compile to `target`, which appears complete or not at all."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        unfinished = Path(folder) / target.name
        command = [COMPILER, *arguments, "-o", str(unfinished)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode != 0:
            raise HostKernelError(f"{result.stderr}\n{' '.join(command)}")
        unfinished.replace(target)


def _build_worker() -> Path:
    headers = sorted(HERE.glob("*.hpp")) + [HERE / name for name in WORKER_SOURCES]
    digest = _digest([*WORKER_FLAGS, *(path.read_text() for path in headers)])
    target = _cache_folder() / f"worker-{digest}"
    if not target.exists():
        sources = [str(HERE / name) for name in WORKER_SOURCES]
        _run_compiler([*WORKER_FLAGS, *sources, "-ldl"], target)
    return target


def _build_kernel(source: str, name: str, options: Sequence[str]) -> Path:
    source = f"{source}\nHOST_ENTRY({name})\n"
    words = [(HERE / header).read_text() for header in ("cuda.hpp", "runtime.hpp")]
    digest = _digest([*KERNEL_FLAGS, *KERNEL_LINK_FLAGS, *options, *words, source])
    target = _cache_folder() / f"{name}-{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            text, compiled = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.o"
            text.write_text(source)
            _run_compiler([*KERNEL_FLAGS, *options, "-c", str(text)], compiled)
            _run_compiler([str(compiled), *KERNEL_LINK_FLAGS], target)
    return target


def _source_lines(report: str) -> str:
    """Replace places in machine code, "[file.so+0x123]", by lines of source and their callers."""

    def look_up(match: re.Match[str]) -> str:
        library, offset = match.groups()
        command = ["addr2line", "-f", "-C", "-i", "-s", "-e", library, offset]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return match.group()
        lines = answer.splitlines()
        calls = [
            f"{re.sub(r'[(<].*', '', function)} ({place.split(' ')[0]})"
            for function, place in zip(lines[::2], lines[1::2], strict=False)
            if "host_call" not in function and "host::call" not in function
        ]
        return ", from ".join(calls)

    report = re.sub(r"\[([^\[\]]+\.so)\+(0x[0-9a-f]+)\]", look_up, report)
    return "\n".join(line for line in report.splitlines() if line.strip())


class HostArray:
    """An array in the device's memory: what a kernel gets as a pointer."""

    def __init__(self, device: HostDevice, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.device = device
        self.shape = shape
        self.dtype = np.dtype(dtype)
        self.nbytes = math.prod(shape) * self.dtype.itemsize
        self.address = device.malloc(self.nbytes)
        weakref.finalize(self, device.release, device.worker, self.address).atexit = False

    def get(self) -> NDArray:
        """Copy to a NumPy array."""
        data = self.device.read(self.address, self.nbytes)
        return np.frombuffer(data, self.dtype).reshape(self.shape).copy()


class HostKernel:
    """A compiled kernel, called as a `cupy.RawKernel` is."""

    def __init__(self, device: HostDevice, library: Path) -> None:
        self.device = device
        self.library = library

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[HostArray | NDArray | np.generic],
        *,
        shared_mem: int = 0,
        overlaps: bool = False,
        seed: int = 0,
    ) -> None:
        """Run the kernel and wait for its end.

        Parameters
        ----------
        grid, block
            Up to three sizes each; the block holds whole warps.
        args
            NumPy scalars and arrays of size 1 go by value, a HostArray as its address.
        shared_mem
            Bytes of dynamic shared memory.
        overlaps
            Whether the kernel may start before the one that was launched before it has ended
            ("programmatic dependent launch"). Kernels run one after the other all the same, but
            an access that conflicts with one of that kernel's is an error unless it comes after
            a `wait_for_prerequisites`.
        seed
            Chooses the order in which blocks and threads run.
        """
        self.device.launch(
            self, grid, block, args, shared_mem=shared_mem, overlaps=overlaps, seed=seed
        )


class HostDevice:
    """Device memory and kernels in a worker process, started on first use."""

    def __init__(self) -> None:
        self.worker: subprocess.Popen[bytes] | None = None
        self._reports: IO[bytes] | None = None
        self._loaded: dict[Path, str] = {}

    def compile(self, source: str, name: str, options: Sequence[str] = ()) -> HostKernel:
        """Compile the kernel `name` of a flat source, or take it from the cache on disk.

        `options` are macro definitions, ``-DNAME=VALUE``.
        """
        return HostKernel(self, _build_kernel(source, name, options))

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> HostArray:
        """Make an array that nothing has written: bytes of 0xFF, NaN in every float type."""
        return HostArray(self, shape, dtype)

    def asarray(self, values: ArrayLike) -> HostArray:
        """Copy a NumPy array to the device, in C order."""
        values = np.asarray(values)
        array = self.empty(values.shape, values.dtype)
        self.write(array.address, values.tobytes())
        return array

    def malloc(self, nbytes: int) -> int:
        return int(self._ask(f"malloc {nbytes}"))

    def free(self, address: int) -> None:
        self._ask(f"free {address}")

    def release(self, worker: subprocess.Popen[bytes], address: int) -> None:
        """Free what was allocated in `worker`, unless its memory is gone with it."""
        if worker is self.worker:
            self.free(address)

    def write(self, address: int, data: bytes, written: bytes | None = None) -> None:
        """Copy to the device. Where a byte of `written` is 0, the data counts as not written."""
        marks = b"\1" * len(data) if written is None else written
        self._ask(f"write {address} {len(data)}", data + marks)

    def read(self, address: int, nbytes: int) -> bytes:
        self._ask(f"read {address} {nbytes}")
        return self._receive(nbytes)

    def launch(
        self,
        kernel: HostKernel,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[HostArray | NDArray | np.generic],
        *,
        shared_mem: int,
        overlaps: bool,
        seed: int,
    ) -> None:
        if kernel.library not in self._loaded:
            self._loaded[kernel.library] = self._ask(f"load {kernel.library}")
        values = [
            np.uint64(arg.address) if isinstance(arg, HostArray) else np.asarray(arg)
            for arg in args
        ]
        data = [value.tobytes() for value in values]
        sizes = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        words = [seed, int(overlaps), shared_mem, *sizes, len(data), *map(len, data)]
        self._ask(
            f"launch {self._loaded[kernel.library]} {' '.join(map(str, words))}", b"".join(data)
        )

    def close(self) -> None:
        """End the worker. Its memory is gone; the next use starts a fresh one."""
        if self.worker is not None:
            self.worker.stdin.close()
            self.worker.stdout.close()
            self.worker.wait()
            self._reports.close()
        self.worker = None
        self._loaded.clear()

    def _start(self) -> None:
        self._reports = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the worker)
        self.worker = subprocess.Popen(
            [_build_worker()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._reports,
        )

    def _ask(self, command: str, data: bytes = b"") -> str:
        if self.worker is None:
            self._start()
        try:
            self.worker.stdin.write(command.encode() + b"\n" + data)
            self.worker.stdin.flush()
        except BrokenPipeError:
            self._raise_report()
        answer = self.worker.stdout.readline().decode()
        if not answer:
            self._raise_report()
        status, _, rest = answer.rstrip("\n").partition(" ")
        if status == "error":
            raise HostKernelError(rest)
        return rest

    def _receive(self, nbytes: int) -> bytes:
        data = self.worker.stdout.read(nbytes)
        if len(data) < nbytes:
            self._raise_report()
        return data

    def _raise_report(self) -> None:
        self.worker.wait()
        self._reports.seek(0)
        report = self._reports.read().decode(errors="replace")
        code = self.worker.returncode
        self.close()
        raise HostKernelError(_source_lines(report) or f"the worker ended with exit code {code}")
