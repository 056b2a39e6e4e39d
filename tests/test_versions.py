"""The program that compares versions of the library, here with itself on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import versions

ROOT = Path(__file__).resolve().parent.parent
SIZES = ["--device=cpu", "--head-dims=8", "--seqlens=20", "--batch=1", "--heads=2"]
SIZES.append("--seconds=0.001")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Another version: a copy of this one."""
    for name in ("flash_cupy", "kernels_cu"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_versions_stand_side_by_side(copy: Path) -> None:
    module = versions.load_version(copy, "flash_cupy_version_of_test")
    x = np.ones((1, 3, 4))
    np.testing.assert_array_equal(module.attention(x, x, x, device="cpu"), x)
    compiler = __import__("flash_cupy_version_of_test.cuda.compiler", fromlist=["compiler"])
    assert compiler.kernel_folder() == copy / "kernels_cu"


def test_program(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert versions.main([str(copy), *SIZES, "--directions", "forward", "deterministic"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.endswith("than this version: time")
    assert len(lines) == 2 * 2
    for line in lines:
        assert "TFLOP/s" in line
        assert f"{copy} " in line
        assert line.endswith("%")


def test_other_results_are_pointed_out(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy / "flash_cupy" / "tiled.py"
    text = path.read_text()
    path.write_text(text.replace("problem.scale", "(2 * problem.scale)"))
    versions.main([str(copy), *SIZES])
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.endswith("WRONG") for line in lines)


@pytest.mark.parametrize(
    ("x", "difference"), [([1.0, -2.0], 0.0), ([1.0, -1.5], 0.25), ([np.nan, -2.0], np.inf)]
)
def test_largest_difference(x: list[float], difference: float) -> None:
    one, zero = np.ones(2), np.zeros(2)
    expected = (np.array([1.0, -2.0]), one, zero)
    assert versions.largest_difference((np.array(x), one, zero), expected) == difference


def test_folder_without_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main([str(tmp_path), *SIZES])
    assert str(tmp_path) in capsys.readouterr().err
