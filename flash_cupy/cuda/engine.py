"""The CUDA engine: from a problem and its arrays to launches of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..arrays import Array, address, namespace, sum_to
from ..problem import Problem
from .launch import Launch, Machine
from .plan import padded_head_dim, plan_kernel
from .tensors import OF_Q_DTYPE, WIDEST_ACCESS, access_bytes, fill_params

Tensors = dict[str, Array]

#: Launches that an engine remembers; a program with ever new lengths starts over at this number.
MAX_LAUNCHES = 4096


class CudaEngine:
    """Runs attention on the arrays of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def forward(
        self,
        problem: Problem,
        q: Array,
        k: Array,
        v: Array,
        alibi_slopes: Array | None,
        o: Array,
        lse: Array,
    ) -> None:
        """Compute the output O and the log-sum-exp L into o and lse."""
        tensors = self._inputs(problem, {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes})
        tensors |= {"o": self._writable(o), "lse": lse}
        self._run("attention_forward", problem, tensors)
        _bring(tensors, o=o)

    def backward(
        self,
        problem: Problem,
        do: Array,
        q: Array,
        k: Array,
        v: Array,
        o: Array,
        lse: Array,
        dlse: Array | None,
        alibi_slopes: Array | None,
        dq: Array,
        dk: Array,
        dv: Array,
        deterministic: bool,
    ) -> None:
        """Compute the gradients into dq, dk and dv, which have the shapes of q, k and v."""
        given = {"do_": do, "q": q, "k": k, "v": v, "o": o, "alibi_slopes": alibi_slopes}
        tensors = self._inputs(problem, given) | {"lse": lse}
        if dlse is not None:
            tensors["dlse"] = dlse
        real = problem.compute_dtype
        tensors["row_dots"] = self.machine.empty((*problem.rows_shape, 2), real)
        if not deterministic:
            # dQ grows here as all blocks add to it; rows and columns filled up as kernels need it.
            rows = -(-problem.seqlen_q // 16) * 16
            shape = (*problem.rows_shape[:-1], rows, padded_head_dim(problem.head_dim))
            tensors["dq_sum"] = self.machine.empty(shape, real)
        with full_gradients(problem, self.machine.empty, dq, dk, dv) as (dq, dk, dv):
            tensors |= {name: self._writable(x) for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
            self._run("row_dots", problem, tensors)
            self._run("attention_backward", problem, tensors)
            self._run("attention_backward_dq" if deterministic else "store_dq", problem, tensors)
            _bring(tensors, dq=dq, dk=dk, dv=dv)

    def _inputs(self, problem: Problem, given: dict[str, Array | None]) -> Tensors:
        """Make inputs readable by kernels: the last axis contiguous, slopes in the sums' dtype."""
        tensors: Tensors = {}
        for name, x in given.items():
            if x is None:
                continue
            if name == "alibi_slopes":
                x = x.astype(problem.compute_dtype, copy=False)
            elif not _rows_are_contiguous(x):
                x = namespace(x).ascontiguousarray(x)
            tensors[name] = x
        return tensors

    def _writable(self, x: Array) -> Array:
        """Return memory like x that kernels can write rows to: x itself if they are contiguous."""
        return x if _rows_are_contiguous(x) else self.machine.empty(x.shape, x.dtype)

    def _run(self, kernel: str, problem: Problem, tensors: Tensors) -> None:
        arrays = list(tensors.values())
        alignment = 0
        for name, x in tensors.items():
            if name in OF_Q_DTYPE:
                alignment |= address(x)
        alignment %= WIDEST_ACCESS
        strides = [x.strides for x in arrays]
        key = (kernel, problem, self.machine.device(), alignment, *tensors, *strides)
        launch = self._launches.get(key)
        if launch is None:
            launch = make_launch(kernel, problem, tensors, alignment, self.machine)
            if len(self._launches) >= MAX_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        self.machine.run(launch, arrays)


def _bring(tensors: Tensors, **results: Array) -> None:
    """Copy results to where they belong, if they were written elsewhere."""
    for name, x in results.items():
        if tensors[name] is not x:
            x[...] = tensors[name]


def make_launch(
    kernel: str, problem: Problem, tensors: Tensors, alignment: int, machine: Machine
) -> Launch:
    """Plan a kernel and fill its parameters, all but the addresses of the tensors."""
    names = {"float32": "float", "float64": "double"}
    element = names.get(problem.dtype.name, problem.dtype.name)
    plan = plan_kernel(
        kernel,
        machine.card(),
        "tensorfloat32" if problem.precision == "tf32" else element,
        problem.head_dim,
        problem.head_dim_v,
        access_bytes(tensors, alignment),
        band=problem.band.left is not None or problem.band.right is not None,
        softcap=problem.softcap is not None,
        alibi="alibi_slopes" in tensors,
        sum_dq="dq_sum" in tensors,
    )
    return Launch(
        machine.load(kernel, plan),
        plan,
        plan.blocks(problem),
        fill_params(problem, tensors),
        tuple(tensors),
    )


@contextmanager
def full_gradients(
    problem: Problem,
    empty: Callable[[tuple[int, ...], np.dtype[Any]], Array],
    *given: Array,
) -> Iterator[tuple[Array, ...]]:
    """Yield gradients with all batch axes; sum those of broadcast inputs to the given arrays."""
    full = []
    for x in given:
        heads = x.shape[-3:-2] or (1,)
        shape = (*problem.batch, *heads, *x.shape[-2:])
        complete = math.prod(shape) == x.size
        full.append(x if complete else empty(shape, x.dtype))
    yield tuple(full)
    for x, y in zip(given, full, strict=True):
        if y is not x:
            x[...] = sum_to(y.astype(problem.compute_dtype), x.shape)


def _rows_are_contiguous(x: Array) -> bool:
    """Whether kernels can read and write the array as it is."""
    return bool(x.shape[-1] == 1 or x.strides[-1] == x.itemsize)
