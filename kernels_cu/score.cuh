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

// 2^x
DEVICE float exp2_real(float x) {
    return exp2_approx(x);
}
DEVICE double exp2_real(double x) {
    return exp2(x);
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
        if constexpr (Config::SOFTCAP) {
            scale = static_cast<Real>(params.scale / params.softcap);
            softcap = static_cast<Real>(params.softcap * LOG2_E);
        } else {
            scale = static_cast<Real>(params.scale * LOG2_E);
        }
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
