"""The record of the last full test run on a GPU, and whether it covers the sources as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORT = ROOT / "tests" / "gpu_report.json"
FOLDERS = ("flash_cupy", "kernels_cu", "tests")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".hpp")


def source_files() -> Iterator[Path]:
    """Yield every file that a GPU's results may depend on."""
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                yield path


def source_hash() -> str:
    """SHA-256 over names and contents of the sources."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def write(passed: int, failed: int, skipped: int) -> None:
    """Record a run on this machine's GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    driver = cupy.cuda.runtime.driverGetVersion()
    report = {
        "gpu": properties["name"].decode(),
        "compute_capability": f"{properties['major']}.{properties['minor']}",
        "cuda_driver": f"{driver // 1000}.{driver % 1000 // 10}",
        "cupy": cupy.__version__,
        "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "passed": passed,
        "failed": failed,
        "skipped": skipped,
        "sources_sha256": source_hash(),
    }
    REPORT.write_text(json.dumps(report, indent=2) + "\n")


def describe() -> str:
    """Say in one line what the recorded run covers."""
    if not REPORT.exists():
        return "GPU: no complete run of the tests on one is recorded"
    report = json.loads(REPORT.read_text())
    current = report["sources_sha256"] == source_hash()
    return (
        f"GPU: the last complete run of the tests, on {report['gpu']} "
        f"({report['passed']} passed, {report['failed']} failed)"
        + (", covers these sources" if current else ", was of OTHER sources than these")
    )
