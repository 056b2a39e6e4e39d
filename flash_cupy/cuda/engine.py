"""The CUDA engine: from a problem and its arrays to launches of kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from ..arrays import Array, sum_to
from ..problem import Problem
from . import hopper, hopper_backward
from .launch import Launch, Machine, Work
from .packing import pack_groups
from .plan import Card, padded_head_dim, plan_kernel, score_options
from .tensors import (
    WIDEST_ACCESS,
    Layout,
    access_bytes,
    alignment,
    axes_after_head,
    fill_params,
)

Tensors = dict[str, Array]

#: Kernels that compute the same: for every GPU, and for those of compute capability 9.0.
Family = Literal["portable", "hopper"]

#: Arrays that kernels get in place of some of a call's, see `stand_ins`.
StandIns = dict[str, Layout]

#: Calls that an engine remembers; a program with ever new lengths starts over at this number.
MAX_WORKS = 4096

GRADIENTS = ("dq", "dk", "dv")

#: Tensors of a workspace that count; all others are sums.
COUNTERS = ("tickets", "dq_counts", "dq_turns")

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


class CudaEngine:
    """Runs attention on the arrays of one machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._works: dict[tuple[Any, ...], Work | StandIns] = {}

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
        tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse}
        if alibi_slopes is not None:
            tensors["alibi_slopes"] = alibi_slopes
        self._compute(problem, tensors)

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
        tensors = {"do_": do, "q": q, "k": k, "v": v, "o": o, "lse": lse}
        if dlse is not None:
            tensors["dlse"] = dlse
        if alibi_slopes is not None:
            tensors["alibi_slopes"] = alibi_slopes
        tensors["dq"], tensors["dk"], tensors["dv"] = dq, dk, dv
        self._compute(problem, tensors, deterministic)

    def _compute(
        self,
        problem: Problem,
        tensors: Tensors,
        deterministic: bool = False,
        stood_in: bool = False,
    ) -> None:
        """Run a call's kernels: those of the call before it that looks alike, on its own arrays.

        ``stood_in``: the tensors are those that kernels get, see `stand_ins`. These may have the
        strides of the ones they stand in for.
        """
        machine = self.machine
        arrays = tensors.values()
        addresses = machine.addresses(arrays)
        key = (
            problem,
            deterministic,
            stood_in,
            _forced_family.get(),
            machine.device(),
            *tensors,
            *[x.strides for x in arrays],
            *[address % WIDEST_ACCESS for address in addresses],
        )
        work: Work | StandIns | None = self._works.get(key)
        if work is None:
            if len(self._works) >= MAX_WORKS:
                self._works.clear()
            work = {} if stood_in else stand_ins(problem, tensors)
            if not work:
                call = Call(*pack_groups(problem, tensors), alignment(tensors, addresses))
                work = make_work(call, deterministic, machine)
            self._works[key] = work
        if isinstance(work, Work):
            machine.run(work, arrays, addresses)
        else:
            self._compute_by_stand_ins(problem, tensors, deterministic, work)

    def _compute_by_stand_ins(
        self, problem: Problem, given: Tensors, deterministic: bool, layouts: StandIns
    ) -> None:
        """Run a call's kernels on other arrays than some of those given: copies there and back."""
        others = {name: self.machine.empty(x.shape, x.dtype) for name, x in layouts.items()}
        results = GRADIENTS if "dq" in given else ("o",)
        for name in others.keys() - results:
            others[name][...] = given[name]
        self._compute(problem, given | others, deterministic, stood_in=True)
        for name in others.keys() & results:
            bring(problem, others[name], given[name])


def stand_ins(problem: Problem, tensors: Mapping[str, Array]) -> StandIns:
    """Return the layouts of arrays that kernels get in place of some of a call's.

    Kernels take rows that are contiguous, slopes in the dtype of the sums, and gradients with all
    batch axes, also those of broadcast inputs.
    """
    layouts = {}
    for name, x in tensors.items():
        shape = full_shape(problem, x) if name in GRADIENTS else x.shape
        dtype = problem.compute_dtype if name == "alibi_slopes" else x.dtype
        rows = axes_after_head(name) == 2
        contiguous = not rows or x.shape[-1] == 1 or x.strides[-1] == x.itemsize
        if shape != x.shape or dtype != x.dtype or not contiguous:
            layouts[name] = Layout.contiguous(shape, dtype)
    return layouts


def full_shape(problem: Problem, gradient: Array) -> tuple[int, ...]:
    """Return the shape of a gradient before it is summed along axes of broadcasting."""
    shape = gradient.shape
    full = (*problem.batch, *(shape[-3:-2] or (1,)), *shape[-2:])
    return shape if math.prod(full) == gradient.size else full


def bring(problem: Problem, result: Array, x: Array) -> None:
    """Copy a result to where it belongs, a gradient summed along axes of broadcasting."""
    if result.shape != x.shape:
        result = sum_to(result.astype(problem.compute_dtype), x.shape)
    x[...] = result


@dataclass(frozen=True)
class Call:
    """What planning looks at: a problem with its tensors, arrays or layouts.

    ``alignment`` is that of the arrays, see `tensors.alignment`.
    """

    problem: Problem
    tensors: Mapping[str, Array | Layout]
    alignment: int


def make_work(call: Call, deterministic: bool, machine: Machine) -> Work:
    """Plan the kernels of a call, and the workspace that they share."""
    if choose_family(call, machine) == "hopper":
        kernels, shapes = hopper_steps(call, deterministic, machine.card())
    else:
        kernels, shapes = portable_steps(call, deterministic)
    counter, real = np.dtype(np.int32), call.problem.compute_dtype
    workspace = {
        name: Layout.contiguous(shape, counter if name in COUNTERS else real)
        for name, shape in shapes.items()
    }
    call = replace(call, tensors={**call.tensors, **workspace})
    launches = tuple(
        make_launch(kernel, call, machine, first=n == 0) for n, kernel in enumerate(kernels)
    )
    return Work(launches, tuple(workspace.values()))


#: Kernels in the order of their launches, and the shapes of their workspace.
Steps = tuple[tuple[str, ...], dict[str, tuple[int, ...]]]


def portable_steps(call: Call, deterministic: bool) -> Steps:
    """Return the portable family's."""
    if "dq" not in call.tensors:
        return ("attention_forward",), {}
    problem = call.problem
    row_dots = (*problem.rows_shape, 2)
    if deterministic:
        return ("row_dots", "attention_backward", "attention_backward_dq"), {"row_dots": row_dots}
    # dQ grows here as all blocks add to it; rows and columns filled up as kernels need it.
    rows = -(-problem.seqlen_q // 16) * 16
    dq_sum = (*problem.rows_shape[:-1], rows, padded_head_dim(problem.head_dim))
    return ("row_dots", "attention_backward", "store_dq"), {"row_dots": row_dots, "dq_sum": dq_sum}


def hopper_steps(call: Call, deterministic: bool, card: Card) -> Steps:
    """Return the Hopper family's."""
    problem = call.problem
    if "dq" not in call.tensors:
        if not hopper.is_dynamic(problem):
            return ("hopper_forward",), {}
        return ("hopper_clear_tickets", "hopper_forward"), {"tickets": (1, 1)}
    choice = card, problem, "alibi_slopes" in call.tensors, deterministic
    return hopper_backward.kernels(*choice), hopper_backward.workspace(*choice)


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


def make_launch(kernel: str, call: Call, machine: Machine, first: bool) -> Launch:
    """Plan a kernel and fill its parameters, all but the addresses of the tensors.

    ``first``: it is the call's first one, which waits for all that is in the stream before it.
    """
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
    blocks = plan.blocks(problem, tensors)
    params = fill_params(problem, tensors)
    for name, count in plan.counts(problem, tensors).items():
        params[0][name] = count
    return Launch(
        machine.load(kernel, plan),
        plan,
        min(blocks, card.multiprocessors) if plan.persistent else blocks,
        params,
        tuple(tensors),
        hopper.box_maps(plan, tensors, params[0]),
        overlaps=plan.overlaps and not first,
    )
