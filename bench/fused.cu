// The transformer's arithmetic beside its matrix products, each function one pass over memory.
//
// ops_numpy.py has the formulas under the same names, ops_cupy.py the launches. Compiled with two
// macros: ELEMENT, the type of activations and of the operands of products (__nv_bfloat16 or
// float), and WIDTH, the number of features of a token. Parameters and all sums are float.
// Pointers are aligned to 16 bytes and rows are multiples of PACK elements: a thread moves PACK of
// them at a time, in one access of 16 bytes if ELEMENT has two.

#include <cuda_bf16.h>

typedef long long Index;

constexpr int PACK = 8;
constexpr int WARP = 32;
constexpr int WARPS = 4;                                         // of blocks with one warp a row
constexpr int PACKS = WIDTH / PACK;                              // in a token
constexpr int LANE_PACKS = (PACKS + WARP - 1) / WARP;            // of them a lane's
constexpr float EPSILON = 1e-5f;                                 // as in ops_numpy.py
constexpr float GELU_A = 0.7978845608028654f;                    // √(2/π)
constexpr float GELU_B = 0.044715f * GELU_A;

static_assert(WIDTH % PACK == 0, "a row is a whole number of packs");

// ---------------------------------------------------------------------------------------- packs

__device__ void load(float (&x)[PACK], const __nv_bfloat16* from) {
    const uint4 bits = *reinterpret_cast<const uint4*>(from);
    const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < PACK / 2; ++i) {
        const float2 pair = __bfloat1622float2(pairs[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

__device__ void load(float (&x)[PACK], const float* from) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4) {
        const float4 quad = *reinterpret_cast<const float4*>(from + i);
        x[i] = quad.x;
        x[i + 1] = quad.y;
        x[i + 2] = quad.z;
        x[i + 3] = quad.w;
    }
}

__device__ void store(__nv_bfloat16* to, const float (&x)[PACK]) {
    uint4 bits;
    __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&bits);
#pragma unroll
    for (int i = 0; i < PACK / 2; ++i) pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
    *reinterpret_cast<uint4*>(to) = bits;
}

__device__ void store(float* to, const float (&x)[PACK]) {
#pragma unroll
    for (int i = 0; i < PACK; i += 4)
        *reinterpret_cast<float4*>(to + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
}

__device__ Index thread_index() { return Index(blockIdx.x) * blockDim.x + threadIdx.x; }

// --------------------------------------------------------------------------------------- sums

__device__ float warp_sum(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Stands for −∞ in softmaxes, without the NaN of −∞ − (−∞); its exponential is 0.
constexpr float LOWEST = -3e38f;

// The sum of exp(x − max) over the x seen so far, and max: what a softmax needs to know of a row.
struct ExpSum {
    float max, sum;

    __device__ void add(const float (&x)[PACK]) {
        float larger = max;
#pragma unroll
        for (int i = 0; i < PACK; ++i) larger = fmaxf(larger, x[i]);
        if (larger > max) {
            sum *= __expf(max - larger);
            max = larger;
        }
#pragma unroll
        for (int i = 0; i < PACK; ++i) sum += __expf(x[i] - max);
    }

    __device__ void merge(ExpSum other) {
        const float larger = fmaxf(max, other.max);
        sum = sum * __expf(max - larger) + other.sum * __expf(other.max - larger);
        max = larger;
    }

    __device__ void merge_warp() {
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            merge({__shfl_xor_sync(~0u, max, step), __shfl_xor_sync(~0u, sum, step)});
    }
};

// ---------------------------------------------------------------------------------- embedding

// x[t] = table[tokens[t]] + positions[t mod context]; positions may be null. A thread a pack.
extern "C" __global__ void embed(const int* tokens, const ELEMENT* table, const ELEMENT* positions,
                                 ELEMENT* x, Index count, Index context) {
    const Index t = thread_index() / PACKS, column = thread_index() % PACKS * PACK;
    if (t >= count) return;
    float sum[PACK];
    load(sum, table + tokens[t] * Index(WIDTH) + column);
    if (positions) {
        float position[PACK];
        load(position, positions + t % context * WIDTH + column);
#pragma unroll
        for (int i = 0; i < PACK; ++i) sum[i] += position[i];
    }
    store(x + t * WIDTH + column, sum);
}

extern "C" __global__ void embed_backward(const ELEMENT* dx, const int* tokens, float* table_grad,
                                          float* positions_grad, Index count, Index context) {
    const Index t = thread_index() / PACKS, column = thread_index() % PACKS * PACK;
    if (t >= count) return;
    float d[PACK];
    load(d, dx + t * WIDTH + column);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        atomicAdd(table_grad + tokens[t] * Index(WIDTH) + column + i, d[i]);
        if (positions_grad) atomicAdd(positions_grad + t % context * WIDTH + column + i, d[i]);
    }
}

// y[r] = x[rows[r]]
extern "C" __global__ void gather(const ELEMENT* x, const int* rows, ELEMENT* y, Index count) {
    const Index r = thread_index() / PACKS, column = thread_index() % PACKS * PACK;
    if (r >= count) return;
    float values[PACK];
    load(values, x + rows[r] * Index(WIDTH) + column);
    store(y + r * WIDTH + column, values);
}

// dx[rows[r]] = dy[r]; the rows are different, dx is zero before.
extern "C" __global__ void scatter(const ELEMENT* dy, const int* rows, ELEMENT* dx, Index count) {
    const Index r = thread_index() / PACKS, column = thread_index() % PACKS * PACK;
    if (r >= count) return;
    float values[PACK];
    load(values, dy + r * WIDTH + column);
    store(dx + rows[r] * Index(WIDTH) + column, values);
}

// ----------------------------------------------------------------------- residual and LayerNorm

// sum = x + y + bias (sum = x where y is null, and is not written then); normal = its rows
// normalised, times gain, plus shift; statistics = (mean, 1/deviation) of each row. A warp a row.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    add_norm(const ELEMENT* x, const ELEMENT* y, const float* bias, const float* gain,
             const float* shift, ELEMENT* sum, ELEMENT* normal, float2* statistics, Index rows) {
    const Index row = Index(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;

    float values[LANE_PACKS][PACK] = {};
    float total = 0;
#pragma unroll
    for (int j = 0; j < LANE_PACKS; ++j) {
        const int column = (lane + j * WARP) * PACK;
        if (column >= WIDTH) break;
        const Index at = row * WIDTH + column;
        load(values[j], x + at);
        if (y) {
            float other[PACK], shared_bias[PACK];
            load(other, y + at);
            load(shared_bias, bias + column);
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[j][i] += other[i] + shared_bias[i];
            store(sum + at, values[j]);
            // From here on as it was rounded, for that is what the backward pass will read.
#pragma unroll
            for (int i = 0; i < PACK; ++i) values[j][i] = float(ELEMENT(values[j][i]));
        }
#pragma unroll
        for (int i = 0; i < PACK; ++i) total += values[j][i];
    }
    const float mean = warp_sum(total) / WIDTH;

    float squares = 0;
#pragma unroll
    for (int j = 0; j < LANE_PACKS; ++j) {
        if ((lane + j * WARP) * PACK >= WIDTH) break;
#pragma unroll
        for (int i = 0; i < PACK; ++i) squares += (values[j][i] - mean) * (values[j][i] - mean);
    }
    const float inverse = rsqrtf(warp_sum(squares) / WIDTH + EPSILON);

#pragma unroll
    for (int j = 0; j < LANE_PACKS; ++j) {
        const int column = (lane + j * WARP) * PACK;
        if (column >= WIDTH) break;
        float factor[PACK], offset[PACK];
        load(factor, gain + column);
        load(offset, shift + column);
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            values[j][i] = (values[j][i] - mean) * inverse * factor[i] + offset[i];
        store(normal + row * WIDTH + column, values[j]);
    }
    if (lane == 0) statistics[row] = make_float2(mean, inverse);
}

// A block adds its columns' sums, a part of them in each warp, to those in memory.
__device__ void add_columns(float* grad, const float (&part)[LANE_PACKS][PACK], float* shared) {
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (int turn = 0; turn < WARPS; ++turn) {
        __syncthreads();
        if (warp != turn) continue;
#pragma unroll
        for (int j = 0; j < LANE_PACKS; ++j) {
            const int column = (lane + j * WARP) * PACK;
            if (column >= WIDTH) break;
#pragma unroll
            for (int i = 0; i < PACK; ++i)
                shared[column + i] = part[j][i] + (turn ? shared[column + i] : 0);
        }
    }
    __syncthreads();
    for (int column = threadIdx.x; column < WIDTH; column += WARPS * WARP)
        atomicAdd(grad + column, shared[column]);
}

// dsum = gradient of the sum, from that of normal and from dx, where that is not null; the two may
// be the same memory. A warp walks rows and keeps their sums by column in registers.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    add_norm_backward(const ELEMENT* dnormal, const ELEMENT* dx, const ELEMENT* x,
                      const float2* statistics, const float* gain, ELEMENT* dsum, float* gain_grad,
                      float* shift_grad, float* bias_grad, Index rows) {
    __shared__ float columns[WIDTH];
    const int lane = threadIdx.x % WARP;
    float gain_part[LANE_PACKS][PACK] = {}, shift_part[LANE_PACKS][PACK] = {};
    float bias_part[LANE_PACKS][PACK] = {};

    for (Index row = Index(blockIdx.x) * WARPS + threadIdx.x / WARP; row < rows;
         row += Index(gridDim.x) * WARPS) {
        const float mean = statistics[row].x, inverse = statistics[row].y;
        float unit[LANE_PACKS][PACK] = {}, d[LANE_PACKS][PACK] = {};
        float total = 0, along = 0;
#pragma unroll
        for (int j = 0; j < LANE_PACKS; ++j) {
            const int column = (lane + j * WARP) * PACK;
            if (column >= WIDTH) break;
            float factor[PACK];
            load(unit[j], x + row * WIDTH + column);
            load(d[j], dnormal + row * WIDTH + column);
            load(factor, gain + column);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                unit[j][i] = (unit[j][i] - mean) * inverse;
                gain_part[j][i] += d[j][i] * unit[j][i];
                shift_part[j][i] += d[j][i];
                d[j][i] *= factor[i];
                total += d[j][i];
                along += d[j][i] * unit[j][i];
            }
        }
        // A row's gradient loses its mean and its part along the row: both were normalised away.
        total = warp_sum(total) / WIDTH;
        along = warp_sum(along) / WIDTH;
#pragma unroll
        for (int j = 0; j < LANE_PACKS; ++j) {
            const int column = (lane + j * WARP) * PACK;
            if (column >= WIDTH) break;
            float stream[PACK] = {};
            if (dx) load(stream, dx + row * WIDTH + column);
#pragma unroll
            for (int i = 0; i < PACK; ++i) {
                d[j][i] = (d[j][i] - total - unit[j][i] * along) * inverse + stream[i];
                bias_part[j][i] += d[j][i];
            }
            store(dsum + row * WIDTH + column, d[j]);
        }
    }
    add_columns(gain_grad, gain_part, columns);
    add_columns(shift_grad, shift_part, columns);
    if (bias_grad) add_columns(bias_grad, bias_part, columns);
}

// ------------------------------------------------------------------------------- bias and GELU

// y += bias, in place; a thread a pack.
extern "C" __global__ void add_bias(ELEMENT* y, const float* bias, Index packs, Index columns) {
    const unsigned pack = thread_index();
    const Index at = Index(pack) * PACK;
    if (pack >= packs) return;
    float values[PACK], added[PACK];
    load(values, y + at);
    load(added, bias + pack % unsigned(columns / PACK) * PACK);
#pragma unroll
    for (int i = 0; i < PACK; ++i) values[i] += added[i];
    store(y + at, values);
}

// (1 + tanh t)/2 with t = a·x + b·x³, by the sigmoid of 2t.
__device__ float gelu_half(float x) {
    return __fdividef(1.0f, 1.0f + __expf(-2.0f * x * (GELU_A + GELU_B * x * x)));
}

extern "C" __global__ void bias_gelu(const ELEMENT* u, const float* bias, ELEMENT* y, Index packs,
                                     Index columns) {
    const unsigned pack = thread_index();
    const Index at = Index(pack) * PACK;
    if (pack >= packs) return;
    float x[PACK], added[PACK];
    load(x, u + at);
    load(added, bias + pack % unsigned(columns / PACK) * PACK);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        x[i] += added[i];
        x[i] *= gelu_half(x[i]);
    }
    store(y + at, x);
}

// Column sums: blocks of (32, 8) threads, a thread a pack of columns and every 8·gridDim.y-th row.
// `rows_of(row, column, d)` gives a pack whose sum over the rows is added to `sums`.
constexpr int SUM_ROWS = 8;

template <class RowsOf>
__device__ void add_column_sums(float* sums, Index rows, Index columns, RowsOf rows_of) {
    __shared__ float parts[SUM_ROWS][WARP][PACK + 1];
    const Index column = (Index(blockIdx.x) * WARP + threadIdx.x) * PACK;
    float sum[PACK] = {};
    if (column < columns) {
        for (Index row = Index(blockIdx.y) * SUM_ROWS + threadIdx.y; row < rows;
             row += Index(gridDim.y) * SUM_ROWS) {
            float d[PACK];
            rows_of(row, column, d);
#pragma unroll
            for (int i = 0; i < PACK; ++i) sum[i] += d[i];
        }
    }
#pragma unroll
    for (int i = 0; i < PACK; ++i) parts[threadIdx.y][threadIdx.x][i] = sum[i];
    __syncthreads();
    if (column >= columns) return;
    // Row y of the threads finishes column y of each pack.
    float total = 0;
#pragma unroll
    for (int y = 0; y < SUM_ROWS; ++y) total += parts[y][threadIdx.x][threadIdx.y];
    atomicAdd(sums + column + threadIdx.y, total);
}

static_assert(SUM_ROWS == PACK, "as many rows of threads as columns in a pack");

extern "C" __global__ void __launch_bounds__(WARP* SUM_ROWS)
    column_sums(const ELEMENT* dy, float* sums, Index rows, Index columns) {
    add_column_sums(sums, rows, columns, [&](Index row, Index column, float(&d)[PACK]) {
        load(d, dy + row * columns + column);
    });
}

// dy becomes the gradient of u: y' = h + x·h', h' = 2·h·(1 − h)·t', t' = a + 3b·x².
extern "C" __global__ void __launch_bounds__(WARP* SUM_ROWS)
    bias_gelu_backward(ELEMENT* dy, const ELEMENT* u, const float* bias, float* bias_grad,
                       Index rows, Index columns) {
    add_column_sums(bias_grad, rows, columns, [&](Index row, Index column, float(&d)[PACK]) {
        float x[PACK], added[PACK];
        load(d, dy + row * columns + column);
        load(x, u + row * columns + column);
        load(added, bias + column);
#pragma unroll
        for (int i = 0; i < PACK; ++i) {
            x[i] += added[i];
            const float h = gelu_half(x[i]);
            const float slope = 2 * GELU_A + 6 * GELU_B * x[i] * x[i];
            d[i] *= h * (1 + x[i] * (1 - h) * slope);
        }
        store(dy + row * columns + column, d);
    });
}

// ------------------------------------------------------------------------------- cross-entropy

constexpr int LOSS_WARPS = 16;

// Adds share·(−log softmax(logits)[target]) to the loss; where `gradient` is not 0, the logits
// become their gradient, share·(softmax(logits) − one at the target). A block a row.
extern "C" __global__ void __launch_bounds__(LOSS_WARPS* WARP)
    cross_entropy(ELEMENT* logits, const int* targets, float* loss, Index columns, float share,
                  Index gradient) {
    __shared__ ExpSum parts[LOSS_WARPS];
    ELEMENT* row = logits + blockIdx.x * columns;
    const int target = targets[blockIdx.x];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;

    ExpSum whole = {LOWEST, 0};
    for (Index at = threadIdx.x * PACK; at < columns; at += LOSS_WARPS * WARP * PACK) {
        float x[PACK];
        load(x, row + at);
        whole.add(x);
    }
    whole.merge_warp();
    if (lane == 0) parts[warp] = whole;
    __syncthreads();
    whole = lane < LOSS_WARPS ? parts[lane] : ExpSum{LOWEST, 0};
    whole.merge_warp();

    if (threadIdx.x == 0)
        atomicAdd(loss, share * (logf(whole.sum) + whole.max - float(row[target])));
    if (!gradient) return;
    __syncthreads();  // the target's logit has been read
    const float factor = share / whole.sum;
    for (Index at = threadIdx.x * PACK; at < columns; at += LOSS_WARPS * WARP * PACK) {
        float x[PACK];
        load(x, row + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            x[i] = factor * __expf(x[i] - whole.max) - (at + i == target ? share : 0);
        store(row + at, x);
    }
}

// --------------------------------------------------------------------- softmax of dense attention

// Scores S, (matrices, columns, columns), become P = softmax(scale·S); with `causal` a query sees
// keys up to its own number. A warp a row.
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    softmax(ELEMENT* scores, Index rows, Index columns, float scale, Index causal) {
    const Index row = Index(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const Index seen = causal ? row % columns + 1 : columns;
    ELEMENT* p = scores + row * columns;

    ExpSum whole = {LOWEST, 0};
    for (Index at = lane * PACK; at < seen; at += WARP * PACK) {
        float x[PACK];
        load(x, p + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) x[i] = at + i < seen ? scale * x[i] : LOWEST;
        whole.add(x);
    }
    whole.merge_warp();
    const float factor = 1 / whole.sum;
    for (Index at = lane * PACK; at < columns; at += WARP * PACK) {
        float x[PACK] = {};
        if (at < seen) load(x, p + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i)
            x[i] = at + i < seen ? factor * __expf(scale * x[i] - whole.max) : 0;
        store(p + at, x);
    }
}

// dP becomes dS = scale·P∘(dP − rowsum(P∘dP)).
extern "C" __global__ void __launch_bounds__(WARPS* WARP)
    softmax_backward(const ELEMENT* probabilities, ELEMENT* gradients, Index rows, Index columns,
                     float scale, Index causal) {
    const Index row = Index(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    if (row >= rows) return;
    const Index seen = causal ? row % columns + 1 : columns;
    const ELEMENT* p = probabilities + row * columns;
    ELEMENT* d = gradients + row * columns;

    float dot = 0;
    for (Index at = lane * PACK; at < seen; at += WARP * PACK) {
        float x[PACK], y[PACK];
        load(x, p + at);
        load(y, d + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) dot += x[i] * y[i];  // P is 0 where a key is not seen
    }
    dot = warp_sum(dot);
    for (Index at = lane * PACK; at < columns; at += WARP * PACK) {
        float x[PACK] = {}, y[PACK] = {};
        if (at < seen) {
            load(x, p + at);
            load(y, d + at);
        }
#pragma unroll
        for (int i = 0; i < PACK; ++i) y[i] = scale * x[i] * (y[i] - dot);
        store(d + at, y);
    }
}

// --------------------------------------------------------------------------------------- AdamW

extern "C" __global__ void square_sum(const float* grad, float* sum, Index count) {
    float squares = 0;
    const Index step = Index(gridDim.x) * blockDim.x * PACK;
    for (Index at = thread_index() * PACK; at < count; at += step) {
        float g[PACK];
        load(g, grad + at);
#pragma unroll
        for (int i = 0; i < PACK; ++i) squares += g[i] * g[i];
    }
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) atomicAdd(sum, squares);
}

// See ops_numpy.adamw; `constants` are the rate, 1/(1 − β₁ᵗ) and 1/(1 − β₂ᵗ). A thread a pack.
extern "C" __global__ void adamw(float* value, float* grad, float* mean, float* square,
                                 ELEMENT* work, const float* constants, const float* sum,
                                 Index count, Index decayed, float beta1, float beta2,
                                 float epsilon, float decay, float clip) {
    const Index at = thread_index() * PACK;
    if (at >= count) return;
    const float rate = constants[0];
    const float shrink = fminf(1.0f, clip * rsqrtf(*sum + epsilon * epsilon));
    const float kept = at < decayed ? 1 - rate * decay : 1;

    float x[PACK], g[PACK], m[PACK], s[PACK];
    load(x, value + at);
    load(g, grad + at);
    load(m, mean + at);
    load(s, square + at);
#pragma unroll
    for (int i = 0; i < PACK; ++i) {
        g[i] *= shrink;
        m[i] = beta1 * m[i] + (1 - beta1) * g[i];
        s[i] = beta2 * s[i] + (1 - beta2) * g[i] * g[i];
        x[i] = kept * x[i] - rate * m[i] * constants[1] / (sqrtf(s[i] * constants[2]) + epsilon);
        g[i] = 0;
    }
    store(mean + at, m);
    store(square + at, s);
    store(value + at, x);
    store(work + at, x);
    store(grad + at, g);
}
