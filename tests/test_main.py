"""``python -m flash_cupy``: what it prints, and that a wrong engine makes it fail."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
from strategies import FLOAT32, FLOAT64
from test_why_no_gpu import FakeCupy

from flash_cupy import __main__ as main
from flash_cupy import arrays, tiled
from flash_cupy.gpu import why_no_cuda


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "SEQLEN", 64)


def test_all_checks_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main() == 0
    printed = capsys.readouterr().out
    assert "flash_cupy" in printed and "engines: cpu" in printed
    assert ("GPU: none, because " in printed) == (why_no_cuda() is not None)
    assert printed.count("  ok") == len(main.OPTIONS) * 4 * (
        2 if "engines: cpu, gpu" in printed else 1
    )
    assert "all checks passed" in printed


def test_every_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is too old, and whatever is wrong with CUDA itself."""
    cupy = FakeCupy()
    cupy.capabilities = [(9, 0), (7, 5)]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(main, "why_no_cuda", lambda: None)
    monkeypatch.setattr(main, "nvrtc_build", lambda: (12, 9, 86))
    monkeypatch.setattr(main, "why_no_gpu", lambda: [None, "it is too old"][cupy.current])
    assert list(main._gpus()) == [
        "CUDA: driver for 12.8, NVRTC 12.9.86",
        "GPU 0: Card 0, compute capability 9.0",
        "GPU 1: Card 1, compute capability 7.5; not used, because it is too old",
    ]
    monkeypatch.setattr(main, "why_no_cuda", lambda: "NVRTC is 12.4, pip install another")
    assert list(main._gpus()) == ["GPU: none, because NVRTC is 12.4, pip install another"]


@pytest.mark.parametrize("wrong", [1e-4, np.nan])
def test_a_wrong_result_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    forward = tiled.forward

    def slightly_wrong(problem, q, k, v, alibi_slopes, o, lse):
        forward(problem, q, k, v, alibi_slopes, o, lse)
        o[..., 0, 0] += wrong

    monkeypatch.setattr(tiled, "forward", slightly_wrong)
    assert main.main() == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "checks FAILED" in printed


@pytest.mark.parametrize("wrong, status", [(0, 0), (1, 1)])
def test_exit_status(monkeypatch: pytest.MonkeyPatch, wrong: float, status: int) -> None:
    backward = tiled.backward

    def perhaps_wrong(problem, *args):
        backward(problem, *args)
        dk = args[-3]
        dk[..., 0, 0] += wrong

    monkeypatch.setattr(tiled, "backward", perhaps_wrong)
    monkeypatch.setattr(arrays, "dtypes", lambda: frozenset([FLOAT32, FLOAT64]))
    monkeypatch.delitem(sys.modules, "flash_cupy.__main__")
    with pytest.raises(SystemExit) as exit:
        runpy.run_module("flash_cupy", run_name="__main__")
    assert exit.value.code == status
