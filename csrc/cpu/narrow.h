// Products with weights that are narrower than the floats they are multiplied by: of frozen layers, where each step
// waits for weights from a cache. As in product.h otherwise; nothing is read in place.
//
//     bfloat16    two vectors of a panel lie in one: a lane is 16 bits of the first and 16 of the second. One
//                 instruction makes floats of either.
//
//                     k = 0  | 0 1 | 2 3 |       vectors 0 .. 3
//                     k = 1  | 0 1 | 2 3 |
//
//     int8        a lane is some neighbours in k. Rows are int16, so many bits of it that no sum overflows int32, and
//                 what an integer stands for is one number for a row of weights and one for a row of factors:
//
//                     x[k] w[k, n]  =  row · column[n] · Σ integers
//
//                     panel    | column 0 | 1 | 2 | 3 |      floats
//                              | start 0  | 1 | 2 | 3 |      int32, what Σ begins with
//                     k = 0, 1 | 0 | 1 | 2 | 3 |             half a vector each
//                     row      | row, 1 / row, - | k = 0 .. L-1 | ... | marks
//
//                 No integer stands for NaN or an infinity: a vector that has one is marked, by who writes it, and a
//                 row with a mark has NaN for its number.
//
//                 VNNI multiplies four unsigned bytes by four signed ones at once. There a lane is four neighbours, the
//                 low and the high bytes of four integers of a row lie together, and 2^15 is added to them:
//
//                     integer  =  low + 2^8 high - 2^15      start[n]  =  - 2^15 Σ w[k, n]
//
//                 A row of many inputs has integers of 8 bits, which are multiplied once:
//
//                     integer  =  byte - 2^7                 start[n]  =  - 2^7 Σ w[k, n]
//
//                 Sums are exact, so that all SIMD levels have the same.
#pragma once

#include "product.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

// ---- bfloat16 ---------------------------------------------------------------------------------------------

// tile[m] += a[m], K floats, times a panel of pairs of vectors
template <int rows, int pairs>
void multiply_pairs(const float* const* a, int64_t K, const BFloat16* panel, float* tile) {
  constexpr int L = kLanes<float>;
  Vec<float> sum[rows][2 * pairs];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * pairs; ++n) sum[m][n] = load(tile + (m * 4 + n) * L);
  }
  for (int64_t k = 0; k < K; ++k, panel += pairs * 2 * L) {
    Vec<float> w[2 * pairs];
#pragma GCC unroll 2
    for (int n = 0; n < pairs; ++n) {
      U32 both;
      __builtin_memcpy(&both, panel + n * 2 * L, sizeof(both));
      w[2 * n] = bit_cast<Vec<float>>(both << 16);
      w[2 * n + 1] = bit_cast<Vec<float>>(both & 0xffff0000u);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const Vec<float> value = broadcast(a[m][k]);
#pragma GCC unroll 4
      for (int n = 0; n < 2 * pairs; ++n) sum[m][n] = multiply_add(sum[m][n], value, w[n], float{});
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 2 * pairs; ++n) store(tile + (m * 4 + n) * L, sum[m][n]);
  }
}

// As Weights, of bfloat16 numbers times floats.
template <class Rows>
class HalfWeights {
 public:
  using C = float;
  using F = float;
  using Packed = BFloat16;
  static constexpr int L = kLanes<C>;

  HalfWeights() = default;
  HalfWeights(const void* data, int64_t row_stride, Rows rows, int64_t K, Packed* panels)
      : data_(static_cast<const BFloat16*>(data)), row_stride_(row_stride), rows_(rows), K_(K), panels_(panels) {}

  static constexpr int64_t panel_size(int64_t K) { return K * kPanelWidth<C>; }
  static int64_t packed_size(Rows rows, int64_t K) { return rows.panels() * panel_size(K); }

  int64_t panels() const { return rows_.panels(); }

  void pack(int64_t p) const {
    const int vectors = rows_.vectors(p), pairs = (vectors + 1) / 2;
    for (int n = 0; n < 2 * pairs; ++n) {
      const BFloat16* lanes[L] = {};
      if (n < vectors) find_lanes(data_, row_stride_, rows_, p, n, lanes);
      for (int64_t k = 0; k < K_; ++k) {
        BFloat16* const to = panel(p) + (k * pairs + n / 2) * 2 * L + n % 2;
        for (int lane = 0; lane < L; ++lane) to[2 * lane] = lanes[lane] ? lanes[lane][k] : BFloat16{0};
      }
    }
  }

  // As there; k0 .. k1 are any columns.
  void multiply(int rows, const F* const* a, int64_t p, int64_t k0, int64_t k1, const C* start, int64_t start_stride,
                C* tile) const {
    const int vectors = rows_.vectors(p);
    start_tile(rows, vectors, start, start_stride, tile);
    constexpr int kMost = kRegisters < 32 ? 2 : kTileRows;  // beside two vectors of weights for each that is loaded
    for (int m = 0; m < rows; m += kMost) {
      with_count<kMost>(rows - m < kMost ? rows - m : kMost, [&](auto count) {
        with_count<2>((vectors + 1) / 2, [&](auto pairs) {
          multiply_pairs<count, pairs>(a + m, k1 - k0, panel(p) + k0 * pairs * 2 * L, tile + m * kPanelWidth<C>);
        });
      });
    }
  }

 private:
  Packed* panel(int64_t p) const { return panels_ + p * panel_size(K_); }

  const BFloat16* data_ = nullptr;
  int64_t row_stride_ = 0;
  Rows rows_ = {};
  int64_t K_ = 0;
  Packed* panels_ = nullptr;
};

struct HalfEngine : VectorEngine<float> {
  template <class Rows>
  using WeightsOf = HalfWeights<Rows>;
  using Packed = BFloat16;
  static constexpr bool kReadsInPlace = false;
  static constexpr int64_t weight_panel_size(int64_t K) { return K * kPanelWidth<float>; }
};

// ---- int8 -------------------------------------------------------------------------------------------------

using I32 = Vec<int32_t>;
typedef int16_t Words __attribute__((vector_size(kVecBytes)));
typedef uint8_t RowBytes __attribute__((vector_size(kVecBytes / 2)));

// How many neighbours in k a lane holds, and whether an integer of a row is multiplied byte by byte.
#if defined(__AVX512VNNI__)
inline constexpr int kNeighbours = 4;
inline constexpr bool kByBytes = true;
#else
inline constexpr int kNeighbours = 2;
inline constexpr bool kByBytes = false;
#endif

// Bits of the integers of a row.
enum class Bits { k8 = 8, k16 = 16 };

// Of x: each of many inputs counts for little, and they are as many products again as there are of h. Few are features
// of their own, of which a small one may count as much as a large one; and sums that are normalised may all be small.
LSTM_EXT_INLINE Bits bits_of_inputs(int64_t I, bool normed) {
  constexpr int64_t kMany = 128;
  return I >= kMany && !normed ? Bits::k8 : Bits::k16;
}

// The neighbours of each lane: bytes, or sixteen bits of each.
LSTM_EXT_INLINE I32 load_neighbours(const int8_t* from) {
#if defined(__AVX512VNNI__)
  I32 bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return bytes;
#else
  typedef int8_t Bytes __attribute__((vector_size(kVecBytes / 2)));
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
#if defined(__AVX512F__)
  return bit_cast<I32>(_mm512_maskz_cvtepi8_epi16(~__mmask32{0}, bit_cast<__m256i>(bytes)));
#else
  return bit_cast<I32>(__builtin_convertvector(bytes, Words));
#endif
#endif
}

// sum + the products of the neighbours of each lane, as integers; a is of a row
LSTM_EXT_INLINE I32 add_products(I32 sum, I32 a, I32 w) {
#if defined(__AVX512VNNI__)
  return bit_cast<I32>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(a), bit_cast<__m512i>(w)));
#elif defined(__AVX512F__)
  return sum + bit_cast<I32>(_mm512_madd_epi16(bit_cast<__m512i>(a), bit_cast<__m512i>(w)));
#elif defined(__AVX2__)
  return sum + bit_cast<I32>(__builtin_ia32_pmaddwd256(bit_cast<Words>(a), bit_cast<Words>(w)));
#elif defined(__SSE2__)
  return sum + bit_cast<I32>(__builtin_ia32_pmaddwd128(bit_cast<Words>(a), bit_cast<Words>(w)));
#else
  return sum + (a << 16 >> 16) * (w << 16 >> 16) + (a >> 16) * (w >> 16);
#endif
}

// Whether one of the floats is NaN or infinite.
LSTM_EXT_INLINE bool has_not_finite(Vec<float> value) {
  constexpr uint32_t kExponent = 0x7f800000;
  const auto mask = (bit_cast<U32>(value) & kExponent) == kExponent;
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(bit_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return __builtin_ia32_movmskps256(bit_cast<Vec<float>>(mask)) != 0;
#elif defined(__SSE2__)
  return __builtin_ia32_movmskps(bit_cast<Vec<float>>(mask)) != 0;
#else
  bool any = false;
  for (int lane = 0; lane < kLanes<float>; ++lane) any |= mask[lane] != 0;
  return any;
#endif
}

// Where the marks of a row of K begin, one for each vector; up to a whole number of vectors.
constexpr int64_t marks_of_row(int64_t K) { return (ceil_div(K, kLanes<float>) + 1) * kLanes<float>; }
constexpr int64_t count_of_marks(int64_t K) {
  return ceil_div(ceil_div(K, kLanes<float>), kLanes<float>) * kLanes<float>;
}

typedef int16_t Marks __attribute__((vector_size(kVecBytes / 2)));

LSTM_EXT_INLINE bool any_mark(Marks marks) {
#if defined(__AVX512F__)
  typedef long long Quads __attribute__((vector_size(sizeof(Marks))));
  return !__builtin_ia32_ptestz256(bit_cast<Quads>(marks), bit_cast<Quads>(marks));
#else
  uint64_t parts[ceil_div(sizeof(Marks), sizeof(uint64_t))], any = 0;
  __builtin_memcpy(parts, &marks, sizeof(marks));
  for (const uint64_t part : parts) any |= part;
  return any != 0;
#endif
}

// What an integer of a row stands for.
LSTM_EXT_INLINE float scale_of_row(const int16_t* row, int64_t K) {
  Marks marked{};
  const int16_t* const marks = row + marks_of_row(K);
  for (int64_t n = 0; n < count_of_marks(K); n += kLanes<float>) {
    Marks some;
    __builtin_memcpy(&some, marks + n, sizeof(some));
    marked |= some;
  }
  float scale;
  __builtin_memcpy(&scale, row, sizeof(scale));
  return any_mark(marked) ? __builtin_nanf("") : scale;
}

// The integers of a row as they lie in it.
LSTM_EXT_INLINE RowBytes row_bytes(U16::Type integers) {
  const RowBytes bytes = bit_cast<RowBytes>(integers);
#if defined(__AVX512VNNI__)
  return __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15,  //
                                 16, 18, 20, 22, 17, 19, 21, 23, 24, 26, 28, 30, 25, 27, 29, 31);
#else
  return bytes;
#endif
}

// The most that an integer of a row of K may be, so that K products with -127 .. 127 add up to less than 2^31; one less
// than int16 holds, since a number that has been rounded may be a little above what is the most.
LSTM_EXT_INLINE int64_t most_of_row(int64_t K, Bits bits) {
  const int64_t held = bits == Bits::k8 ? INT8_MAX : INT16_MAX - 1;
  const int64_t most = INT32_MAX / (127 * (K > 0 ? K : 1));
  return most < held ? most : held;
}

inline constexpr int64_t kHeadOfPanel = kPanelWidth<float> * (sizeof(float) + sizeof(int32_t));  // bytes

// tile[m] = start[m * start_stride] + a[m], K integers of so many parts, times a panel of so many vectors
template <int parts, int rows, int vectors>
void multiply_integers(const int16_t* const* a, int64_t K, const int8_t* panel, const float* start,
                       int64_t start_stride, float* tile) {
  constexpr int L = kLanes<float>;
  const float* const scales = reinterpret_cast<const float*>(panel);
  const int32_t* const starts = reinterpret_cast<const int32_t*>(scales + kPanelWidth<float>);
  panel += kHeadOfPanel;
  I32 sum[rows][parts][vectors] = {};
  for (int64_t k = 0; k < K; k += kNeighbours, panel += vectors * kNeighbours * L) {
    I32 w[vectors];
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      w[n] = in_register<(rows * parts + 1) * vectors>(load_neighbours(panel + n * kNeighbours * L));
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 2
      for (int part = 0; part < parts; ++part) {
        int32_t factors;
        const char* const integers = reinterpret_cast<const char*>(a[m] + L);
        __builtin_memcpy(&factors, integers + k * (4 * parts / kNeighbours) + part * 4, sizeof(factors));
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[m][part][n] = add_products(sum[m][part][n], I32{} + factors, w[n]);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
    const float scale = scale_of_row(a[m], K);
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) {
      U32 integers = bit_cast<U32>(load(starts + n * L)) + bit_cast<U32>(sum[m][0][n]);
      if constexpr (parts == 2) integers += bit_cast<U32>(sum[m][1][n]) << 8;
      const Vec<float> product =
          computed(load(scales + n * L) * scale) * __builtin_convertvector(bit_cast<I32>(integers), Vec<float>);
      store(tile + (m * 4 + n) * L, load(start + m * start_stride + n * L) + product);
    }
  }
}

// As Weights, of int8 numbers and a scale for each row, times rows of integers of so many bits.
template <class Rows>
class Int8Weights {
 public:
  using C = float;
  using F = int16_t;
  using Packed = int8_t;
  static constexpr int L = kLanes<C>;

  Int8Weights() = default;
  Int8Weights(const void* data, int64_t row_stride, const float* scales, Rows rows, int64_t K, Packed* panels,
              Bits bits)
      : data_(static_cast<const int8_t*>(data)),
        row_stride_(row_stride),
        scales_(scales),
        rows_(rows),
        K_(K),
        panels_(panels),
        bits_(bits) {}

  static constexpr int64_t panel_size(int64_t K) {
    return kHeadOfPanel + ceil_div(K, kNeighbours) * kNeighbours * kPanelWidth<C>;
  }
  static int64_t packed_size(Rows rows, int64_t K) { return rows.panels() * panel_size(K); }

  int64_t panels() const { return rows_.panels(); }

  void pack(int64_t p) const {
    const int vectors = rows_.vectors(p);
    float* const scales = reinterpret_cast<float*>(panel(p));
    int32_t* const starts = reinterpret_cast<int32_t*>(scales + kPanelWidth<C>);
    int8_t* const numbers = panel(p) + kHeadOfPanel;
    const uint32_t added = kByBytes ? 1u << (static_cast<int>(bits_) - 1) : 0;
    for (int n = 0; n < vectors; ++n) {
      const int8_t* lanes[L];
      find_lanes<int8_t, Rows, C>(data_, row_stride_, rows_, p, n, lanes);
      const float* scale_of[L];
      find_lanes<float, Rows, C>(scales_, 1, rows_, p, n, scale_of);
      for (int lane = 0; lane < L; ++lane) {
        int32_t sum = 0;
        for (int64_t k = 0; k < ceil_div(K_, kNeighbours) * kNeighbours; ++k) {
          const int8_t number = lanes[lane] && k < K_ ? lanes[lane][k] : int8_t{0};
          numbers[((k / kNeighbours * vectors + n) * L + lane) * kNeighbours + k % kNeighbours] = number;
          sum += number;
        }
        scales[n * L + lane] = scale_of[lane] ? *scale_of[lane] : 0;
        starts[n * L + lane] = static_cast<int32_t>(-added * static_cast<uint32_t>(sum));
      }
    }
  }

  // As there, of all columns: 0 .. K.
  void multiply(int rows, const F* const* a, int64_t p, int64_t, int64_t, const C* start, int64_t start_stride,
                C* tile) const {
    const auto by_parts = [&](auto parts) {
      constexpr int kMost = kFullRows / parts;  // so many rows at a time that their sums are in registers
      const int most = rows > kMost ? (rows + 1) / 2 : rows;
      for (int m = 0; m < rows; m += most) {
        with_count<kMost>(rows - m < most ? rows - m : most, [&](auto count) {
          with_count<4>(rows_.vectors(p), [&](auto vectors) {
            multiply_integers<parts, count, vectors>(a + m, K_, panel(p), start + m * start_stride, start_stride,
                                                     tile + m * kPanelWidth<C>);
          });
        });
      }
    };
    with_count<kByBytes ? 2 : 1>(kByBytes ? static_cast<int>(bits_) / 8 : 1, by_parts);
  }

 private:
  Packed* panel(int64_t p) const { return panels_ + p * panel_size(K_); }

  const int8_t* data_ = nullptr;
  int64_t row_stride_ = 0;
  const float* scales_ = nullptr;
  Rows rows_ = {};
  int64_t K_ = 0;
  Packed* panels_ = nullptr;
  Bits bits_ = Bits::k16;
};

// As VectorEngine, of rows of integers: of 16 bits, but those that `put_inputs` makes. What they stand for is set by
// `scale_row` before `put`.
struct Int8Engine {
  using C = float;
  using F = int16_t;
  template <class Rows>
  using WeightsOf = Int8Weights<Rows>;
  struct Session {};
  using Packed = int8_t;

  static constexpr EngineKind kKind = EngineKind::kVectors;
  static constexpr int kRows = kTileRows, row_planes = 1, planes = 1;
  static constexpr bool kBorrowsRows = false, kKeepsInfinity = true, kSplitsFloats = false;
  static constexpr bool kReadsInPlace = false, kScaled = true;
  static constexpr int L = kLanes<C>;

  static constexpr int64_t row_size(int64_t K) { return marks_of_row(K) + count_of_marks(K); }
  static constexpr int64_t weight_panel_size(int64_t K) { return Int8Weights<PlainRows<C>>::panel_size(K); }

  // NaN if either is.
  static LSTM_EXT_INLINE C larger(C a, C b) { return b <= a || a != a ? a : b; }

  // The largest |x| of a row; NaN if one of them is NaN or infinite.
  static C largest(const C* x, int64_t K) {
    Vec<C> most{}, spoilt{};
    for (int64_t k = 0; k < K; k += L) {
      const Vec<C> value = load_up_to(x + k, K - k), size = value < 0 ? -value : value;
      most = size > most ? size : most;
      spoilt += value * 0;
    }
    C result = 0;
    for (int lane = 0; lane < L; ++lane) result = larger(result, most[lane] + spoilt[lane]);
    return result;
  }

  // Numbers up to `most` in a row of K, in which nothing is marked.
  static LSTM_EXT_INLINE void scale_row(F* row, C most, int64_t K, Bits bits = Bits::k16) {
    constexpr C kLeast = 1e-30f;  // below, all are taken for zero: the inverse of their scale may be infinite
    const C integers = static_cast<C>(most_of_row(K, bits)), scale = most / integers;
    const C front[] = {scale, most < kLeast ? 0 : 1 / scale};
    __builtin_memcpy(row, front, sizeof(front));
    for (int64_t n = 0; n < count_of_marks(K); n += L) {
      constexpr Marks kNone{};
      __builtin_memcpy(row + marks_of_row(K) + n, &kNone, sizeof(kNone));
    }
  }

  static LSTM_EXT_INLINE void put(F* row, int64_t n, Vec<C> value, int64_t K) {
    row[marks_of_row(K) + n / L] = has_not_finite(value);
    const RowBytes bytes = row_bytes(integers_of(row, value, Bits::k16));
    __builtin_memcpy(row + L + n, &bytes, sizeof(bytes));
  }
  static LSTM_EXT_INLINE void put_rounded(F* row, int64_t n, Vec<C> value, int64_t K) { put(row, n, value, K); }

  // All of x, with a scale for the row.
  static void put_inputs(F* row, const C* x, int64_t I, Bits bits) {
    scale_row(row, largest(x, I), I, bits);
    for (int64_t n = 0; n < I; n += L) {
      const Vec<C> value = load_up_to(x + n, I - n);
      if (!kByBytes || bits == Bits::k16) {
        put(row, n, value, I);
        continue;
      }
      typedef uint8_t Bytes __attribute__((vector_size(L)));
      const auto bytes = __builtin_convertvector(integers_of(row, value, bits), Bytes);
      __builtin_memcpy(reinterpret_cast<char*>(row + L) + n, &bytes, sizeof(bytes));
    }
  }

 private:
  // As the products take them.
  static LSTM_EXT_INLINE U16::Type integers_of(const F* row, Vec<C> value, Bits bits) {
    C front[2];
    __builtin_memcpy(front, row, sizeof(front));
    constexpr C kRound = 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
    const uint32_t added = kByBytes ? 1u << (static_cast<int>(bits) - 1) : 0;
    return to_16_bits(bit_cast<U32>(computed(value * front[1]) + kRound) + added);
  }
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
