"""The fused kernels, held to the NumPy formulas: on a GPU, and on the simulated device.

Without a GPU cuBLAS is missing, all else is tested; sizes are small there, as it is slow.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ops_numpy
import pytest
from costs import flash_vjp
from fused_host import Host
from host.device import missing_compiler
from transformer import Config, Transformer, bfloat16

from flash_cupy import dense_attention, dense_attention_backward
from flash_cupy.gpu import why_no_gpu

cupy = pytest.importorskip("cupy")
import ops_cupy  # noqa: E402  needs CuPy

on_gpu = pytest.mark.skipif(why_no_gpu() is not None, reason=f"no GPU: {why_no_gpu()}")
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}  # of the largest element


class Gpu:
    """Where arrays are and kernels run."""

    def asarray(self, x: np.ndarray) -> Any:
        return cupy.asarray(x)

    def asnumpy(self, x: Any) -> np.ndarray:
        return cupy.asnumpy(x)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return cupy.empty(shape, dtype)

    def close(self) -> None:
        pass


class Pair:
    """The same arrays for both modules: in float32 for NumPy, on a device for the other."""

    def __init__(self, device: Any, dtype: str) -> None:
        self.device, self.dtype, self.asarray = device, dtype, device.asarray
        self.large = isinstance(device, Gpu)

    def activation(self, *shape: int, seed: int, scale: float = 1) -> tuple[np.ndarray, Any]:
        x = random(*shape, dtype=self.dtype, seed=seed) * np.float32(scale)
        return x, self.asarray(x.astype(self.dtype))

    def parameter(self, *shape: int, seed: int) -> tuple[np.ndarray, Any]:
        x = random(*shape, seed=seed)
        return x, self.asarray(x)

    def close(self, got: Any, expected: np.ndarray, dtype: str | None = None) -> None:
        got = self.device.asnumpy(got).astype(np.float32)
        assert got.shape == expected.shape
        scale = np.abs(expected).max() + 1e-30
        tolerance = TOLERANCE[dtype or self.dtype]
        np.testing.assert_allclose(got / scale, expected / scale, rtol=0, atol=tolerance)


HOST_PAIR = pytest.param(
    ("host", "bfloat16"),
    id="host",
    marks=pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler())),
)
GPU_PAIRS = [pytest.param(("gpu", dtype), id=f"gpu-{dtype}", marks=on_gpu) for dtype in TOLERANCE]


@pytest.fixture(params=[HOST_PAIR, *GPU_PAIRS])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    where, dtype = request.param
    bfloat16()  # NumPy knows the name from now on
    device = Host(monkeypatch) if where == "host" else Gpu()
    yield Pair(device, dtype)
    device.close()


def widths(pair: Pair) -> tuple[int, ...]:
    """A row of a few packs, and rows that do and do not fill whole warps."""
    return (8, 128, 512, 768, 1024) if pair.large else (264,)


def random(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Draw numbers that `dtype` has, as float32, so that both sides see the same."""
    drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return drawn.astype(bfloat16()).astype(np.float32) if dtype == "bfloat16" else drawn


@pytest.mark.parametrize(
    ("width", "dtype", "arch"),
    [(8, "bfloat16", "sm_80"), (1024, "bfloat16", "sm_90a"), (1024, "float32", "sm_90a")],
)
def test_kernels_compile_and_stay_in_registers(width: int, dtype: str, arch: str) -> None:
    pathfinder = pytest.importorskip("cuda.pathfinder")
    from cupy.cuda import nvrtc

    headers = pathfinder.find_nvidia_header_directory("cudart")
    program = nvrtc.createProgram(ops_cupy.source(), "fused.cu", [], [])
    options = (f"-arch={arch}", "-ftz=true", "--ptxas-options=-v", f"-I{headers}")
    try:
        nvrtc.compileProgram(program, (*options, *ops_cupy.options(dtype, width)))
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    nvrtc.destroyProgram(program)
    assert "warning" not in log
    assert log.count(" 0 bytes spill stores") == log.count("bytes spill stores") > 10


def test_embedding(pair: Pair) -> None:
    for width in widths(pair):
        table, g_table = pair.activation(16, width, seed=1)
        positions, g_positions = pair.activation(9, width, seed=2)
        dx, g_dx = pair.activation(21, width, seed=3)
        tokens = np.random.default_rng(0).integers(16, size=21)
        g_tokens = pair.asarray(tokens)
        for p, g_p in ((None, None), (positions, g_positions)):
            got = ops_cupy.embed(g_tokens, g_table, g_p, 7)
            pair.close(got, ops_numpy.embed(tokens, table, p, 7))
        grads = [np.ones_like(x) for x in (table, positions)]
        g_grads = [pair.asarray(x) for x in grads]
        ops_numpy.embed_backward(dx, tokens, *grads, 7)
        ops_cupy.embed_backward(g_dx, g_tokens, *g_grads, 7)
        for got, expected in zip(g_grads, grads, strict=True):
            pair.close(got, expected, "float32")
        rows = np.array([20, 3, 4])
        g_rows = pair.asarray(rows)
        pair.close(ops_cupy.gather(g_dx, g_rows), dx[rows])
        pair.close(ops_cupy.scatter(g_dx[:3], g_rows, 30), ops_numpy.scatter(dx[:3], rows, 30))


@pytest.mark.parametrize("updated", [True, False])
def test_add_norm(updated: bool, pair: Pair) -> None:
    rows = 1003 if pair.large else 37
    for width in widths(pair):
        x, g_x = pair.activation(rows, width, seed=1)
        y, g_y = pair.activation(rows, width, seed=2) if updated else (None, None)
        bias, g_bias = pair.parameter(width, seed=3) if updated else (None, None)
        (gain, g_gain), (shift, g_shift) = (pair.parameter(width, seed=seed) for seed in (4, 5))
        total, normal, statistics = ops_numpy.add_norm(x, y, bias, gain, shift)
        g_total, g_normal, g_statistics = ops_cupy.add_norm(g_x, g_y, g_bias, g_gain, g_shift)
        pair.close(g_total, total)
        pair.close(g_normal, normal)

        (dnormal, g_dnormal), (dx, g_dx) = (pair.activation(rows, width, seed=s) for s in (6, 7))
        for stream, g_stream in ((None, None), (dx, g_dx)):
            grads = [np.ones(width, np.float32) for _ in range(2 + updated)]
            g_grads = [pair.asarray(x) for x in grads]
            none = [] if updated else [None]
            expected = ops_numpy.add_norm_backward(
                dnormal, stream, total, statistics, gain, *grads, *none
            )
            got = ops_cupy.add_norm_backward(
                g_dnormal.copy(), g_stream, g_total, g_statistics, g_gain, *g_grads, *none
            )
            pair.close(got, expected)
            for g_grad, grad in zip(g_grads, grads, strict=True):
                pair.close(g_grad, grad)


@pytest.mark.parametrize("biased", [True, False])
def test_linear(biased: bool, pair: Pair) -> None:
    (x, g_x), (weight, g_weight) = pair.activation(70, 24, seed=1), pair.activation(24, 40, seed=2)
    bias, g_bias = pair.parameter(40, seed=3) if biased else (None, None)
    pair.close(ops_cupy.linear(g_x, g_weight, g_bias), ops_numpy.linear(x, weight, bias))
    dy, g_dy = pair.activation(70, 40, seed=4)
    grads = [np.ones((24, 40), np.float32), np.ones(40, np.float32)][: 1 + biased]
    g_grads = [pair.asarray(grad) for grad in grads]
    none = [] if biased else [None]
    expected = ops_numpy.linear_backward(dy, x, weight, *grads, *none)
    pair.close(ops_cupy.linear_backward(g_dy, g_x, g_weight, *g_grads, *none), expected)
    for g_grad, grad in zip(g_grads, grads, strict=True):
        pair.close(g_grad, grad, "float32")


def test_bias_gelu(pair: Pair) -> None:
    for shape in ((1, 8), (77, 264), (1003, 3072)) if pair.large else ((1, 8), (27, 264)):
        (u, g_u), (dy, g_dy) = pair.activation(*shape, seed=1), pair.activation(*shape, seed=2)
        bias, g_bias = pair.parameter(shape[1], seed=3)
        pair.close(ops_cupy.bias_gelu(g_u, g_bias), ops_numpy.bias_gelu(u, bias))
        grad = np.ones(shape[1], np.float32)
        g_grad = pair.asarray(grad)
        expected = ops_numpy.bias_gelu_backward(dy, u, bias, grad)
        pair.close(ops_cupy.bias_gelu_backward(g_dy, g_u, g_bias, g_grad), expected)
        pair.close(g_grad, grad)


def test_cross_entropy(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    for outputs in (16, 5008) if pair.large else (16, 4104):
        rows = 70 if pair.large else 7
        monkeypatch.setattr(ops_cupy, "LOGITS", 2 * rows // 7 * outputs)  # parts, the last shorter
        # Logits of order one: those of order ten, rounded to bfloat16, are off by percents.
        x, g_x = pair.activation(rows, 64, seed=1, scale=1 / 8)
        table, g_table = pair.activation(outputs, 64, seed=2)
        targets = np.random.default_rng(0).integers(outputs, size=rows)
        g_targets = pair.asarray(targets)
        grad = np.ones_like(table)
        g_grad = pair.asarray(grad)
        loss, dx = ops_numpy.cross_entropy_backward(x, table, targets, grad)
        g_loss, g_dx = ops_cupy.cross_entropy_backward(g_x, g_table, g_targets, g_grad)
        assert float(g_loss) == pytest.approx(float(loss), rel=TOLERANCE[pair.dtype])
        pair.close(g_dx, dx)
        pair.close(g_grad, grad)
        again = ops_cupy.cross_entropy(g_x, g_table, g_targets)
        assert float(again) == pytest.approx(float(g_loss), rel=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_dense_attention(causal: bool, pair: Pair) -> None:
    for seqlen in (8, 136, 600) if pair.large else (8, 272):
        shape = (2, seqlen, 3, 32) if pair.large else (1, seqlen, 1, 16)  # (B, N, H, D) in memory
        arrays = [pair.activation(*shape, seed=seed) for seed in range(4)]
        q, k, v, do = (x.swapaxes(1, 2).astype(np.float64) for x, _ in arrays)
        g_q, g_k, g_v, g_do = (x.swapaxes(1, 2) for _, x in arrays)
        o, *gradients = (pair.device.empty(shape, g_q.dtype).swapaxes(1, 2) for _ in range(4))
        _, backprop = ops_cupy.dense_attention_vjp(g_q, g_k, g_v, out=o, causal=causal)
        backprop(g_do, out=tuple(gradients))
        how = {"causal": causal, "device": "cpu"}
        pair.close(o, dense_attention(q, k, v, **how))
        expected = dense_attention_backward(do, q, k, v, **how)
        for got, truth in zip(gradients, expected, strict=True):
            pair.close(got, truth)


def test_adamw(pair: Pair) -> None:
    size, decayed = 4096 + 64, 4096
    value, grad = random(size), random(size)
    g_value, g_grad = pair.asarray(value), pair.asarray(grad)
    g_work = pair.asarray(value.astype(pair.dtype))
    mean, square, g_mean, g_square = (np.zeros(size, np.float32) for _ in range(4))
    g_mean, g_square = pair.asarray(g_mean), pair.asarray(g_square)
    how = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "decay": 0.1, "clip": 1.0}
    for step in range(3):
        grad[:] = random(size, seed=step) * 0.1**step  # clipped, and short enough in the end
        g_grad[:] = pair.asarray(grad)
        constants = np.array([0.01, 1 / (1 - 0.9 ** (step + 1)), 1 / (1 - 0.95 ** (step + 1))])
        constants = constants.astype(np.float32)
        state, g_state = (value, grad, mean, square), (g_value, g_grad, g_mean, g_square)
        ops_numpy.adamw(*state, value, constants, decayed=decayed, **how)
        ops_cupy.adamw(*g_state, g_work, pair.asarray(constants), decayed=decayed, **how)
        assert not g_grad.any()
    pair.close(g_value, value, "float32")
    pair.close(g_mean, mean, "float32")
    rounded = pair.device.asnumpy(g_value).astype(pair.dtype)
    np.testing.assert_array_equal(pair.device.asnumpy(g_work), rounded)


@pytest.mark.parametrize("alibi", [True, False])
def test_whole_model(alibi: bool, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the same model by both modules."""
    config = Config(vocabulary=64, context=24, layers=2, heads=3, width=264, alibi=alibi)
    on_cpu = partial(flash_vjp, device="cpu")
    model = Transformer(config, on_cpu)
    mixed = replace(config, mixed=pair.dtype == "bfloat16")
    if isinstance(pair.device, Host):
        monkeypatch.setattr("transformer.operations", lambda xp: ops_cupy)
        on_device = Transformer(mixed, on_cpu)
    else:
        on_device = Transformer(mixed, flash_vjp, cupy)
    on_device.parameters.value[:] = pair.asarray(model.parameters.value)
    on_device.parameters.work[:] = on_device.parameters.value
    tokens = np.random.default_rng(0).integers(64, size=(2, 25))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    rows = None if alibi else np.array([3, 40, 17])
    targets = targets if rows is None else targets.ravel()[rows]
    loss = model.gradients(inputs, targets, rows)
    g_rows = None if rows is None else pair.asarray(rows)
    g_loss = on_device.gradients(pair.asarray(inputs), pair.asarray(targets), g_rows)
    assert float(g_loss) == pytest.approx(float(loss), rel=TOLERANCE[pair.dtype])
    for name, each in on_device.parameters.named.items():
        expected = model.parameters[name].grad
        difference = pair.device.asnumpy(each.grad) - expected
        relative = np.linalg.norm(difference) / (np.linalg.norm(expected) + 1e-6)
        assert relative < (5e-2 if mixed.mixed else 1e-4), name
