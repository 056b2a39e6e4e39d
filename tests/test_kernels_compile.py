"""Every kernel of the plan tables compiles for every kind of GPU; this needs NVRTC and no GPU."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flash_cupy.cuda import params
from flash_cupy.cuda.compiler import compile_cubin, inline_includes, kernel_folder
from flash_cupy.cuda.plan import (
    ELEMENT_BYTES,
    HEAD_DIMS,
    Card,
    ForwardPlan,
    KernelPlan,
    plan_kernel,
)

CARDS = {
    "sm_80": Card((8, 0), 163 << 10),
    "sm_89": Card((8, 9), 99 << 10),
    "sm_90a": Card((9, 0), 227 << 10),
    "sm_120": Card((12, 0), 99 << 10),
}
MASKS = {
    "full": {"band": False, "softcap": False, "alibi": False},
    "causal": {"band": True, "softcap": False, "alibi": False},
    "all": {"band": True, "softcap": True, "alibi": True},
}
TILED = ("attention_forward", "attention_backward", "attention_backward_dq")
KERNELS = (*TILED, "row_dots", "store_dq")
MAX_REGISTERS = 255

# Kernels that use local memory, in bytes a thread: (kernel, element, head dim, mask, arch).
LOCAL_MEMORY: dict[tuple[str, str, int, str, str], int] = {
    ("attention_backward", "bfloat16", 64, "all", "sm_120"): 16,
    ("attention_backward", "bfloat16", 128, "causal", "sm_120"): 8,
    ("attention_backward", "float", 96, "all", "sm_80"): 16,
    ("attention_backward", "float", 96, "causal", "sm_80"): 16,
    ("attention_backward", "float", 96, "full", "sm_80"): 8,
    ("attention_backward", "float", 192, "all", "sm_120"): 8,
    ("attention_backward", "float", 192, "all", "sm_80"): 8,
    ("attention_backward", "float", 256, "all", "sm_80"): 32,
    ("attention_backward", "float", 256, "all", "sm_90a"): 16,
    ("attention_backward", "float", 256, "causal", "sm_80"): 16,
    ("attention_backward", "float", 256, "full", "sm_80"): 16,
    ("attention_backward", "float16", 64, "all", "sm_120"): 16,
    ("attention_backward", "float16", 128, "causal", "sm_120"): 8,
    ("attention_backward_dq", "float", 96, "all", "sm_90a"): 8,
    ("attention_backward_dq", "float", 128, "all", "sm_80"): 24,
    ("attention_backward_dq", "float", 128, "all", "sm_90a"): 24,
    ("attention_backward_dq", "float", 192, "all", "sm_120"): 8,
    ("attention_backward_dq", "float", 192, "all", "sm_90a"): 24,
    ("attention_backward_dq", "float", 192, "causal", "sm_90a"): 24,
    ("attention_backward_dq", "float", 192, "full", "sm_120"): 16,
    ("attention_backward_dq", "tensorfloat32", 256, "all", "sm_120"): 48,
    ("attention_backward_dq", "tensorfloat32", 256, "causal", "sm_89"): 24,
    ("attention_backward_dq", "tensorfloat32", 256, "full", "sm_120"): 40,
    ("attention_backward_dq", "tensorfloat32", 256, "full", "sm_89"): 24,
    ("attention_forward", "bfloat16", 64, "all", "sm_120"): 8,
    ("attention_forward", "bfloat16", 64, "causal", "sm_120"): 8,
    ("attention_forward", "float", 96, "all", "sm_90a"): 24,
    ("attention_forward", "float", 96, "causal", "sm_90a"): 16,
    ("attention_forward", "float", 96, "full", "sm_90a"): 24,
    ("attention_forward", "float", 128, "all", "sm_90a"): 40,
    ("attention_forward", "float", 128, "causal", "sm_90a"): 48,
    ("attention_forward", "float", 128, "full", "sm_90a"): 40,
    ("attention_forward", "float16", 64, "all", "sm_120"): 8,
    ("attention_forward", "float16", 64, "causal", "sm_120"): 8,
    ("store_dq", "double", 192, "all", "sm_80"): 8,
}

# Kernels that find no room in the shared memory of a card: (kernel, element, head dim, arch).
TOO_LARGE = {
    ("attention_backward", "double", 160, "sm_120"),
    ("attention_backward", "double", 160, "sm_89"),
    ("attention_backward", "double", 192, "sm_120"),
    ("attention_backward", "double", 192, "sm_89"),
    ("attention_backward", "double", 256, "sm_120"),
    ("attention_backward", "double", 256, "sm_89"),
    ("attention_backward_dq", "double", 256, "sm_120"),
    ("attention_backward_dq", "double", 256, "sm_89"),
}

# One of each kernel, element type, mask and architecture; all of them are in the slow test.
SOME = [
    ("attention_forward", "bfloat16", 64, "causal", "sm_89"),
    ("attention_forward", "bfloat16", 128, "all", "sm_80"),
    ("attention_forward", "bfloat16", 256, "full", "sm_90a"),
    ("attention_forward", "float16", 128, "causal", "sm_120"),
    ("attention_forward", "tensorfloat32", 128, "causal", "sm_90a"),
    ("attention_forward", "float", 64, "full", "sm_80"),
    ("attention_forward", "float", 128, "all", "sm_90a"),
    ("attention_forward", "double", 128, "causal", "sm_80"),
    ("attention_forward", "double", 64, "all", "sm_90a"),
    ("attention_backward", "bfloat16", 64, "causal", "sm_80"),
    ("attention_backward", "float16", 128, "full", "sm_90a"),
    ("attention_backward", "tensorfloat32", 64, "causal", "sm_120"),
    ("attention_backward", "float", 128, "causal", "sm_90a"),
    ("attention_backward", "double", 64, "all", "sm_89"),
    ("attention_backward_dq", "bfloat16", 64, "all", "sm_90a"),
    ("attention_backward_dq", "float", 64, "causal", "sm_80"),
    ("attention_backward_dq", "double", 64, "full", "sm_90a"),
    ("row_dots", "bfloat16", 128, "full", "sm_80"),
    ("row_dots", "double", 64, "full", "sm_120"),
    ("store_dq", "float16", 64, "full", "sm_80"),
    ("store_dq", "double", 256, "full", "sm_90a"),
]
ALL = list(itertools.product(KERNELS, ELEMENT_BYTES, HEAD_DIMS, MASKS, CARDS))


def check(kernel: str, element: str, head_dim: int, mask: str, arch: str) -> None:
    def choose() -> KernelPlan:
        return plan_kernel(
            kernel, CARDS[arch], element, head_dim, head_dim, 16, sum_dq=True, **MASKS[mask]
        )

    if (kernel, element, head_dim, arch) in TOO_LARGE:
        with pytest.raises(ValueError, match=r"no backward kernel .* fits in"):
            choose()
        return
    plan = choose()
    cubin = compile_cubin(kernel, plan, arch)
    allowed = LOCAL_MEMORY.get((kernel, element, head_dim, mask, arch), 0)
    assert cubin.stack_bytes <= allowed, f"{plan} uses {cubin.stack_bytes} bytes of local memory"
    assert cubin.registers <= MAX_REGISTERS
    assert plan.shared_bytes <= CARDS[arch].shared_bytes
    assert len(cubin.code) > 0


@pytest.mark.parametrize("case", SOME, ids=lambda case: "-".join(map(str, case)))
def test_compiles_without_local_memory(case: tuple[str, str, int, str, str]) -> None:
    check(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case)))
def test_every_plan_compiles_without_local_memory(case: tuple[str, str, int, str, str]) -> None:
    check(*case)


@pytest.mark.parametrize("access_bytes", [2, 4, 8])
def test_narrow_accesses_compile(access_bytes: int) -> None:
    plan = plan_kernel(
        "attention_forward",
        CARDS["sm_90a"],
        "bfloat16",
        59,
        111,
        access_bytes,
        sum_dq=True,
        **MASKS["causal"],
    )
    # Single elements of 16 bits travel through registers: 8 bytes of local memory.
    allowed = 8 if access_bytes == 2 else 0
    assert compile_cubin("attention_forward", plan, "sm_90a").stack_bytes <= allowed


def test_every_call_has_a_plan_on_every_card() -> None:
    for kernel, card, element, mask in itertools.product(
        KERNELS, CARDS.values(), ELEMENT_BYTES, MASKS.values()
    ):
        for d, dv in itertools.product((1, *HEAD_DIMS), repeat=2):
            arguments = (kernel, card, element, d, dv, 16)
            try:
                plan = plan_kernel(*arguments, sum_dq=True, **mask)
            except ValueError as error:
                assert may_be_too_wide(kernel, card, element, d, dv)
                assert "fits in 101376 bytes of shared memory" in str(error)
                continue
            assert plan.shared_bytes <= card.shared_bytes
            assert plan == plan_kernel(*arguments, sum_dq=True, **mask)


def may_be_too_wide(kernel: str, card: Card, element: str, d: int, dv: int) -> bool:
    """Whether 16 rows each of q, do, k and v can be more than shared memory holds.

    In float64 on the cards that compute float64 at 1/64 of float32's rate.
    """
    small = card.shared_bytes < 100 << 10
    return "backward" in kernel and element == "double" and small and max(d, dv) >= 160


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"element": "int8"}, "element is 'int8', not one of float16"),
        ({"access_bytes": 32}, "access_bytes is 32, not 2, 4, 8 or 16"),
        ({"element": "double", "access_bytes": 4}, "access_bytes is 4, .* at least an element"),
        ({"tile_n": 40}, "tile_n is 40, not a positive multiple of 16"),
        ({"warps": 3}, "3 warps cannot own 16-row blocks of tile_m=128"),
        ({"head_dim_v": 256}, "o and S take .* registers"),
    ],
)
def test_a_plan_validates_itself(changed: dict[str, object], message: str) -> None:
    row = {
        "element": "bfloat16",
        "access_bytes": 16,
        "warps": 4,
        "head_dim": 64,
        "head_dim_v": 64,
        "tile_m": 128,
        "tile_n": 64,
        "stages": 1,
        "blocks_per_sm": 1,
        "band": False,
        "softcap": False,
        "alibi": False,
        "dim_unroll": 4,
        "dim_v_group": 16,
    }
    ForwardPlan(**row)
    with pytest.raises(ValueError, match=message):
        ForwardPlan(**(row | changed))


def test_a_source_that_does_not_compile_says_where() -> None:
    plan = plan_kernel(
        "attention_forward", CARDS["sm_80"], "float", 64, 64, 16, sum_dq=False, **MASKS["full"]
    )
    object.__setattr__(plan, "element", "no_such_type")
    with pytest.raises(RuntimeError, match=r"attention_forward\.cu\(\d+\): error"):
        compile_cubin("attention_forward", plan, "sm_80")


def test_inlined_includes_name_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.cu").write_text('#include "b.cuh"\n#include "c.cuh"\nint a;\n')
    (tmp_path / "b.cuh").write_text('#pragma once\n#include "c.cuh"\nint b;\n')
    other = tmp_path / "other"
    other.mkdir()
    (other / "b.cuh").write_text("int other_b;\n")
    (other / "c.cuh").write_text("int c;\n")
    assert inline_includes("a.cu", (tmp_path, other)).splitlines() == [
        '#line 1 "a.cu"',
        '#line 1 "b.cuh"',
        "",
        '#line 1 "c.cuh"',
        "int c;",
        '#line 3 "b.cuh"',
        "int b;",
        '#line 2 "a.cu"',
        "",
        "int a;",
    ]
    with pytest.raises(FileNotFoundError, match=r"c\.cuh is in none of"):
        inline_includes("a.cu", (tmp_path,))


def test_every_header_inclusion_is_inlined() -> None:
    for kernel in KERNELS:
        text = inline_includes(f"{kernel}.cu", (kernel_folder(),))
        assert "#include" not in text
        assert "#pragma once" not in text


def fields_of(dtype: np.dtype, struct: str) -> list[str]:
    """C++ that fails to compile where a field is not at its NumPy offset."""
    lines = [f'static_assert(sizeof({struct}) == {dtype.itemsize}, "{struct}");']
    for name, (field, offset, *_) in dtype.fields.items():
        lines.append(
            f"static_assert(offsetof({struct}, {name}) == {offset} && "
            f'sizeof({struct}::{name}) == {field.itemsize}, "{struct}::{name}");'
        )
    return lines


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_parameters_mirror_the_struct(tmp_path: Path) -> None:
    header = inline_includes("params.cuh", (kernel_folder(),))
    words = ["#include <cstddef>", "#include <cstring>", "#define __device__"]
    source = tmp_path / "params.cpp"

    def compile_with(dtype: np.dtype) -> subprocess.CompletedProcess[str]:
        asserts = [*fields_of(params.TENSOR, "Tensor"), *fields_of(dtype, "AttentionParams")]
        asserts += fields_of(dtype["floats"], "Scalars<float>")
        asserts += fields_of(dtype["doubles"], "Scalars<double>")
        source.write_text("\n".join([*words, "#define __forceinline__ inline", header, *asserts]))
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(source)]
        return subprocess.run(command, capture_output=True, text=True)

    result = compile_with(params.ATTENTION_PARAMS)
    assert result.returncode == 0, result.stderr
    # The C++ struct has no field that the mirror lacks.
    body = re.search(r"struct AttentionParams \{(.*?)\n\};", header, re.S)[1]
    names = re.findall(r"^ +[\w<>]+ (\w+)(?:\[\w+\])?;", body, re.M)
    assert names == list(params.ATTENTION_PARAMS.names)

    swapped = [(name, params.ATTENTION_PARAMS.fields[name][0]) for name in names]
    swapped[-4:-2] = swapped[-3:-5:-1]  # band_low and band_high
    assert compile_with(np.dtype(swapped, align=True)).returncode != 0


HEAD_TILES_CHECK = """
#include <cstdio>
#include <cstring>
#include <algorithm>
#include <set>
#include <utility>
#define __device__
#define __forceinline__ inline
using std::min;
struct { unsigned x; } gridDim;
HEADER
int main() {
    const uint32 tiles = 3, heads = 7;
    gridDim.x = tiles * heads;
    for (uint32 section = 1; section <= 9; ++section) {
        std::set<std::pair<uint32, uint32>> taken;
        for (uint32 i = 0, last = 0; i < tiles * heads; ++i) {
            const HeadTile at = nth_head_tile(i, tiles, heads, section);
            if (at.head >= heads || at.tile >= tiles || at.head / section < last) return 1;
            last = at.head / section;  // sections one after the other
            taken.insert({at.head, at.tile});
        }
        if (taken.size() != tiles * heads) return 2;
    }
    // Sections of two heads, which have five tiles or more.
    const HeadTile first = head_tile_of<true, 5>(0, tiles);
    const HeadTile second = head_tile_of<true, 5>(1, tiles);
    if (first.head != 0 || second.head != 1 || first.tile != 0 || second.tile != 0) return 3;
    return head_tile_of<true, 5>(6, tiles).head == 2 ? 0 : 4;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_every_tile_of_every_head_is_taken_once(tmp_path: Path) -> None:
    source, program = tmp_path / "tiles.cpp", tmp_path / "tiles"
    header = inline_includes("head_tiles.cuh", (kernel_folder(),))
    source.write_text(HEAD_TILES_CHECK.replace("HEADER", header))
    subprocess.run(["g++", "-std=c++17", "-o", str(program), str(source)], check=True)
    assert subprocess.run([str(program)]).returncode == 0
