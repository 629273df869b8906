// The matrix product by tile registers:  C[m, n] += Σ_k A[m, k] B[k, n],  for numbers of any kind up to float.
//
// Tiles multiply bfloat16. Wider numbers are made of *planes*: a number cut off or rounded to bfloat16, what is then
// missing in the same way, and so on, so that a float is the exact sum of three, a float16 of two:
//
//     float      1.0110111 00101101 01100101       24 bits of mantissa
//     plane 0    1.0110111                          8 of them
//     plane 1              .0101101                 what is missing, to 8 bits
//     plane 2                       01100101        and the rest
//
// A product of two numbers is the sum of the products of their planes, of which those below the last bit of a float
// product are left out (plane i times plane j with i + j > 2). How many are left:
//
//                float   float16   bfloat16 (weights)
//     float        6        5          3                   in a backward pass, where rows are gradients
//     itself       6        4          1                   forward
//
// Six products for one are still faster than multiplying floats by vectors, and round no worse: 32 of them are summed
// before they are rounded to the sum.
//
// A row of A is [planes][K], each plane filled up with zeros to whole tiles. A panel of B is [K / 32][vectors][planes]
// tiles; one of these holds 32 factors of 16 columns as [16 pairs in k][16 columns][2] (see amx.h).
//
// What planes cannot hold is infinity, since what is missing of it is no number: such a product comes out as NaN, and
// whoever finds one multiplies that row again, exactly. Planes below the smallest normal number are zero.
#pragma once

#include "amx.h"
#include "product.h"

#if defined(LSTM_EXT_TILES)

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

// ---- planes ---------------------------------------------------------------------------------------------

// K, to a whole number of tiles
inline constexpr int64_t filled_up(int64_t K) { return ceil_div(K, kTileDepth) * kTileDepth; }

template <class S>
inline constexpr int kPlanes = sizeof(S) == 4 ? 3 : 2;
template <>
inline constexpr int kPlanes<BFloat16> = 1;

// Factors of a panel that holds K rows or columns of S
template <class S>
constexpr int64_t tile_panel_size(int64_t K) {
  return filled_up(K) / kTileDepth * 4 * kPlanes<S> * kTileFactors;
}

// f(plane, value of the plane) for each, as float vectors
template <int planes, class F>
LSTM_EXT_INLINE void for_planes(Vec<float> value, const F& f) {
#pragma GCC unroll 3
  for (int plane = 0; plane < planes; ++plane) {
    const auto rounded = bit_cast<U16::Type>(_mm512_cvtneps_pbh(bit_cast<__m512>(value)));
    f(plane, rounded);
    if (plane + 1 < planes) value -= widen(rounded, BFloat16{});
  }
}

// The same of two vectors, f(plane, values of the first and then of the second)
template <int planes, class F>
LSTM_EXT_INLINE void for_planes(Vec<float> first, Vec<float> second, const F& f) {
#pragma GCC unroll 3
  for (int plane = 0; plane < planes; ++plane) {
    const auto both = bit_cast<__m512i>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(second), bit_cast<__m512>(first)));
    f(plane, bit_cast<Vec<float>>(both));
    if (plane + 1 < planes) {
      first -= widen(bit_cast<U16::Type>(_mm512_maskz_extracti64x4_epi64(0xff, both, 0)), BFloat16{});
      second -= widen(bit_cast<U16::Type>(_mm512_maskz_extracti64x4_epi64(0xff, both, 1)), BFloat16{});
    }
  }
}

// ---- a weight matrix --------------------------------------------------------------------------------------

// As Weights, packed into tiles.
template <class S, class Rows>
class TileWeights {
 public:
  using C = float;
  using F = BFloat16;
  using Packed = BFloat16;
  static constexpr int L = kLanes<C>, planes = kPlanes<S>;
  static_assert(L == kTileHeight);

  TileWeights() = default;
  TileWeights(const void* data, int64_t row_stride, Rows rows, int64_t K, Packed* panels)
      : data_(static_cast<const S*>(data)), row_stride_(row_stride), rows_(rows), K_(K), panels_(panels) {}

  static int64_t packed_size(Rows rows, int64_t K) { return rows.panels() * tile_panel_size<S>(K); }

  int64_t panels() const { return rows_.panels(); }

  void pack(int64_t p) const {
    const int vectors = rows_.vectors(p);
    for (int n = 0; n < vectors; ++n) {
      const S* lanes[L];
      find_lanes(data_, row_stride_, rows_, p, n, lanes);
      for (int64_t k = 0; k < K_; k += kTileDepth) {
        pack_tiles(lanes, k, panel(p) + (k / kTileDepth * vectors + n) * planes * kTileFactors);
      }
    }
  }

  // tile[m] = start[m * start_stride] + a[m] times panel p, over columns k0 .. k1; k0 is a multiple of kTileDepth, the
  // rows a[m] are equally far apart and as TileEngine<S> puts them.
  void multiply(int rows, const F* const* a, int64_t p, int64_t k0, int64_t k1, const C* start, int64_t start_stride,
                C* tile) const {
    const int vectors = rows_.vectors(p);
    const TileRows factors{a[0], rows > 1 ? a[1] - a[0] : 0, filled_up(K_), kTileDepth};
    multiply_blocks<planes, planes>(rows, vectors, factors, ceil_div(k1 - k0, kTileDepth),
                                    panel(p) + k0 / kTileDepth * vectors * planes * kTileFactors, start, start_stride,
                                    tile);
  }

  // tile += one row times panel p as floats, slowly
  void multiply_exactly(const F* a, int64_t p, C* tile) const {
    for (int n = 0; n < rows_.vectors(p); ++n) {
      const S* lanes[L];
      find_lanes(data_, row_stride_, rows_, p, n, lanes);
      for (int lane = 0; lane < L; ++lane) {
        if (lanes[lane]) tile[n * L + lane] += exact_sum(a, lanes[lane]);
      }
    }
  }

 private:
  F* panel(int64_t p) const { return panels_ + p * tile_panel_size<S>(K_); }

  // Sixteen rows, columns k .. k + 32
  void pack_tiles(const S* const (&lanes)[L], int64_t k, F* to) const {
    Vec<C> block[planes][L] = {};
#pragma GCC unroll 1
    for (int lane = 0; lane < L; ++lane) {
      if (!lanes[lane]) continue;
      const auto half = [&](int64_t n) { return n < K_ ? load_up_to(lanes[lane] + n, K_ - n) : Vec<C>{}; };
      for_planes<planes>(half(k), half(k + L), [&](int plane, Vec<C> pairs) { block[plane][lane] = pairs; });
    }
    for (int plane = 0; plane < planes; ++plane) {
      transpose<C>(block[plane]);
      for (int pair = 0; pair < L; ++pair) {
        __builtin_memcpy(to + plane * kTileFactors + pair * kTileDepth, &block[plane][pair], kVecBytes);
      }
    }
  }

  C exact_sum(const F* a, const S* weights) const {
    Vec<C> sum{};
    for (int64_t k = 0; k < K_; k += L) {
      Vec<C> value = load(a + k), rest{};
      for (int plane = planes - 1; plane > 0; --plane) rest += load(a + plane * filled_up(K_) + k);
      sum += (rest == rest ? value + rest : value) * load_up_to(weights + k, K_ - k);
    }
    C total = 0;
    for (int lane = 0; lane < L; ++lane) total += sum[lane];
    return total;
  }

  const S* data_ = nullptr;
  int64_t row_stride_ = 0;
  Rows rows_ = {};
  int64_t K_ = 0;
  F* panels_ = nullptr;
};

// As VectorEngine. What is multiplied by panels of S are rows of S too, or, in a backward pass, gradients that are
// floats.
template <class S, int planes_of_rows = kPlanes<S>>
struct TileEngine {
  using C = float;
  using F = BFloat16;
  template <class Rows>
  using WeightsOf = TileWeights<S, Rows>;
  using Session = TileSession;

  static constexpr EngineKind kKind = EngineKind::kTiles;
  static constexpr int kRows = kTileHeight, row_planes = planes_of_rows, planes = kPlanes<S>;
  static constexpr bool kBorrowsRows = false;
  static constexpr bool kKeepsInfinity = row_planes == 1, kSplitsFloats = true;
  static constexpr bool kReadsInPlace = false, kScaled = false, kGathersColumns = false;

  // Plane after plane, each filled up with zeros to a whole number of tiles. An odd number of cache lines, so that
  // those of neighbouring rows fall into different sets.
  static constexpr int64_t weight_panel_size(int64_t K) { return tile_panel_size<S>(K); }
  static constexpr int64_t row_size(int64_t K) { return (row_planes * filled_up(K) / kTileDepth | 1) * kTileDepth; }

  // Planes of rows are cut off, which takes fewer instructions than rounding, and is as exact. The products left out
  // differ in sign all the same, since the rounded planes of weights do.
  static LSTM_EXT_INLINE void put(F* row, int64_t n, Vec<C> value, int64_t K) {
    value += Vec<C>{};  // makes a signalling NaN a quiet one, which is one still when it is cut
    for (int plane = 0; plane < row_planes; ++plane) {
      const U32 bits = bit_cast<U32>(value);
      put_plane(row + plane * filled_up(K), n, to_16_bits(bits >> 16), K);
      value -= bit_cast<Vec<C>>(bits & 0xffff0000u);
    }
  }
  static LSTM_EXT_INLINE void put_rounded(F* row, int64_t n, Vec<C> value, int64_t K) {
    if constexpr (row_planes == 1) {
      put_plane(row, n, narrow(value, S{}), K);
    } else {
      put(row, n, rounded_to<S>(value), K);
    }
  }

  // The planes of rows of T, [K, N], as VectorEngine packs them: [K / 32][vectors][planes] tiles
  using Packed = BFloat16;
  static constexpr int64_t panel_size(int64_t K) { return tile_panel_size<S>(K); }
  template <class T>
  static void pack(const T* const* rows, int64_t K, int64_t N, int64_t p, Packed* panel) {
    static_assert(kPlanes<T> == planes);
    const int vectors = panel_vectors<C>(N, p);
    for (int64_t k = 0; k < filled_up(K); k += 2) {
      F* to = panel + k / kTileDepth * vectors * planes * kTileFactors + k % kTileDepth * kTileHeight;
      for (int n = 0; n < vectors; ++n, to += planes * kTileFactors) {
        const int64_t column = p * kPanelWidth<C> + n * kLanes<C>;
        const auto value = [&](int64_t row) {
          return row < K && rows[row] ? load_up_to(rows[row] + column, N - column) : Vec<C>{};
        };
        U32 pair[planes];
        for_planes<planes>(value(k), [&](int plane, U16::Type part) { pair[plane] = to_32_bits(part); });
        for_planes<planes>(value(k + 1), [&](int plane, U16::Type part) {
          const U32 both = pair[plane] | to_32_bits(part) << 16;
          __builtin_memcpy(to + plane * kTileFactors, &both, sizeof(both));
        });
      }
    }
  }

  static void multiply(int rows, int vectors, const F* const* a, int64_t K, const Packed* panel, C* tile) {
    const TileRows factors{a[0], rows > 1 ? a[1] - a[0] : 0, filled_up(K), kTileDepth};
    multiply_blocks<row_planes, planes>(rows, vectors, factors, filled_up(K) / kTileDepth, panel, tile, kPanelWidth<C>,
                                        tile);
  }

  // Up to 16 columns of a [K, M], K up to kMostSumDepth, turned into tiles
  struct Transposed {
    alignas(64) F tiles[row_planes * kMostSumDepth * kTileHeight];

    Transposed(const C* a, int64_t M, int64_t K, int count) {
      for (int64_t k = 0; k < K; k += kTileDepth) {
        Vec<C> block[row_planes][kTileHeight];
        for (int pair = 0; pair < kTileHeight; ++pair) {
          const auto row = [&](int64_t n) { return n < K ? load_up_to(a + n * M, count) : Vec<C>{}; };
          Vec<C> low = row(k + 2 * pair), high = row(k + 2 * pair + 1);
          for (int plane = 0; plane < row_planes; ++plane) {
            const U32 kept = bit_cast<U32>(high) & 0xffff0000u, other = bit_cast<U32>(low) & 0xffff0000u;
            block[plane][pair] = bit_cast<Vec<C>>(kept | other >> 16);
            high -= bit_cast<Vec<C>>(kept);
            low -= bit_cast<Vec<C>>(other);
          }
        }
        for (int plane = 0; plane < row_planes; ++plane) {
          transpose<C>(block[plane]);
          for (int m = 0; m < kTileHeight; ++m) {
            store(reinterpret_cast<C*>(tiles) + ((k / kTileDepth * row_planes + plane) * kTileHeight + m) * kLanes<C>,
                  block[plane][m]);
          }
        }
      }
    }
  };
  static void multiply(int rows, int vectors, const Transposed& columns, int64_t k0, int64_t K, int64_t,
                       const Packed* panel, C* tile) {
    const TileRows factors{columns.tiles, kTileDepth, kTileFactors, row_planes * kTileFactors};
    multiply_blocks<row_planes, planes>(rows, vectors, factors, filled_up(K) / kTileDepth,
                                        panel + k0 / kTileDepth * vectors * planes * kTileFactors, tile, kPanelWidth<C>,
                                        tile);
  }

  // exactly(m, its sums) for those rows of a tile of sums that hold a NaN: their products have met an infinity, or a
  // NaN.
  template <class Exactly>
  static void repair(int rows, int vectors, C* tile, const Exactly& exactly) {
    for (int m = 0; m < rows; ++m) {
      if (has_nan(tile + m * kPanelWidth<C>, vectors)) exactly(m, tile + m * kPanelWidth<C>);
    }
  }

 private:
  static bool has_nan(const C* sums, int vectors) {
    __mmask16 found = 0;
    for (int n = 0; n < vectors; ++n) {
      const __m512 value = _mm512_loadu_ps(sums + n * kLanes<C>);
      found |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    }
    return found != 0;
  }

  static LSTM_EXT_INLINE void put_plane(F* plane, int64_t n, U16::Type value, int64_t K) {
    __builtin_memcpy(plane + n, &value, sizeof(value));
    const bool half_left = n + kLanes<C> >= K && n + kLanes<C> < filled_up(K);  // of a tile
    if (half_left) __builtin_memset(plane + n + kLanes<C>, 0, sizeof(value));
  }
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL

#endif
