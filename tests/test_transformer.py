"""The transformer's pieces and the whole of it against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import transformer
from transformer import Array, Config, Parameter, Parameters, Transformer

import flash_cupy

BATCH, CONTEXT = 2, 5
SMALL = Config(vocabulary=11, context=7, layers=2, heads=2, width=6, dtype="float64")
ATTEND = partial(flash_cupy.attention_vjp, device="cpu")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def parameter(*shape: int, seed: int = 1) -> Parameter:
    return Parameter(random(*shape, seed=seed), np.zeros(shape))


def small_model(config: Config = SMALL) -> Transformer:
    """Build a model whose parameters, gains and biases included, are of order one."""
    model = Transformer(config, ATTEND)
    model.parameters.value += 0.3 * random(model.parameters.value.size, seed=2)
    return model


def slopes(function: Callable[[], float], array: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Differentiate `function()` by every element of `array`, by central differences."""
    result = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        below = function()
        array[index] = kept
        result[index] = (above - below) / (2 * step)
    return result


def check_piece(
    piece: Callable[[Array], tuple[Array, transformer.Backprop]],
    x: np.ndarray,
    parameters: list[Parameter],
) -> None:
    """Hold all gradients of ⟨piece(x), dy⟩ against finite differences; gradients must add up."""
    y, backprop = piece(x)
    dy = random(*y.shape, seed=3)
    for each in parameters:
        each.grad[...] = 1.0
    dx = backprop(dy.copy())

    def value() -> float:
        return float((piece(x)[0] * dy).sum())

    if x.dtype.kind == "f":
        np.testing.assert_allclose(dx, slopes(value, x), rtol=1e-7, atol=1e-8)
    for each in parameters:
        np.testing.assert_allclose(each.grad - 1, slopes(value, each.value), rtol=1e-7, atol=1e-8)


def test_linear() -> None:
    weight, bias = parameter(3, 4), parameter(4)
    x = random(6, 3)
    np.testing.assert_allclose(
        transformer.linear(x, weight, bias)[0], x @ weight.value + bias.value, rtol=1e-14
    )
    check_piece(lambda x: transformer.linear(x, weight, bias), x, [weight, bias])


def test_layer_norm() -> None:
    weight, bias = parameter(5), parameter(5, seed=2)
    check_piece(lambda x: transformer.layer_norm(x, weight, bias), random(4, 5), [weight, bias])


def test_layer_norm_rows_have_mean_zero_and_variance_one() -> None:
    unit = Parameter(np.ones(64), np.zeros(64))
    zero = Parameter(np.zeros(64), np.zeros(64))
    y, _ = transformer.layer_norm(3 + 5 * random(10, 64), unit, zero)
    np.testing.assert_allclose(y.mean(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(y.var(axis=1), 1, rtol=1e-5)


def test_gelu() -> None:
    check_piece(transformer.gelu, 2 * random(4, 6), [])
    x = np.array([-100.0, 0.0, 1.0, 100.0])
    np.testing.assert_allclose(transformer.gelu(x)[0], [0, 0, 0.841192, 100], atol=1e-6)


def test_embedding() -> None:
    table, tokens = parameter(4, 3), np.array([0, 3, 3, 1, 0])  # repeated: gradients add up
    np.testing.assert_array_equal(transformer.embedding(tokens, table)[0][3], table.value[1])
    check_piece(lambda tokens: transformer.embedding(tokens, table), tokens, [table])


def test_add_positions() -> None:
    table, x = parameter(6, 3), random(2 * 5, 3)
    y, _ = transformer.add_positions(x, table, context=5)
    np.testing.assert_array_equal(y[7], x[7] + table.value[2])
    check_piece(lambda x: transformer.add_positions(x, table, context=5), x, [table])


def test_alibi_slopes() -> None:
    np.testing.assert_array_equal(transformer.alibi_slopes(4), [1 / 4, 1 / 16, 1 / 64, 1 / 256])


@pytest.mark.parametrize("options", [{"causal": True}, {"alibi_slopes": np.array([0.5, 0.1])}])
def test_attention(options: dict[str, Any]) -> None:
    parameters, attend = small_model().parameters, partial(ATTEND, **options)
    used = [parameters[f"0.attention.{p}.{k}"] for p in ("qkv", "out") for k in ("weight", "bias")]
    check_piece(
        lambda x: transformer.attention(
            x, parameters, "0.attention", heads=2, context=CONTEXT, attend=attend
        ),
        random(BATCH * CONTEXT, SMALL.width),
        used,
    )


def test_mlp_and_residual() -> None:
    parameters = small_model().parameters
    used = [p for name, p in parameters.named.items() if name.startswith("0.mlp")]
    assert len(used) == 6
    check_piece(
        lambda x: transformer.residual(x, parameters, "0.mlp", transformer.mlp),
        random(4, SMALL.width),
        used,
    )


def test_cross_entropy() -> None:
    table, targets = parameter(7, 3), np.array([0, 6, 2, 2])
    x = random(4, 3)
    logits = x @ table.value.T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss, _ = transformer.cross_entropy(x, table, targets)
    assert loss == pytest.approx(-np.log(p[range(4), targets]).mean(), rel=1e-13)
    check_piece(lambda x: transformer.cross_entropy(x, table, targets), x, [table])


def test_cross_entropy_of_huge_logits() -> None:
    table = Parameter(np.array([[1e4], [-1e4]]), np.zeros((2, 1)))
    loss, backprop = transformer.cross_entropy(np.ones((1, 1)), table, np.array([1]))
    assert loss == pytest.approx(2e4)
    assert np.isfinite(backprop(1.0)).all()


@pytest.mark.parametrize("options", [{"alibi": True}, {"alibi": False}, {"causal": False}])
def test_whole_model(options: dict[str, bool]) -> None:
    """Every parameter's gradient, along one random direction a parameter."""
    model = small_model(replace(SMALL, **options))
    assert ("position" in model.parameters.named) == (not model.config.alibi)
    tokens = np.random.default_rng(4).integers(SMALL.vocabulary, size=(BATCH, CONTEXT))
    targets = np.roll(tokens, -1, axis=1)
    _, backprop = model.loss(tokens, targets)
    backprop()
    for seed, (name, each) in enumerate(model.parameters.named.items()):
        direction, kept, step = random(*each.value.shape, seed=seed), each.value.copy(), 1e-5
        ends = []
        for sign in (1, -1):
            each.value[...] = kept + sign * step * direction
            ends.append(float(model.loss(tokens, targets)[0]))
        each.value[...] = kept
        slope = (ends[0] - ends[1]) / (2 * step)
        assert (each.grad * direction).sum() == pytest.approx(slope, rel=1e-6, abs=1e-9), name


@pytest.mark.parametrize("causal", [True, False])
def test_later_tokens_reach_earlier_ones_only_without_causal(causal: bool) -> None:
    model = small_model(replace(SMALL, causal=causal))
    tokens = np.random.default_rng(4).integers(SMALL.vocabulary, size=(1, CONTEXT))
    changed = tokens.copy()
    changed[0, 3:] = (changed[0, 3:] + 1) % SMALL.vocabulary
    before, after = (model.hidden(each)[0] for each in (tokens, changed))
    differ = (before != after).any(axis=1)
    np.testing.assert_array_equal(differ, [not causal] * 3 + [True] * 2)


def test_next_logits_are_those_of_the_loss() -> None:
    model = small_model()
    tokens = np.random.default_rng(4).integers(SMALL.vocabulary, size=(3, 1))
    targets = np.array([[1], [5], [10]])
    logits = model.next_logits(tokens)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(p[range(3), targets[:, 0]]).mean()
    assert float(model.loss(tokens, targets)[0]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("alibi", [True, False])
def test_the_order_of_tokens_matters(alibi: bool) -> None:
    # One layer's causal mask alone would leave the last token blind to it.
    model = small_model(replace(SMALL, layers=1, alibi=alibi))
    one, other = (model.hidden(np.array([order]))[0][-1] for order in ([1, 2, 3], [2, 1, 3]))
    assert np.abs(one - other).max() > 1e-3


def test_parameters_are_views_of_one_vector_with_matrices_first() -> None:
    shapes = {"bias": np.ones(2), "weight": np.full((2, 3), 2.0), "gain": np.full(1, 3.0)}
    parameters = Parameters(shapes, np)
    np.testing.assert_array_equal(parameters.value, [2] * 6 + [1, 1, 3])
    assert parameters.matrix_size == 6
    parameters.value[:] = np.arange(9)
    np.testing.assert_array_equal(parameters["weight"].value, [[0, 1, 2], [3, 4, 5]])
    parameters["gain"].grad[0] = 7
    assert parameters.grad[8] == 7


def test_everything_stays_in_the_parameters_dtype() -> None:
    model = Transformer(Config(vocabulary=11, context=5, layers=1, heads=2, width=4), ATTEND)
    loss, backprop = model.loss(np.zeros((1, 5), int), np.ones((1, 5), int))
    backprop()
    dtypes = {a.dtype for a in (model.parameters.value, model.parameters.grad, loss)}
    dtypes.add(model.hidden(np.zeros((1, 5), int))[0].dtype)
    assert dtypes == {np.dtype("float32")}


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        Config(width=10, heads=4)


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens a sequence: the model takes 7"):
        small_model().hidden(np.zeros((1, 8), int))
