// Matrix products of warpgroups and their registers, see async.hpp.
//
// A product is computed when it is issued, and its result kept until the wait: meanwhile its
// accumulator holds poison, and its unit reads the operands in shared memory, so that whoever
// overwrites them before the wait is reported.
#include <cmath>
#include <cstring>

#include "async.hpp"
#include "memory.hpp"

using host::WARP;
using host::WARPGROUP;

constexpr int M = 64, K = 16, MAX_N = 256;
constexpr size_t UNIT_BYTES = 16;
constexpr int UNIT_ELEMENTS = 8;

// ---- operands -----------------------------------------------------------------------------------

static double from_bf16(uint16_t bits) {
    const uint32_t wide = uint32_t{bits} << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

static double from_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(mantissa, -24);
    return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Every number of a type by its bits.
struct Numbers {
    double value[1 << 16];

    explicit Numbers(double (*from)(uint16_t)) {
        for (unsigned bits = 0; bits < 1 << 16; ++bits) value[bits] = from(bits);
    }
};

static const double* numbers(bool is_bf16) {
    static const Numbers bf16(from_bf16), f16(from_f16);
    return is_bf16 ? bf16.value : f16.value;
}

// An operand in shared memory with 128-byte swizzle: R x K, R being m or n.
struct Operand {
    static constexpr unsigned ROW_BYTES = 128, GROUP_BYTES = 8 * ROW_BYTES;

    unsigned start, leading, stride;  // bytes
    bool transposed;                  // its rows in memory are the product's k

    Operand(uint64_t descriptor, bool transposed)
        : start((descriptor & 0x3fff) << 4),
          leading((descriptor >> 16 & 0x3fff) << 4),
          stride((descriptor >> 32 & 0x3fff) << 4),
          transposed(transposed) {
        if (descriptor >> 62 != 1) {
            host::fail("wgmma: a descriptor without 128-byte swizzle is not simulated");
        }
        // The swizzle is made of address bits, so a group of 8 rows starts where they are 0. Inside
        // it, only k may move along the rows.
        const unsigned rest = start % GROUP_BYTES;
        if (descriptor >> 49 & 7 || rest >= ROW_BYTES || (transposed && rest != 0)) {
            host::fail("wgmma: an operand starts %u bytes behind a multiple of %u", rest,
                       GROUP_BYTES);
        }
    }

    // The address of the unit of 8 elements from (r, k) on, along k, or along r if transposed.
    unsigned unit(unsigned r, unsigned k) const {
        const unsigned row = transposed ? k : r, element = transposed ? r : k;
        constexpr unsigned COLUMNS = ROW_BYTES / 2;
        const unsigned address = start + row / 8 * stride + row % 8 * ROW_BYTES +
                                 element / COLUMNS * leading + element % COLUMNS * 2;
        return address ^ (address >> 7 & 7) << 4;
    }

    void read_unit(uint16_t* elements, unsigned r, unsigned k, const Actor& actor,
                   const void* code) const {
        const unsigned char* source = host::shared_pointer(unit(r, k));
        device_memory.check(source, UNIT_BYTES, Access::READ, actor, code);
        memcpy(elements, source, UNIT_BYTES);
    }

    // Rows first to first + count, row r to column r - first of `matrix` (K rows of `count`).
    void read(double* matrix, unsigned first, unsigned count, const double* number,
              const Actor& actor, const void* code) const {
        uint16_t elements[UNIT_ELEMENTS];
        for (unsigned r = 0; r < count; r += transposed ? UNIT_ELEMENTS : 1) {
            for (unsigned k = 0; k < K; k += transposed ? 1 : UNIT_ELEMENTS) {
                read_unit(elements, first + r, k, actor, code);
                double* target = matrix + k * count + r;
                for (int i = 0; i < UNIT_ELEMENTS; ++i) {
                    target[transposed ? i : i * count] = number[elements[i]];
                }
            }
        }
    }
};

// ---- products -----------------------------------------------------------------------------------

int Asynchronous::product_unit(int warpgroup) {
    if (product_units_.size() <= static_cast<size_t>(warpgroup)) {
        product_units_.resize(warpgroup + 1, -1);
    }
    int& unit = product_units_[warpgroup];
    if (unit < 0) {
        unit = running_block->new_unit("the matrix products of warpgroup " +
                                       std::to_string(warpgroup));
    }
    return unit;
}

// What all of `count` threads know.
static Knowledge common_view(Thread* const* threads, int count) {
    Knowledge common = running_block->view(*threads[0]);
    for (int i = 1; i < count; ++i) common.meet(running_block->view(*threads[i]));
    return common;
}

// The place of a lane's i-th register in its warp's 16 rows.
static int row_of(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
static int column_of(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

static bool is_poison(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == 0xffffffff;
}

static void check_untouched(const Accumulator& accumulator, const char* when) {
    for (int i = 0; i < accumulator.count; ++i) {
        if (!is_poison(accumulator.d[i])) {
            host::fail("wgmma: element %d of an accumulator was written between issue and %s", i,
                       when);
        }
    }
}

// Whether the thread has executed wgmma_fence since it wrote the registers of its next product.
// It shows in registers that a product has used before and that this one is to read; they are
// forgotten.
static void check_fenced(Thread& thread, const void* first, size_t count, bool read,
                         const char* what) {
    if (!thread.product_fence) host::fail("wgmma: no wgmma_fence before the first product");
    const auto* words = static_cast<const uint32_t*>(first);
    std::vector<Registers> rest;
    for (Registers& registers : thread.registers) {
        if (!registers.overlaps(words, count)) {
            rest.push_back(std::move(registers));
            continue;
        }
        if (!registers.fenced) {
            host::fail("wgmma: no wgmma_fence between the wait for an accumulator and its next "
                       "product");
        }
        if (read && registers.first == words && registers.values.size() == count &&
            !std::equal(words, words + count, registers.values.begin())) {
            host::fail("wgmma: %s was written after the latest wgmma_fence", what);
        }
    }
    thread.registers = std::move(rest);
}

static void remember(Thread& thread, const void* first, size_t count, bool fenced) {
    const auto* words = static_cast<const uint32_t*>(first);
    thread.registers.push_back({words, std::vector<uint32_t>(words, words + count), fenced});
}

// The accumulator of the thread's product into `d`, with its present values.
static Accumulator& open_accumulator(Thread& thread, float* d, int count, bool accumulate) {
    for (Accumulator& other : thread.accumulators) {
        if (other.d == d && other.count == count) {
            check_untouched(other, "the next product");
            return other;
        }
        if (d < other.d + other.count && other.d < d + count) {
            host::fail("wgmma: an accumulator overlaps with one of another shape that is in use");
        }
    }
    check_fenced(thread, d, count, accumulate, "an accumulator");
    thread.accumulators.push_back({d, count, std::vector<float>(count, 0.0f), 0});
    Accumulator& accumulator = thread.accumulators.back();
    if (accumulate) std::copy(d, d + count, accumulator.result.begin());
    return accumulator;
}

// sum[m][n] += sum over k of a[k][m] b[k][n]
static void multiply(double* sum, const double* a, const double* b, int n) {
    for (int i = 0; i < M; ++i) {
        double* row = sum + i * n;
        for (int k = 0; k < K; ++k) {
            const double factor = a[k * M + i];
            const double* other = b + k * n;
            for (int j = 0; j < n; ++j) row[j] += factor * other[j];
        }
    }
}

static void read_a(double* a, const host::Product& product, Thread* const* threads,
                   const double* number, int unit, uint32_t clock) {
    double quarter[K * WARP / 2];
    for (int warp = 0; warp < 4; ++warp) {
        constexpr int ROWS = M / 4;
        Thread* const* lanes = threads + warp * WARP;
        if (product.a_registers) {
            for (int lane = 0; lane < WARP; ++lane) {
                const auto& own = *static_cast<const host::Product*>(lanes[lane]->operands);
                for (int i = 0; i < 8; ++i) {
                    const uint32_t pair = own.a_registers[i / 2];
                    const uint16_t bits = pair >> 16 * (i % 2);
                    quarter[column_of(lane, i) * ROWS + row_of(lane, i)] = number[bits];
                }
            }
        } else {
            const Knowledge known = common_view(lanes, WARP);
            Operand(product.a, product.transposed_a)
                .read(quarter, warp * ROWS, ROWS, number, Actor::unit(unit, clock, known, -1),
                      product.code);
        }
        for (int k = 0; k < K; ++k) {
            std::copy(quarter + k * ROWS, quarter + (k + 1) * ROWS, a + k * M + warp * ROWS);
        }
    }
}

static void compute_product(Thread* const* threads) {
    const auto& product = *static_cast<const host::Product*>(threads[0]->operands);
    const int n = product.n, warpgroup = threads[0]->index / WARPGROUP;
    const double* number = numbers(product.is_bf16);
    const int unit = asynchronous.product_unit(warpgroup);
    const uint32_t clock = running_block->tick();

    static double a[K * M], b[K * MAX_N], sum[M * MAX_N];
    read_a(a, product, threads, number, unit, clock);
    const Knowledge known = common_view(threads, WARPGROUP);
    Operand(product.b, product.transposed_b)
        .read(b, 0, n, number, Actor::unit(unit, clock, known, -1), product.code);

    Accumulator* accumulators[WARPGROUP];
    for (int i = 0; i < WARPGROUP; ++i) {
        const auto& own = *static_cast<const host::Product*>(threads[i]->operands);
        const bool same = own.n == n && own.is_bf16 == product.is_bf16 && own.a == product.a &&
                          own.b == product.b && own.accumulate == product.accumulate &&
                          own.transposed_a == product.transposed_a &&
                          own.transposed_b == product.transposed_b;
        if (!same) host::fail("wgmma: the threads of a warpgroup give different operands");
        if (own.a_registers) {
            check_fenced(*threads[i], own.a_registers, 4, true, "an operand");
            remember(*threads[i], own.a_registers, 4, true);
        }
        accumulators[i] = &open_accumulator(*threads[i], own.d, n / 2, own.accumulate);
        accumulators[i]->group = threads[i]->product_group;
        threads[i]->product_latest = clock;
        for (int j = 0; j < n / 2; ++j) {
            const int row = 16 * (i / WARP) + row_of(i % WARP, j);
            sum[row * n + column_of(i % WARP, j)] =
                product.accumulate ? double{accumulators[i]->result[j]} : 0.0;
        }
    }
    multiply(sum, a, b, n);
    for (int i = 0; i < WARPGROUP; ++i) {
        for (int j = 0; j < n / 2; ++j) {
            const int row = 16 * (i / WARP) + row_of(i % WARP, j);
            accumulators[i]->result[j] =
                static_cast<float>(sum[row * n + column_of(i % WARP, j)]);
        }
        memset(accumulators[i]->d, POISON, n / 2 * sizeof(float));
    }
}

static void wait_for_products(Thread& thread, uint32_t pending) {
    if (thread.product_group < pending) return;
    const uint32_t done = thread.product_group - pending;  // groups below this one
    std::vector<Accumulator> rest;
    for (Accumulator& accumulator : thread.accumulators) {
        if (accumulator.group >= done) {
            rest.push_back(std::move(accumulator));
            continue;
        }
        check_untouched(accumulator, "wait");
        std::copy(accumulator.result.begin(), accumulator.result.end(), accumulator.d);
        remember(thread, accumulator.d, accumulator.count, false);
    }
    thread.accumulators = std::move(rest);
    if (done > 0) {
        const int unit = asynchronous.product_unit(thread.index / WARPGROUP);
        running_block->learn(thread, unit, thread.product_clocks[done - 1] + 1);
    }
}

// ---- registers ----------------------------------------------------------------------------------

// Of a thread, in a kernel with __launch_bounds__(threads, 1) that uses all it can.
int Asynchronous::initial_registers() {
    return std::min(65536 / running_block->count() / 8 * 8, 256);
}

void Asynchronous::set_registers(int count, bool grow) {
    const char* operation = grow ? "grow_registers" : "shrink_registers";
    const int warpgroups = running_block->count() / WARPGROUP;
    if (registers_.empty()) registers_.assign(warpgroups, initial_registers());
    int& present = registers_[running_block->running().index / WARPGROUP];
    if (count % 8 != 0 || count < 24 || count > 256) {
        host::fail("%s: %d registers, takes a multiple of 8 from 24 to 256", operation, count);
    }
    if (grow ? count < present : count > present) {
        host::fail("%s: %d registers, a thread has %d", operation, count, present);
    }
    present = count;
}

// ---- what kernels call --------------------------------------------------------------------------

static void nothing(void* const*) {}

namespace host {

void wgmma(Product& product, Place place) {
    product.code = __builtin_return_address(0);
    running_block->wait_for_warpgroup("wgmma", place, &product, compute_product);
}

void wgmma_fence(Place place) {
    running_block->wait_for_warp("wgmma_fence", ~0u, place, nullptr, nothing, false, nullptr);
    Thread& self = running_block->running();
    self.product_fence = true;
    for (Registers& registers : self.registers) {
        std::copy_n(registers.first, registers.values.size(), registers.values.begin());
        registers.fenced = true;
    }
}

void wgmma_commit(Place place) {
    running_block->wait_for_warp("wgmma_commit", ~0u, place, nullptr, nothing, false, nullptr);
    Thread& self = running_block->running();
    self.product_clocks.push_back(self.product_latest);
    self.product_group += 1;
}

void wgmma_wait(int pending, Place place) {
    running_block->wait_for_warp("wgmma_wait", ~0u, place, nullptr, nothing, false, nullptr);
    wait_for_products(running_block->running(), pending);
}

void set_registers(int count, bool grow, Place place) {
    struct Operands {
        int count;
        bool grow;
    } operands{count, grow};
    running_block->wait_for_warpgroup("setmaxnreg", place, &operands, [](Thread* const* threads) {
        const auto& operands = *static_cast<const Operands*>(threads[0]->operands);
        asynchronous.set_registers(operands.count, operands.grow);
    });
}

}  // namespace host
