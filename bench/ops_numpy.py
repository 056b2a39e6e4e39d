"""The transformer's arithmetic in NumPy: plain formulas, which those of `ops_cupy` are held to.

A function named ``f_backward`` takes the gradient of f's result, adds the gradients of parameters
to the arrays ``..._grad`` and returns the gradient of f's first argument. Shapes as in
`transformer`: x (T, W), weights (I, O), tables (V, W).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

EPSILON = 1e-5
"""Added to the variance of a row before it is divided by."""

GELU_A = math.sqrt(2 / math.pi)
GELU_B = 0.044715 * GELU_A

empty_like = np.empty_like


def embed(tokens: Array, table: Array, positions: Array | None, context: int) -> Array:
    """Look up each token's row of the table and add that of its position in its sequence."""
    x = table[tokens]
    if positions is not None:
        x.reshape(-1, context, x.shape[1])[...] += positions[:context]
    return x


def embed_backward(
    dx: Array, tokens: Array, table_grad: Array, positions_grad: Array | None, context: int
) -> None:
    """Tokens have no gradient: this only adds up those of the tables."""
    np.add.at(table_grad, tokens, dx)
    if positions_grad is not None:
        positions_grad[:context] += dx.reshape(-1, context, dx.shape[1]).sum(axis=0)


def gather(x: Array, rows: Array) -> Array:
    """Take rows of x, (R, W)."""
    return x[rows]


def scatter(dy: Array, rows: Array, count: int) -> Array:
    """Put dy at `rows`, all different, of `count` rows that are otherwise zero."""
    dx = np.zeros((count, dy.shape[1]), dy.dtype)
    dx[rows] = dy
    return dx


def add_norm(
    x: Array, y: Array | None, bias: Array | None, gain: Array, shift: Array
) -> tuple[Array, Array, tuple[Array, Array]]:
    """`x + y + bias`, and each of its rows brought to mean 0 and variance 1, scaled and shifted.

    Returns the sum, its normalised rows, and the rows' (mean, 1/deviation), (T, 1) each.
    """
    if y is not None:
        x = x + y
        x += bias
    mean = x.mean(axis=1, keepdims=True)
    normal = x - mean
    variance = np.einsum("tw,tw->t", normal, normal)[:, None] / x.shape[1]
    inverse = 1 / np.sqrt(variance + EPSILON)
    normal *= inverse
    normal *= gain
    normal += shift
    return x, normal, (mean, inverse)


def add_norm_backward(
    dnormal: Array,
    dx: Array | None,
    x: Array,
    statistics: tuple[Array, Array],
    gain: Array,
    gain_grad: Array,
    shift_grad: Array,
    bias_grad: Array | None,
) -> Array:
    """Gradient of the sum from those of its normalised rows and, in dx, of itself."""
    mean, inverse = statistics
    unit = (x - mean) * inverse
    gain_grad += np.einsum("tw,tw->w", dnormal, unit)
    shift_grad += dnormal.sum(axis=0)
    # A row's gradient loses its mean and its part along the row: both were normalised away.
    dsum = dnormal * gain
    along = np.einsum("tw,tw->t", dsum, unit)[:, None] / x.shape[1]
    dsum -= dsum.mean(axis=1, keepdims=True)
    dsum -= unit * along
    dsum *= inverse
    if dx is not None:
        dsum += dx
    if bias_grad is not None:
        bias_grad += dsum.sum(axis=0)
    return dsum


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """`x @ weight (+ bias)`."""
    y = x @ weight
    if bias is not None:
        y += bias
    return y


def linear_backward(
    dy: Array, x: Array, weight: Array, weight_grad: Array, bias_grad: Array | None
) -> Array:
    """`dx = dy weightᵀ`, `dweight = xᵀ dy`."""
    weight_grad += x.T @ dy
    if bias_grad is not None:
        bias_grad += dy.sum(axis=0)
    return dy @ weight.T


def bias_gelu(u: Array, bias: Array) -> Array:
    """`y = x/2·(1 + tanh t)`, `t = a·x + b·x³`, `x = u + bias`: GELU, its usual approximation."""
    x = u + bias
    x *= _half(x)
    return x


def bias_gelu_backward(dy: Array, u: Array, bias: Array, bias_grad: Array) -> Array:
    """With `h = (1 + tanh t)/2`: `y' = h + x·h'`, `h' = 2·h·(1 − h)·t'`, `t' = a + 3b·x²`."""
    x = u + bias
    half = _half(x)
    slope: Array = x * x
    slope *= 6 * GELU_B
    slope += 2 * GELU_A
    slope *= x
    slope *= 1 - half
    slope += 1
    slope *= half
    slope *= dy
    bias_grad += slope.sum(axis=0)
    return slope


def _half(x: Array) -> Array:
    """(1 + tanh t)/2."""
    half = x * x
    half *= GELU_B
    half += GELU_A
    half *= x
    np.tanh(half, out=half)
    half *= 0.5
    half += 0.5
    return half


def logits(x: Array, table: Array) -> Array:
    """`x tableᵀ`, (T, V)."""
    scores: Array = x @ table.T
    return scores


def cross_entropy(x: Array, table: Array, targets: Array) -> Array:
    """Mean of `−log softmax(x tableᵀ)[target]` in nats."""
    return _softmax_and_loss(x, table, targets)[1]


def cross_entropy_backward(
    x: Array, table: Array, targets: Array, table_grad: Array
) -> tuple[Array, Array]:
    """Loss and gradient of x: one pass over the logits, which are not needed again."""
    dlogits, loss = _softmax_and_loss(x, table, targets)
    dlogits[np.arange(len(x)), targets] -= 1
    dlogits *= 1 / len(x)
    table_grad += dlogits.T @ x
    return loss, dlogits @ table


def _softmax_and_loss(x: Array, table: Array, targets: Array) -> tuple[Array, Array]:
    scores = logits(x, table)
    scores -= scores.max(axis=1, keepdims=True)
    chosen = scores[np.arange(len(x)), targets]
    p = np.exp(scores, out=scores)
    total = p.sum(axis=1, keepdims=True)
    p /= total
    return p, (np.log(total[:, 0]) - chosen).mean()


def adamw(
    value: Array,
    grad: Array,
    mean: Array,
    square: Array,
    work: Array,
    constants: Array,
    *,
    decayed: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    decay: float,
    clip: float,
) -> None:
    """One step of AdamW in place; see `optimizer.AdamW`. The gradient is zero afterwards.

    `constants` are the learning rate, 1/(1 − β₁ᵗ) and 1/(1 − β₂ᵗ).
    """
    rate, mean_factor, square_factor = constants
    grad *= min(1.0, clip / math.sqrt(grad @ grad + epsilon**2))
    mean *= beta1
    mean += (1 - beta1) * grad
    grad *= grad
    square *= beta2
    square += (1 - beta2) * grad

    # value ← value − rate·(mean/(1 − β₁ᵗ) / (√(square/(1 − β₂ᵗ)) + ε) + decay·value)
    step = np.sqrt(square)
    step *= math.sqrt(square_factor)
    step += epsilon
    np.divide(mean, step, out=step)
    step *= rate * mean_factor
    value[:decayed] *= 1 - rate * decay
    value -= step
    if work is not value:
        work[...] = value
    grad.fill(0)
