"""The host device on sm_90: its barriers, copies and matrix products, and planted bugs.

What a function computes is tested on a GPU too, where there is one of that kind.
"""

# ruff: noqa: F811 (fixtures are imported)
from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from host import testing
from host.device import HostDevice, HostKernelError
from host.testing import Machine, device, machine, rng, tensor_map  # noqa: F401
from numpy.typing import NDArray

HEADERS = (
    "ptx.cuh",
    "mbarrier.cuh",
    "tma.cuh",
    "wgmma.cuh",
    "warpgroup.cuh",
    "turns.cuh",
    "hopper_tile.cuh",
)


def run(machine: Machine, parameters: str, body: str, *args: Any, **options: Any) -> None:
    testing.run(machine, parameters, body, *args, headers=HEADERS, arch="sm_90a", **options)


# The columns of a box of 24 rows in the order of shared memory.
PLACES = np.arange(8) ^ np.arange(24)[:, None] % 8
SWIZZLED = (PLACES[..., None] * 8 + np.arange(8)).reshape(24, 64)
COPY_BOX = """
    const uint32 tile = swizzle_aligned(shared_address(dynamic_shared_memory()));
    const uint32 barrier = tile + ROWS * 128;
    const BoxPlace place = {col, row, 1, {1, 2}};
    if (threadIdx.x == 0) {
        init_barrier(barrier, 1);
        fence_barrier_init();
    }
    __syncthreads();
"""


@pytest.fixture
def tensor(rng: np.random.Generator) -> NDArray:
    """A tensor (2, 3, 2, 50, 88) inside a larger one, some of whose axes are in another order."""
    memory = rng.integers(0, 1 << 16, (2, 3, 51, 2, 96), np.uint16)
    return memory.swapaxes(2, 3)[:, :, :, :50, :88]


def box_of(x: NDArray, col: int, row: int) -> tuple[NDArray, NDArray]:
    """What a box of 24 rows holds of the head that COPY_BOX names, and which of it is inside."""
    rows, cols = row + np.arange(24)[:, None], col + np.arange(64)
    inside = (rows >= 0) & (rows < x.shape[-2]) & (cols < x.shape[-1])
    head = x[1, 2, 1]
    return np.where(inside, head[rows.clip(0, 49), cols.clip(0, 87)], 0), inside


@pytest.mark.parametrize(("col", "row"), [(0, 0), (64, 40), (0, -5), (8, 60)])
def test_load_box(machine: Machine, tensor: NDArray, col: int, row: int) -> None:
    """Rows of 128 bytes, swizzled; zeros outside the tensor."""
    memory, d = machine.asarray(tensor.base), machine.empty((24, 64), np.uint16)
    run(
        machine,
        "const __grid_constant__ TensorMap map, int col, int row, uint16* d",
        f"""
        constexpr int ROWS = 24;
        {COPY_BOX}
        if (threadIdx.x == 0) {{
            prefetch_map(&map);
            arrive_expecting(barrier, ROWS * 128);
            load_box(tile, &map, place, barrier);
        }}
        wait_for(barrier, 0);
        for (int i = threadIdx.x; i < ROWS * 64; i += 32) {{
            d[i] = load_shared<uint16>(tile + 2 * i);
        }}
        """,
        tensor_map(machine, memory, tensor, 24),
        np.int32(col),
        np.int32(row),
        d,
        shared_mem=5120,
    )
    box, _ = box_of(tensor, col, row)
    np.testing.assert_array_equal(d.get(), np.take_along_axis(box, SWIZZLED, 1))


@pytest.mark.parametrize(("col", "row"), [(0, 0), (64, 40), (64, 0)])
def test_store_box(machine: Machine, tensor: NDArray, col: int, row: int) -> None:
    """The rows and columns that exist."""
    values = np.arange(24 * 64, dtype=np.uint16).reshape(24, 64)
    memory = machine.asarray(tensor.base)
    run(
        machine,
        "const __grid_constant__ TensorMap map, int col, int row, const uint16* values",
        f"""
        constexpr int ROWS = 24;
        {COPY_BOX}
        SwizzledTile<float16, ROWS, 64> box = {{tile}};
        for (int i = threadIdx.x; i < ROWS * 64; i += 32) {{
            store_shared(box.at(i / 64, i % 64), values[i]);
        }}
        fence_async_shared();
        __syncthreads();
        if (threadIdx.x == 0) {{
            store_box(&map, place, tile);
            commit_bulk();
            wait_bulk_read<0>();
        }}
        """,
        tensor_map(machine, memory, tensor, 24),
        np.int32(col),
        np.int32(row),
        machine.asarray(values),
        shared_mem=5120,
    )
    expected = tensor.base.copy()
    _, inside = box_of(tensor, col, row)
    head = expected.swapaxes(2, 3)[1, 2, 1, :50, :88]
    i, j = np.nonzero(inside)
    head[row + i, col + j] = values[i, j]
    np.testing.assert_array_equal(memory.get(), expected)


def test_bulk_copies(machine: Machine, rng: np.random.Generator) -> None:
    """Two blocks add what they have loaded, to the same place and each to one of its own."""
    x = rng.integers(-8, 8, (2, 256)).astype(np.float32)
    shapes = 256, (2, 256), (2, 256)
    total, own, copy = (machine.asarray(np.ones(shape, np.float32)) for shape in shapes)
    run(
        machine,
        "const float* x, float* total, float* own, float* copy",
        """
        const uint32 shared = shared_address(dynamic_shared_memory()), barrier = shared + 1024;
        if (threadIdx.x == 0) {
            init_barrier(barrier, 1);
            fence_barrier_init();
            arrive_expecting(barrier, 1024);
            load_bulk(shared, x + 256 * blockIdx.x, 512, barrier);
            load_bulk(shared + 512, x + 256 * blockIdx.x + 128, 512, barrier);
            wait_for(barrier, 0);
            add_bulk(total, shared, 1024);
            commit_bulk();
            add_bulk(own + 256 * blockIdx.x, shared, 1024);
            store_bulk(copy + 256 * blockIdx.x, shared, 1024);
            commit_bulk();
            wait_bulk_read<1>();
            wait_bulk<0>();
        }
        """,
        machine.asarray(x),
        total,
        own,
        copy,
        grid=2,
        shared_mem=1040,
    )
    np.testing.assert_array_equal(total.get(), 1 + x.sum(0))
    np.testing.assert_array_equal(own.get(), 1 + x)
    np.testing.assert_array_equal(copy.get(), x)


#: A block adds the value of the one before, and that of the first.
BLOCK_AFTER_BLOCK = """
    const int block = blockIdx.x;
    if (threadIdx.x == 0) {
        if (block > 0 && waits) wait_for_turn(turns + block - 1, 1);
        x[block] = block == 0 ? 1 : x[block - 1] + x[0];
        pass_turn(turns + block);
    }
"""


def test_turns_order_blocks(machine: Machine) -> None:
    """Also those that come before the one which a block has waited for."""
    x, turns = (machine.asarray(np.zeros(4, np.int32)) for _ in range(2))
    run(machine, "int* x, int* turns, bool waits", BLOCK_AFTER_BLOCK, x, turns, True, grid=4)
    np.testing.assert_array_equal(x.get(), [1, 2, 3, 4])
    np.testing.assert_array_equal(turns.get(), 1)


def test_blocks_without_turns_race(device: HostDevice) -> None:
    x, turns = (device.asarray(np.zeros(4, np.int32)) for _ in range(2))
    with pytest.raises(HostKernelError, match=r"race: read of .*\n.* of another block"):
        run(device, "int* x, int* turns, bool waits", BLOCK_AFTER_BLOCK, x, turns, False, grid=4)


TURNS_HEAD = """
    const int i = threadIdx.x;
    const uint32 shared = shared_address(dynamic_shared_memory());
    float* const bulk = x + 64;
    const auto fill = [=] {
        store_shared(shared + 4 * i, 1.0f);
        fence_async_shared();
        __syncthreads();
    };
    const auto finish = [] { commit_bulk(); wait_bulk<0>(); };
    const auto add = [=] { add_bulk(bulk, shared, 256); finish(); };
    volatile float sink;
"""
ADDS = "atomicAdd(x + i, 1.0f);"
ADDS_AND_PASSES = f"{ADDS} __syncthreads(); if (i == 0) pass_turn(turns);"
WAITS = "if (i == 0) wait_for_turn(turns, 1); __syncthreads();"

#: Whether turns suffice, and what the blocks of a grid do, of 64 threads each.
TURNS: dict[str, tuple[bool, list[str]]] = {
    "one thread for all that it has met": (True, [ADDS_AND_PASSES, f"{WAITS} sink = x[63 - i];"]),
    "bulk additions": (
        True,
        ["fill(); if (i == 0) { add(); pass_turn_of_bulk(turns); }", f"{WAITS} sink = bulk[i];"],
    ),
    "bulk additions to what others have stored": (
        True,
        [
            "fill(); if (i == 0) { store_bulk(bulk, shared, 256); finish();"
            " pass_turn_of_bulk(turns); }",
            f"fill(); {WAITS} if (i == 0) {{ add(); pass_turn_of_bulk(turns + 1); }}",
            "wait_for_turn(turns + 1, 1); sink = bulk[i]; bulk[i] = 0;",
        ],
    ),
    "turns of several blocks": (
        True,
        [ADDS_AND_PASSES, ADDS_AND_PASSES, "wait_for_turn(turns, 2); sink = x[i];"],
    ),
    "too early a turn": (
        False,
        [ADDS_AND_PASSES, ADDS_AND_PASSES, "wait_for_turn(turns, 1); sink = x[i];"],
    ),
    "passed before a barrier": (
        False,
        [f"{ADDS} if (i == 0) pass_turn(turns);", f"{WAITS} sink = x[i];"],
    ),
    "no barrier behind the wait": (
        False,
        [ADDS_AND_PASSES, "if (i == 0) wait_for_turn(turns, 1); sink = x[i];"],
    ),
    "bulk turn after ordinary additions": (
        False,
        [
            f"fill(); {ADDS} __syncthreads(); if (i == 0) {{ add(); pass_turn_of_bulk(turns); }}",
            f"{WAITS} sink = x[i];",
        ],
    ),
    "bulk turn after ordinary stores": (
        False,
        ["x[i] = 1; __syncthreads(); if (i == 0) pass_turn_of_bulk(turns);", f"{WAITS} {ADDS}"],
    ),
    "bulk turn after another thread's additions": (
        False,
        [
            "fill(); if (i == 0) add(); __syncthreads(); if (i == 1) pass_turn_of_bulk(turns);",
            f"{WAITS} sink = bulk[i];",
        ],
    ),
    "bulk turn for blocks before": (
        False,
        [
            ADDS_AND_PASSES,
            f"fill(); {WAITS} if (i == 0) {{ add(); pass_turn_of_bulk(turns + 1); }}",
            "wait_for_turn(turns + 1, 1); sink = x[i];",
        ],
    ),
    "additions without a turn beside those with one": (
        False,
        [ADDS, ADDS_AND_PASSES, "wait_for_turn(turns, 1); sink = x[i];"],
    ),
}


@pytest.mark.parametrize("name", TURNS)
def test_turns_order_what_was_done_before(device: HostDevice, name: str) -> None:
    orders, blocks = TURNS[name]
    cases = "".join(f"case {number}: {{ {body} }} break;" for number, body in enumerate(blocks))
    args = device.asarray(np.zeros(128, np.float32)), device.asarray(np.zeros(2, np.int32))

    def run_blocks() -> None:
        body = f"{TURNS_HEAD} switch (blockIdx.x) {{ {cases} }} (void)sink;"
        run(device, "float* x, int* turns", body, *args, grid=len(blocks), block=64)

    if orders:
        run_blocks()
        return
    with pytest.raises(HostKernelError, match=r"race: .*\nafter a .* by a thread of another block"):
        run_blocks()


# ---------------------------------------------------------------------------------------------
# Kernels that overlap

WRITES, READS = "x[i] = i;", "sink = x[i];"
WAIT_OF_ONE = "if (i == 0) wait_for_prerequisites();"
LOAD = """
    if (i == 40) {
        const uint32 shared = shared_address(dynamic_shared_memory()), barrier = shared + 256;
        init_barrier(barrier, 1);
        fence_barrier_init();
        arrive_expecting(barrier, 256);
        load_bulk(shared, x, 256, barrier);
        wait_for(barrier, 0);
    }
"""

#: What two kernels do, the second one overlapping with the first: what is reported.
OVERLAPS: dict[str, tuple[str, str, str | None]] = {
    "wait": (WRITES, "wait_for_prerequisites(); sink = x[63 - i];", None),
    "wait of one thread": (WRITES, f"{WAIT_OF_ONE} __syncthreads(); sink = x[63 - i];", None),
    "reads": (READS, f"{READS} {WAIT_OF_ONE}", None),
    "bulk copy": (WRITES, f"{WAIT_OF_ONE} __syncthreads(); {LOAD}", None),
    "late wait": (WRITES, f"{READS} wait_for_prerequisites();", "read of .*written"),
    "no barrier": (WRITES, f"{WAIT_OF_ONE} {READS}", "read of .*written"),
    "write too early": (READS, f"{WRITES} {WAIT_OF_ONE}", "write of .*read"),
    "write over a write": (WRITES, f"{WRITES} {WAIT_OF_ONE}", "write of .*written"),
    "additions of both": (
        "atomicAdd(x + i, 1);",
        f"atomicAdd(x + i, 1); {WAIT_OF_ONE}",
        "atomic operation of .*written",
    ),
    "bulk copy by another thread": (
        WRITES,
        f"{WAIT_OF_ONE} {LOAD}",
        "read of .* by the copies that the mbarrier at byte 256 counts,.*written",
    ),
}


def run_after_another(device: HostDevice, x: Any, body: str, **options: Any) -> None:
    head = "const int i = threadIdx.x; volatile int sink;"
    run(device, "int* x", f"{head} {body} (void)sink;", x, block=64, **options)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("name", OVERLAPS)
def test_kernels_overlap(device: HostDevice, name: str, overlaps: bool) -> None:
    first, second, report = OVERLAPS[name]
    x = device.asarray(np.zeros(64, np.int32))
    run_after_another(device, x, first)
    if report is None or not overlaps:
        run_after_another(device, x, second, overlaps=overlaps)
        return
    report = f"race: {report} that may still run: wait_for_prerequisites is missing"
    with pytest.raises(HostKernelError, match=f"(?s){report}"):
        run_after_another(device, x, second, overlaps=True)


def test_no_thread_waits_for_the_kernel_before(device: HostDevice) -> None:
    """Then the kernel behind it might start while the one before it still runs."""
    x = device.asarray(np.zeros(64, np.int32))
    with pytest.raises(HostKernelError, match="no thread has called wait_for_prerequisites"):
        run_after_another(device, x, READS, overlaps=True)


def test_kernel_overlaps_with_several(device: HostDevice) -> None:
    """The last one starts when the second one lets it, which may be before that waits."""
    x = device.asarray(np.zeros(64, np.int32))
    run_after_another(device, x, WRITES)
    run_after_another(device, x, WAIT_OF_ONE, overlaps=True)
    with pytest.raises(HostKernelError, match=r"race: read of .*\nwhich a kernel has written"):
        run_after_another(device, x, f"{READS} {WAIT_OF_ONE}", overlaps=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_store_matrix(machine: Machine, rng: np.random.Generator, transposed: bool) -> None:
    """Rows to any 16-byte addresses; row r of matrix i to the address of lane 8i + r."""
    registers = rng.integers(0, 1 << 32, (32, 4), np.uint32)
    chosen = rng.permutation(32).astype(np.int32)
    d = machine.empty((32, 8), np.uint16)
    function = "store_matrix_transposed_x4" if transposed else "store_matrix_x4"
    run(
        machine,
        "const uint32* r, const int* chosen, Chunk* d",
        f"""
        const int lane = threadIdx.x;
        const uint32 shared = shared_address(dynamic_shared_memory());
        r += 4 * lane;
        {function}(shared + 16 * chosen[lane], r[0], r[1], r[2], r[3]);
        __syncwarp();
        d[lane] = load_shared<Chunk>(shared + 16 * lane);
        """,
        *map(machine.asarray, (registers, chosen)),
        d,
    )
    pairs = registers.view(np.uint16).reshape(8, 4, 4, 2)  # g, t, matrix, half
    matrices = pairs.transpose(2, 0, 1, 3).reshape(4, 8, 8)
    rows = (matrices.swapaxes(1, 2) if transposed else matrices).reshape(32, 8)
    np.testing.assert_array_equal(d.get()[chosen], rows)


# ---------------------------------------------------------------------------------------------
# Matrix products

PRODUCTS = """
    using T = {type};
    constexpr int N = {n}, K = 64;
    const uint32 shared = swizzle_aligned(shared_address(dynamic_shared_memory()));
    // One after the other: both operands as they are, and transposed.
    const SwizzledTile<T, 64, K> a_tile = {{shared}}, at_tile = {{shared + 64 * 128}};
    const SwizzledTile<T, N, K> b_tile = {{shared + 2 * 64 * 128}};
    const SwizzledTile<T, K, N> bt_tile = {{b_tile.address + b_tile.BYTES}};
    const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    for (int i = thread; i < 64 * K; i += 128) {{
        store_shared(a_tile.at(i / K, i % K), a[i]);
        store_shared(at_tile.at(i % K, i / K), a[i]);
    }}
    for (int i = thread; i < N * K; i += 128) {{
        store_shared(b_tile.at(i / K, i % K), b[i]);
        store_shared(bt_tile.at(i % K, i / K), b[i]);
    }}
    fence_async_shared();
    __syncthreads();
    float acc[N / 2];
    for (int i = 0; i < N / 2; ++i) acc[i] = 1;
    uint32 registers[K / 16][4];
    for (int k = 0; k < K; k += 16) {{
        for (int i = 0; i < 4; ++i) {{
            const int at = (16 * warp + g + i % 2 * 8) * K + k + 2 * t + i / 2 * 8;
            registers[k / 16][i] = a[at].bits | uint32(a[at + 1].bits) << 16;
        }}
    }}
    wgmma_fence();
    // Neighbouring products go into groups of their own, to be waited for one by one.
    for (int k = 0; k < K; k += 16) {{
        const bool accumulate = k > 0 || variant % 2;
        const uint64 ak = a_tile.k_major(0, k), am = at_tile.mn_major(k, 0);
        const uint64 bk = b_tile.k_major(0, k), bn = bt_tile.mn_major(k, 0);
        switch (variant / 2) {{
            case 0: wgmma_ss<T, N, false, false>(acc, ak, bk, accumulate); break;
            case 1: wgmma_ss<T, N, true, false>(acc, am, bk, accumulate); break;
            case 2: wgmma_ss<T, N, false, true>(acc, ak, bn, accumulate); break;
            case 3: wgmma_ss<T, N, true, true>(acc, am, bn, accumulate); break;
            case 4: wgmma_rs<T, N, false>(acc, registers[k / 16], bk, accumulate); break;
            case 5: wgmma_rs<T, N, true>(acc, registers[k / 16], bn, accumulate); break;
        }}
        wgmma_commit();
    }}
    wgmma_wait<2>();
    wgmma_wait<0>();
    for (int i = 0; i < N / 2; ++i) {{
        const int row = 16 * warp + g + i / 2 % 2 * 8, col = i / 4 * 8 + 2 * t + i % 2;
        d[row * N + col] = acc[i];
    }}
"""


@pytest.mark.parametrize("variant", range(12))
@pytest.mark.parametrize(
    ("name", "dtype", "n"), [("float16", np.float16, 80), ("bfloat16", ml_dtypes.bfloat16, 128)]
)
def test_wgmma(
    machine: Machine, rng: np.random.Generator, name: str, dtype: type, n: int, variant: int
) -> None:
    a, b = rng.standard_normal((64, 64)).astype(dtype), rng.standard_normal((n, 64)).astype(dtype)
    d = machine.empty((64, n), np.float32)
    run(
        machine,
        f"const {name}* a, const {name}* b, float* d, int variant",
        PRODUCTS.format(type=name, n=n),
        *(machine.asarray(x.view(np.uint16)) for x in (a, b)),
        d,
        np.int32(variant),
        block=128,
        shared_mem=1024 + 4 * 8192 + 128 * 128 * 2,
    )
    expected = variant % 2 + a.astype(np.float64) @ b.astype(np.float64).T
    np.testing.assert_allclose(d.get(), expected, rtol=1e-6, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# All together

PIPELINE = """
    // Warpgroup 0 loads `tiles` tiles of x; 1 and 2 multiply 64 rows of q with each, write the
    // products to shared memory, from where warps 1 and 2 add them to d.
    constexpr int STAGES = 2, ROWS = 64;
    using T = bfloat16;
    using Tile = SwizzledTile<T, ROWS, 64>;
    const uint32 shared = swizzle_aligned(shared_address(dynamic_shared_memory()));
    const uint32 sums = shared + (2 + STAGES) * Tile::BYTES;
    const auto full = [=](int i) { return sums + 2 * 16384 + 8 * i; };
    const auto empty = [=](int i) { return full(STAGES + i); };
    const int group = threadIdx.x / 128, thread = threadIdx.x % 128;
    if (threadIdx.x == 0) {
        init_barrier(full(2 * STAGES), 1);
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(full(i), 1);
            init_barrier(empty(i), 2);
        }
        fence_barrier_init();
    }
    __syncthreads();
    if (group == 0) {
        shrink_registers<32>();
        if (threadIdx.x == 0) {
            arrive_expecting(full(2 * STAGES), 2 * Tile::BYTES);
            for (int i = 0; i < 2; ++i) {
                load_box(shared + i * Tile::BYTES, &q, {0, ROWS * i, 0, {0, 0}}, full(2 * STAGES));
            }
            for (int i = 0; i < tiles; ++i) {
                const int stage = i % STAGES;
                wait_for(empty(stage), i / STAGES % 2 ^ 1);
                arrive_expecting(full(stage), Tile::BYTES);
                load_box(shared + (2 + stage) * Tile::BYTES, &x, {0, ROWS * i, 0, {0, 0}},
                         full(stage));
            }
        } else if (threadIdx.x / 32 == 1 || threadIdx.x / 32 == 2) {
            const int consumer = threadIdx.x / 32 - 1;
            for (int i = 0; i < tiles; ++i) {
                sync_named(1 + consumer, 160);
                if (threadIdx.x % 32 == 0) {
                    add_bulk(d + 4096 * consumer, sums + 16384 * consumer, 16384);
                    commit_bulk();
                    wait_bulk_read<0>();
                }
                __syncwarp();
                if (i + 1 < tiles) arrive_named(3 + consumer, 160);
            }
        }
    } else {
        grow_registers<232>();
        const int consumer = group - 1;
        const Tile q_tile = {shared + consumer * Tile::BYTES};
        wait_for(full(2 * STAGES), 0);
        for (int i = 0; i < tiles; ++i) {
            const int stage = i % STAGES;
            const Tile x_tile = {shared + (2 + stage) * Tile::BYTES};
            float acc[32];
            wait_for(full(stage), i / STAGES % 2);
            wgmma_fence();
            for (int k = 0; k < 64; k += 16) {
                wgmma_ss<T, 64, false, true>(acc, q_tile.k_major(0, k), x_tile.mn_major(k, 0),
                                             k > 0);
            }
            wgmma_commit();
            wgmma_wait<0>();
            if (thread == 0) arrive_at(empty(stage));
            if (i > 0) sync_named(3 + consumer, 160);
            for (int j = 0; j < 32; ++j) {
                store_shared(sums + 16384 * consumer + 4 * (128 * j + thread), acc[j]);
            }
            fence_async_shared();
            arrive_named(1 + consumer, 160);
        }
    }
"""


@pytest.mark.parametrize("seed", range(5))
def test_pipeline(machine: Machine, rng: np.random.Generator, seed: int) -> None:
    """Loads, products and additions side by side, on two blocks."""
    tiles = 5
    q, x = (
        rng.standard_normal((1, 1, 1, rows, 64)).astype(ml_dtypes.bfloat16).view(np.uint16)
        for rows in (128, 64 * tiles)
    )
    q_memory, x_memory = machine.asarray(q), machine.asarray(x)
    d = machine.asarray(np.zeros((2, 32, 128), np.float32))
    run(
        machine,
        "const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap x, float* d, "
        "int tiles",
        PIPELINE,
        tensor_map(machine, q_memory, q, 64),
        tensor_map(machine, x_memory, x, 64),
        d,
        np.int32(tiles),
        block=384,
        grid=2,
        seed=seed,
        shared_mem=1024 + 4 * 8192 + 2 * 16384 + 64,
    )
    q, x = (y.view(ml_dtypes.bfloat16).astype(np.float64).reshape(-1, 64, 64) for y in (q, x))
    products = 2 * (q @ x.sum(0)).reshape(2, 4, 2, 8, 8, 4, 2)  # group, warp, 8 rows, g, ..., t, e
    expected = products.transpose(0, 4, 2, 6, 1, 3, 5).reshape(2, 32, 128)
    np.testing.assert_allclose(d.get(), expected, rtol=1e-5, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Planted bugs, all in one kernel of three warpgroups. `tile` is the first of three boxes of 64 rows
# in shared memory, x has two in global memory, which `map` maps.

PLANTED_HEAD = """
    using T = bfloat16;
    using Tile = SwizzledTile<T, 64, 64>;
    constexpr int BYTES = Tile::BYTES;
    const int i = threadIdx.x, group = i / 128;
    const uint32 shared = swizzle_aligned(shared_address(dynamic_shared_memory()));
    const Tile tile = {shared}, other_tile = {shared + BYTES};
    const uint32 full = shared + 3 * BYTES, empty = full + 8;
    const auto start = [=](int fulls, int empties) {
        if (i == 0) {
            init_barrier(full, fulls);
            init_barrier(empty, empties);
            fence_barrier_init();
        }
        __syncthreads();
    };
    const auto load = [&](int row) {
        arrive_expecting(full, BYTES);
        load_box(shared, &map, {0, row, 0, {0, 0}}, full);
    };
    const auto load_first = [&] {  // and wait for it
        start(1, 2);
        if (i == 0) load(0);
        wait_for(full, 0);
    };
    const auto store = [&](int row) { store_box(&map, {0, row, 0, {0, 0}}, shared); };
    const auto fill = [=] {
        for (int j = i; j < 64 * 64; j += 384) store_shared(tile.at(j / 64, j % 64), uint16(0));
    };
    float acc[32];
    const auto multiply = [&] {
        wgmma_ss<T, 64, false, false>(acc, tile.k_major(0, 0), tile.k_major(0, 0), false);
    };
    const auto read = [=](int row) { return load_shared<uint16>(tile.at(row, 0)); };
    const auto write = [=](int row) { store_shared(tile.at(row, 0), uint16(0)); };
    volatile int sink;
"""

NOT_LANDED = (
    r"has not landed: a wait is missing|race: read of .* shared memory,\nafter a write by the "
    "copies that the mbarrier at byte .* counts"
)

PLANTED = {
    "barrier that nobody initialized": (
        "arrive_at(full);",
        "arrive: no mbarrier at byte",
    ),
    "barrier without its fence": (
        """if (i == 0) init_barrier(full, 1);
        __syncthreads();
        arrive_at(full);""",
        "fence_barrier_init is missing",
    ),
    "barrier that others do not know yet": (
        """if (i == 0) { init_barrier(full, 384); fence_barrier_init(); }
        arrive_at(full);""",
        "no mbarrier at byte|which no barrier orders before",
    ),
    "barrier taken for memory": (
        "start(1, 1); sink = load_shared<uint32>(full);",
        "where an mbarrier lives",
    ),
    "too many arrivals": (
        "start(2, 1); if (i == 0) arrive_expecting(full, 16); __syncthreads(); arrive_at(full);",
        "more than its 2 arrivals in a phase, 16 bytes are still to come",
    ),
    "too few arrivals": (
        "start(2, 1); if (i == 0) arrive_at(full); wait_for(full, 0);",
        r"deadlock: .*\n    threads 0-383: at wait_for\(the mbarrier at byte \d+, parity 0\), "
        r"in phase 0 with 1 of 2 arrivals and 0 bytes to come, test.cu:",
    ),
    "too few bytes announced": (
        """start(1, 1);
        if (i == 0) { arrive_expecting(full, BYTES - 16); load_box(shared, &map, {}, full); }
        wait_for(full, 0);""",
        "deadlock: .*\n.* and -16 bytes to come",
    ),
    "nothing keeps a barrier from the next phase": (
        "start(1, 1); if (i == 0) { arrive_at(full); arrive_at(full); } else wait_for(full, 0);",
        "nothing keeps phase 1 from completing|deadlock",
    ),
    "store in front of the tensor": (
        "start(1, 1); if (i == 0) store(-1);",
        "store_box at -1, takes places from 0 on",
    ),
    "missing wait": (
        "start(1, 1); if (i == 0) load(0); __syncthreads(); sink = read(0);",
        NOT_LANDED,
    ),
    "wrong parity": (
        "start(1, 1); if (i == 0) load(0); wait_for(full, 1); sink = read(0);",
        f"nothing has written|{NOT_LANDED}",
    ),
    "wait by another thread": (
        "start(1, 1); if (i == 0) { load(0); wait_for(full, 0); } else sink = read(0);",
        f"nothing has written|race: write|{NOT_LANDED}",
    ),
    "load without a wait": (
        "start(1, 1); if (i == 0) load(0);",
        "the block ends",
    ),
    "load over a tile that is still read": (
        "load_first(); sink = read(i % 64); if (i == 0) load(64);",
        "race: write of .* shared memory by the copies that the mbarrier at byte .* counts,\n"
        f"after a read by thread|{NOT_LANDED}",
    ),
    "load over a tile after a part of its readers": (
        """load_first();
        if (group > 0) sink = read(i % 64);
        if (i == 128 || i == 129) arrive_at(empty);
        if (i == 0) { wait_for(empty, 0); load(64); }""",
        f"race: write of .* by the copies|{NOT_LANDED}",
    ),
    "store of what was written without a fence": (
        "fill(); __syncthreads(); if (i == 0) store(0);",
        r"missing fence: read of .* shared memory by the bulk copies of thread 0 .*,\n"
        "after a write by thread",
    ),
    "fence by another thread before the writes": (
        "if (i == 0) fence_async_shared(); fill(); __syncthreads(); if (i == 0) store(0);",
        "missing fence: read of .* shared memory by the bulk copies of thread 0",
    ),
    "fence by a third thread behind the barrier": (
        "fill(); __syncthreads(); if (i == 200) fence_async_shared(); if (i == 0) store(0);",
        "missing fence: read of .* shared memory by the bulk copies of thread 0",
    ),
    "fence without a barrier": (
        "fill(); fence_async_shared(); if (i == 0) store(0);",
        r"race: (read|write) of .* shared memory|nothing has written",
    ),
    "source overwritten": (
        """load_first();
        if (i == 0) { store(64); commit_bulk(); write(0); wait_bulk_read<0>(); }""",
        r"race: write of .* shared memory,\nafter a read by the bulk copies of thread 0",
    ),
    "wait for too few groups": (
        """load_first();
        if (i == 0) { store(64); commit_bulk(); wait_bulk_read<1>(); write(0); }""",
        r"race: write of .* shared memory,\nafter a read by the bulk copies of thread 0",
    ),
    "bulk group that is not committed": (
        "load_first(); if (i == 0) { store(64); wait_bulk_read<0>(); }",
        "exits before its bulk copies have read shared memory",
    ),
    "result read too early": (
        """load_first();
        if (i == 0) { store(64); commit_bulk(); wait_bulk_read<0>(); sink = x[4096]; }""",
        r"race: read of .* global memory,\nafter a write by the bulk copies of thread 0",
    ),
    "turn passed too early": (
        """load_first();
        if (i == 0) { store(64); commit_bulk(); wait_bulk_read<0>(); pass_turn_of_bulk(turns); }""",
        "pass_turn_of_bulk before bulk additions are in global memory: wait_bulk is missing",
    ),
    "turn that never comes": ("wait_for_turn(turns, 1);", "deadlock: a block waits for turn 1"),
    "misaligned box": (
        "start(1, 1); if (i == 0) load_box(shared + 128, &map, {}, full);",
        "is not a multiple of 1024",
    ),
    "bytes that are no multiple of 16": (
        "start(1, 1); if (i == 0) load_bulk(shared, x, 24, full);",
        "load_bulk: 24 bytes, takes multiples of 16",
    ),
    "named barrier with different counts": (
        "sync_named(1, i < 128 ? 256 : 384);",
        "named barrier 1: (256|384) threads, but others came with",
    ),
    "named barrier that too few reach": (
        "if (i < 128) sync_named(2, 256);",
        r"deadlock: .*\n    threads 0-127: at sync_named\(2\), 128 of 256 threads, test.cu:",
    ),
    "named barrier that too many reach": (
        "arrive_named(1, 256);",
        "the block ends while 128 of 256 threads have come to named barrier 1",
    ),
    "warp that arrives twice": (
        "if (i < 32) for (int j = 0; j < 2; ++j) arrive_named(1, 96);",
        "warp 0 comes a second time before it completes, with 32 of 96",
    ),
    "arrival that does not wait": (
        """if (i < 32) write(i);
        if (i < 32) sync_named(1, 64);
        else if (i < 64) { arrive_named(1, 64); sink = read(i - 32); }""",
        "race: (read|write) of .* shared memory|nothing has written",
    ),
    "half a warp at a named barrier": (
        "if (i % 32 < 16) sync_named(1, 384);",
        "divergence: the lanes of a warp do not reach the same|deadlock",
    ),
    "operands written without a fence": (
        "fill(); __syncthreads(); wgmma_fence(); multiply();",
        r"missing fence: read of .* shared memory by the matrix products of warpgroup \d,\n"
        "after a write by thread",
    ),
    "operands that nothing has written": (
        "wgmma_fence(); multiply();",
        "read of .* shared memory, which nothing has written",
    ),
    "operands before the wait": (
        "start(1, 1); if (i == 0) load(0); wgmma_fence(); multiply();",
        f"race: read of .* by the matrix products|{NOT_LANDED}",
    ),
    "operand overwritten before the wait": (
        "load_first(); if (i < 128) { wgmma_fence(); multiply(); wgmma_commit(); write(i % 64); }",
        r"race: write of .* shared memory,\nafter a read by the matrix products of warpgroup 0",
    ),
    "operand released before the wait": (
        """load_first();
        if (group > 0) {
            wgmma_fence();
            multiply();
            wgmma_commit();
            if (i % 128 == 0) arrive_at(empty);
            wgmma_wait<0>();
        } else if (i == 0) {
            wait_for(empty, 0);
            load(64);
        }""",
        r"race: write of .* shared memory by the copies .* counts,\n"
        f"after a read by the matrix products of warpgroup|{NOT_LANDED}",
    ),
    "misplaced operand": (
        "load_first(); wgmma_fence(); wgmma_ss<T, 64, false, false>"
        "(acc, tile.k_major(0, 0) + 8, tile.k_major(0, 0), false);",
        "wgmma: an operand starts 128 bytes behind a multiple of 1024",
    ),
    "no fence before a product": (
        "load_first(); multiply();",
        "no wgmma_fence before the first product",
    ),
    "no fence between a wait and the next product": (
        "load_first(); wgmma_fence(); multiply(); wgmma_commit(); wgmma_wait<0>(); multiply();",
        "no wgmma_fence between the wait for an accumulator and its next product",
    ),
    "accumulator written after the fence": (
        """load_first();
        for (int j = 0; j < 2; ++j) {
            wgmma_fence();
            acc[5] = j;
            wgmma_ss<T, 64, false, false>(acc, tile.k_major(0, 0), tile.k_major(0, 0), true);
            wgmma_commit();
            wgmma_wait<0>();
        }""",
        "an accumulator was written after the latest wgmma_fence",
    ),
    "operand in registers written after the fence": (
        """load_first();
        uint32 a[4] = {};
        for (int j = 0; j < 2; ++j) {
            wgmma_fence();
            a[2] = j;
            wgmma_rs<T, 64, false>(acc, a, tile.k_major(0, 0), false);
            wgmma_commit();
            wgmma_wait<0>();
        }""",
        "an operand was written after the latest wgmma_fence",
    ),
    "accumulator changed before the wait": (
        "load_first(); wgmma_fence(); multiply(); acc[3] = 0; wgmma_commit(); wgmma_wait<0>();",
        "element 3 of an accumulator was written between issue and wait",
    ),
    "product that is not committed": (
        "load_first(); wgmma_fence(); multiply(); wgmma_wait<0>();",
        "exits before its matrix products are done",
    ),
    "product by half a warpgroup": (
        "load_first(); wgmma_fence(); if (i % 128 < 64) multiply();",
        r"deadlock: .*\n.* at wgmma, test.cu",
    ),
    "more registers than there are": (
        "if (group > 0) grow_registers<240>();",
        "the warpgroups together have 82944 registers, the block 64512",
    ),
    "registers that are no multiple of 8": (
        "shrink_registers<36>();",
        "shrink_registers: 36 registers, takes a multiple of 8 from 24 to 256",
    ),
}


def run_planted(device: HostDevice, body: str, bug: int, seed: int) -> None:
    x = np.zeros((1, 1, 1, 128, 64), np.uint16)
    memory, turns = device.asarray(x), device.asarray(np.zeros(1, np.int32))
    run(
        device,
        "const __grid_constant__ TensorMap map, uint16* x, int* turns, int bug",
        f"{PLANTED_HEAD} {body} (void)sink;",
        tensor_map(device, memory, x, 64),
        memory,
        turns,
        np.int32(bug),
        block=384,
        shared_mem=1024 + 3 * 8192 + 16,
        seed=seed,
    )


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_bug(device: HostDevice, name: str, seed: int) -> None:
    cases = "".join(
        f'case {number}: {{\n#line 1 "test.cu"\n{body}\n}} break;\n'
        for number, (body, _) in enumerate(PLANTED.values())
    )
    with pytest.raises(HostKernelError, match=PLANTED[name][1]) as error:
        run_planted(device, f"switch (bug) {{ {cases} }}", list(PLANTED).index(name), seed)
    assert re.search(r"in block \(0, 0, 0\), thread \(\d+, 0, 0\)", str(error.value))


@pytest.mark.parametrize("seed", [0, 1])
def test_fence_by_the_thread_that_starts_the_copy(device: HostDevice, seed: int) -> None:
    """It need not be each of those that have stored."""
    body = """
        fill();
        __syncthreads();
        if (i == 0) { fence_async_shared(); store(0); commit_bulk(); wait_bulk_read<0>(); }
    """
    run_planted(device, body, 0, seed)
