"""The host device itself: every PTX function against NumPy, and planted bugs that it must report.

What a function computes is tested on a GPU too, where there is one, so that the host device's
semantics are the machine's.
"""

# ruff: noqa: F811 (fixtures are imported)
from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest
from host.device import HostDevice, HostKernelError
from host.machine import Image
from host.testing import Machine, device, machine, rng, run  # noqa: F401
from numpy.typing import NDArray

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


# ---------------------------------------------------------------------------------------------
# Fragments and products


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(machine: Machine, rng: np.random.Generator, transposed: bool) -> None:
    """Rows at any 16-byte addresses; matrix i comes from the addresses of lanes 8i to 8i + 7."""
    rows = rng.integers(0, 1 << 16, (64, 8), np.uint16)
    chosen = rng.permutation(64)[:32].astype(np.int32)
    d = machine.empty((32, 4), np.uint32)
    function = "load_matrix_transposed_x4" if transposed else "load_matrix_x4"
    run(
        machine,
        "const Chunk* rows, const int* chosen, uint32* d",
        f"""
        auto* shared = reinterpret_cast<Chunk*>(dynamic_shared_memory());
        shared[threadIdx.x] = rows[threadIdx.x];
        shared[threadIdx.x + 32] = rows[threadIdx.x + 32];
        __syncthreads();
        uint32 fragment[4];
        {function}(fragment, shared_address(shared + chosen[threadIdx.x]));
        for (int i = 0; i < 4; ++i) d[4 * threadIdx.x + i] = fragment[i];
        """,
        *map(machine.asarray, (rows, chosen)),
        d,
    )
    matrices = rows[chosen].reshape(4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    pairs = d.get().view(np.uint16).reshape(32, 4, 2)
    for i in range(4):
        for half in range(2):
            np.testing.assert_array_equal(pairs[:, i, half], matrices[i, G, 2 * T + half])


def fragment_16(matrix: NDArray, k_offsets: list[tuple[int, int]]) -> NDArray:
    """Pairs of 16-bit elements in neighbouring columns, one register for each (row, k) offset."""
    registers = [
        np.stack([matrix[G + row, k + 2 * T], matrix[G + row, k + 2 * T + 1]], -1)
        for row, k in k_offsets
    ]
    return np.stack(registers, 1).view(np.uint32).reshape(32, -1)


def fragment(matrix: NDArray, k_offsets: list[tuple[int, int]]) -> NDArray:
    """One element a register."""
    return np.stack([matrix[G + row, k + T] for row, k in k_offsets], 1)


def accumulator(matrix: NDArray) -> NDArray:
    return np.stack([matrix[G + row, 2 * T + e] for row in (0, 8) for e in (0, 1)], 1)


K16_A = [(0, 0), (8, 0), (0, 8), (8, 8)]
K16_B = [(0, 0), (0, 8)]
F64_A = [(row, 4 * i) for i in range(4) for row in (0, 8)]
F64_B = [(0, 4 * i) for i in range(4)]


@pytest.mark.parametrize(
    ("function", "dtype", "k", "a_offsets", "b_offsets"),
    [
        ("mma_f16", np.float16, 16, K16_A, K16_B),
        ("mma_bf16", ml_dtypes.bfloat16, 16, K16_A, K16_B),
        ("mma_f64", np.float64, 16, F64_A, F64_B),
    ],
)
def test_mma(
    machine: Machine,
    rng: np.random.Generator,
    function: str,
    dtype: type,
    k: int,
    a_offsets: list[tuple[int, int]],
    b_offsets: list[tuple[int, int]],
) -> None:
    a, b = rng.standard_normal((16, k)).astype(dtype), rng.standard_normal((k, 8)).astype(dtype)
    real = np.float64 if dtype is np.float64 else np.float32
    c = rng.standard_normal((16, 8)).astype(real)
    to_fragment = fragment_16 if np.dtype(dtype).itemsize == 2 else fragment
    a_registers, b_registers = to_fragment(a, a_offsets), to_fragment(b.T, b_offsets)
    register = {2: "uint32", 4: "uint32", 8: "double"}[np.dtype(dtype).itemsize]
    result = "double" if real is np.float64 else "float"
    d = machine.asarray(accumulator(c))
    run(
        machine,
        f"{result}* d, const {register}* a, const {register}* b",
        f"""
        const int lane = threadIdx.x;
        {function}(d + 4 * lane, a + {len(a_offsets)} * lane, b + {len(b_offsets)} * lane);
        """,
        d,
        *map(machine.asarray, (a_registers, b_registers)),
    )
    expected = c + a.astype(np.float64) @ b.astype(np.float64)
    eps = np.finfo(real).eps
    np.testing.assert_allclose(d.get(), accumulator(expected), rtol=4 * eps, atol=64 * eps)


# ---------------------------------------------------------------------------------------------
# Conversions and functions


def hard_floats(rng: np.random.Generator, dtype: type) -> NDArray:
    """Floats of all magnitudes, and the ends, ties and neighbours of ties of a narrower type."""
    narrow = np.arange(1 << 16, dtype=np.uint16)[::7].view(dtype).astype(np.float32)
    narrow = narrow[np.isfinite(narrow)]
    ties = (narrow[:-1] + narrow[1:]) / 2
    any_bits = rng.integers(0, 1 << 32, 4096, np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65519.9, 65520, 3.4e38], np.float32)
    with np.errstate(invalid="ignore"):
        near = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (-1, 1)]
    values = np.concatenate([narrow, ties, *near, any_bits, special])
    return values[: len(values) // 64 * 64]


def apply(machine: Machine, expression: str, x: NDArray, result: type, step: int = 1) -> NDArray:
    """`expression` of x, where x is `step` consecutive elements from `in` on."""
    source = {2: "uint16", 4: "float"}[x.itemsize]
    target = "uint32" if result is np.uint32 else "float"
    y = machine.empty((x.size // step,), result)
    run(
        machine,
        f"const {source}* x, {target}* y, int count",
        f"""
        for (int i = threadIdx.x; i < count; i += 32) {{
            const {source}* in = x + {step} * i;
            y[i] = {expression};
        }}
        """,
        machine.asarray(x),
        y,
        np.int32(x.size // step),
    )
    return y.get()


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize(
    ("function", "dtype"), [("pack_f16", np.float16), ("pack_bf16", ml_dtypes.bfloat16)]
)
def test_pack(machine: Machine, rng: np.random.Generator, function: str, dtype: type) -> None:
    x = hard_floats(rng, dtype)
    packed = apply(machine, f"{function}(in[0], in[1])", x, np.uint32, step=2)
    got, expected = packed.view(dtype).astype(np.float32), x.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(got, expected)
    numbers = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(got[numbers]), np.signbit(x[numbers]))


@pytest.mark.parametrize(
    ("name", "dtype"), [("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)]
)
def test_to_float(machine: Machine, name: str, dtype: type) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    got = apply(machine, f"to_float({name}{{in[0]}})", bits, np.float32)
    np.testing.assert_array_equal(got, bits.view(dtype).astype(np.float32))


def test_warp_max(machine: Machine, rng: np.random.Generator) -> None:
    x = rng.integers(0, 1 << 32, 32, np.uint32)
    y = machine.empty((32,), np.uint32)
    run(
        machine,
        "const uint32* x, uint32* y",
        "y[threadIdx.x] = warp_max(x[threadIdx.x]);",
        machine.asarray(x),
        y,
    )
    np.testing.assert_array_equal(y.get(), np.full(32, x.max()))


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("function", "numpy_function"),
    [("exp2_approx", np.exp2), ("reciprocal_approx", np.reciprocal)],
)
def test_approx(
    machine: Machine, rng: np.random.Generator, function: str, numpy_function: np.ufunc
) -> None:
    x = (rng.standard_normal(512) * 60).astype(np.float32)
    x[:6] = 0, -0.0, np.inf, -np.inf, np.nan, -130
    got = apply(machine, f"{function}(in[0])", x, np.float32)
    expected = numpy_function(x)
    expected[np.abs(expected) < np.finfo(np.float32).tiny] *= 0
    np.testing.assert_allclose(got, expected, rtol=3e-7)


# ---------------------------------------------------------------------------------------------
# Copies, collectives and sums


@pytest.mark.parametrize("nbytes", [4, 8, 16])
def test_copy_async(machine: Machine, rng: np.random.Generator, nbytes: int) -> None:
    """A unit from the source where it is valid, zeros where not; two groups in flight."""
    source = rng.integers(0, 256, (2, 32, nbytes), np.uint8)
    target = machine.empty(source.shape, np.uint8)
    run(
        machine,
        "const char* source, uint16* target",
        f"""
        constexpr int BYTES = {nbytes}, ROW = 32 * BYTES;
        const int first = threadIdx.x * BYTES;
        const uint32 shared = shared_address(dynamic_shared_memory());
        for (int group = 0; group < 2; ++group) {{
            const int valid_bytes = (threadIdx.x + group) % 3 ? BYTES : 0;
            const int start = group * ROW + first;
            copy_async<BYTES>(shared + start, source + start, valid_bytes);
            commit_copies();
        }}
        wait_copies<1>();
        const auto copy_back = [&](int start) {{
            for (int i = start; i < start + BYTES; i += 2) {{
                target[i / 2] = load_shared<uint16>(shared + i);
            }}
        }};
        copy_back(first);
        wait_copies<0>();
        copy_back(ROW + first);
        """,
        machine.asarray(source),
        target,
    )
    valid = (LANES + np.arange(2)[:, None]) % 3 != 0
    expected = np.where(valid[..., None], source, 0)
    np.testing.assert_array_equal(target.get(), expected)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("__shfl_sync(~0u, x, 5)", np.full(32, 5)),
        ("__shfl_sync(~0u, x, 1, 4)", LANES // 4 * 4 + 1),
        ("__shfl_xor_sync(~0u, x, 17)", LANES ^ 17),
        ("__shfl_xor_sync(~0u, x, 2, 4)", LANES ^ 2),
        ("__shfl_up_sync(~0u, x, 3)", np.where(LANES < 3, LANES, LANES - 3)),
        ("__shfl_down_sync(~0u, x, 1, 8)", np.where(LANES % 8 == 7, LANES, LANES + 1)),
        ("__ballot_sync(~0u, x < 3)", np.full(32, 7)),
        ("__any_sync(~0u, x == 31)", np.full(32, 1)),
        ("__all_sync(~0u, x < 31)", np.full(32, 0)),
        ("x < 8 ? __shfl_sync(0xffu, x, 2) : __shfl_sync(~0xffu, x, 9)", np.where(LANES < 8, 2, 9)),
    ],
)
def test_warp_collective(machine: Machine, call: str, expected: NDArray) -> None:
    y = machine.empty((32,), np.int32)
    run(machine, "int* y", f"const int x = threadIdx.x; y[x] = {call};", y, seed=3)
    np.testing.assert_array_equal(y.get(), expected)


def test_add_global(machine: Machine) -> None:
    """Sums by many blocks of vectors of floats and of doubles."""
    sums, total = machine.asarray(np.zeros(4, np.float32)), machine.asarray(np.zeros(1))
    body = """
        const float values[4] = {1, 2, 3, float(threadIdx.x)};
        add_global<4>(sums, values);
        add_global<2>(sums, values);
        add_global(total, 0.5);
    """
    run(machine, "float* sums, double* total", body, sums, total, grid=3)
    np.testing.assert_array_equal(sums.get(), [192, 384, 288, 3 * 496])
    assert total.get()[0] == 48


def test_seed_orders_threads(device: HostDevice) -> None:
    """The order of threads is random, and the seed's own."""
    orders = []
    for seed in (0, 0, 1):
        order = device.empty((64,), np.uint32)
        count = device.asarray(np.zeros(1, np.uint32))
        body = "order[atomicAdd(count, 1u)] = threadIdx.x;"
        run(device, "uint32* order, uint32* count", body, order, count, block=64, seed=seed)
        orders.append(order.get())
    assert sorted(orders[0]) == list(range(64))
    assert list(orders[0]) == list(orders[1]) != list(orders[2])


# ---------------------------------------------------------------------------------------------
# Arrays of NumPy on the device

INCREMENT = "if (threadIdx.x < n) x[int(threadIdx.x) * step] += 1;"


def increment(device: HostDevice, x: NDArray, step: int) -> None:
    image = Image(device, x)
    args = np.uint64(image.address), np.int32(x.size), np.int32(step)
    run(device, "float* x, int n, int step", INCREMENT, *args)
    image.copy_back()


@pytest.mark.parametrize("part", [np.s_[:20], np.s_[1::3], np.s_[::-2], np.s_[:0]])
def test_image_has_the_array_s_layout(device: HostDevice, part: slice) -> None:
    x = np.arange(60, dtype=np.float32)[part]
    before = x.copy()
    increment(device, x, x.strides[0] // x.itemsize)
    np.testing.assert_array_equal(x, before + 1)


def test_memory_between_elements_is_not_written(device: HostDevice) -> None:
    with pytest.raises(HostKernelError, match="which nothing has written"):
        increment(device, np.zeros(60, np.float32)[::3], step=1)


def test_inputs_are_not_written(device: HostDevice) -> None:
    x = np.zeros(8, np.float32)
    x.flags.writeable = False
    with pytest.raises(AssertionError, match="a kernel has written to an input"):
        increment(device, x, step=1)


# ---------------------------------------------------------------------------------------------
# Planted bugs. Kernels have 64 threads, 1024 bytes of shared memory and x, y of 64 floats, of which
# nothing has written y.

PLANTED = {
    "missing barrier": (
        """shared[threadIdx.x] = x[threadIdx.x];
        y[threadIdx.x] = shared[63 - threadIdx.x];""",
        r"nothing has written|race: (read|write) of .* shared memory",
    ),
    "missing barrier before the tile is overwritten": (
        """shared[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        y[threadIdx.x] = shared[63 - threadIdx.x];
        shared[threadIdx.x] = 0;""",
        r"race: (read|write) of .* shared memory,\nafter a (read|write) by thread \d+",
    ),
    "barrier of the warp instead of the block": (
        """shared[threadIdx.x] = x[threadIdx.x];
        __syncwarp();
        y[threadIdx.x] = shared[threadIdx.x];
        y[threadIdx.x] += shared[63 - threadIdx.x];""",
        r"nothing has written|race: (read|write) of .* shared memory",
    ),
    "missing barrier of the warp": (
        """shared[threadIdx.x] = x[threadIdx.x];
        __shfl_sync(~0u, 0, 0);
        y[threadIdx.x] = shared[threadIdx.x ^ 1];""",
        r"race: read of .* shared memory",
    ),
    "two threads write one element": (
        "y[threadIdx.x / 2] = 0;",
        r"race: write of .* global memory",
    ),
    "atomic and plain sums": (
        "if (threadIdx.x) atomicAdd(x, 1.0f); else x[0] += 1;",
        r"race: .* global memory,\nafter an? (atomic operation|write) by",
    ),
    "missing wait": (
        """copy_async<4>(shared_address(shared + threadIdx.x), x + threadIdx.x, 4);
        commit_copies();
        y[threadIdx.x] = shared[threadIdx.x];""",
        "has not landed: a wait is missing",
    ),
    "wait for too few groups": (
        """for (int i = 0; i < 2; ++i) {
            copy_async<4>(shared_address(shared + threadIdx.x + 64 * i), x + threadIdx.x, 4);
            commit_copies();
        }
        wait_copies<1>();
        y[threadIdx.x] = shared[threadIdx.x + 64];""",
        "has not landed: a wait is missing",
    ),
    "missing commit": (
        """copy_async<4>(shared_address(shared + threadIdx.x), x + threadIdx.x, 4);
        wait_copies<0>();
        y[threadIdx.x] = shared[threadIdx.x];""",
        "has not landed: a wait is missing",
    ),
    "wait without a barrier": (
        """copy_async<4>(shared_address(shared + threadIdx.x), x + threadIdx.x, 4);
        commit_copies();
        wait_copies<0>();
        y[threadIdx.x] = shared[63 - threadIdx.x];""",
        "nothing has written|has not landed|race: (read|write)",
    ),
    "copy over a tile that is still read": (
        """shared[threadIdx.x] = x[threadIdx.x];
        __syncthreads();
        y[threadIdx.x] = shared[63 - threadIdx.x];
        copy_async<4>(shared_address(shared + threadIdx.x), x, 4);""",
        "race: write of|has not landed",
    ),
    "misaligned copy": (
        "copy_async<16>(shared_address(shared + threadIdx.x), x, 16);",
        "is not aligned to the 16 bytes",
    ),
    "global memory past the end": (
        "y[threadIdx.x] = x[threadIdx.x + 1];",
        r"read out of bounds.* 0 bytes past the end of the 256 of an array in global memory",
    ),
    "global memory in front of the start": (
        "y[-1 - int(threadIdx.x)] = 0;",
        r"write out of bounds.* bytes in front of an array of 256 bytes in global memory",
    ),
    "copy from past the end": (
        "copy_async<16>(shared_address(shared + 4 * threadIdx.x), x + 4 * threadIdx.x, 16);",
        "read out of bounds",
    ),
    "shared memory past the end": (
        "shared[threadIdx.x + 193] = 0;",
        r"write out of bounds.* 0 bytes past the end of the 1024 of shared memory",
    ),
    "pointer taken for a shared address": (
        "y[threadIdx.x] = load_shared<float>(4 * threadIdx.x);",
        "is not an address in shared memory",
    ),
    "misaligned access": (
        "y[threadIdx.x] = load_shared<float>(shared_address(shared) + 2);",
        "misaligned address",
    ),
    "shared memory that nothing wrote": (
        "y[threadIdx.x] = shared[0];",
        r"read of byte 0 of the 1024 of shared memory, which nothing has written",
    ),
    "global memory that nothing wrote": (
        "x[threadIdx.x] = y[threadIdx.x];",
        r"read of .* global memory, which nothing has written",
    ),
    "fragment that nothing wrote": (
        "uint32 d[4]; load_matrix_x4(d, shared_address(shared));",
        r"read of .* shared memory, which nothing has written",
    ),
    "barrier that half of the threads reach": (
        "if (threadIdx.x < 32) __syncthreads();",
        r"divergence: (__syncthreads is not reached by all|a thread exits while others wait)",
    ),
    "two different barriers": (
        """if (threadIdx.x < 32) __syncthreads();
        else __syncthreads();""",
        r"divergence: __syncthreads is not reached by all",
    ),
    "shuffle that some lanes skip": (
        "if (threadIdx.x % 32 != 7) __shfl_sync(~0u, 1, 0);",
        r"divergence: .*__shfl_sync|deadlock",
    ),
    "copy cut short": (
        "copy_async<16>(shared_address(shared + 4 * threadIdx.x), x + 4 * threadIdx.x, 4);",
        r"copy_async of 4 valid bytes out of 16, takes none or all",
    ),
    "shuffle from a lane outside the mask": (
        "if (threadIdx.x % 2) __shfl_sync(0xaaaaaaaau, 1, 0);",
        r"shuffles from lane 0, not in the mask",
    ),
    "shuffle by a lane outside the mask": (
        "__shfl_sync(0xffffu, 1, 0);",
        r"mask 0x0000ffff does not name lane",
    ),
    "lanes at different operations": (
        "if (threadIdx.x % 2) __syncwarp(); else __shfl_sync(~0u, 1, 0);",
        r"divergence: the lanes of a warp do not reach the same",
    ),
    "lanes that wait for a barrier of the block": (
        "if (threadIdx.x % 2) __syncthreads(); else __syncwarp();",
        r"deadlock: no thread of the block can go on\n    threads [^:]*: at __syncthreads",
    ),
    "index past a register array": (
        "float registers[4] = {}; for (int i = 0; i < 5; ++i) y[i] = registers[i];",
        r"test.cu:1:.*index 4 out of bounds",
    ),
    "integer overflow": (
        "const int stride = 1 << 30; y[(threadIdx.x + stride) * 2] = int(gridDim.x + 1) * stride;",
        r"test.cu:1:.*signed integer overflow",
    ),
    "null pointer": ("x = nullptr; *x = 1;", "test.cu:1:.*null pointer"),
    "endless recursion": (
        """struct F { static int f(volatile int* p) { return *p ? 0 : f(p) + 1; } };
        volatile int zero = 0; y[0] = F::f(&zero);""",
        "Segmentation fault",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_bug(device: HostDevice, name: str, seed: int) -> None:
    body, message = PLANTED[name]
    head = "auto* shared = reinterpret_cast<float*>(dynamic_shared_memory()); (void)shared;\n"
    x, y = device.asarray(np.ones(64, np.float32)), device.empty((64,), np.float32)
    with pytest.raises(HostKernelError, match=message) as error:
        body = f'{head}#line 1 "test.cu"\n{body}'
        run(device, "float* x, float* y", body, x, y, block=64, seed=seed)
    assert re.search(r"in block \(0, 0, 0\), thread \(\d+, 0, 0\)", str(error.value))
    assert "test.cu:" in str(error.value)


def test_race_between_blocks(device: HostDevice) -> None:
    y = device.empty((32,), np.float32)
    with pytest.raises(HostKernelError, match=r"race: write of .*\n.* of another block"):
        run(device, "float* y", "y[threadIdx.x] = blockIdx.x;", y, grid=2)


def test_use_after_free(device: HostDevice) -> None:
    x, y = device.asarray(np.ones(32, np.float32)), device.empty((32,), np.float32)
    address = np.uint64(x.address)
    del x
    with pytest.raises(HostKernelError, match="array in global memory that has been freed"):
        run(device, "float* x, float* y", "y[threadIdx.x] = x[threadIdx.x];", address, y)


@pytest.mark.parametrize(
    ("argument", "options", "message"),
    [
        (np.int64(1), {}, "argument 1 has 8 bytes, the kernel's parameter 4"),
        (np.int32(1), {"block": 33}, "a block of 33 threads"),
        (np.int32(1), {"grid": 0}, "a grid with an axis of 0 blocks"),
        (np.int32(1), {"shared_mem": 228 << 10}, "bytes of shared memory are more than"),
    ],
)
def test_refused_launch(
    device: HostDevice, argument: np.generic, options: dict[str, int], message: str
) -> None:
    """A launch that a GPU would refuse, or take with garbage; the device's memory stays."""
    y = device.asarray(np.zeros(32, np.float32))
    with pytest.raises(HostKernelError, match=message):
        run(device, "float* y, int n", "y[threadIdx.x] = n;", y, argument, **options)
    assert not y.get().any()


def test_compile_error(device: HostDevice) -> None:
    with pytest.raises(HostKernelError, match=r"test.cu:1:.*error"):
        run(device, "", "no_such_function();")
