"""Compiling kernels ahead of their first use."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .arrays import dtypes
from .attention import attention_backward, attention_forward
from .cuda import hopper, hopper_backward
from .gpu import why_no_gpu
from .problem import Precision


def compile(
    head_dims: Iterable[int | tuple[int, int]],
    dtype: Any,
    *,
    masks: Sequence[bool] = (False, True),
    softcap: bool = False,
    alibi: bool = False,
    backward: bool = True,
    deterministic: bool = False,
    precision: Precision | None = None,
    progress: bool = True,
) -> None:
    """Compile, on the current GPU, the kernels of calls that are going to be made.

    A kernel takes a second or two to compile when it is first needed, and a few milliseconds from
    CuPy's cache on disk in later processes. The calls are taken to have rows that are contiguous
    and begin at multiples of 16 bytes: others have kernels of their own.

    Parameters
    ----------
    head_dims : iterable of int or (int, int)
        D of the calls, or (D, Dv); 1 to 256.
    dtype : dtype
        Of q, k and v: float16, bfloat16, float32 or float64.
    masks : sequence of bool
        Whether a call has a mask (causal or a window): False, True or, by default, both. A
        causal call of one query hides no key and has none.
    softcap, alibi : bool
        Whether the calls have these options.
    backward : bool
        Whether gradients are asked for, too.
    deterministic : bool
        Whether the backward calls will be ``deterministic``.
    precision : {'tf32'}, optional
        The ``precision`` of the calls.
    progress : bool
        Show a progress bar (where tqdm is installed).

    Raises
    ------
    TypeError
        A dtype that attention does not take, options of a wrong type.
    ValueError
        There is no GPU to compile for (the message says why and what to do); a head dim or a
        precision that the GPU does not take.

    Examples
    --------
    >>> import flash_cupy
    >>> flash_cupy.compile([64, 128], "float16")  # doctest: +SKIP
    >>> flash_cupy.compile([(192, 128)], "float32", precision="tf32")  # doctest: +SKIP
    """
    known = dtypes()  # first, for it is what lets NumPy understand 'bfloat16'
    if np.dtype(dtype) not in known:
        raise TypeError(f"dtype: got {dtype}, takes float16, bfloat16, float32 or float64")
    reason = why_no_gpu()
    if reason is not None:
        raise ValueError(f"no GPU to compile for: {reason}")
    import cupy

    pairs = [(d, d) if isinstance(d, int) else d for d in head_dims]
    # Heads, queries and keys.
    sizes = {(1, 2, 2)}
    if np.dtype(dtype).itemsize == 2:
        sizes |= {(1, *lengths) for lengths in hopper.lengths()}
        if backward:
            sizes |= {(1, 2, keys) for keys in hopper_backward.lengths()}
            sizes |= {(heads, 2, 2) for heads in hopper_backward.head_counts()}
    calls = list(itertools.product(pairs, masks, sorted(sizes)))
    for (head_dim, head_dim_v), mask, (heads, queries, keys) in _with_bar(calls, progress):
        shapes = ((heads, queries, head_dim), (heads, keys, head_dim), (heads, keys, head_dim_v))
        q, k, v = (cupy.zeros(shape, dtype) for shape in shapes)
        options: dict[str, Any] = {
            "causal": mask,
            "softcap": 1.0 if softcap else None,
            "alibi_slopes": cupy.zeros(heads, np.float32) if alibi else None,
            "precision": precision,
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
