// exp, tanh and their kin of a SIMD vector, for sigmoids and tanh good to 3 ulp where those are normal numbers; NaN and
// infinities give what they should. And the random events of a vector of units.
//
//     exp(x)  = 2^n exp(r)          with x = n ln 2 + r, |r| <= ln 2 / 2, and exp(r) by its series
//     tanh(x) = -m / (2 + m)        with m = exp(-2 |x|) - 1, and the sign of x
//     log(1 + u) = 2 artanh(u / (2 + u))     for u of 0 .. 1, by its series
#pragma once

#include "../cell_math.h"
#include "simd.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

// Whether an instruction multiplies by a power of two of any exponent.
#if defined(__AVX512F__)
inline constexpr bool kScalesAny = true;
#else
inline constexpr bool kScalesAny = false;
#endif

template <class C>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kTerms = 7;            // remainder below 2^-26
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLn2High = 0x1.62e400p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  // exp is 0 at the lowest, without that instruction also a third above it, and infinite at the highest.
  static constexpr float kLowest = kScalesAny ? -104.f : -87.3f, kHighest = 89.f;
  static constexpr float kTanhLowest = -40.f;  // exp of it is nothing beside 1
  static constexpr int kArtanhTerms = 8;       // remainder below 2^-26 at 1/3
};

template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kTerms = 13;  // remainder below 2^-56
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;
  static constexpr double kLowest = kScalesAny ? -746. : -708.3, kHighest = 710.;
  static constexpr double kTanhLowest = -80.;
  static constexpr int kArtanhTerms = 17;
};

template <class C>
struct VecMath {
  using Number = C;
  using Value = Vec<C>;
  using K = ExpConstants<C>;
  using Int = Vec<typename K::Int>;

  // x = n ln2 + r with |r| <= ln2 / 2; n + kRound, whose last bits are n; m1 = exp(r) - 1 by its series
  struct Reduced {
    Value rounded, m1;
  };

  static LSTM_EXT_INLINE Reduced reduce(Value x) {
    const Value rounded = x * C(1.4426950408889634) + K::kRound, n = rounded - K::kRound;
    const Value r = (x - n * K::kLn2High) - n * K::kLn2Low;
    Value series = broadcast(C(1) / factorial(K::kTerms));
#pragma GCC unroll 16
    for (int term = K::kTerms - 1; term >= 2; --term) {
      series = series * r + C(1) / factorial(term);
    }
    return {rounded, series * (r * r) + r};
  }

  static LSTM_EXT_INLINE Value inverse(Value x) { return 1 / x; }

  static LSTM_EXT_INLINE Value exp(Value x) { return exp_of(reduce(at_most(at_least(x, K::kLowest), K::kHighest))); }

  // No cancellation near 0, no overflow; 0 - m, since tanh(0) is no -0
  static LSTM_EXT_INLINE Value tanh(Value x) {
    const Int sign = bit_cast<Int>(x) & bit_cast<Int>(broadcast(C(-0.)));
    const Value twice = -2 * bit_cast<Value>(bit_cast<Int>(x) ^ sign);
    const Value m = expm1(twice);
    return bit_cast<Value>(bit_cast<Int>((0 - m) / (2 + m)) | sign);
  }

  // of x <= 0
  static LSTM_EXT_INLINE Value expm1(Value x) {
    const Reduced reduced = reduce(at_least(x, K::kTanhLowest));
    const Value power = power_of_two(reduced.rounded);
    return power * reduced.m1 + (power - 1);
  }

  // of u from 0 to 1
  static LSTM_EXT_INLINE Value log1p(Value u) {
    const Value s = u / (2 + u), square = s * s;
    Value series = broadcast(C(1) / (2 * K::kArtanhTerms + 1));
#pragma GCC unroll 16
    for (int n = K::kArtanhTerms - 1; n >= 0; --n) series = series * square + C(1) / (2 * n + 1);
    return 2 * s * series;
  }

 protected:
  static constexpr C factorial(int n) {
    C product = 1;
    for (int factor = 2; factor <= n; ++factor) product *= factor;
    return product;
  }

  // exp(x), and 2^n for n of -126 .. 0
#if defined(__AVX512F__)
  static LSTM_EXT_INLINE Value exp_of(const Reduced& x) { return scale(1 + x.m1, x.rounded - K::kRound); }
  static LSTM_EXT_INLINE Value power_of_two(Value rounded) { return scale(broadcast(C(1)), rounded - K::kRound); }

  static LSTM_EXT_INLINE Vec<float> scale(Vec<float> value, Vec<float> n) {
    return _mm512_maskz_scalef_ps(0xffff, value, n);
  }
  static LSTM_EXT_INLINE Vec<double> scale(Vec<double> value, Vec<double> n) {
    return _mm512_maskz_scalef_pd(0xff, value, n);
  }
#else
  // 2^(n - 1) is a number, or zero, for every n between the bounds of x; 2^n is none for the largest.
  static LSTM_EXT_INLINE Value exp_of(const Reduced& x) { return (2 + 2 * x.m1) * power_of_two(x.rounded, C(0.5)); }

  static LSTM_EXT_INLINE Value power_of_two(Value rounded, C times = 1) {
    return bit_cast<Value>((bit_cast<Int>(rounded) << K::kMantissaBits) + bit_cast<Int>(broadcast(times)));
  }
#endif
};

// The same for who waits for one result: the series in pairs of terms, that do not wait for each other.
template <class C>
struct SoonMath : VecMath<C> {
  using Base = VecMath<C>;
  using typename Base::Int, typename Base::K, typename Base::Reduced, typename Base::Value;

  static LSTM_EXT_INLINE Reduced reduce(Value x) {
    const Value rounded = x * C(1.4426950408889634) + K::kRound, n = rounded - K::kRound;
    const Value r = (x - n * K::kLn2High) - n * K::kLn2Low, square = r * r;
    static_assert(K::kTerms % 2 == 1);
    Value series = pair(K::kTerms - 1, r);
#pragma GCC unroll 16
    for (int term = K::kTerms - 3; term >= 2; term -= 2) series = series * square + pair(term, r);
    return {rounded, series * square + r};
  }

  static LSTM_EXT_INLINE Value exp(Value x) {
    return Base::exp_of(reduce(at_most(at_least(x, K::kLowest), K::kHighest)));
  }

  // A sigmoid of less than 1e-17 is nothing beside 1.
  static LSTM_EXT_INLINE Value bounded_exp(Value x) {
    return Base::exp_of(reduce(at_most(at_least(x, K::kLowest), C(40))));
  }

  struct Fraction {
    Value over, under;
  };
  static LSTM_EXT_INLINE Fraction tanh_fraction(Value x) {
    const Int sign = bit_cast<Int>(x) & bit_cast<Int>(broadcast(C(-0.)));
    const Reduced reduced = reduce(at_least(-2 * bit_cast<Value>(bit_cast<Int>(x) ^ sign), K::kTanhLowest));
    const Value power = Base::power_of_two(reduced.rounded), m = power * reduced.m1 + (power - 1);
    return {bit_cast<Value>(bit_cast<Int>(0 - m) | sign), 2 + m};
  }

 private:
  // Terms n and n + 1 of the series, without r to the power of n
  static LSTM_EXT_INLINE Value pair(int n, Value r) {
    return r * (C(1) / Base::factorial(n + 1)) + C(1) / Base::factorial(n);
  }
};

template <class Drawn, int... lane>
LSTM_EXT_INLINE Vec<int64_t> widen_mask(Drawn drawn, std::integer_sequence<int, lane...>) {
  return __builtin_convertvector(__builtin_shufflevector(drawn, drawn, lane...), Vec<int64_t>);
}

// An event of some units of one row: where it happens `happens`, else `otherwise`.
template <class C>
LSTM_EXT_INLINE Vec<C> where_drawn(Chance chance, uint64_t key, int64_t unit, Vec<C> happens, Vec<C> otherwise) {
  if (!chance.possible) return otherwise;
  U32 units;
#pragma GCC unroll 16
  for (int lane = 0; lane < kVecBytes / 4; ++lane) units[lane] = static_cast<uint32_t>(lane);
  const U32 bits = draw_bits(key, units + static_cast<uint32_t>(unit));
  const auto drawn = bits <= chance.last;
  if constexpr (sizeof(C) == 4) {
    return drawn ? happens : otherwise;
  } else {  // of the lanes, half as many
    constexpr std::make_integer_sequence<int, kLanes<C>> kFirst;
    return widen_mask(drawn, kFirst) ? happens : otherwise;
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
