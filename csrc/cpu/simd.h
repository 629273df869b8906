// One SIMD vector, as wide as the level this translation unit is compiled for, on compiler vector types: the arithmetic
// operators, comparisons and `mask ? a : b` work lane by lane.
//
// The letters of the kernels:
//
//     S      the type that arrays store: float, double, BFloat16, Float16
//     C      the type that is computed in, Compute<S>: double for double, float for all others
//     F      the type of a factor of a product, Factor<S>: C, or BFloat16 where bfloat16 is multiplied in pairs
//     L      lanes: numbers of type C in a vector, kLanes<C>
//     kPer   factors in one lane, kFactorsPerLane<F>: 1, or 2 of BFloat16
//
//     level                     vector     lanes of float   registers   micro-kernel, rows x vectors
//     baseline, x86             16 bytes         4             16             6 x 2
//     baseline, aarch64         16 bytes         4             32             6 x 4
//     avx2                      32 bytes         8             16             6 x 2
//     avx512, avx512bf16, amx   64 bytes        16             32             6 x 4
//
// The kernels live in the namespace of their level, so that the linker never takes one level's for another's. Of the
// inline functions that levels share (walk.h, share.h, plan.h) it keeps the first copy: the build links the levels
// narrowest first.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef LSTM_EXT_SIMD_LEVEL  // the build names it; this is for editors
#define LSTM_EXT_SIMD_LEVEL baseline
#endif

#define LSTM_EXT_INLINE __attribute__((always_inline)) inline
#define LSTM_EXT_STRINGIFY_NOW(name) #name
#define LSTM_EXT_STRINGIFY(name) LSTM_EXT_STRINGIFY_NOW(name)

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32;  // of vectors
#else
inline constexpr int kRegisters = 16;
#endif

#if defined(__AVX512F__)
inline constexpr int kVecBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVecBytes = 32;
#else
inline constexpr int kVecBytes = 16;
#endif

// Of the micro-kernel: rows of a tile; vectors that stand side by side in a panel; and rows whose sums are in registers
// for four vectors at once, half as many where registers are.
inline constexpr int kTileRows = 6, kBeside = kRegisters / 8, kFullRows = kTileRows * kBeside / 4;

// Whether a product and a sum are one instruction.
#if defined(__FMA__) || defined(__aarch64__)
inline constexpr bool kFuses = true;
#else
inline constexpr bool kFuses = false;
#endif

// Storage-only types: 16 bits of memory, float in registers.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class S>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<double> {
  using Type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::Type;

// What the elements of storage type S are as factors of a product: kept as they are where there is an instruction that
// adds the products of neighbouring bfloat16 pairs to float sums, what they are in registers otherwise.
template <class S>
struct FactorOf {
  using Type = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct FactorOf<BFloat16> {
  using Type = BFloat16;
};
#endif
template <class S>
using Factor = typename FactorOf<S>::Type;

// How many neighbouring factors one lane holds.
template <class F>
inline constexpr int kFactorsPerLane = sizeof(Compute<F>) / sizeof(F);

template <class C>
struct VecOf {
  typedef C Type __attribute__((vector_size(kVecBytes)));
};
template <class C>
using Vec = typename VecOf<C>::Type;

template <class C>
inline constexpr int kLanes = kVecBytes / sizeof(C);

template <class To, class From>
LSTM_EXT_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

template <class C>
LSTM_EXT_INLINE Vec<C> broadcast(C value) {
  return value - Vec<C>{};
}

// A loaded value that stays in a register, if there is room beside `others`: compilers would rather make it an operand
// in memory of each instruction that uses it, and load it several times from where the first load is still under way.
template <int others, class V>
LSTM_EXT_INLINE V in_register(V value) {
#if defined(__x86_64__)
  if constexpr (others < kRegisters) asm("" : "+v"(value));
#endif
  return value;
}

// A value that has been computed by here. Compilers fuse a product and a sum only where both stand in one block, and
// like to move one of them to where it is used: bits would depend on what is compiled around it.
template <class V>
LSTM_EXT_INLINE V computed(V value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
  return value;
}

// x, but no less than `low`, or no more than `high`; NaN stays NaN.
template <class C>
LSTM_EXT_INLINE Vec<C> at_least(Vec<C> x, C low) {
  return x < low ? broadcast(low) : x;
}
template <class C>
LSTM_EXT_INLINE Vec<C> at_most(Vec<C> x, C high) {
  return x > high ? broadcast(high) : x;
}
// These instructions return their second operand if either is NaN.
#if defined(__AVX512F__)
LSTM_EXT_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm512_maskz_max_ps(0xffff, broadcast(low), x); }
LSTM_EXT_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm512_maskz_min_ps(0xffff, broadcast(high), x); }
#elif defined(__AVX__)
LSTM_EXT_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm256_max_ps(broadcast(low), x); }
LSTM_EXT_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm256_min_ps(broadcast(high), x); }
LSTM_EXT_INLINE Vec<double> at_least(Vec<double> x, double low) { return _mm256_max_pd(broadcast(low), x); }
LSTM_EXT_INLINE Vec<double> at_most(Vec<double> x, double high) { return _mm256_min_pd(broadcast(high), x); }
#elif defined(__x86_64__)
LSTM_EXT_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm_max_ps(broadcast(low), x); }
LSTM_EXT_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm_min_ps(broadcast(high), x); }
#endif

// ---- 16-bit floats, in registers -------------------------------------------------------------

using U32 = Vec<uint32_t>;
struct U16 {
  typedef uint16_t Type __attribute__((vector_size(kVecBytes / 2)));
};

#if defined(__AVX512F__)  // one instruction, where compilers make several of a conversion
LSTM_EXT_INLINE U32 to_32_bits(U16::Type raw) {
  return bit_cast<U32>(_mm512_maskz_cvtepu16_epi32(0xffff, bit_cast<__m256i>(raw)));
}
LSTM_EXT_INLINE U16::Type to_16_bits(U32 bits) {
  return bit_cast<U16::Type>(_mm512_maskz_cvtepi32_epi16(0xffff, bit_cast<__m512i>(bits)));
}
#else
LSTM_EXT_INLINE U32 to_32_bits(U16::Type raw) { return __builtin_convertvector(raw, U32); }
LSTM_EXT_INLINE U16::Type to_16_bits(U32 bits) { return __builtin_convertvector(bits, U16::Type); }
#endif

LSTM_EXT_INLINE Vec<float> widen(U16::Type raw, BFloat16) { return bit_cast<Vec<float>>(to_32_bits(raw) << 16); }

// Rounds to nearest, ties to even, and keeps NaN a quiet NaN.
LSTM_EXT_INLINE U16::Type narrow(Vec<float> value, BFloat16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40;
  return to_16_bits((bits & 0x7fffffff) > 0x7f800000u ? quiet : rounded);
}

#if defined(__AVX512F__)
LSTM_EXT_INLINE Vec<float> widen(U16::Type raw, Float16) {
  return bit_cast<Vec<float>>(_mm512_maskz_cvtph_ps(0xffff, bit_cast<__m256i>(raw)));
}
LSTM_EXT_INLINE U16::Type narrow(Vec<float> value, Float16) {
  return bit_cast<U16::Type>(
      _mm512_maskz_cvtps_ph(0xffff, bit_cast<__m512>(value), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
LSTM_EXT_INLINE Vec<float> widen(U16::Type raw, Float16) {
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(bit_cast<__m128i>(raw)));
}
LSTM_EXT_INLINE U16::Type narrow(Vec<float> value, Float16) {
  return bit_cast<U16::Type>(_mm256_cvtps_ph(bit_cast<__m256>(value), _MM_FROUND_TO_NEAREST_INT));
}
#else
LSTM_EXT_INLINE Vec<float> widen(U16::Type raw, Float16) {
  const U32 bits = to_32_bits(raw);
  const U32 magnitude = (bits & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent and normalises subnormal numbers in one go.
  const U32 scaled = bit_cast<U32>(bit_cast<Vec<float>>(magnitude) * 0x1p112f);
  const U32 special = magnitude >= (0x7c00u << 13) ? U32{} + 0x7f800000u : U32{};
  return bit_cast<Vec<float>>(scaled | special | ((bits & 0x8000) << 16));
}

// As for bfloat16.
LSTM_EXT_INLINE U16::Type narrow(Vec<float> value, Float16) {
  const U32 bits = bit_cast<U32>(value);
  const U32 magnitude = bits & 0x7fffffff;
  const U32 normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Below 2^-14: adding 0.5 lets the adder round to the 2^-24 grid of the subnormal numbers.
  const U32 subnormal = bit_cast<U32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000u;
  U32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : half;  // 65520 and above
  half = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ff) | 0x7e00u : half;
  return to_16_bits(half | ((bits >> 16) & 0x8000));
}
#endif

// ---- memory --------------------------------------------------------------------------------------

template <class C>
  requires(sizeof(C) > 2)
LSTM_EXT_INLINE Vec<C> load(const C* from) {
  Vec<C> value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

template <class Half>
  requires(sizeof(Half) == 2)
LSTM_EXT_INLINE Vec<float> load(const Half* from) {
  U16::Type raw;
  __builtin_memcpy(&raw, from, sizeof(raw));
  return widen(raw, Half{});
}

template <class C>
  requires(sizeof(C) > 2)
LSTM_EXT_INLINE void store(C* to, Vec<C> value) {
  __builtin_memcpy(to, &value, sizeof(value));
}

template <class Half>
  requires(sizeof(Half) == 2)
LSTM_EXT_INLINE void store(Half* to, Vec<float> value) {
  const U16::Type raw = narrow(value, Half{});
  __builtin_memcpy(to, &raw, sizeof(raw));
}

#if defined(__AVX512F__)
LSTM_EXT_INLINE Vec<float> load_some(const float* from, int count) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
}
LSTM_EXT_INLINE Vec<double> load_some(const double* from, int count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), from);
}
LSTM_EXT_INLINE void store_some(float* to, Vec<float> value, int count) {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
}
LSTM_EXT_INLINE void store_some(double* to, Vec<double> value, int count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << count) - 1), value);
}
#endif

// The first `count` < lanes elements; the other lanes are zero, and memory behind them is not touched.
template <class S>
LSTM_EXT_INLINE Vec<Compute<S>> load_some(const S* from, int count) {
  S some[kLanes<Compute<S>>] = {};
  for (int lane = 0; lane < count; ++lane) some[lane] = from[lane];
  return load(some);
}

template <class S>
LSTM_EXT_INLINE void store_some(S* to, Vec<Compute<S>> value, int count) {
  S some[kLanes<Compute<S>>];
  store(some, value);
  for (int lane = 0; lane < count; ++lane) to[lane] = some[lane];
}

template <class S>
LSTM_EXT_INLINE Vec<Compute<S>> load_up_to(const S* from, int64_t count) {
  return count >= kLanes<Compute<S>> ? load(from) : load_some(from, static_cast<int>(count));
}

template <class S>
LSTM_EXT_INLINE void store_up_to(S* to, Vec<Compute<S>> value, int64_t count) {
  if (count >= kLanes<Compute<S>>) {
    store(to, value);
  } else {
    store_some(to, value, static_cast<int>(count));
  }
}

// Asks for the cache lines of some elements that are read soon.
template <class S>
LSTM_EXT_INLINE void fetch(const S* from, int64_t count) {
  constexpr int kLine = 64 / sizeof(S);
  for (int64_t n = 0; n < count; n += kLine) __builtin_prefetch(from + n);
}

// What a value is after a trip through storage.
template <class S>
LSTM_EXT_INLINE Vec<Compute<S>> rounded_to(Vec<Compute<S>> value) {
  if constexpr (sizeof(S) == 2) return widen(narrow(value, S{}), S{});
  return value;
}

// ---- factors of products: a vector of lanes, each of kFactorsPerLane neighbours ---------------------

#if defined(__AVX512BF16__)
LSTM_EXT_INLINE Vec<float> multiply_add(Vec<float> sum, Vec<float> a, Vec<float> b, BFloat16) {
  return bit_cast<Vec<float>>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
}
LSTM_EXT_INLINE Vec<float> broadcast_lane(const BFloat16* from) {
  uint32_t pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return bit_cast<Vec<float>>(U32{} + pair);
}
LSTM_EXT_INLINE Vec<float> load_factors(const BFloat16* from) {
  Vec<float> lanes;
  __builtin_memcpy(&lanes, from, sizeof(lanes));
  return lanes;
}
LSTM_EXT_INLINE Vec<float> load_some_factors(const BFloat16* from, int count) {
  return bit_cast<Vec<float>>(_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, from));
}
#endif

// By name where the machine has one instruction for it: whether compilers fuse a product and a sum depends on what they
// are told to optimise, and for whom, and the bits of all tiles are one another's.
template <class C>
LSTM_EXT_INLINE Vec<C> multiply_add(Vec<C> sum, Vec<C> a, Vec<C> b, C) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) return _mm512_fmadd_ps(a, b, sum);
  if constexpr (sizeof(C) == 8) return _mm512_fmadd_pd(a, b, sum);
#elif defined(__FMA__)
  if constexpr (sizeof(C) == 4) return _mm256_fmadd_ps(a, b, sum);
  if constexpr (sizeof(C) == 8) return _mm256_fmadd_pd(a, b, sum);
#endif
  return sum + a * b;
}

// The same, its result where the sum was if `in_place`: where sums fill the registers compilers put some results into
// those of a factor, and then move or even store them. Of pairs of bfloat16, and elsewhere, they are left to choose.
template <bool in_place, class F, class V>
LSTM_EXT_INLINE V multiply_add_to(V sum, V a, V b, F) {
#if defined(__FMA__)
  if constexpr (in_place && std::is_same_v<F, float>) {
    asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  } else if constexpr (in_place && std::is_same_v<F, double>) {
    asm("vfmadd231pd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
#endif
  return multiply_add(sum, a, b, F{});
}

template <class C>
LSTM_EXT_INLINE Vec<C> broadcast_lane(const C* from) {
  return broadcast(*from);
}
template <class S>
LSTM_EXT_INLINE Vec<Compute<S>> load_factors(const S* from) {
  return load(from);
}
// The first `count` elements, fewer than the vector holds; the others are zero.
template <class S>
LSTM_EXT_INLINE Vec<Compute<S>> load_some_factors(const S* from, int count) {
  return load_some(from, count);
}

// ---- shuffles ------------------------------------------------------------------------------------

template <class V, int... lane>
LSTM_EXT_INLINE V even_lanes(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane)...);
}
template <class V, int... lane>
LSTM_EXT_INLINE V odd_lanes(V a, V b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + 1)...);
}
// offset 0 interleaves the lower halves of a and b, offset lanes/2 the upper ones
template <int offset, class V, int... lane>
LSTM_EXT_INLINE V interleave(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int kCount = sizeof...(lane);
  return __builtin_shufflevector(a, b, (lane % 2 * kCount + offset + lane / 2)...);
}

// Sums neighbouring lanes of each of some rows, a power of two, until all fit into one vector, row after row. Of as
// many rows as lanes, lane n of the result is the sum of all lanes of rows[n].
template <class V, int rows>
LSTM_EXT_INLINE V sum_lanes(V (&row)[rows]) {
  constexpr std::make_integer_sequence<int, sizeof(V) / sizeof(row[0][0])> kAll;
#pragma GCC unroll 8
  for (int count = rows; count > 1; count /= 2) {
#pragma GCC unroll 16
    for (int n = 0; n < count / 2; ++n) {
      const V a = row[2 * n], b = row[2 * n + 1];
      row[n] = even_lanes(a, b, kAll) + odd_lanes(a, b, kAll);
    }
  }
  return row[0];
}

template <class C>
LSTM_EXT_INLINE C sum_of_lanes(Vec<C> value) {
  constexpr std::make_integer_sequence<int, kLanes<C>> kAll;
#pragma GCC unroll 8
  for (int n = 1; n < kLanes<C>; n *= 2) value = even_lanes(value, value, kAll) + odd_lanes(value, value, kAll);
  return value[0];
}

template <class C>
LSTM_EXT_INLINE void transpose(Vec<C> (&rows)[kLanes<C>]) {
  constexpr int kHalf = kLanes<C> / 2;
  constexpr std::make_integer_sequence<int, kLanes<C>> kAll;
#pragma GCC unroll 8
  for (int round = 1; round < kLanes<C>; round *= 2) {
    Vec<C> next[kLanes<C>];
#pragma GCC unroll 16
    for (int n = 0; n < kHalf; ++n) {
      next[2 * n] = interleave<0>(rows[n], rows[n + kHalf], kAll);
      next[2 * n + 1] = interleave<kHalf>(rows[n], rows[n + kHalf], kAll);
    }
#pragma GCC unroll 16
    for (int n = 0; n < kLanes<C>; ++n) rows[n] = next[n];
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
