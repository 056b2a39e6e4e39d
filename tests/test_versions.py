"""The program that compares versions of the library, here with itself on the CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import cubins
import numpy as np
import pytest
import versions
from cells import Cell

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


def test_kernels_are_compiled_once(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("cubins")
    cell = Cell(1, 2, 100, 64, "full", "float16", "forward")
    version = versions.load_version(copy, "flash_cupy_version_of_test")
    (line,) = cubins.compile_missing(folder, version, [cell])
    assert "hopper_forward: 128 registers, 0 bytes of stack" in line
    assert cubins.compile_missing(folder, version, [cell]) == []
    (path,) = folder.iterdir()
    assert path.read_bytes().startswith(b"\x7fELF")

    with (copy / "kernels_cu" / "softmax.cuh").open("a") as source:
        source.write("// another one\n")
    other = versions.load_version(copy, "flash_cupy_version_of_test")
    ((kernel, plan),) = cubins.kernels_of(other, cell)
    assert cubins.path_of(folder, other, kernel, plan) != path


def test_kernels_of_a_pass_and_of_what_comes_before(copy: Path) -> None:
    version = versions.load_version(copy, "flash_cupy_version_of_test")
    cell = Cell(1, 4, 100, 256, "causal", "bfloat16", "deterministic", kv_heads=2)
    kernels = dict(cubins.kernels_of(version, cell))
    assert list(kernels) == ["hopper_forward", "hopper_row_dots", "hopper_backward_wide"]
    assert kernels["hopper_backward_wide"].deterministic


def test_without_a_gpu_kernels_are_only_compiled(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cubins, "compile_missing", lambda *args: [str(len(list(args[-1])))])
    assert versions.main([str(copy), *SIZES, "--cubins", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out == f"this: 4\n{copy}: 4\n"
    assert (tmp_path / "new").is_dir()


def test_folder_without_a_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        versions.main([str(tmp_path), *SIZES])
    assert str(tmp_path) in capsys.readouterr().err
