"""The Hopper family without a GPU: which calls it takes, its plans, its maps, and compilation."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cubins import BAD_WARNINGS
from cubins import HOPPER as HOPPER_CARD
from strategies import BFLOAT16, FLOAT16, FLOAT32

from flash_cupy.arrays import address
from flash_cupy.cuda import driver, force_family, hopper, hopper_backward, tensor_maps
from flash_cupy.cuda.compiler import compile_cubin, kernel_folder
from flash_cupy.cuda.engine import Call, choose_family, make_launch, make_work
from flash_cupy.cuda.launch import Work, prepare
from flash_cupy.cuda.plan import Card, KernelPlan
from flash_cupy.cuda.tensor_maps import MAP_BYTES, BoxMap
from flash_cupy.cuda.tensors import Layout, alignment
from flash_cupy.problem import Options, Problem

HOPPER = Card(**HOPPER_CARD)
AMPERE = Card((8, 0), 163 << 10, multiprocessors=108)
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "softcap": {"softcap": 20.0},
    "softcap and alibi": {"softcap": 20.0, "alibi": True},
    "all": {"window": (40, 5), "softcap": 20.0, "alibi": True},
}
HEAD_DIMS = [
    (64, 64),
    (96, 96),
    (128, 128),
    (192, 128),
    (192, 192),
    (256, 256),
    (64, 256),
    (256, 192),
]


class FakeMachine:
    """A machine that compiles and runs nothing."""

    def __init__(self, card: Card) -> None:
        self._card = card

    def device(self) -> int:
        return 0

    def card(self) -> Card:
        return self._card

    def load(self, kernel: str, plan: KernelPlan) -> Any:
        return SimpleNamespace(kernel=SimpleNamespace(ptr=0))


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 16 bytes."""
    memory = np.zeros(int(np.prod(shape)) * dtype.itemsize + 16, np.uint8)
    first = -memory.ctypes.data % 16
    return memory[first : memory.size - 16 + first].view(dtype).reshape(shape)


def call_of(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, *, alibi: bool = False, **options: Any
) -> Call:
    """A forward call of these arrays."""
    problem = Problem.of(q, k, v, Options(device="cpu", **options))
    tensors = {"q": q, "k": k, "v": v}
    if alibi:
        tensors["alibi_slopes"] = np.ones(problem.heads, np.float32)
    tensors["o"] = aligned(problem.o_shape, q.dtype)
    tensors["lse"] = np.empty(problem.lse_shape, np.float32)
    return Call(problem, tensors, alignment(tensors, map(address, tensors.values())))


def simple_call(
    seqlen: int, head_dim: int, head_dim_v: int, dtype: np.dtype = BFLOAT16, **options: Any
) -> Call:
    """One head; q and k share memory, for nothing reads them."""
    q = aligned((1, seqlen, head_dim), dtype)
    return call_of(q, q, aligned((1, seqlen, head_dim_v), dtype), **options)


def plan_of(call: Call) -> hopper.HopperForwardPlan:
    return hopper.plan_forward(HOPPER, call.problem, call.tensors)


# ---------------------------------------------------------------------------------------------
# Compilation


def check_compiles(plan: KernelPlan, kernel: str = "hopper_forward") -> None:
    cubin = compile_cubin(kernel, plan, "sm_90a")
    assert cubin.stack_bytes == 0, plan
    assert not BAD_WARNINGS.search(cubin.log), f"{plan}: {cubin.log}"


# One of each head dim and mask; all of them are in the slow test.
SOME = [
    (1000, 64, 64, "causal"),
    (16384, 64, 64, "causal"),
    (16384, 64, 64, "full"),
    (1000, 96, 96, "full"),
    (1000, 128, 128, "causal"),
    (16384, 128, 128, "full"),
    (1000, 192, 192, "full"),
    (1000, 256, 256, "softcap"),
]


@pytest.mark.parametrize(("seqlen", "d", "dv", "mask"), SOME)
def test_compiles_without_spills(seqlen: int, d: int, dv: int, mask: str) -> None:
    check_compiles(plan_of(simple_call(seqlen, d, dv, **MASKS[mask])))


def backward_plans(call: Call, deterministic: bool = False) -> dict[str, KernelPlan]:
    """The plans of a call's backward kernels by their names."""
    tensors = dict(call.tensors)
    alibi = "alibi_slopes" in tensors
    for name, shape in hopper_backward.workspace(
        HOPPER, call.problem, alibi, deterministic
    ).items():
        tensors[name] = np.empty(shape, np.float32)
    return {
        kernel: hopper_backward.PLANS[kernel](HOPPER, call.problem, tensors)
        for kernel in hopper_backward.kernels(HOPPER, call.problem, alibi, deterministic)
    }


# Among them head dims of v narrower than q's, whose rows take fewer lanes.
SOME_BACKWARD = [
    (64, 64, "causal"),
    (96, 96, "full"),
    (128, 128, "causal"),
    (128, 128, "softcap and alibi"),
    (128, 72, "full"),
    (104, 96, "softcap"),
    (192, 128, "full"),
    (256, 256, "causal"),
    (256, 192, "full"),
]


@pytest.mark.parametrize(("d", "dv", "mask"), SOME_BACKWARD)
def test_backward_compiles_without_spills(d: int, dv: int, mask: str) -> None:
    for kernel, plan in backward_plans(simple_call(1000, d, dv, **MASKS[mask])).items():
        check_compiles(plan, kernel)
        assert plan.shared_bytes <= HOPPER.shared_bytes


def many_heads_call(
    heads: int, seqlen: int, head_dim: int = 64, group: int = 1, **options: Any
) -> Call:
    q, k = (aligned((n, seqlen, head_dim), BFLOAT16) for n in (heads, heads // group))
    return call_of(q, k, k, **options)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_whole_heads_compile_without_spills(mask: str) -> None:
    plan = backward_plans(many_heads_call(132, 512, **MASKS[mask]))["hopper_backward"]
    assert plan.head_rows == 512
    check_compiles(plan, "hopper_backward")
    assert plan.shared_bytes <= HOPPER.shared_bytes


@pytest.mark.parametrize(
    ("shape", "options", "whole"),
    [
        ((132, 512), {}, True),
        ((106, 1, 40), {"causal": True}, True),
        ((105, 512), {}, False),  # a fifth of the multiprocessors would be idle
        ((133, 512), {}, False),
        ((212, 512), {}, True),
        ((132, 513), {}, False),
        ((132, 512, 72), {}, False),
        ((132, 512, 64, 2), {}, False),
        ((132, 512), {"softcap": 2.0}, False),
        ((132, 512), {"alibi": True}, False),
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_which_calls_have_blocks_for_whole_heads(
    shape: tuple[int, ...], options: dict[str, Any], whole: bool, deterministic: bool
) -> None:
    call = many_heads_call(*shape, **options)
    plans = backward_plans(call, deterministic)
    alibi = "alibi_slopes" in call.tensors
    workspace = hopper_backward.workspace(HOPPER, call.problem, alibi, deterministic)
    if whole:
        assert list(plans) == ["hopper_row_dots", "hopper_backward"]
        assert list(workspace) == ["row_dots"]
        assert plans["hopper_backward"].blocks(call.problem, {}) == call.problem.heads
    else:
        assert list(plans) == ["hopper_row_dots", "hopper_backward"]
        assert list(workspace) == ["row_dots", "dq_sum", "dq_counts", *["dq_turns"] * deterministic]


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("d", "dv"), [*HEAD_DIMS, (128, 96), (128, 64), (96, 128), (96, 64), (64, 96), (64, 128)]
)
def test_every_backward_plan_compiles_without_spills(
    d: int, dv: int, mask: str, deterministic: bool
) -> None:
    for seqlen in (1000, 16384):
        call = simple_call(seqlen, d, dv, **MASKS[mask])
        for kernel, plan in backward_plans(call, deterministic).items():
            check_compiles(plan, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("d", "dv"), HEAD_DIMS)
@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
def test_every_plan_compiles_without_spills(dtype: np.dtype, d: int, dv: int, mask: str) -> None:
    plans = {plan_of(simple_call(n, d, dv, dtype, **MASKS[mask])) for n in (1000, 16384)}
    for plan in plans:
        check_compiles(plan)


@pytest.mark.parametrize("mask", MASKS)
def test_every_call_has_a_plan_that_fits(mask: str) -> None:
    dims = (8, 40, 64, 80, 96, 128, 160, 192, 256)
    for d, dv, seqlen in itertools.product(dims, dims, (1, 16384)):
        plan = plan_of(simple_call(seqlen, d, dv, **MASKS[mask]))
        assert plan.head_dim >= d
        assert plan.head_dim_v >= dv
        assert plan.shared_bytes <= HOPPER.shared_bytes
        assert plan.stages >= 2
        # The registers that a multiprocessor has.
        consumers = plan.warps // 4 - 1
        threads = plan.producer_registers + consumers * plan.consumer_registers
        assert 128 * threads <= 65536


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("mask", MASKS)
def test_every_call_has_a_backward_plan_that_fits(mask: str, deterministic: bool) -> None:
    dims = (8, 40, 64, 80, 96, 128, 160, 192, 256)
    lengths = {1, *hopper_backward.lengths(), 16384}
    for d, dv, seqlen in itertools.product(dims, dims, lengths):
        plans = backward_plans(simple_call(seqlen, d, dv, **MASKS[mask]), deterministic)
        plan = [*plans.values()][-1]
        assert plan.head_dim >= d
        assert plan.head_dim_v >= dv
        assert plan.shared_bytes <= HOPPER.shared_bytes


@pytest.mark.parametrize("mask", MASKS)
def test_lengths_have_all_plans(mask: str) -> None:
    def plan(seqlen_q: int, seqlen_k: int, head_dim: int) -> hopper.HopperForwardPlan:
        q, k = (aligned((1, n, head_dim), BFLOAT16) for n in (seqlen_q, seqlen_k))
        call = call_of(q, k, k, **MASKS[mask])
        tickets = ("tickets",) if hopper.is_dynamic(call.problem) else ()
        return hopper.plan_forward(HOPPER, call.problem, (*call.tensors, *tickets))

    for head_dim in (64, 96, 128, 256):
        known = {plan(*lengths, head_dim) for lengths in hopper.lengths()}
        for seqlen_q, seqlen_k in itertools.product((2, 100, 256, 384, 1000, 1024, 4096), repeat=2):
            assert plan(seqlen_q, seqlen_k, head_dim) in known


def test_o_has_a_place_of_its_own_where_there_is_room() -> None:
    assert not plan_of(simple_call(1000, 128, 128)).o_over_q
    assert not plan_of(simple_call(16384, 128, 128)).o_over_q
    assert plan_of(simple_call(1000, 256, 256)).o_over_q


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"warps": 8}, "8 warps cannot own tile_m=128 rows"),
        ({"warps": 10}, "10 warps cannot own tile_m=128 rows"),
        ({"warps": 8, "tile_m": 64}, "consumers take turns: it takes two"),
        ({"tile_n": 40}, "tile_n is 40, not a positive multiple of 16"),
    ],
)
def test_a_plan_validates_itself(changed: dict[str, int], message: str) -> None:
    plan = plan_of(simple_call(1000, 128, 128))
    with pytest.raises(ValueError, match=message):
        replace(plan, **changed)


# ---------------------------------------------------------------------------------------------
# Choice of the family


def transposed_call() -> Call:
    """A call in the layout (batch, seqlen, heads, head_dim)."""
    q, k = (aligned((2, 70, heads, 64), FLOAT16).swapaxes(1, 2) for heads in (4, 2))
    return call_of(q, k, k)


def unaligned_call() -> Call:
    q = aligned((1, 70, 72), FLOAT16)[..., 4:68]
    return call_of(q, aligned((1, 70, 64), FLOAT16), aligned((1, 70, 64), FLOAT16))


def backward_running_call() -> Call:
    q = aligned((1, 70, 64), FLOAT16)
    return call_of(q[:, ::-1], q, q)


def batched_call(swapped: bool) -> Call:
    q = aligned((2, 3, 5, 1, 20, 64), FLOAT16)
    k = aligned((2, 5, 3, 1, 20, 64), FLOAT16).swapaxes(1, 2) if swapped else q
    return call_of(q, k, k)


CHOICES = {
    "plain": (simple_call(100, 64, 64), HOPPER, "hopper"),
    "one row": (simple_call(1, 128, 128), HOPPER, "hopper"),
    "every option": (simple_call(100, 128, 64, **MASKS["all"]), HOPPER, "hopper"),
    "other strides": (transposed_call(), HOPPER, "hopper"),
    "batch axes that merge": (batched_call(False), HOPPER, "hopper"),
    "a head dim between those of kernels": (simple_call(100, 72, 104), HOPPER, "hopper"),
    "another GPU": (simple_call(100, 64, 64), AMPERE, "it takes a GPU of compute capability 9.0"),
    "float32": (simple_call(9, 64, 64, FLOAT32), HOPPER, "got float32, takes float16 or bfloat16"),
    "rows of odd lengths": (simple_call(100, 59, 64), HOPPER, "q has a stride of 118 bytes"),
    "unaligned": (unaligned_call(), HOPPER, "does not begin at a multiple of 16 bytes"),
    "negative stride": (backward_running_call(), HOPPER, "q has a stride of -128 bytes"),
    "three batch axes": (batched_call(True), HOPPER, "more than 2 batch axes remain"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_choice_of_the_family(name: str) -> None:
    call, card, expected = CHOICES[name]
    machine = FakeMachine(card)
    chosen = "hopper" if expected == "hopper" else "portable"
    assert choose_family(call, machine) == chosen
    with force_family("portable"):
        assert choose_family(call, machine) == "portable"
    with force_family("hopper"):
        if chosen == "hopper":
            assert choose_family(call, machine) == "hopper"
        else:
            with pytest.raises(ValueError, match=f"hopper family cannot .*{expected}"):
                choose_family(call, machine)
    assert choose_family(call, machine) == chosen


def test_force_family_names_the_families() -> None:
    with pytest.raises(ValueError, match="family: got 'volta', takes one of portable, hopper"):
        force_family("volta").__enter__()


# ---------------------------------------------------------------------------------------------
# Maps


def test_maps_of_a_launch() -> None:
    q = aligned((2, 300, 4, 72), FLOAT16).swapaxes(1, 2)
    k = aligned((2, 200, 72), FLOAT16)[:1, None]
    v = aligned((2, 2, 200, 64), FLOAT16)[:, :1]
    launch = make_launch("hopper_forward", call_of(q, k, v), FakeMachine(HOPPER), first=True)
    tiles = launch.plan
    assert dict(launch.maps) == {
        "q": BoxMap(
            0, "float16", (72, 300, 4, 2, 1), (4 * 144, 144, 300 * 4 * 144, 16), tiles.tile_m
        ),
        "k": BoxMap(0, "float16", (72, 200, 1, 2, 1), (144, 16, 0, 16), tiles.tile_n),
        "v": BoxMap(0, "float16", (64, 200, 1, 2, 1), (128, 16, 2 * 200 * 128, 16), tiles.tile_n),
        "o": BoxMap(0, "float16", (64, 300, 4, 2, 1), (128, 300 * 128, 4 * 300 * 128, 16), 64),
    }


def test_maps_are_in_the_order_of_the_struct() -> None:
    text = (kernel_folder() / "hopper_maps.cuh").read_text()
    call = simple_call(100, 64, 64)
    plans = {"Forward": plan_of(call), "Backward": backward_plans(call)["hopper_backward"]}
    for name, plan in plans.items():
        body = re.search(rf"struct {name}Maps \{{(.*?)\n\}};", text, re.S)[1]
        assert re.findall(r"^ +TensorMap (\w+);", body, re.M) == list(plan.boxes)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[BoxMap]:
    """The maps that the driver is asked to encode: here each becomes its number."""
    maps: list[BoxMap] = []

    def encode(box_map: BoxMap) -> bytes:
        maps.append(box_map)
        return bytes([len(maps)]) * MAP_BYTES

    monkeypatch.setattr(tensor_maps, "encode", encode)
    monkeypatch.setattr(driver, "lets_launches_overlap", lambda: True)
    return maps


def test_launches_are_prepared_once_for_the_same_addresses(encoded: list[BoxMap]) -> None:
    launch = make_launch(
        "hopper_forward", simple_call(100, 64, 64), FakeMachine(HOPPER), first=True
    )
    assert launch.tensors == ("q", "k", "v", "o", "lse")
    work, stream = Work((launch,), ()), 7
    (prepared,) = prepare(work, stream, 16, 32, 48, 64, 80)
    params, maps = prepared.arguments
    assert params["v"]["data"] == 48
    assert maps.tobytes() == b"".join(bytes([i]) * MAP_BYTES for i in (1, 2, 3, 4))
    assert [box_map.address for box_map in encoded] == [16, 32, 48, 64]
    assert prepare(work, stream, 16, 32, 48, 64, 80) == (prepared,)
    prepare(work, stream, 16, 32, 48, 96, 80)
    prepare(work, stream + 1, 16, 32, 48, 64, 80)
    assert len(encoded) == 12


def backward_work(deterministic: bool) -> Work:
    """A backward call of 2 heads."""
    q = aligned((2, 200, 64), BFLOAT16)
    forward = call_of(q, q, q, causal=True)
    gradients = {"do_": q, "dq": q, "dk": q, "dv": q}
    call = replace(forward, tensors={**forward.tensors, **gradients})
    return make_work(call, deterministic, FakeMachine(HOPPER))


def test_workspace_is_one_piece_of_memory(encoded: list[BoxMap]) -> None:
    """Its tensors follow each other, aligned like arrays of their own."""
    work = backward_work(deterministic=True)
    row_dots, dq_sum, dq_counts, dq_turns = work.workspace
    assert row_dots.dtype == dq_sum.dtype == np.float32
    assert dq_counts.dtype == dq_turns.dtype == np.int32
    for (begin, end), x in zip(itertools.pairwise(work.offsets), work.workspace, strict=True):
        assert begin % 512 == 0 and 0 <= end - begin - x.nbytes < 512
    addresses = range(4096, 4096 * 10, 4096)
    memory = 1 << 30
    for launch, prepared in zip(work.launches, prepare(work, 0, *addresses, memory), strict=True):
        assert launch.tensors[-4:] == ("row_dots", "dq_sum", "dq_counts", "dq_turns")
        params = prepared.arguments[0]
        placed = [int(params[name]["data"][0]) for name in launch.tensors]
        assert placed == [*addresses, *(memory + begin for begin in work.offsets[:-1])]


def test_only_launches_behind_others_of_their_call_overlap() -> None:
    for deterministic in (False, True):
        launches = backward_work(deterministic).launches
        assert [launch.overlaps for launch in launches] == [False, True]


def test_tickets_are_cleared_by_a_kernel_ahead() -> None:
    masked = simple_call(hopper.MIN_DYNAMIC_SEQLEN, 64, 64, causal=True)
    work = make_work(masked, False, FakeMachine(HOPPER))
    assert work.workspace == (Layout.contiguous((1, 1), np.dtype(np.int32)),)
    clear, forward = work.launches
    assert (clear.blocks, clear.plan.threads, clear.overlaps) == (1, 32, False)
    assert forward.plan.dynamic and forward.overlaps
    short = simple_call(hopper.MIN_DYNAMIC_SEQLEN - 1, 64, 64, causal=True)
    work = make_work(short, False, FakeMachine(HOPPER))
    assert work.workspace == () and [x.overlaps for x in work.launches] == [False]


def test_a_launch_has_no_more_blocks_than_there_are_multiprocessors() -> None:
    few, many = (
        make_launch("hopper_forward", simple_call(n, 64, 64), FakeMachine(HOPPER), True).blocks
        for n in (300, 100_000)
    )
    assert (few, many) == (2, 132)
