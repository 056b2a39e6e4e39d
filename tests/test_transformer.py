"""The transformer's pieces and the whole of it against finite differences, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import ops_numpy as ops
import pytest
import transformer
from costs import flash_vjp
from transformer import Array, Config, Parameter, Parameters, Transformer

BATCH, CONTEXT = 2, 5
SMALL = Config(vocabulary=11, context=7, layers=2, heads=2, width=6, dtype="float64")
ATTEND = partial(flash_vjp, device="cpu")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def parameter(*shape: int, seed: int = 1) -> Parameter:
    value = random(*shape, seed=seed)
    return Parameter(value, np.zeros(shape), value)


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


def check_gradients(
    function: Callable[..., tuple[Array, ...]],
    backprop: Callable[..., Array],
    x: np.ndarray,
    parameters: list[Parameter],
) -> None:
    """Hold all gradients of Σ⟨y, dy⟩ over the results y of function(x) against differences.

    `backprop(*dys)` returns dx and adds the parameters' gradients to what is in `grad` already.
    """
    ys = function(x)
    dys = [random(*y.shape, seed=3 + i) for i, y in enumerate(ys)]
    for each in parameters:
        each.grad[...] = 1.0
    dx = backprop(*(dy.copy() for dy in dys))

    def value() -> float:
        return float(sum((y * dy).sum() for y, dy in zip(function(x), dys, strict=True)))

    if x.dtype.kind == "f":
        np.testing.assert_allclose(dx, slopes(value, x), rtol=1e-7, atol=1e-8)
    for each in parameters:
        np.testing.assert_allclose(each.grad - 1, slopes(value, each.value), rtol=1e-7, atol=1e-8)


def check_piece(
    piece: Callable[[Array], tuple[Array, transformer.Backprop]],
    x: np.ndarray,
    parameters: list[Parameter],
) -> None:
    check_gradients(lambda x: (piece(x)[0],), piece(x)[1], x, parameters)


@pytest.mark.parametrize("biased", [True, False])
def test_linear(biased: bool) -> None:
    weight, bias = parameter(3, 4), parameter(4) if biased else None
    x = random(6, 3)
    expected = x @ weight.value + (bias.value if bias else 0)
    np.testing.assert_allclose(transformer.linear(ops, x, weight, bias)[0], expected, rtol=1e-14)
    check_piece(
        lambda x: transformer.linear(ops, x, weight, bias), x, [weight, *([bias] if bias else [])]
    )


@pytest.mark.parametrize("updated", [True, False])
def test_add_norm(updated: bool) -> None:
    """The sum, and its rows normalised; with and without a gradient of the sum itself."""
    gain, shift, bias = parameter(5), parameter(5, seed=2), parameter(5, seed=4)
    x, y = random(4, 5), random(4, 5, seed=7)
    update = (y, bias) if updated else (None, None)
    used = [gain, shift, bias] if updated else [gain, shift]
    _, _, backprop = transformer.add_norm(ops, x, update, gain, shift)

    def function(x: Array) -> tuple[Array, ...]:
        return transformer.add_norm(ops, x, update, gain, shift)[:2]

    check_gradients(function, lambda dx, dnormal: backprop(dnormal, dx), x, used)
    check_gradients(lambda x: function(x)[1:], lambda dnormal: backprop(dnormal, None), x, used)
    if updated:  # the stream's gradient is that of the update too
        check_gradients(
            lambda y: transformer.add_norm(ops, x, (y, bias), gain, shift)[:2],
            lambda dx, dnormal: backprop(dnormal, dx),
            y,
            [],
        )


def test_rows_are_normalised_to_mean_zero_and_variance_one() -> None:
    x = 3 + 5 * random(10, 64)
    _, normal, (mean, inverse) = ops.add_norm(x, None, None, np.ones(64), np.zeros(64))
    np.testing.assert_allclose(normal.mean(axis=1), 0, atol=1e-14)
    np.testing.assert_allclose(normal.var(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(mean[:, 0], x.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(1 / inverse[:, 0], x.std(axis=1), rtol=1e-5)


def test_bias_gelu() -> None:
    bias, u = parameter(6), 2 * random(4, 6)
    check_gradients(
        lambda u: (ops.bias_gelu(u, bias.value),),
        lambda dy: ops.bias_gelu_backward(dy, u, bias.value, bias.grad),
        u,
        [bias],
    )
    x = np.array([[-100.0, 0.0, 1.0, 100.0]])
    np.testing.assert_allclose(ops.bias_gelu(x, np.zeros(4)), [[0, 0, 0.841192, 100]], atol=1e-6)


@pytest.mark.parametrize("positioned", [True, False])
def test_embed(positioned: bool) -> None:
    table, tokens = parameter(4, 3), np.array([0, 3, 3, 1, 0, 2])  # repeated: gradients add up
    positions = parameter(5, 3, seed=5) if positioned else None
    p_value, p_grad = (positions.value, positions.grad) if positions else (None, None)
    x = ops.embed(tokens, table.value, p_value, 3)
    expected = table.value[1] + (p_value[0] if positioned else 0)
    np.testing.assert_array_equal(x[3], expected)
    check_gradients(
        lambda tokens: (ops.embed(tokens, table.value, p_value, 3),),
        lambda dx: ops.embed_backward(dx, tokens, table.grad, p_grad, 3),
        tokens,
        [table, *([positions] if positions else [])],
    )


def test_scatter_undoes_gather() -> None:
    x, rows = random(6, 3), np.array([4, 1])
    np.testing.assert_array_equal(ops.gather(x, rows), x[[4, 1]])
    check_gradients(lambda x: (ops.gather(x, rows),), lambda dy: ops.scatter(dy, rows, 6), x, [])


def test_alibi_slopes() -> None:
    np.testing.assert_array_equal(transformer.alibi_slopes(4), [1 / 4, 1 / 16, 1 / 64, 1 / 256])


@pytest.mark.parametrize("options", [{"causal": True}, {"alibi_slopes": np.array([0.5, 0.1])}])
def test_attention(options: dict[str, Any]) -> None:
    parameters, attend = small_model().parameters, partial(ATTEND, **options)
    used = [parameters[f"0.attention.{name}"] for name in ("qkv.weight", "qkv.bias", "out.weight")]
    check_piece(
        lambda x: transformer.attention(
            ops, x, parameters, "0.attention", heads=2, context=CONTEXT, attend=attend
        ),
        random(BATCH * CONTEXT, SMALL.width),
        used,
    )


def test_mlp() -> None:
    parameters = small_model().parameters
    used = [parameters[f"0.mlp.{name}"] for name in ("up.weight", "up.bias", "out.weight")]
    check_piece(
        lambda x: transformer.mlp(ops, x, parameters, "0.mlp"), random(4, SMALL.width), used
    )


def test_cross_entropy() -> None:
    table, targets = parameter(7, 3), np.array([0, 6, 2, 2])
    x = random(4, 3)
    logits = x @ table.value.T
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    loss = ops.cross_entropy(x, table.value, targets)
    assert loss == pytest.approx(-np.log(p[range(4), targets]).mean(), rel=1e-13)
    table.grad[...] = 1.0
    again, dx = ops.cross_entropy_backward(x, table.value, targets, table.grad)
    assert again == loss

    def value() -> float:
        return float(ops.cross_entropy(x, table.value, targets))

    np.testing.assert_allclose(dx, slopes(value, x), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(table.grad - 1, slopes(value, table.value), rtol=1e-7, atol=1e-9)


def test_cross_entropy_of_huge_logits() -> None:
    table, grad = np.array([[1e4], [-1e4]]), np.zeros((2, 1))
    loss, dx = ops.cross_entropy_backward(np.ones((1, 1)), table, np.array([1]), grad)
    assert loss == pytest.approx(2e4)
    assert np.isfinite(dx).all()
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"alibi": True}, None),
        ({"alibi": False}, None),
        ({"causal": False, "alibi": False}, [7, 2, 0]),  # masked language model
        ({"causal": False, "alibi": False, "classes": 3}, [0, CONTEXT]),  # classifier
    ],
)
def test_whole_model(options: dict[str, Any], rows: list[int] | None) -> None:
    """Every parameter's gradient, along one random direction a parameter."""
    model = small_model(replace(SMALL, **options))
    assert ("position" in model.parameters.named) == (not model.config.alibi)
    rng = np.random.default_rng(4)
    tokens = rng.integers(SMALL.vocabulary, size=(BATCH, CONTEXT))
    at = None if rows is None else np.array(rows)
    outputs = model.config.classes or SMALL.vocabulary
    targets = rng.integers(outputs, size=tokens.size if at is None else at.size)
    loss = model.gradients(tokens, targets, at)
    assert loss == model.loss(tokens, targets, at)
    for seed, (name, each) in enumerate(model.parameters.named.items()):
        direction, kept, step = random(*each.value.shape, seed=seed), each.value.copy(), 1e-5
        ends = []
        for sign in (1, -1):
            each.value[...] = kept + sign * step * direction
            ends.append(float(model.loss(tokens, targets, at)))
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


def test_logits_are_those_of_the_loss() -> None:
    model = small_model()
    tokens = np.random.default_rng(4).integers(SMALL.vocabulary, size=(3, 1))
    targets = np.array([[1], [5], [10]])
    logits = model.logits(tokens, np.arange(3))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(p[range(3), targets[:, 0]]).mean()
    assert float(model.loss(tokens, targets)) == pytest.approx(expected, rel=1e-12)


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
    loss = model.gradients(np.zeros((1, 5), int), np.ones((1, 5), int))
    dtypes = {a.dtype for a in (model.parameters.value, model.parameters.grad, loss)}
    dtypes.add(model.hidden(np.zeros((1, 5), int))[0].dtype)
    assert dtypes == {np.dtype("float32")}


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        Config(width=10, heads=4)


def test_sequences_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="8 tokens a sequence: the model takes 7"):
        small_model().hidden(np.zeros((1, 8), int))
