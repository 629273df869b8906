// The one matrix product of the CPU backend: a tile of up to kTileRows rows by four vectors.
//
// The four vectors are the four gates of one vector of units where gates are computed, and four
// neighbouring vectors of columns elsewhere. A *panel* holds the other factor as [K][4][lanes], a lane being one
// element or, of bfloat16 where the machine multiplies it in pairs, two neighbours in k. Every element of a result is
// one chain of fused multiply-adds in the order of k, whatever the height of the tile that computed it, so that
// results do not depend on how rows were dealt out to threads.
#pragma once

#include "simd.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class C>
inline constexpr int kPanelWidth = 4 * kLanes<C>;

LSTM_EXT_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <int rows, class F, class C = Compute<F>>
LSTM_EXT_INLINE void multiply_panel_rows(const F* const* a, int64_t k_stride, int64_t K, const C* panel, C* tile) {
  constexpr int L = kLanes<C>;
  Vec<C> sum[rows][4];
  const F* row[rows];
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
    row[m] = a[m];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) sum[m][g] = load(tile + (m * 4 + g) * L);
  }
  int64_t at = 0;
  do {
    const Vec<C> w[4] = {load(panel), load(panel + L), load(panel + 2 * L), load(panel + 3 * L)};
#pragma GCC unroll 8
    for (int m = 0; m < rows; ++m) {
      const Vec<C> value = broadcast_lane(row[m] + at);
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) sum[m][g] = multiply_add(sum[m][g], value, w[g], F{});
    }
    panel += 4 * L;
    at += k_stride;
  } while (--K > 0);
#pragma GCC unroll 8
  for (int m = 0; m < rows; ++m) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) store(tile + (m * 4 + g) * L, sum[m][g]);
  }
}

// tile[m] += sum over k of a[m][k * k_stride] * panel[k], K lanes of the panel;  tile is [rows][4][lanes], contiguous
template <class F, int most = kTileRows>
void multiply_panel(int rows, const F* const* a, int64_t k_stride, int64_t K, const Compute<F>* panel,
                    Compute<F>* tile) {
  if constexpr (most > 1) {
    if (rows < most) return multiply_panel<F, most - 1>(rows, a, k_stride, K, panel, tile);
  }
  if (K > 0) multiply_panel_rows<most>(a, k_stride, K, panel, tile);
}

// Which rows of a [rows, K] matrix make up vector g of panel p.
struct GateRows {  // of a gate matrix [4H, K]
  int64_t H;
  template <class C>
  int64_t panels() const {
    return ceil_div(H, kLanes<C>);
  }
  template <class C>
  int64_t first(int64_t p, int g) const {
    return g * H + p * kLanes<C>;
  }
  template <class C>
  int64_t count(int64_t p, int) const {
    return H - p * kLanes<C>;
  }
};

struct PlainRows {  // of a matrix [N, K]
  int64_t N;
  template <class C>
  int64_t panels() const {
    return ceil_div(N, kPanelWidth<C>);
  }
  template <class C>
  int64_t first(int64_t p, int g) const {
    return p * kPanelWidth<C> + g * kLanes<C>;
  }
  template <class C>
  int64_t count(int64_t p, int g) const {
    return N - first<C>(p, g);
  }
};

// Transposes rows first .. first + count of `source` into vector g of a panel; missing rows are zero.
template <class S, class C = Compute<S>>
void pack_vector(const S* source, int64_t row_stride, int64_t count, int64_t K, int g, C* panel) {
  constexpr int L = kLanes<C>, kPer = kFactorsPerLane<Factor<S>>;
  for (int64_t k = 0; k < K; k += L * kPer) {
    Vec<C> block[L];
#pragma GCC unroll 16
    for (int lane = 0; lane < L; ++lane) {
      const S* from = source + lane * row_stride + k;
      block[lane] = lane >= count       ? Vec<C>{}
                    : K - k >= L * kPer ? load_factors(from)
                                        : load_some_factors(from, static_cast<int>(K - k));
    }
    transpose<C>(block);
    for (int j = 0; j < L && k + j * kPer < K; ++j) store(panel + ((k / kPer + j) * 4 + g) * L, block[j]);
  }
}

// A weight matrix [rows, K] whose rows become columns of the product: packed into panels, or read where it
// lies when there are too few rows to multiply for packing to pay.
template <class S, class Rows>
class Weights {
 public:
  using C = Compute<S>;
  using F = Factor<S>;
  static constexpr int L = kLanes<C>, kPer = kFactorsPerLane<F>;

  // Reading in place costs a horizontal sum per result; packing costs about as much as one product row
  // for each vector of lanes (measured; the break-even is flat).
  static bool in_place_pays(int64_t rows_to_multiply, int64_t K) { return rows_to_multiply * 6 < K; }

  Weights() = default;
  Weights(const void* data, int64_t row_stride, Rows rows, int64_t K, C* panels)
      : data_(static_cast<const S*>(data)), row_stride_(row_stride), rows_(rows), K_(K), panels_(panels) {}

  static int64_t packed_size(Rows rows, int64_t K) { return rows.template panels<C>() * panel_size(K); }

  int64_t panels() const { return rows_.template panels<C>(); }

  void pack(int64_t p) const {
    if (!panels_) return;
    for (int g = 0; g < 4; ++g) {
      pack_vector(row(p, g), row_stride_, rows_.template count<C>(p, g), K_, g, panel(p));
    }
  }

  // tile[m] += a[m] times panel p, over columns k0 .. k1; k0 and the rows a[m] hold whole lanes
  void multiply(int rows, const F* const* a, int64_t p, int64_t k0, int64_t k1, C* tile) const {
    if (panels_) {
      multiply_panel(rows, a, kPer, ceil_div(k1 - k0, kPer), panel(p) + panel_size(k0), tile);
    } else {
      for (int g = 0; g < 4; ++g) multiply_in_place(rows, a, p, g, k0, k1, tile);
    }
  }

 private:
  const S* row(int64_t p, int g) const { return data_ + rows_.template first<C>(p, g) * row_stride_; }
  C* panel(int64_t p) const { return panels_ + p * panel_size(K_); }
  static int64_t panel_size(int64_t K) { return ceil_div(K, kPer) * kPanelWidth<C>; }

  // Vectors run along k, one sum per unit; lane n of the result is unit n.
  void multiply_in_place(int rows, const F* const* a, int64_t p, int g, int64_t k0, int64_t k1, C* tile) const {
    const int64_t count = rows_.template count<C>(p, g), K = k1 - k0;
    if (count <= 0) return;
    const S* units = row(p, g) + k0;
    for (int m = 0; m < rows; ++m) {
      Vec<C> sum[L];
#pragma GCC unroll 16
      for (int lane = 0; lane < L; lane += kStreams) {
        // lanes beyond the last unit repeat it: their results are never stored
        const int64_t last = count - 1 - lane;
        multiply_streams(a[m], units + (last < 0 ? count - 1 : lane) * row_stride_, last, K, sum + lane);
      }
      C* to = tile + (m * 4 + g) * L;
      store(to, load(to) + sum_rows<C>(sum));
    }
  }

  // As many rows at once as the hardware's prefetchers follow well.
  static constexpr int kStreams = L < 8 ? L : 8;

  // Sums of a times `first`, the row after it, and so on up to `last`, which stands for those behind it too.
  LSTM_EXT_INLINE void multiply_streams(const F* a, const S* first, int64_t last, int64_t K, Vec<C>* sum) const {
    const S* row[kStreams];
#pragma GCC unroll 16
    for (int n = 0; n < kStreams; ++n) {
      row[n] = n == 0 ? first : row[n - 1] + (n <= last ? row_stride_ : 0);
      sum[n] = Vec<C>{};
    }
    int64_t k = 0;
    for (; k + L * kPer <= K; k += L * kPer) {
      const Vec<C> value = load_factors(a + k);
#pragma GCC unroll 16
      for (int n = 0; n < kStreams; ++n) sum[n] = multiply_add(sum[n], value, load_factors(row[n] + k), F{});
    }
    if (k < K) {
      const int rest = static_cast<int>(K - k);
      const Vec<C> value = load_some_factors(a + k, rest);
#pragma GCC unroll 16
      for (int n = 0; n < kStreams; ++n) {
        sum[n] = multiply_add(sum[n], value, load_some_factors(row[n] + k, rest), F{});
      }
    }
  }

  const S* data_ = nullptr;
  int64_t row_stride_ = 0;
  Rows rows_ = {};
  int64_t K_ = 0;
  C* panels_ = nullptr;
};

// A matrix [K, N] whose columns stay columns, packed into panels. Row k is rows[k], null for zeros.
template <class S, class C = Compute<S>>
void pack_columns(const S* const* rows, int64_t K, int64_t N, int64_t p, C* panel) {
  constexpr int L = kLanes<C>;
  for (int64_t k = 0; k < K; ++k) {
    for (int g = 0; g < 4; ++g, panel += L) {
      const int64_t column = p * kPanelWidth<C> + g * L;
      store(panel, rows[k] && column < N ? load_up_to(rows[k] + column, N - column) : Vec<C>{});
    }
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
