"""Products over pairs of rows and keys of which some are out of sight."""

from __future__ import annotations

from .arrays import Array, namespace


def matmul_visible(weights: Array, values: Array, visible: Array | None) -> Array:
    """Compute ``weights @ values`` so that a pair out of sight contributes nothing at all.

    A weight of 0 is not enough for that: 0 * NaN is NaN. So non-finite values are left out of the
    product, and the results that see one of them are set to NaN.

    Parameters
    ----------
    weights : (..., M, K), zero where not visible
    values : (..., K, N)
    visible : bool, broadcasts to (..., M, K), or None where all pairs are in sight
    """
    xp = namespace(weights)
    finite = xp.isfinite(values)
    if visible is None or finite.all():
        return weights @ values
    product = weights @ xp.where(finite, values, 0)
    reached = visible.astype(weights.dtype) @ (~finite).astype(weights.dtype)
    return xp.where(reached > 0, weights.dtype.type("nan"), product)
