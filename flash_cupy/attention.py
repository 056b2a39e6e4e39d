"""The public functions: each checks its call as a Problem and hands it to an engine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .arrays import Array, namespace
from .engine import engine_for
from .problem import Device, Options, Precision, Problem, Window, check_flag


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    out: Array | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
) -> Array:
    """Exact softmax attention, ``o = softmax(scale * q k^T) v``, in memory linear in N.

    The layout follows `numpy.matmul`: the last two axes are (sequence, feature), the axis before
    them is the head, all others are batch axes, which broadcast. ``(N, D)`` and ``(H, N, D)`` are
    accepted. Arrays may have any strides: pass a ``(B, N, H, D)`` array as ``x.swapaxes(1, 2)``,
    which is read in place; only a last axis that is not contiguous costs a copy on the GPU.

    Parameters
    ----------
    q : array, (*batch, H, Nq, D)
        Queries: a NumPy or CuPy array of float16, bfloat16 (ml_dtypes), float32 or float64. D and
        Dv are at least 1, and on the GPU at most 256.
    k : array, (*batch, Hkv, Nk, D)
        Keys, of q's dtype. H is a multiple of Hkv; query head h reads key head h // (H / Hkv).
    v : array, (*batch, Hkv, Nk, Dv)
        Values, of q's dtype. Dv may differ from D.
    causal : bool
        Query i sees key j only where ``j <= i + Nk - Nq``: aligned at the bottom right, so that
        the last query sees the last key.
    window : (left, right), optional
        Query i sees key j only where ``i + Nk - Nq - left <= j <= i + Nk - Nq + right``: whole
        numbers >= 0, each side inclusive; None on a side is unlimited. Beside causal both hold.
    scale : float, optional
        Factor on ``q k^T``, finite and >= 0; ``1 / sqrt(D)`` by default.
    softcap : float, optional
        Scores become ``softcap * tanh(score / softcap)``, after scale and before ALiBi and masks
        [2]_; finite and > 0.
    alibi_slopes : array, (H,) or (*batch, H), optional
        Adds ``-slope * |i + Nk - Nq - j|`` to the scores [3]_; float32 or float64, of the same
        library as q. Slopes get no gradient.
    out : array, (*batch, H, Nq, Dv), optional
        Where to write the result: of q's dtype and array type, of any strides. Must overlap
        neither an input nor itself.
    device : {'cpu', 'gpu'}, optional
        Where NumPy arrays are computed: by default on the current GPU when there is one that
        `flash_cupy` runs on and D and Dv are at most 256, else on the CPU. CuPy arrays are always
        computed on the GPU they are on, which must be the current device.
    precision : {'tf32'}, optional
        Let the GPU round float32 operands of products to 11 significant bits, as TF32 has, which
        is faster. By default float32 means float32 accuracy (on the GPU of entries above 2^-27 of
        the largest in their tile, some 32 to 128 rows; smaller ones keep 2^-51 of that). The CPU
        engine always has float32 accuracy; other dtypes take None only.

    Returns
    -------
    o : array, (*batch, H, Nq, Dv)
        Of q's dtype and array type; without a head axis where q, k and v all are (N, D). A row
        that sees no key is 0. NaN and inf in an input reach exactly the rows that see them.

    Raises
    ------
    TypeError
        Not NumPy or CuPy arrays, a mixture of both, unsupported or mixed dtypes, options of a
        wrong type.
    ValueError
        Shapes that do not fit together, options out of range, an unfit out, CuPy arrays that are
        not on the current device, a device that is not there (the message says why and what to
        do), a problem that the GPU has no kernel for.

    Notes
    -----
    With d = i + Nk - Nq - j, over the keys j that query i sees::

        S_ij = softcap(scale * q_i . k_j) - slope * |d|
        L_i = log(sum_j exp(S_ij))                  o_i = sum_j exp(S_ij - L_i) v_j

    Computed tile by tile with online softmax [1]_, so that the N x N matrix of scores never exists.
    Scores and sums are float32, of float64 input float64.

    On CuPy arrays the work is put on the current stream, without synchronisation. The first call
    of a kind compiles its kernel, which takes a second or two, or loads it from CuPy's disk cache;
    `flash_cupy.compile` does that ahead. After that a call can be captured in a CUDA graph.

    References
    ----------
    .. [1] T. Dao, D. Y. Fu, S. Ermon, A. Rudra, C. Ré, "FlashAttention: fast and memory-efficient
       exact attention with IO-awareness", 2022.
    .. [2] Gemma Team, "Gemma 2: improving open language models at a practical size", 2024.
    .. [3] O. Press, N. A. Smith, M. Lewis, "Train short, test long: attention with linear biases
       enables input length extrapolation", 2021.

    Examples
    --------
    >>> import numpy as np
    >>> from flash_cupy import attention
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 1024, 64), dtype=np.float32)
    >>> attention(q, k, v, causal=True).shape
    (8, 1024, 64)
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device, precision)
    problem = Problem.of(q, k, v, options)
    return _forward(problem, q, k, v, alibi_slopes, None if out is None else (out, None))[0]


def attention_forward(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    out: tuple[Array | None, Array | None] | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
) -> tuple[Array, Array]:
    """Compute attention and what its backward pass needs.

    Parameters
    ----------
    q, k, v, causal, window, scale, softcap, alibi_slopes, device, precision
        As in `attention`.
    out : (o, lse), optional
        Arrays to write the results to, None for one to be allocated; they overlap neither an input
        nor each other.

    Returns
    -------
    o : array, (*batch, H, Nq, Dv)
        As in `attention`.
    lse : array, (*batch, H, Nq)
        Log-sum-exp of each row's scores, ``L_i = log(sum_j exp(S_ij))``, natural logarithm;
        float32, for float64 input float64. A row that sees no key has -inf.

    Raises
    ------
    TypeError, ValueError
        As in `attention`.

    Notes
    -----
    Results over disjoint sets of keys merge into that of all keys by their lse:
    ``lse = logaddexp(lse1, lse2)``, ``o = exp(lse1 - lse) * o1 + exp(lse2 - lse) * o2``.
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device, precision)
    problem = Problem.of(q, k, v, options)
    return _forward(problem, q, k, v, alibi_slopes, out)


def attention_backward(
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    *,
    dlse: Array | None = None,
    deterministic: bool = False,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
) -> tuple[Array, Array, Array]:
    """Compute the gradients with respect to q, k and v by recomputation from lse.

    Parameters
    ----------
    do : array, (*batch, H, Nq, Dv)
        Gradient with respect to o, of q's dtype.
    q, k, v, causal, window, scale, softcap, alibi_slopes, device, precision
        As given to `attention_forward`.
    o : array, (*batch, H, Nq, Dv)
    lse : array, (*batch, H, Nq)
        What `attention_forward` returned for them.
    dlse : array, (*batch, H, Nq), optional
        Gradient with respect to lse, of lse's dtype; zero by default.
    deterministic : bool
        Make equal calls on the same device give equal bits, in memory linear in N. By default the
        GPU sums dq in whatever order its blocks get there, which is faster; the CPU engine always
        gives equal bits.
    out : (dq, dk, dv), optional
        Arrays to write the results to, None for one to be allocated; they overlap neither an input
        nor each other.

    Returns
    -------
    dq, dk, dv : arrays
        With the shapes, the dtype and the array type of q, k and v. Summed over the query heads
        that share a key head, and over axes along which an input was broadcast. Rows that see no
        key, and keys that no row sees, get 0.

    Raises
    ------
    TypeError, ValueError
        As in `attention`, and for do, o, lse and dlse that do not belong to q.

    Notes
    -----
    With ``P_ij = exp(S_ij - L_i)`` and ``D_i = sum_d do_id o_id - dlse_i`` (section 3.1 of [1]_)::

        dv_j = sum_i P_ij do_i                      dS_ij = P_ij (do_i . v_j - D_i)
        dq_i = scale * sum_j dS_ij k_j              dk_j = scale * sum_i dS_ij q_i

    With a softcap c, dS_ij has the derivative ``1 - tanh(scale * q_i . k_j / c)^2`` as a further
    factor. S and P are never stored; beside its results the backward pass takes O(N) numbers a
    head, and by default on the GPU a copy of dq in float32 (of float64 input in float64).

    References
    ----------
    .. [1] T. Dao, "FlashAttention-2: faster attention with better parallelism and work
       partitioning", 2023.
    """
    options = Options(causal, window, scale, softcap, alibi_slopes, device, precision)
    problem = Problem.of(q, k, v, options)
    return _backward(problem, do, q, k, v, alibi_slopes, o, lse, dlse, deterministic, out)


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    *,
    deterministic: bool = False,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Array | None = None,
    out: Array | None = None,
    device: Device | None = None,
    precision: Precision | None = None,
) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
    """Compute attention together with the function that propagates a gradient back through it.

    Parameters
    ----------
    q, k, v, causal, window, scale, softcap, alibi_slopes, out, device, precision
        As in `attention`.
    deterministic : bool
        Make equal calls of backprop give equal bits, see `attention_backward`.

    Returns
    -------
    o : array, (*batch, H, Nq, Dv)
        As in `attention`.
    backprop : callable
        ``backprop(do)``, with do like o, returns ``(dq, dk, dv)``, as `attention_backward` does,
        and may be called any number of times. It holds q, k, v, o and lse (and alibi_slopes), which
        must stay unchanged until then.

    Raises
    ------
    TypeError, ValueError
        As in `attention`; backprop raises them for a do that does not belong to o.

    Examples
    --------
    >>> import numpy as np
    >>> from flash_cupy import attention_vjp
    >>> q, k, v = np.random.default_rng(0).standard_normal((3, 8, 1024, 64), dtype=np.float32)
    >>> o, backprop = attention_vjp(q, k, v, causal=True)
    >>> dq, dk, dv = backprop(np.ones_like(o))
    """
    check_flag("deterministic", deterministic)
    options = Options(causal, window, scale, softcap, alibi_slopes, device, precision)
    problem = Problem.of(q, k, v, options)
    o, lse = _forward(problem, q, k, v, alibi_slopes, None if out is None else (out, None))

    def backprop(do: Array) -> tuple[Array, Array, Array]:
        return _backward(problem, do, q, k, v, alibi_slopes, o, lse, deterministic=deterministic)

    return o, backprop


def _forward(
    problem: Problem,
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array | None,
    out: tuple[Array | None, Array | None] | None,
) -> tuple[Array, Array]:
    takes_o = problem.o_shape, problem.dtype
    takes_lse = problem.lse_shape, problem.compute_dtype
    o = lse = None
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}
        problem.check_out(out, {"o": takes_o, "lse": takes_lse}, inputs)
        o, lse = out
    new = namespace(q).ndarray
    o = new(*takes_o) if o is None else o
    lse = new(*takes_lse) if lse is None else lse
    if problem.empty:
        o[...], lse[...] = 0, -np.inf
    else:
        engine_for(problem).forward(problem, q, k, v, alibi_slopes, o, lse)
    return o, lse


def _backward(
    problem: Problem,
    do: Array,
    q: Array,
    k: Array,
    v: Array,
    alibi_slopes: Array | None,
    o: Array,
    lse: Array,
    dlse: Array | None = None,
    deterministic: bool = False,
    out: tuple[Array | None, Array | None, Array | None] | None = None,
) -> tuple[Array, Array, Array]:
    check_flag("deterministic", deterministic)
    rows = {"do": do, "o": o, "lse": lse, "dlse": dlse}
    problem.check_rows(rows)
    dtype = problem.dtype
    dq = dk = dv = None
    if out is not None:
        takes = {"dq": (q.shape, dtype), "dk": (k.shape, dtype), "dv": (v.shape, dtype)}
        inputs = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes, **rows}
        problem.check_out(out, takes, inputs)
        dq, dk, dv = out
    new = namespace(q).ndarray
    dq = new(q.shape, dtype) if dq is None else dq
    dk = new(k.shape, dtype) if dk is None else dk
    dv = new(v.shape, dtype) if dv is None else dv
    if problem.empty:
        dq[...], dk[...], dv[...] = 0, 0, 0
    else:
        engine_for(problem).backward(
            problem, do, q, k, v, o, lse, dlse, alibi_slopes, dq, dk, dv, deterministic
        )
    return dq, dk, dv
