"""Compiling kernels ahead of their first use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from .arrays import dtypes
from .attention import attention_backward, attention_forward
from .gpu import why_no_gpu


def compile(
    head_dims: Iterable[int | tuple[int, int]],
    dtype: Any,
    *,
    masks: Sequence[bool] = (False, True),
    softcap: bool = False,
    alibi: bool = False,
    backward: bool = True,
    deterministic: bool = False,
    progress: bool = True,
) -> None:
    """Compile, on the current GPU, the kernels of calls that are going to be made.

    A kernel takes a second or two to compile when it is first needed, and a few milliseconds from
    CuPy's cache on disk in later processes.

    Parameters
    ----------
    head_dims : iterable of int or (int, int)
        D of the calls, or (D, Dv).
    dtype : dtype
        Of q, k and v: float16, bfloat16, float32 or float64.
    masks : sequence of bool
        Whether a call has a mask (causal or a window): False, True or, by default, both.
    softcap, alibi : bool
        Whether the calls have these options.
    backward : bool
        Whether gradients are asked for, ``deterministic`` ones or not.
    progress : bool
        Show a progress bar (where tqdm is installed).

    Raises
    ------
    ValueError
        There is no GPU to compile for, a dtype or head dim that the GPU does not take.

    Examples
    --------
    >>> import flash_cupy
    >>> flash_cupy.compile([64, 128], "float16")  # doctest: +SKIP
    """
    reason = why_no_gpu()
    if reason is not None:
        raise ValueError(f"no GPU to compile for: {reason}")
    import cupy
    import numpy as np

    if np.dtype(dtype) not in dtypes():
        raise ValueError(f"dtype: got {dtype}, takes float16, bfloat16, float32 or float64")
    pairs = [(d, d) if isinstance(d, int) else d for d in head_dims]
    slopes = cupy.zeros(1, np.float32) if alibi else None
    calls = list(itertools.product(pairs, masks))
    for (head_dim, head_dim_v), mask in _with_bar(calls, progress):
        # Two rows: with one, a causal mask would hide nothing and be dropped.
        q, k, v = (cupy.zeros((1, 2, d), dtype) for d in (head_dim, head_dim, head_dim_v))
        options: dict[str, Any] = {
            "causal": mask,
            "softcap": 1.0 if softcap else None,
            "alibi_slopes": slopes,
        }
        o, lse = attention_forward(q, k, v, **options)
        if backward:
            attention_backward(o, q, k, v, o, lse, deterministic=deterministic, **options)


def _with_bar(calls: list[Any], progress: bool) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return calls
    bar: Iterable[Any] = tqdm(calls, desc="compiling attention kernels", disable=not progress)
    return bar
