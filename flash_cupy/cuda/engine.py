"""The CUDA engine: from a problem and its arrays to launches of kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import numpy as np

from ..arrays import Array, address, namespace, sum_to
from ..problem import Problem
from . import hopper, hopper_backward
from .launch import Launch, Machine
from .packing import pack_groups
from .plan import padded_head_dim, plan_kernel, score_options
from .tensors import OF_Q_DTYPE, WIDEST_ACCESS, access_bytes, fill_params

Tensors = dict[str, Array]

#: Kernels that compute the same: for every GPU, and for those of compute capability 9.0.
Family = Literal["portable", "hopper"]

#: Launches that an engine remembers; a program with ever new lengths starts over at this number.
MAX_LAUNCHES = 4096

_forced_family: ContextVar[Family | None] = ContextVar("forced_family", default=None)


@contextmanager
def force_family(family: Family) -> Iterator[None]:
    """Compute calls of this context with one family of kernels, for tests and measurements.

    A call that the family cannot take raises ValueError.
    """
    if family not in get_args(Family):
        raise ValueError(f"family: got {family!r}, takes one of {', '.join(get_args(Family))}")
    token = _forced_family.set(family)
    try:
        yield
    finally:
        _forced_family.reset(token)


class Call:
    """A problem with its arrays, and what all calls have in common that look alike."""

    def __init__(self, problem: Problem, tensors: Tensors) -> None:
        self.problem = problem
        self.tensors = tensors
        self.alignment = 0
        for name, x in tensors.items():
            if name in OF_Q_DTYPE:
                self.alignment |= address(x)
        self.alignment %= WIDEST_ACCESS
        self.key = (problem, self.alignment, *[x.strides for x in tensors.values()])


class CudaEngine:
    """Runs attention on the arrays of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._launches: dict[tuple[Any, ...], Launch] = {}
        self._families: dict[tuple[Any, ...], Family] = {}

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
        call = Call(*pack_groups(problem, tensors))
        if self._family(call) == "hopper":
            if hopper.is_dynamic(call.problem):
                call.tensors["tickets"] = self.machine.zero()
            self._run("hopper_forward", call)
        else:
            self._run("attention_forward", call)
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
        with full_gradients(problem, self.machine.empty, dq, dk, dv) as (dq, dk, dv):
            tensors |= {name: self._writable(x) for name, x in (("dq", dq), ("dk", dk), ("dv", dv))}
            call = Call(*pack_groups(problem, tensors))
            if self._family(call) == "hopper":
                self._hopper_backward(call, deterministic)
            else:
                self._portable_backward(call, deterministic)
            _bring(tensors, dq=dq, dk=dk, dv=dv)

    def _portable_backward(self, call: Call, deterministic: bool) -> None:
        problem, tensors = call.problem, call.tensors
        real = problem.compute_dtype
        tensors["row_dots"] = self.machine.empty((*problem.rows_shape, 2), real)
        if not deterministic:
            # dQ grows here as all blocks add to it; rows and columns filled up as kernels need it.
            rows = -(-problem.seqlen_q // 16) * 16
            shape = (*problem.rows_shape[:-1], rows, padded_head_dim(problem.head_dim))
            tensors["dq_sum"] = self.machine.empty(shape, real)
        self._run("row_dots", call)
        self._run("attention_backward", call)
        self._run("attention_backward_dq" if deterministic else "store_dq", call)

    def _hopper_backward(self, call: Call, deterministic: bool) -> None:
        problem, tensors = call.problem, call.tensors
        shapes = hopper_backward.workspace(problem, "alibi_slopes" in tensors, deterministic)
        for name, shape in shapes.items():
            dtype = np.dtype(np.int32 if name == "dq_turns" else np.float32)
            tensors[name] = self.machine.empty(shape, dtype)
        for kernel in hopper_backward.kernels(problem):
            self._run(kernel, call)

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

    def _family(self, call: Call) -> Family:
        """Return the family that computes a call."""
        key = (self.machine.device(), _forced_family.get(), *call.key)
        family = self._families.get(key)
        if family is None:
            family = choose_family(call, self.machine)
            _remember(self._families, key, family)
        return family

    def _run(self, kernel: str, call: Call) -> None:
        key = (kernel, self.machine.device(), *call.tensors, *call.key)
        launch = self._launches.get(key)
        if launch is None:
            launch = make_launch(kernel, call, self.machine)
            _remember(self._launches, key, launch)
        self.machine.run(launch, list(call.tensors.values()))


def _remember(memory: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    if len(memory) >= MAX_LAUNCHES:
        memory.clear()
    memory[key] = value


def _bring(tensors: Tensors, **results: Array) -> None:
    """Copy results to where they belong, if they were written elsewhere."""
    for name, x in results.items():
        if tensors[name] is not x:
            x[...] = tensors[name]


def choose_family(call: Call, machine: Machine) -> Family:
    """Choose the family for a call: Hopper's own kernels where they can take it.

    Raises
    ------
    ValueError
        The family that `force_family` asks for cannot take the call.
    """
    forced = _forced_family.get()
    if forced == "portable":
        return "portable"
    reason = hopper.why_not(call.problem, call.tensors, call.alignment, machine.card())
    if reason is None:
        return "hopper"
    if forced == "hopper":
        raise ValueError(f"the hopper family cannot take this call: {reason}")
    return "portable"


def make_launch(kernel: str, call: Call, machine: Machine) -> Launch:
    """Plan a kernel and fill its parameters, all but the addresses of the tensors."""
    problem, tensors, card = call.problem, call.tensors, machine.card()
    planner = (hopper.PLANS | hopper_backward.PLANS).get(kernel)
    if planner is not None:
        plan = planner(card, problem, tensors)
    else:
        names = {"float32": "float", "float64": "double"}
        element = names.get(problem.dtype.name, problem.dtype.name)
        plan = plan_kernel(
            kernel,
            card,
            "tensorfloat32" if problem.precision == "tf32" else element,
            problem.head_dim,
            problem.head_dim_v,
            access_bytes(tensors, call.alignment),
            **score_options(problem, tensors),
            sum_dq="dq_sum" in tensors,
        )
    blocks = plan.blocks(problem)
    params = fill_params(problem, tensors)
    return Launch(
        machine.load(kernel, plan),
        plan,
        min(blocks, card.multiprocessors) if plan.persistent else blocks,
        params,
        tuple(tensors),
        hopper.box_maps(plan, tensors, params[0]),
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
