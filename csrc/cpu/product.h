// The matrix product by vectors:  C[m, n] += Σ_k A[m, k] B[k, n]
//
// (tiles.h has that of processors with tile registers.) The micro-kernel computes a *tile* of C, up to kTileRows rows m
// by up to four vectors of n. Its registers:
//
//     AVX-512      6 rows x 4 vectors of sums + 4 vectors of B + 1 broadcast of A     29 of 32
//     AVX2, SSE2   6 rows x 2 vectors of sums + 2 vectors of B + 1 broadcast of A     15 of 16, twice for four vectors
//                  3 rows x 4 vectors of sums + 1 broadcast of A, B from memory       13 of 16, of fewer rows
//
// The four vectors are the gates i f g o of one vector of units where gates are computed, and neighbouring vectors of
// columns elsewhere; the last panel has as few of them as hold its units or columns. B comes as *panels*, one for each
// four vectors, packed in the order in which they are read:
//
//     panel p:   k = 0  | vector 0 | vector 1 | vector 2 | vector 3 |
//                k = 1  | vector 0 | vector 1 | vector 2 | vector 3 |
//                ...
//
// or, where the micro-kernel takes two vectors (kBeside), vectors 0 and 1 of all k, then 2 and 3 of all k.
//
// A lane is one element, or, of bfloat16 where the machine multiplies it in pairs, B[k, n] and B[k + 1, n] side by
// side. For few rows B is not packed but read where it lies: weights are stored as B transposed, [n][k], and vectors
// then run along k.
//
// Every element of a packed product is one chain of fused multiply-adds in the order of k, whatever the height of the
// tile that computed it, so that results do not depend on how rows were dealt out to threads.
#pragma once

#include <initializer_list>

#include "plan.h"
#include "simd.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class C>
inline constexpr int kPanelWidth = 4 * kLanes<C>;

// Where vector n of a panel of K lanes begins, and how far one of its k is from the next.
template <class C>
struct VectorPlace {
  int64_t offset;
  int stride;

  LSTM_EXT_INLINE VectorPlace(int vectors, int n, int64_t K) {
    const int group = n / kBeside * kBeside, beside = vectors - group < kBeside ? vectors - group : kBeside;
    offset = (group * K + n % kBeside) * kLanes<C>;
    stride = beside * kLanes<C>;
  }
};

// tile[m] += Σ_k a[m][k * k_stride] * panel[k], for K lanes; of more vectors than stand side by side the others are in
// `beyond`. By four k at a time, with a stride that is a constant, a core decodes little more than the loads and
// multiply-adds, which counts where another thread shares the core; where a product and a sum are two instructions
// there are too few registers for it. In a function of its own, where nothing else wants one.
template <int rows, int vectors, class F, class Stride>
[[gnu::noinline]] void multiply_tile(const F* const* a, Stride k_stride, int64_t K, const Compute<F>* panel,
                                     const Compute<F>* beyond, Compute<F>* tile) {
  using C = Compute<F>;
  constexpr int kFirst = vectors < kBeside ? vectors : kBeside;
  constexpr int L = kLanes<C>;
  constexpr int kHeld = (rows + 1) * vectors;  // sums and vectors of B
  constexpr bool kInPlace = vectors > 1 && kHeld < kRegisters;
  if (K <= 0) __builtin_unreachable();
  Vec<C> sum[rows][vectors];
  const F* row[rows];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
    row[m] = a[m];
#pragma GCC unroll 4
    for (int g = 0; g < vectors; ++g) sum[m][g] = load(tile + (m * 4 + g) * L);
  }
  int64_t at = 0;
  const auto step = [&] {
    Vec<C> w[vectors];
#pragma GCC unroll 4
    for (int g = 0; g < vectors; ++g) {
      w[g] = in_register<kHeld>(load(g < kFirst ? panel + g * L : beyond + (g - kFirst) * L));
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const Vec<C> value = broadcast_lane(row[m] + at);
#pragma GCC unroll 4
      for (int g = 0; g < vectors; ++g) sum[m][g] = multiply_add_to<kInPlace>(sum[m][g], value, w[g], F{});
    }
    panel += kFirst * L;
    if constexpr (kFirst < vectors) beyond += (vectors - kFirst) * L;
    at += k_stride;
  };
  if constexpr (kFuses) {
    for (; K >= 4; K -= 4) {
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) step();
    }
  }
#pragma GCC unroll 1
  for (; K > 0; --K) step();
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int g = 0; g < vectors; ++g) store(tile + (m * 4 + g) * L, sum[m][g]);
  }
}

// f(count as a constant), of 1 .. most
template <int most, class F>
LSTM_EXT_INLINE void with_count(int count, const F& f) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, f);
  }
  f(std::integral_constant<int, most>{});
}

// The same for a panel of 1 to 4 vectors and `depth` lanes, of which lanes k .. k + K. A tile is [rows][4][lanes],
// contiguous.
template <class F, class Stride>
void multiply_panel(int rows, int vectors, const F* const* a, Stride k_stride, int64_t k, int64_t K, int64_t depth,
                    const Compute<F>* panel, Compute<F>* tile) {
  using C = Compute<F>;
  if (K <= 0) return;
  const auto from = [&](int n) {
    const VectorPlace<C> place(vectors, n, depth);
    return panel + place.offset + k * place.stride;
  };
  with_count<4>(vectors, [&](auto width) {
    with_count<kTileRows>(rows, [&](auto count) {
      if constexpr (width <= kBeside) {
        multiply_tile<count, width>(a, k_stride, K, from(0), nullptr, tile);
      } else if constexpr (count * width <= kFullRows * 4) {
        multiply_tile<count, width>(a, k_stride, K, from(0), from(kBeside), tile);
      } else {
        multiply_tile<count, kBeside>(a, k_stride, K, from(0), nullptr, tile);
        multiply_tile<count, width - kBeside>(a, k_stride, K, from(kBeside), nullptr, tile + kBeside * kLanes<C>);
      }
    });
  });
}

// tile[m] = start[m * start_stride], for a panel of so many vectors
template <class C>
LSTM_EXT_INLINE void start_tile(int rows, int vectors, const C* start, int64_t start_stride, C* tile) {
  if (start == tile) return;
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < vectors; ++n) {
      store(tile + m * kPanelWidth<C> + n * kLanes<C>, load(start + m * start_stride + n * kLanes<C>));
    }
  }
}

// How many vectors panel p of N columns has.
template <class C>
int panel_vectors(int64_t N, int64_t p) {
  const int64_t left = ceil_div(N - p * kPanelWidth<C>, kLanes<C>);
  return left < 4 ? static_cast<int>(left) : 4;
}

// Where each of the gates i f g o stands in TensorFlow's order, i g f o.
constexpr int kernel_quarter(int gate) { return gate == 1 ? 2 : gate == 2 ? 1 : gate; }

// Which rows of a [rows, K] matrix make up the vectors of panel p: in *groups* of neighbouring rows, one after the
// other. Group g is rows first .. first + count, and takes `width` lanes.
template <class C>
struct GateRows {  // of a gate matrix [4H, K]: a group for each gate of up to a vector of units
  int64_t H;
  constexpr int64_t panels() const { return ceil_div(H, kLanes<C>); }
  int64_t first(int64_t p, int g) const { return g * H + p * kLanes<C>; }
  int64_t count(int64_t p, int) const {
    const int64_t left = H - p * kLanes<C>;
    return left < kLanes<C> ? left : kLanes<C>;
  }
  // Few units share vectors.
  int width(int64_t p) const {
    const int64_t units = count(p, 0);
    return 4 * units <= kLanes<C> ? kLanes<C> / 4 : 2 * units <= kLanes<C> ? kLanes<C> / 2 : kLanes<C>;
  }
  int vectors(int64_t p) const { return 4 * width(p) / kLanes<C>; }
  // Where a group begins among the columns of a matrix [K, 4H] in TensorFlow's order of gates.
  int64_t first_column(int64_t p, int g) const { return kernel_quarter(g) * H + p * kLanes<C>; }
};

template <class C>
struct PlainRows {  // of a matrix [N, K]: a group for each vector
  int64_t N;
  constexpr int64_t panels() const { return ceil_div(N, kPanelWidth<C>); }
  int64_t first(int64_t p, int g) const { return p * kPanelWidth<C> + g * kLanes<C>; }
  int64_t count(int64_t p, int g) const {
    const int64_t left = N - first(p, g);
    return left < 0 ? 0 : left < kLanes<C> ? left : kLanes<C>;
  }
  int width(int64_t) const { return kLanes<C>; }
  int vectors(int64_t p) const { return panel_vectors<C>(N, p); }
};

// The rows that are the lanes of vector n of panel p, of a matrix with such rows; null where there is none.
template <class S, class Rows, class C = Compute<S>>
void find_lanes(const S* data, int64_t row_stride, const Rows& rows, int64_t p, int n, const S* (&lanes)[kLanes<C>]) {
  const int width = rows.width(p), groups = kLanes<C> / width;
  for (int group = 0; group < groups; ++group) {
    const int g = n * groups + group;
    const int64_t first = rows.first(p, g), count = rows.count(p, g);
    for (int unit = 0; unit < width; ++unit) {
      lanes[group * width + unit] = unit < count ? data + (first + unit) * row_stride : nullptr;
    }
  }
}

// Transposes a row for each lane into vectors `stride` apart, of a panel; absent rows are zero. Rows are too short for
// a prefetcher to follow: the next ones of a panel are asked for meanwhile.
template <class S, class C = Compute<S>>
void pack_vector(const S* const (&rows)[kLanes<C>], const S* const (&next)[kLanes<C>], int64_t K, int stride, C* to) {
  constexpr int L = kLanes<C>, kPer = kFactorsPerLane<Factor<S>>, kLine = 64 / sizeof(S);
  for (int64_t k = 0; k < K; k += L * kPer) {
    if (k % kLine == 0) {
      for (const S* row : next) {
        if (row) fetch(row + k, 1);
      }
    }
    Vec<C> block[L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
      block[lane] = !rows[lane]         ? Vec<C>{}
                    : K - k >= L * kPer ? load_factors(rows[lane] + k)
                                        : load_some_factors(rows[lane] + k, static_cast<int>(K - k));
    }
    transpose<C>(block);
    for (int j = 0; j < L && k + j * kPer < K; ++j) store(to + (k / kPer + j) * stride, block[j]);
  }
}

// Rows of weights as they lie, [rows, K] of S, and the rows that they are multiplied by.
template <class S>
struct InPlace {
  const S* weights;
  int64_t row_stride;
  const Factor<S>* const* a;
  int64_t K;
};

// The groups of rows that make up a panel: rows first[g] .. first[g] + count[g] take the lanes from g * width on.
struct PanelGroups {
  template <class Rows>
  LSTM_EXT_INLINE PanelGroups(const Rows& rows, int64_t p) : width(rows.width(p)) {
    for (int g = 0; g < 4; ++g) {
      first[g] = rows.first(p, g);
      count[g] = rows.count(p, g);
    }
  }

  int64_t first[4], count[4], width;
};

// The product with weights in place:  tile[m] += a[m] times a panel, of all these together. Vectors run along k:
//
//     row 0 of the group   |  k = 0 .. L-1  |  k = L .. 2L-1  | ...
//     row 1                |  k = 0 .. L-1  |  k = L .. 2L-1  | ...
//     ...
//
// Each pair of a row of weights and a row a[m] has a vector of sums, whose lanes are added up at the end: that is
// lane n of the result for row n.
template <class S>
struct InPlaceProduct {
  using C = Compute<S>;
  using F = Factor<S>;
  using Factors = std::initializer_list<InPlace<S>>;
  static constexpr int L = kLanes<C>, kPer = kFactorsPerLane<F>;

  // In a function of its own, where nothing else wants a register that holds where a stream is.
  [[gnu::noinline]] static void multiply(int rows, Factors factors, const PanelGroups& groups, C* tile) {
    const int most = rows > kFullRows ? (rows + 1) / 2 : rows;
    for (int g = 0; g < 4; ++g) {
      if (groups.count[g] <= 0) continue;
      for (int m = 0; m < rows; m += most) {
        with_count<kFullRows>(rows - m < most ? rows - m : most, [&](auto count) {
          multiply_group<count>(factors, m, groups.first[g], groups.count[g],
                                tile + m * kPanelWidth<C> + g * groups.width);
        });
      }
    }
  }

 private:
  template <int rows>
  static LSTM_EXT_INLINE void multiply_group(Factors factors, int m0, int64_t row, int64_t count, C* tile) {
    constexpr int kStreams = streams(rows);
    Vec<C> sums[rows][L / kStreams] = {};
#pragma GCC unroll 4
    for (int n = 0; n < L / kStreams; ++n) {
      const int64_t first = n * kStreams;
      if (first < count) multiply_streams(factors, m0, row + first, count - 1 - first, sums, n);
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      C* to = tile + m * kPanelWidth<C>;
      store_up_to(to, load_up_to(to, count) + sum_lanes(sums[m]), count);
    }
  }

  // How many rows of weights are read side by side: as many as there are registers for their sums, and as the
  // hardware's prefetchers follow.
  static constexpr int streams(int rows) {
    const int most = rows * 8 <= kFullRows * 4 ? 8 : 4;
    return L < most ? L : most;
  }

  // sums[m][to], lane n = a[m] · row first + n of the weights. Past the group's end (`last` rows on) its last row is
  // read again, so that there is no tail; those lanes are not stored.
  template <int rows, int vectors>
  static LSTM_EXT_INLINE void multiply_streams(Factors factors, int m0, int64_t first, int64_t last,
                                               Vec<C> (&sums)[rows][vectors], int to) {
    constexpr int kStreams = L / vectors;
    Vec<C> sum[rows][kStreams] = {};
    for (const InPlace<S>& factor : factors) {
      if constexpr (kRegisters < 32 && rows * (kStreams + 1) + 1 == kRegisters) {
        add_streams_apart(factor, m0, first, last, sum);
      } else {
        add_streams(factor, m0, first, last, sum);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) sums[m][to] = sum_lanes(sum[m]);
  }

  // In a function of its own, where nothing else wants one of few registers: a sum that waits for memory in each turn
  // of the loop makes all of it half as fast.
  template <int rows, int kStreams>
  [[gnu::noinline]] static void add_streams_apart(const InPlace<S>& factor, int m0, int64_t first, int64_t last,
                                                  Vec<C> (&sum)[rows][kStreams]) {
    Vec<C> own[rows][kStreams];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kStreams; ++n) own[m][n] = sum[m][n];
    }
    add_streams(factor, m0, first, last, own);
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kStreams; ++n) sum[m][n] = own[m][n];
    }
  }

  template <int rows, int kStreams>
  static LSTM_EXT_INLINE void add_streams(const InPlace<S>& factor, int m0, int64_t first, int64_t last,
                                          Vec<C> (&sum)[rows][kStreams]) {
    const int64_t row_stride = factor.row_stride, K = factor.K;
    const S* unit[kStreams];
    const F* row[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) row[m] = factor.a[m0 + m];
#pragma GCC unroll 8
    for (int n = 0; n < kStreams; ++n) {
      unit[n] = n == 0 ? factor.weights + first * row_stride : unit[n - 1] + (n <= last ? row_stride : 0);
    }
    const auto add = [&](const auto& load_vector, int64_t k) {
      Vec<C> values[rows];
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) values[m] = load_vector(row[m] + k);
#pragma GCC unroll 8
      for (int n = 0; n < kStreams; ++n) {
        const Vec<C> weights = in_register<rows*(kStreams + 1)>(load_vector(unit[n] + k));
#pragma GCC unroll 8
        for (int m = 0; m < rows; ++m) sum[m][n] = multiply_add(sum[m][n], values[m], weights, F{});
      }
    };
    int64_t k = 0;
    for (; k + L * kPer <= K; k += L * kPer) add([](const auto* from) { return load_factors(from); }, k);
    if (k < K) {
      const int rest = static_cast<int>(K - k);
      add([rest](const auto* from) { return load_some_factors(from, rest); }, k);
    }
  }
};

// Weights stored as [K, 4H], in TensorFlow's order of gates: their columns are columns of the product, so that a panel
// is packed, or multiplied by where it lies, row after row.
template <class S>
struct KernelWeights {
  using C = Compute<S>;
  using F = Factor<S>;
  static constexpr int L = kLanes<C>, kPer = kFactorsPerLane<F>;
  static constexpr int kDepth = 8;  // rows of weights that are read side by side in place, in lanes

  const S* data;
  int64_t row_stride, K;
  GateRows<C> gates;

  void pack(int64_t p, C* to) const {
    const int vectors = gates.vectors(p);
    const bool full = gates.count(p, 0) == L;
    const int64_t depth = ceil_div(K, kPer);
    for (int64_t k = 0; k < depth; ++k) {
      for (int n = 0; n < vectors; ++n) {
        const VectorPlace<C> place(vectors, n, depth);
        store(to + place.offset + k * place.stride, full ? lanes<true>(k * kPer, p, n) : lanes<false>(k * kPer, p, n));
      }
    }
  }

  // tile[m] of each panel first .. last - 1 += a[m] times rows k = 0 .. K of it; the tiles of a panel's rows lie at
  // `tiles`, those of the next one `panel_stride` further. Each sum is one chain in the order of k, as if packed.
  void multiply(int rows, const F* const* a, int64_t first, int64_t last, C* tiles, int64_t panel_stride) const {
    with_count<kTileRows>(rows, [&](auto count) {
      int64_t k = 0;
      for (; k + kDepth * kPer <= K; k += kDepth * kPer) {
        this->template add<count, kDepth>(a, k, first, last, tiles, panel_stride);
      }
      for (; k < K; k += kPer) this->template add<count, 1>(a, k, first, last, tiles, panel_stride);
    });
  }

 private:
  template <int rows, int depth>
  void add(const F* const* a, int64_t k, int64_t first, int64_t last, C* tiles, int64_t panel_stride) const {
    const F* row[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) row[m] = a[m] + k;
    const int64_t full = gates.H / L < last ? gates.H / L : last;
    for (const int n : {0, 2, 1, 3}) {  // the gates as they follow each other in memory
      C* tile = tiles + n * L;
      for (int64_t p = first; p < full; ++p, tile += panel_stride) add_vector<true, rows, depth>(row, k, p, n, tile);
    }
    if (full == last) return;
    C* const tile = tiles + (full - first) * panel_stride;
    for (int n = 0; n < gates.vectors(full); ++n) add_vector<false, rows, depth>(row, k, full, n, tile + n * L);
  }

  template <bool full, int rows, int depth>
  LSTM_EXT_INLINE void add_vector(const F* const (&row)[rows], int64_t k, int64_t p, int n, C* tile) const {
    Vec<C> sum[rows];
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) sum[m] = load(tile + m * kPanelWidth<C>);
#pragma GCC unroll 8
    for (int d = 0; d < depth; ++d) {
      const Vec<C> weights = lanes<full>(k + d * kPer, p, n);
#pragma GCC unroll 8
      for (int m = 0; m < rows; ++m) sum[m] = multiply_add(sum[m], broadcast_lane(row[m] + d * kPer), weights, F{});
    }
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) store(tile + m * kPanelWidth<C>, sum[m]);
  }

  // Vector n of panel p: row k, or as many rows from there on as a lane holds
  template <bool full>
  LSTM_EXT_INLINE Vec<C> lanes(int64_t k, int64_t p, int n) const {
    const S* row = data + k * row_stride;
    if constexpr (kPer == 1) {
      return with_columns<full>(row, p, n, [](const S* from) { return load(from); });
    } else {
      const auto load_raw = [](const S* from) {
        U16::Type bits;
        __builtin_memcpy(&bits, from, sizeof(bits));
        return to_32_bits(bits);
      };
      const U32 low = with_columns<full>(row, p, n, load_raw);
      const U32 high = k + 1 < K ? with_columns<full>(row + row_stride, p, n, load_raw) : U32{};
      return bit_cast<Vec<C>>(low | high << 16);
    }
  }

  // f(the elements of a row that are the lanes of vector n of panel p): where they lie, or, of a panel that is not
  // full, brought together; lanes without a unit are zero.
  template <bool full, class Load>
  LSTM_EXT_INLINE auto with_columns(const S* row, int64_t p, int n, const Load& f) const {
    if constexpr (full) return f(row + gates.first_column(p, n));
    S some[L];
    gather(row, p, n, some);
    return f(some);
  }

  [[gnu::noinline]] void gather(const S* row, int64_t p, int n, S (&some)[L]) const {
    const int width = gates.width(p);
    for (int lane = 0; lane < L; ++lane) {
      const int g = (n * L + lane) / width, unit = (n * L + lane) % width;
      some[lane] = unit < gates.count(p, g) ? row[gates.first_column(p, g) + unit] : S{};
    }
  }
};

// A weight matrix [rows, K] whose rows become columns of the product: packed into panels, or read where it
// lies when there are too few rows to multiply for packing to pay.
template <class S, class Rows>
class Weights {
 public:
  using C = Compute<S>;
  using F = Factor<S>;
  using Packed = C;
  static constexpr int L = kLanes<C>, kPer = kFactorsPerLane<F>;

  Weights() = default;
  Weights(const void* data, int64_t row_stride, Rows rows, int64_t K, C* panels)
      : data_(static_cast<const S*>(data)), row_stride_(row_stride), rows_(rows), K_(K), panels_(panels) {}

  static int64_t packed_size(Rows rows, int64_t K) { return rows.panels() * panel_size(K); }

  int64_t panels() const { return rows_.panels(); }

  // From now on `data` is [K, rows]. Such a matrix in place is multiplied by its own `multiply`.
  void lie_by_columns() { by_columns_ = true; }
  KernelWeights<S> kernel() const { return {data_, row_stride_, K_, rows_}; }

  void pack(int64_t p) const {
    if (!panels_) return;
    if constexpr (std::is_same_v<Rows, GateRows<C>>) {
      if (by_columns_) return kernel().pack(p, panel(p));
    }
    const int vectors = rows_.vectors(p);
    const S* lanes[5][L] = {};
    for (int n = 0; n < vectors; ++n) find_lanes(data_, row_stride_, rows_, p, n, lanes[n]);
    for (int n = 0; n < vectors; ++n) {
      const VectorPlace<C> place(vectors, n, ceil_div(K_, kPer));
      pack_vector(lanes[n], lanes[n + 1], K_, place.stride, panel(p) + place.offset);
    }
  }

  // tile[m] = start[m * start_stride] + a[m] times panel p, over columns k0 .. k1; k0 and the rows a[m] hold whole
  // lanes
  void multiply(int rows, const F* const* a, int64_t p, int64_t k0, int64_t k1, const C* start, int64_t start_stride,
                C* tile) const {
    start_tile(rows, rows_.vectors(p), start, start_stride, tile);
    if (panels_) {
      multiply_panel(rows, rows_.vectors(p), a, std::integral_constant<int, kPer>{}, k0 / kPer, ceil_div(k1 - k0, kPer),
                     ceil_div(K_, kPer), panel(p), tile);
    } else {
      multiply_in_place(rows, {in_place(a, k0, k1)}, p, tile);
    }
  }

  // Columns k0 .. k1 as they lie, and the rows that they are multiplied by
  InPlace<S> in_place(const F* const* a, int64_t k0, int64_t k1) const { return {data_ + k0, row_stride_, a, k1 - k0}; }

  void multiply_in_place(int rows, std::initializer_list<InPlace<S>> factors, int64_t p, C* tile) const {
    InPlaceProduct<S>::multiply(rows, factors, PanelGroups(rows_, p), tile);
  }

  C* panel(int64_t p) const { return panels_ + p * panel_size(K_); }

 private:
  static int64_t panel_size(int64_t K) { return ceil_div(K, kPer) * kPanelWidth<C>; }

  const S* data_ = nullptr;
  int64_t row_stride_ = 0;
  Rows rows_ = {};
  int64_t K_ = 0;
  C* panels_ = nullptr;
  bool by_columns_ = false;
};

// A matrix [K, N] whose columns stay columns, packed into panels. Row k is rows[k], null for zeros. Each row is read a
// little of, which no prefetcher follows: its lines are asked for some rows ahead.
template <class S, class C = Compute<S>>
void pack_columns(const S* const* rows, int64_t K, int64_t N, int64_t p, C* panel) {
  constexpr int L = kLanes<C>, kAhead = 16;
  const int vectors = panel_vectors<C>(N, p);
  for (int64_t k = 0; k < K; ++k) {
    const S* const ahead = k + kAhead < K ? rows[k + kAhead] : nullptr;
    if (ahead) fetch(ahead + p * kPanelWidth<C>, vectors * L);
    for (int g = 0; g < vectors; ++g) {
      const int64_t column = p * kPanelWidth<C> + g * L;
      const VectorPlace<C> place(vectors, g, K);
      store(panel + place.offset + k * place.stride, rows[k] ? load_up_to(rows[k] + column, N - column) : Vec<C>{});
    }
  }
}

// A matrix [N, K] whose rows become columns, packed into the same panels.
template <class S, class C = Compute<S>>
void pack_rows_as_columns(const Matrix& matrix, int64_t K, int64_t N, int64_t p, C* panel) {
  constexpr int L = kLanes<C>;
  const int vectors = panel_vectors<C>(N, p);
  for (int n = 0; n < vectors; ++n) {
    const int64_t first = p * kPanelWidth<C> + n * L;
    const S* rows = static_cast<const S*>(matrix.data) + first * matrix.row_stride;
    const VectorPlace<C> place(vectors, n, K);
    for (int64_t k = 0; k < K; k += L) {
      Vec<C> block[L];
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane) {
        block[lane] = first + lane < N ? load_up_to(rows + lane * matrix.row_stride + k, K - k) : Vec<C>{};
      }
      transpose<C>(block);
      for (int j = 0; j < L && k + j < K; ++j) store(panel + place.offset + (k + j) * place.stride, block[j]);
    }
  }
}

// An engine is what a pass over the steps has to know of its products, here those of vectors: how rows of S are laid
// out to be multiplied, how many of them at a time, and by what.
template <class S>
struct VectorEngine {
  using C = Compute<S>;
  using F = Factor<S>;
  template <class Rows>
  using WeightsOf = Weights<S, Rows>;
  struct Session {};  // held by whoever multiplies

  static constexpr EngineKind kKind = EngineKind::kVectors;
  static constexpr int kRows = kTileRows, row_planes = 1, planes = 1;
  static constexpr bool kBorrowsRows = sizeof(S) == sizeof(F);  // rows of S may be multiplied where they lie
  static constexpr bool kKeepsInfinity = true;  // else sums that should be infinite are NaN, and their rows repaired
  static constexpr bool kSplitsFloats = false;  // else a computed number is multiplied as planes of its own
  static constexpr bool kReadsInPlace = true;   // weights may be multiplied where they lie
  static constexpr bool kScaled = false;        // factors are integers, which a number in front of their row scales

  // Elements of a row of K factors, and of a panel of K factors of WeightsOf.
  static constexpr int64_t row_size(int64_t K) { return ceil_div(K, kLanes<C>) * kLanes<C>; }
  static constexpr int64_t weight_panel_size(int64_t K) { return ceil_div(K, kFactorsPerLane<F>) * kPanelWidth<C>; }

  // Factors n .. n + lanes of a row of K
  static LSTM_EXT_INLINE void put(F* row, int64_t n, Vec<C> value, int64_t) { store(row + n, value); }
  // The same, rounded as S rounds: h is at each step what one cell call would return.
  static LSTM_EXT_INLINE void put_rounded(F* row, int64_t n, Vec<C> value, int64_t) {
    if constexpr (sizeof(F) == sizeof(S)) {
      store(row + n, value);
    } else {
      store(row + n, rounded_to<S>(value));
    }
  }

  // A matrix of T, [K, N], whose columns stay columns, in panels
  using Packed = C;
  static constexpr int64_t panel_size(int64_t K) { return K * kPanelWidth<C>; }
  template <class T>
  static void pack(const T* const* rows, int64_t K, int64_t N, int64_t p, Packed* panel) {
    pack_columns(rows, K, N, p, panel);
  }

  // tile[m] += a[m], K factors, times a panel of so many vectors
  static void multiply(int rows, int vectors, const F* const* a, int64_t K, const Packed* panel, C* tile) {
    multiply_panel(rows, vectors, a, std::integral_constant<int, 1>{}, 0, K, K, panel, tile);
  }

  // Columns as rows: tile[m] += column m of a [K, M] times K rows of a panel of `depth`, from its row k0 on. A small
  // tile passes a row of a so often that the columns of each are first brought together.
  static constexpr bool kGathersColumns = kRegisters < 32;
  struct Transposed {
    const C* a;
    int64_t M;
    Transposed(const C* matrix, int64_t width, int64_t, int) : a(matrix), M(width) {}
  };
  static void multiply(int rows, int vectors, const Transposed& columns, int64_t k0, int64_t K, int64_t depth,
                       const Packed* panel, C* tile) {
    const C* column[kRows] = {};
    for (int m = 0; m < rows; ++m) column[m] = columns.a + m;
    multiply_panel(rows, vectors, column, columns.M, k0, K, depth, panel, tile);
  }
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
