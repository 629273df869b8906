// The products of the backward pass over all rows of a chunk, once its recurrence is done: the weights' gradients and
// dx.
#pragma once

#include "backward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S, class Engine>
void Backward<S, Engine>::prepare_grads(Arena& arena) {
  const auto [T, B, I, H, P, projected] = shape_;
  if (!cell_ && (T > 1 || projected)) h_ = hidden_ = arena.get<S>((B + chunk_rows_) * H) + B * H;
  if (!cell_ && T > 1 && projected) project_again_in(arena);
  if (cell_ && projected) hidden_ = arena.get<S>(chunk_rows_ * H);
  dw_ih_ = product_for(dir_.grads.w_ih, 4 * H, I, arena);
  dw_hh_ = product_for(dir_.grads.w_hh, 4 * H, P, arena);
  if (dir_.grads.b_ih) db_ = sums_for(dir_.grads.b_ih, 4 * H, arena);
  if (projected) dw_hr_ = product_for(dir_.grads.w_hr, P, H, arena);
  if (Engine::kGathersColumns && I + H >= kLeastGatheredFor) columns_ = arena.get<C>(plan_.threads * kMostGathered);
}

template <class S, class Engine>
void Backward<S, Engine>::project_again_in(Arena& arena) {
  const auto [T, B, I, H, P, projected] = shape_;
  h_ = arena.get<S>((B + chunk_rows_) * P) + B * P;
  w_hr_columns_ = arena.get<S>(H * P);
  w_hr_again_ = arena.get<Packed>(column_panels(P) * Engine::panel_size(H));
  factors_ = grad_rows(plan_.threads * Engine::kRows, H, H, arena);
}

template <class S, class Engine>
void Backward<S, Engine>::add_weight_grads(const Share& share, int64_t s0, int64_t s1, int64_t rows) const {
  const bool start = s1 == shape_.T;  // the chunk is the first to be run, its sums are the first
  if (w_hr_again_) project_again(share, s0 > 0 ? -walk_.active(s0 - 1) : 0, rows - walk_.active(s1 - 1));
  share.for_part(rows, [&](int64_t row) {
    const int64_t s = row_step_[row], slot = row_slot_[row];
    const int64_t x_row = layer_.x_map.at(walk_.time(s, slot, dir_.reverse), walk_.row(slot));
    dw_ih_.rows[row] = static_cast<const S*>(layer_.x) + x_row;
    dw_hh_.rows[row] = masked_h_before(s, slot, row);
    if (shape_.projected) dw_hr_.rows[row] = hidden_ + row * shape_.H;
  });
  share.team.sync();
  for (const WeightGrad* grad : {&dw_ih_, &dw_hh_, &dw_hr_}) pack_rows(share, grad->rows, rows, grad->N, grad->panels);
  share.team.sync();
  if (dgates_h_.values) {
    add_products(share, dgates_, rows, {&dw_ih_}, start);
    add_products(share, dgates_h_, rows, {&dw_hh_}, start);
  } else {
    add_products(share, dgates_, rows, {&dw_ih_, &dw_hh_}, start);
  }
  if (shape_.projected) add_products(share, dh_, rows, {&dw_hr_}, start);
  if (db_) add_bias_grad(share, rows, start);
}

template <class S, class Engine>
void Backward<S, Engine>::project_again(const Share& share, int64_t first, int64_t last) const {
  const int64_t mine = share.team.rank * int64_t{Engine::kRows};
  share.for_part(ceil_div(last - first, Engine::kRows), [&](int64_t tile) {
    const int64_t row = first + tile * Engine::kRows, H = shape_.H, P = shape_.P;
    const int count = tile_count(last, row);
    for (int m = 0; m < count; ++m) {
      for (int64_t u = 0; u < H; u += L) {
        factors_.put(mine + m, u, u, load_up_to(hidden_ + (row + m) * H + u, H - u), H - u);
      }
    }
    for (int64_t p = 0; p < column_panels(P); ++p) {
      alignas(64) C sums[Engine::kRows * kWidth];
      multiply(factors_, mine, count, w_hr_again_, w_hr_by_columns(), P, p, sums);
      for (int m = 0; m < count; ++m) {
        for_vectors(h_ + (row + m) * P, P, p, sums + m * kWidth,
                    [](S* h, C* sum, int64_t left) { store_up_to(h, load(sum), left); });
      }
    }
  });
}

template <class S, class Engine>
void Backward<S, Engine>::add_products(const Share& share, const GradRows& a, int64_t rows,
                                       std::initializer_list<const WeightGrad*> grads, bool start) const {
  const int64_t M = a.width, tiles = ceil_div(M, Engine::kRows);
  int64_t N = 0, k0 = 0;
  for (const WeightGrad* grad : grads) N += grad->N;
  const bool gathers = columns_ && N >= kLeastGatheredFor;
  do {  // at least once: the sum of no rows is zero
    const int64_t K = rows - k0 < plan_.depth[0] ? rows - k0 : plan_.depth[0];
    const auto columns = [&](int64_t tile) {
      const int64_t m = tile * Engine::kRows;
      return typename Engine::Transposed(a.row(k0) + m, M, K, tile_count(M, m));
    };
    const auto add = [&](int64_t tile, const typename Engine::Transposed& transposed, const WeightGrad& grad,
                         int64_t p) {
      add_tile(a, tile * Engine::kRows, transposed, k0, K, rows, p, start && k0 == 0, grad);
    };
    if constexpr (Engine::kSplitsFloats) {
      share.for_part(tiles, [&](int64_t tile) {
        const auto transposed = columns(tile);
        for (const WeightGrad* grad : grads) {
          for (int64_t p = 0; p < column_panels(grad->N); ++p) add(tile, transposed, *grad, p);
        }
      });
    } else {
      const int64_t blocks =
          gathers ? share.team.size * ceil_div(tiles, share.team.size * tiles_gathered(K)) : share.team.size;
      C* const gathered = gathers ? columns_ + share.team.rank * kMostGathered : nullptr;
      share.for_part(blocks, [&](int64_t block) {
        const int64_t first = block * tiles / blocks, last = (block + 1) * tiles / blocks;
        if (gathers) gather_columns(a, k0, K, first, last, gathered);
        for (const WeightGrad* grad : grads) {
          for (int64_t p = 0; p < column_panels(grad->N); ++p) {
            for (int64_t tile = first; tile < last; ++tile) {
              const C* const from = gathered + (tile - first) * K * Engine::kRows;
              add(tile, gathers ? typename Engine::Transposed(from, Engine::kRows, K, 0) : columns(tile), *grad, p);
            }
          }
        }
      });
    }
    k0 += K;
  } while (k0 < rows);
}

// The columns of tiles first .. last - 1: [tile][K][kRows]
template <class S, class Engine>
void Backward<S, Engine>::gather_columns(const GradRows& a, int64_t k0, int64_t K, int64_t first, int64_t last,
                                         C* to) const {
  constexpr int64_t kRows = Engine::kRows;
  for (int64_t k = 0; k < K; ++k, to += kRows) {
    const C* const row = a.row(k0 + k);
    C* tile = to;
    int64_t m = first * kRows;
    for (; m + kRows <= a.width && m < last * kRows; m += kRows, tile += K * kRows) {
      __builtin_memcpy(tile, row + m, kRows * sizeof(C));
    }
    for (int n = 0; m < a.width && m < last * kRows; ++m) tile[n++] = row[m];
  }
}

template <class S, class Engine>
void Backward<S, Engine>::add_tile(const GradRows& a, int64_t m0, const typename Engine::Transposed& transposed,
                                   int64_t k0, int64_t K, int64_t rows, int64_t p, bool start,
                                   const WeightGrad& grad) const {
  const int64_t N = grad.N;
  const int count = tile_count(a.width, m0), vectors = panel_vectors<C>(N, p);
  alignas(64) C product[Engine::kRows * kWidth];
  const auto load_sums = [&](int m) {
    for_vectors(grad.sums + (m0 + m) * N, N, p, product + m * kWidth,
                [&](C* sum, C* part, int64_t left) { store(part, start ? Vec<C>{} : load_up_to(sum, left)); });
  };
  for (int m = 0; m < count; ++m) load_sums(m);
  Engine::multiply(count, vectors, transposed, k0, K, rows, grad.panels + p * Engine::panel_size(rows), product);
  if constexpr (!Engine::kKeepsInfinity) {
    Engine::repair(count, vectors, product, [&](int m, C* row) {
      load_sums(m);
      multiply_exactly(a.row(k0) + m0 + m, a.width, K, [&](int64_t k) { return grad.rows[k0 + k]; }, N, p, row);
    });
  }
  for (int m = 0; m < count; ++m) {
    for_vectors(grad.sums + (m0 + m) * N, N, p, product + m * kWidth,
                [](C* sum, C* part, int64_t left) { store_up_to(sum, load(part), left); });
  }
}

template <class S, class Engine>
void Backward<S, Engine>::add_bias_grad(const Share& share, int64_t rows, bool start) const {
  constexpr int kVectors = 8;  // side by side, so that rows are read in order
  const int64_t N = 4 * shape_.H;
  share.for_part(ceil_div(N, kVectors * L), [&](int64_t part) {
    Vec<C> sum[kVectors] = {};
    const int64_t first = part * kVectors * L;
    const auto for_vectors = [&](const auto& f) {
      for (int v = 0; v < kVectors && first + v * L < N; ++v) f(first + v * L, sum[v]);
    };
    for_vectors([&](int64_t n, Vec<C>& to) { to = start ? Vec<C>{} : load_up_to(db_ + n, N - n); });
    for (int64_t row = 0; row < rows; ++row) {
      const C* const from = dgates_.row(row);
      if (first + kVectors * L <= N) {
        for (int v = 0; v < kVectors; ++v) sum[v] += load(from + first + v * L);
      } else {
        for_vectors([&](int64_t n, Vec<C>& to) { to += load_up_to(from + n, N - n); });
      }
    }
    for_vectors([&](int64_t n, Vec<C>& from) { store_up_to(db_ + n, from, N - n); });
  });
}

template <class S, class Engine>
void Backward<S, Engine>::input_grads(const Share& share, int64_t rows) const {
  for (int64_t p = 0; p < column_panels(shape_.I); ++p) {
    share.for_part(ceil_div(rows, Engine::kRows), [&](int64_t tile) {
      const int64_t first = tile * Engine::kRows, I = shape_.I;
      const int count = tile_count(rows, first);
      alignas(64) C sums[Engine::kRows * kWidth];
      multiply(dgates_, first, count, w_ih_, dir_.weights.w_ih, I, p, sums);
      for (int m = 0; m < count; ++m) {
        for_vectors(dx_row(row_step_[first + m], row_slot_[first + m]), I, p, sums + m * kWidth,
                    [&](S* dx, C* sum, int64_t left) {
                      Vec<C> value = load(sum);
                      if (add_to_dx_) value += load_up_to(dx, left);
                      store_up_to(dx, value, left);
                    });
      }
    });
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
