// The score policy: what happens between S = Q K^T and the softmax, chosen at compile time.
//
// A kernel's loops ask three things of it: which tiles a tile sees, wholly or in part
// (visible_tiles), which keys a row sees (Score::keys), and what a score becomes
// (Score::modify, with its derivative in Score::modify_with_slope).
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"

// Causal and window as one band: row i sees the columns j with i + low <= j <= i + high.
struct Band {
    int32 low, high;

    // The same pairs with rows and columns exchanged.
    DEVICE Band transposed() const {
        return {-high, -low};
    }
};

// Tiles [begin, end) have a visible pair in them; in tiles [full_begin, full_end), a part of
// those or empty, every pair is visible and every column exists.
struct TileRange {
    int32 begin, full_begin, full_end, end;

    DEVICE bool is_full(int32 tile) const {
        return tile >= full_begin && tile < full_end;
    }
};

// Which of the columns 0, 1, 8, 9, 16, 17, ... 121, a lane's of 128 in a product's accumulators,
// are first..last: a bit for each, from the lowest on. ptxas tests seven bits by one instruction;
// to compare would take two for each column.
DEVICE uint32 column_bits(int32 first, int32 last) {
    const auto from = [](int32 column) {  // bits of this column and those behind it
        return shift_left(~0u, max((column >> 3) * 2 + min(column & 7, 2), 0));
    };
    return from(first) & ~from(last + 1);
}

// The tiles of `tile` columns, of `columns` in all, that the rows first..last (inclusive) see.
DEVICE TileRange visible_tiles(Band band, int32 first, int32 last, int32 tile, int32 columns) {
    const int32 any_first = max(first + band.low, 0);
    const int32 any_last = min(last + band.high, columns - 1);
    const int32 all_first = max(last + band.low, 0);
    const int32 all_last = min(first + band.high, columns - 1);
    TileRange range;
    range.begin = any_first / tile;
    range.end = any_last < any_first ? range.begin : any_last / tile + 1;
    range.full_begin = ceil_div(all_first, tile);
    range.full_end = all_last < 0 ? 0 : (all_last + 1) / tile;
    return range;
}

// 2^x for x up to 1000, below 2^-1022 zero.
DEVICE float exp2_real(float x) {
    return exp2_approx(x);
}

// Two thirds of the instructions of CUDA's exp2, and no branch.
DEVICE double exp2_real(double x) {
    // x = n + f with -1/2 <= f <= 1/2: the sum is so large that its last bit is 1.
    constexpr double ROUNDER = 6755399441055744.0;  // 1.5 * 2^52
    const double sum = x + ROUNDER;
    const double f = x - (sum - ROUNDER);
    // The polynomial of degree 11 with the least relative error, 3.4e-18.
    double p = 4.4370674162622857e-10;
    p = p * f + 7.074126231741479e-09;
    p = p * f + 1.0178185975568677e-07;
    p = p * f + 1.3215432953506289e-06;
    p = p * f + 1.5252733519785626e-05;
    p = p * f + 0.00015403530462839758;
    p = p * f + 0.0013333558146757121;
    p = p * f + 0.009618129107587997;
    p = p * f + 0.05550410866482007;
    p = p * f + 0.24022650695910158;
    p = p * f + 0.6931471805599453;
    p = p * f + 1.0;
    // n is in the lowest bits of the sum; added to the exponent of p.
    const double power = bit_cast<double>(bit_cast<uint64>(p) + (bit_cast<uint64>(sum) << 52));
    return x >= -1022 ? power : x < -1022 ? 0 : x;  // x is NaN
}

// 1/x
DEVICE float reciprocal(float x) {
    return reciprocal_approx(x);
}
DEVICE double reciprocal(double x) {
    return 1 / x;
}

// tanh to what the element type needs: for 16-bit types an absolute error of about 2e-7.
template <class T>
struct Tanh {
    static DEVICE float of(float x) {
        return 1 - 2 * reciprocal_approx(1 + exp2_approx(static_cast<float>(2 * LOG2_E) * x));
    }
};
template <>
struct Tanh<float> {
    static DEVICE float of(float x) {
        return tanhf(x);
    }
};
template <>
struct Tanh<double> {
    static DEVICE double of(double x) {
        return tanh(x);
    }
};

// What dK and dQ are to be multiplied by: the score's derivative, if it is the same for all pairs;
// a softcap's is part of dS.
template <class Config>
DEVICE float gradient_scale(const AttentionParams& params) {
    return Config::SOFTCAP ? 1 : scalars<float>(params).scale;
}

// Scores of one head in base 2: the softmax is that of 2^(factor * modify(s)), s = q . k.
// Config has the Element type and the switches BAND, SOFTCAP and ALIBI.
template <class Config, class Real>
struct Score {
    static constexpr bool MODIFIES = Config::SOFTCAP || Config::ALIBI;

    Band band;
    int32 seqlen_k;
    int32 shift;     // column of the diagonal in row 0
    Real factor;     // all there is to do to a score where nothing modifies it, else 1
    Real scale;      // s * scale, in base 2, or divided by softcap where there is one
    Real softcap;    // in base 2
    Real slope;      // of ALiBi, in base 2

    DEVICE Score(const AttentionParams& params, const HeadIndex& index) {
        band = {-(1 << 30), 1 << 30};
        if constexpr (Config::BAND) band = {params.band_low, params.band_high};
        seqlen_k = params.seqlen_k;
        shift = params.seqlen_k - params.seqlen_q;
        scale = scalars<Real>(params).to_log2;
        if constexpr (Config::SOFTCAP) softcap = scalars<Real>(params).softcap;
        if constexpr (Config::ALIBI) {
            slope = *head_data<const Real>(params.alibi_slopes, index, index.head) *
                    static_cast<Real>(LOG2_E);
        }
        // With scale = 0 a masked score, -inf, must stay -inf when multiplied.
        factor = MODIFIES ? 1 : max(scale, static_cast<Real>(1e-37));
    }

    // The keys that a row sees: first..last, none where last < first.
    struct Keys {
        int32 first, last;
    };
    DEVICE Keys keys(int32 row) const {
        if constexpr (Config::BAND) {
            return {max(row + band.low, 0), min(row + band.high, seqlen_k - 1)};
        } else {
            return {0, seqlen_k - 1};
        }
    }
    // The rows that see a key, in the same manner.
    struct Rows {
        int32 first, last;
    };
    DEVICE Rows rows(int32 key) const {
        const int32 seqlen_q = key < seqlen_k ? seqlen_k - shift : 0;
        if constexpr (Config::BAND) {
            return {max(key - band.high, 0), min(key - band.low, seqlen_q - 1)};
        } else {
            return {0, seqlen_q - 1};
        }
    }
    DEVICE bool sees(int32 row, int32 key) const {
        const Keys visible = keys(row);
        return key >= visible.first && key <= visible.last;
    }

    // What the softmax's exponent takes, up to `factor`.
    DEVICE Real modify(Real s, int32 row, int32 key) const {
        Real slope_unused;
        return modify_with_slope(s, row, key, slope_unused);
    }

    // The same, and `derivative`: that of the final score, in natural units, to s.
    DEVICE Real modify_with_slope(Real s, int32 row, int32 key, Real& derivative) const {
        if constexpr (!MODIFIES) {
            derivative = scale * static_cast<Real>(LN_2);
            return s;
        }
        Real modified = s * scale;
        derivative = scale * static_cast<Real>(LN_2);
        if constexpr (Config::SOFTCAP) {
            const Real t = Tanh<typename Config::Element>::of(modified);
            modified = softcap * t;
            derivative = scale * softcap * static_cast<Real>(LN_2) * (1 - t * t);
        }
        if constexpr (Config::ALIBI) {
            const int32 distance = row + shift - key;
            modified -= slope * static_cast<Real>(distance < 0 ? -distance : distance);
        }
        return modified;
    }
};
