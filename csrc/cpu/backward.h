// Backward pass of one direction of a layer.
//
// Chunks of steps are walked from the last to the first. Within a chunk only the recurrence is sequential:
// dh of a step is dgates of the step after it times w_hh, and the gate gradients come out of those tiles.
// They are kept for the chunk as rows [4H] of `dgates_`; the weight gradients and dx are then plain products
// over all its rows, each element summed in the order of the rows.
#pragma once

#include "forward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S>
class Backward {
 public:
  using C = Compute<S>;
  static constexpr int L = kLanes<C>;
  static constexpr int kWidth = kPanelWidth<C>;

  Backward(const LayerBackward& layer, const BackwardDirection& direction, const Steps& steps, bool add_to_dx,
           Arena& arena)
      : layer_(layer), d_(direction), steps_(steps), shape_(layer.shape), add_to_dx_(add_to_dx) {
    const auto [T, B, I, H, P, projected] = shape_;
    const int64_t row_bytes = 4 * H * static_cast<int64_t>(sizeof(C));
    int64_t rows = row_bytes > 0 ? kChunkBytes / row_bytes : 0;
    if (rows < kLeastChunkRows) rows = kLeastChunkRows;
    chunk_steps_ = B > 0 ? ceil_div(rows, B) : T;
    if (chunk_steps_ > T) chunk_steps_ = T;
    chunk_rows_ = chunk_steps_ * B;

    dgates_ = arena.get<C>(chunk_rows_ * 4 * H);
    later_dgates_ = arena.get<C>(B * 4 * H);
    row_slot_ = arena.get<int64_t>(chunk_rows_);
    row_step_ = arena.get<int64_t>(chunk_rows_);
    dc_ = arena.get<C>(B * ceil_div(H, L) * L);
    w_hh_ = arena.get<C>(column_panels(P) * 4 * H * kWidth);
    if (projected) {
      dh_ = arena.get<C>(chunk_rows_ * P);
      hidden_ = arena.get<C>(chunk_rows_ * H);
      w_hr_ = arena.get<C>(column_panels(H) * P * kWidth);
    }
    if (layer_.dx) w_ih_ = arena.get<C>(column_panels(I) * 4 * H * kWidth);
    const int64_t widest = I > P ? (I > H ? I : H) : (P > H ? P : H);
    const int64_t most_rows = 4 * H > P ? 4 * H : P;  // of a weight matrix
    source_rows_ = arena.get<const S*>(most_rows > chunk_rows_ ? most_rows : chunk_rows_);
    if (d_.grads.wanted) {
      columns_ = arena.get<C>(column_panels(widest) * chunk_rows_ * kWidth);
      dw_ih_ = sums_for(d_.grads.w_ih, 4 * H * I, arena);
      dw_hh_ = sums_for(d_.grads.w_hh, 4 * H * P, arena);
      if (d_.grads.b_ih) db_ = sums_for(d_.grads.b_ih, 4 * H, arena);
      if (projected) dw_hr_ = sums_for(d_.grads.w_hr, P * H, arena);
    }
  }

  StepWork step_work() const {
    const int64_t panels = column_panels(shape_.P);
    return {shape_.B, kTileRows, panels, panels * 4 * shape_.H * kWidth * static_cast<int64_t>(sizeof(C))};
  }

  void run(const Team& team) const {
    const Share share(team, step_work());
    prepare(share);
    const int64_t chunks = ceil_div(shape_.T, chunk_steps_);
    for (int64_t n = chunks - 1; n >= 0; --n) run_chunk(share, n * chunk_steps_);
    finish(share);
    team.sync();
  }

 private:
  // Enough rows per chunk for the weight gradients to be worth a pass over their sums.
  static constexpr int64_t kLeastChunkRows = 256;

  static int64_t column_panels(int64_t N) { return ceil_div(N, kWidth); }

  // Weight gradients are summed in place where storage can hold the sums.
  static C* sums_for(void* out, int64_t count, Arena& arena) {
    return sizeof(S) == sizeof(C) ? static_cast<C*>(out) : arena.get<C>(count);
  }

  // ---- before the last step ----------------------------------------------------------------------

  void prepare(const Share& share) const {
    const auto [T, B, I, H, P, projected] = shape_;
    pack_matrix(share, d_.weights.w_hh, 4 * H, P, w_hh_);
    if (projected) pack_matrix(share, d_.weights.w_hr, P, H, w_hr_);
    if (layer_.dx) pack_matrix(share, d_.weights.w_ih, 4 * H, I, w_ih_);
    share.team.sync();
  }

  void pack_matrix(const Share& share, const Matrix& matrix, int64_t K, int64_t N, C* panels) const {
    share.team.sync();  // source_rows_ is shared
    share.for_part(K, [&](int64_t k) { source_rows_[k] = static_cast<const S*>(matrix.data) + k * matrix.row_stride; });
    share.team.sync();
    share.for_part(column_panels(N), [&](int64_t p) { pack_columns(source_rows_, K, N, p, panels + p * K * kWidth); });
  }

  // ---- a chunk: the recurrence, then the products over all of its rows ---------------------------

  void run_chunk(const Share& share, int64_t s0) const {
    const int64_t s1 = s0 + chunk_steps_ < shape_.T ? s0 + chunk_steps_ : shape_.T;
    int64_t rows = 0;
    for (int64_t s = s0; s < s1; ++s) {
      share.for_part(steps_.active(s), [&](int64_t slot) {
        row_slot_[rows + slot] = slot;
        row_step_[rows + slot] = s;
      });
      rows += steps_.active(s);
    }
    // dgates rows of the step after the current one: in the chunk, or left over from the chunk before
    const C* later = later_dgates_;
    int64_t end = rows;
    for (int64_t s = s1 - 1; s >= s0; --s) {
      const int64_t first_row = end - steps_.active(s);
      run_step(share, s, first_row, later);
      later = dgates_ + first_row * 4 * shape_.H;
      end = first_row;
    }
    if (share.by_rows) share.team.sync();  // members who share rows have just waited
    share.for_part(steps_.active(s0),
                   [&](int64_t slot) { copy_row(dgates_ + slot * 4 * shape_.H, later_dgates_ + slot * 4 * shape_.H); });
    if (d_.grads.wanted) add_weight_grads(share, rows, s1 == shape_.T);
    if (layer_.dx) input_grads(share, rows);
    share.team.sync();
  }

  void copy_row(const C* from, C* to) const {
    __builtin_memcpy(to, from, static_cast<size_t>(4 * shape_.H) * sizeof(C));
  }

  void run_step(const Share& share, int64_t s, int64_t first_row, const C* later) const {
    const int64_t N = shape_.P, active = steps_.active(s);
    share.for_panels(column_panels(N), [&](int64_t p) {
      share.for_tiles(active, [&](int64_t first, int count) {
        alignas(64) C sums[kTileRows * kWidth];
        recurrent_grad(s, first, count, p, later, sums);
        for (int m = 0; m < count; ++m) {
          for (int g = 0; g < 4; ++g) {
            const int64_t n = p * kWidth + g * L;
            if (n < N) take_dh(s, first + m, first_row + first + m, n, load(sums + (m * 4 + g) * L));
          }
        }
      });
    });
    share.sync_rows();
    if (!shape_.projected) return;
    share.for_panels(column_panels(shape_.H), [&](int64_t p) {
      share.for_tiles(active, [&](int64_t first, int count) { unproject(s, first, count, first_row, p); });
    });
    share.sync_rows();
  }

  // sums = what the step after s, or the end of the sequence, wants of h at step s
  void recurrent_grad(int64_t s, int64_t first, int count, int64_t p, const C* later, C* sums) const {
    const int64_t K = 4 * shape_.H, running = steps_.active(s + 1);
    __builtin_memset(sums, 0, static_cast<size_t>(count) * kWidth * sizeof(C));
    const C* a[kTileRows] = {};
    int rows = 0;  // slots that go on after s come first
    for (; rows < count && first + rows < running; ++rows) a[rows] = later + (first + rows) * K;
    if (rows > 0) multiply_panel(rows, panel_vectors<C>(shape_.P, p), a, 1, K, w_hh_ + p * K * kWidth, sums);
    for (int m = 0; m < rows; ++m) {
      if (steps_.resets_before(s + 1, first + m, d_.reverse)) {
        __builtin_memset(sums + m * kWidth, 0, kWidth * sizeof(C));
      }
    }
    for (int m = rows; m < count; ++m) {
      copy_from(d_.dh_n, steps_.row(first + m), shape_.P, p, sums + m * kWidth);
    }
  }

  static void copy_from(const Matrix& matrix, int64_t row, int64_t N, int64_t p, C* sums) {
    if (!matrix.data) return;
    const S* from = static_cast<const S*>(matrix.data) + row * matrix.row_stride;
    for (int64_t n = p * kWidth; n < N && n < (p + 1) * kWidth; n += L) {
      store(sums + (n - p * kWidth), load_up_to(from + n, N - n));
    }
  }

  void take_dh(int64_t s, int64_t slot, int64_t row, int64_t n, Vec<C> dh) const {
    const int64_t b = steps_.row(slot), t = steps_.time(s, slot, d_.reverse), count = shape_.P - n;
    if (d_.dy) dh += load_up_to(static_cast<const S*>(d_.dy) + layer_.dy_map.at(t, b) + n, count);
    if (shape_.projected) {
      store_up_to(dh_ + row * shape_.P + n, dh, count);
    } else {
      unit_grad(s, slot, row, n, dh);
    }
  }

  void unproject(int64_t s, int64_t first, int rows, int64_t first_row, int64_t p) const {
    alignas(64) C sums[kTileRows * kWidth] = {};
    const C* a[kTileRows];
    for (int m = 0; m < rows; ++m) a[m] = dh_ + (first_row + first + m) * shape_.P;
    multiply_panel(rows, panel_vectors<C>(shape_.H, p), a, 1, shape_.P, w_hr_ + p * shape_.P * kWidth, sums);
    for (int m = 0; m < rows; ++m) {
      for (int g = 0; g < 4; ++g) {
        const int64_t u = p * kWidth + g * L;
        if (u < shape_.H) unit_grad(s, first + m, first_row + first + m, u, load(sums + (m * 4 + g) * L));
      }
    }
  }

  // Gate gradients of one row and one vector of units; not inlined, as Forward::finish_unit.
  [[gnu::noinline]] void unit_grad(int64_t s, int64_t slot, int64_t row, int64_t u, Vec<C> dh) const {
    const int64_t H = shape_.H, count = H - u, b = steps_.row(slot), t = steps_.time(s, slot, d_.reverse);
    const S* gates = static_cast<const S*>(d_.gates) + layer_.gates_map.at(t, b) + u;
    const GateValues<Vec<C>> gate{load_up_to(gates, count), load_up_to(gates + H, count),
                                  load_up_to(gates + 2 * H, count), load_up_to(gates + 3 * H, count)};
    const C* cell = static_cast<const C*>(d_.cells) + layer_.cells_map.at(t, b) + u;
    const Vec<C> tanh_c = VecMath<C>::tanh(load_up_to(cell, count));

    const int64_t c_width = ceil_div(H, L) * L;
    C* dc_state = dc_ + slot * c_width + u;
    Vec<C> dc = load_matrix(d_.dc_n, b, u, count, s == steps_.length(slot) - 1);
    if (s < steps_.length(slot) - 1) dc = load(dc_state);
    if (d_.d_cells) dc += load_up_to(static_cast<const C*>(d_.d_cells) + layer_.d_cells_map.at(t, b) + u, count);

    const auto grad = cell_backward(gate, c_before(s, slot, u, count), tanh_c, dh, dc);
    C* to = dgates_ + row * 4 * H + u;
    store_up_to(to, grad.d_pre.i, count);
    store_up_to(to + H, grad.d_pre.f, count);
    store_up_to(to + 2 * H, grad.d_pre.g, count);
    store_up_to(to + 3 * H, grad.d_pre.o, count);
    store(dc_state, steps_.resets_before(s, slot, d_.reverse) ? Vec<C>{} : grad.d_c_prev);
    if (shape_.projected) store_up_to(hidden_ + row * H + u, rounded_to<S>(gate.o * tanh_c), count);
  }

  static Vec<C> load_matrix(const Matrix& matrix, int64_t row, int64_t n, int64_t count, bool wanted) {
    if (!wanted || !matrix.data) return Vec<C>{};
    return load_up_to(static_cast<const S*>(matrix.data) + row * matrix.row_stride + n, count);
  }

  Vec<C> c_before(int64_t s, int64_t slot, int64_t u, int64_t count) const {
    const int64_t b = steps_.row(slot);
    if (steps_.resets_before(s, slot, d_.reverse)) return Vec<C>{};
    if (s == 0) return load_matrix(d_.state.c0, b, u, count, true);
    const int64_t t = steps_.time(s - 1, slot, d_.reverse);
    return load_up_to(static_cast<const C*>(d_.cells) + layer_.cells_map.at(t, b) + u, count);
  }

  // ---- products over the rows of a chunk ---------------------------------------------------------

  // `start`: the sums of this chunk, which is the first to be run, are the first.
  void add_weight_grads(const Share& share, int64_t rows, bool start) const {
    const int64_t H = shape_.H, P = shape_.P;
    const auto x_row = [&](int64_t row) {
      const int64_t slot = row_slot_[row];
      const int64_t t = steps_.time(row_step_[row], slot, d_.reverse);
      return static_cast<const S*>(layer_.x) + layer_.x_map.at(t, steps_.row(slot));
    };
    gather(share, rows, x_row);
    pack_source(share, rows, shape_.I);
    add_product(share, dgates_, 4 * H, rows, shape_.I, start, dw_ih_);

    gather(share, rows, [&](int64_t row) { return h_before(row_step_[row], row_slot_[row]); });
    pack_source(share, rows, P);
    add_product(share, dgates_, 4 * H, rows, P, start, dw_hh_);
    if (shape_.projected) {
      share.team.sync();
      share.for_part(column_panels(H), [&](int64_t p) {
        C* panel = columns_ + p * rows * kWidth;
        for (int64_t row = 0; row < rows; ++row) {
          const C* hidden = hidden_ + row * H;
          pack_columns<C, C>(&hidden, 1, H, p, panel + row * panel_vectors<C>(H, p) * L);
        }
      });
      share.team.sync();
      add_product(share, dh_, P, rows, H, start, dw_hr_);
    }
    if (db_) add_bias_grad(share, rows, start);
  }

  template <class RowOf>
  void gather(const Share& share, int64_t rows, const RowOf& row_of) const {
    share.team.sync();
    share.for_part(rows, [&](int64_t row) { source_rows_[row] = row_of(row); });
    share.team.sync();
  }

  void pack_source(const Share& share, int64_t rows, int64_t N) const {
    share.for_part(column_panels(N),
                   [&](int64_t p) { pack_columns(source_rows_, rows, N, p, columns_ + p * rows * kWidth); });
    share.team.sync();
  }

  const S* h_before(int64_t s, int64_t slot) const {
    const int64_t b = steps_.row(slot);
    if (steps_.resets_before(s, slot, d_.reverse)) return nullptr;
    if (s == 0) {
      const S* h0 = static_cast<const S*>(d_.state.h0.data);
      return h0 ? h0 + b * d_.state.h0.row_stride : nullptr;
    }
    return static_cast<const S*>(d_.y) + layer_.y_map.at(steps_.time(s - 1, slot, d_.reverse), b);
  }

  // sums [M, N] += transpose of a [rows, M] times the packed columns [rows, N]; if `start`, whatever sums held
  void add_product(const Share& share, const C* a, int64_t M, int64_t rows, int64_t N, bool start, C* sums) const {
    const int64_t tiles = ceil_div(M, kTileRows);
    for (int64_t p = 0; p < column_panels(N); ++p) {
      const int vectors = panel_vectors<C>(N, p);
      int64_t k0 = 0;
      do {  // at least once: the sum of no rows is zero
        const int64_t k1 = rows - k0 < kBlockDepth ? rows : k0 + kBlockDepth;
        share.for_part(tiles, [&](int64_t tile) {
          alignas(64) C product[kTileRows * kWidth];
          const int64_t m0 = tile * kTileRows;
          const int count = static_cast<int>(M - m0 < kTileRows ? M - m0 : kTileRows);
          const C* column[kTileRows];
          for (int m = 0; m < count; ++m) {
            column[m] = a + k0 * M + m0 + m;
            for_vectors(sums + (m0 + m) * N, N, p, product + m * kWidth, [&](C* sum, C* part, int64_t left) {
              store(part, start && k0 == 0 ? Vec<C>{} : load_up_to(sum, left));
            });
          }
          multiply_panel(count, vectors, column, M, k1 - k0, columns_ + p * rows * kWidth + k0 * vectors * L, product);
          for (int m = 0; m < count; ++m) {
            for_vectors(sums + (m0 + m) * N, N, p, product + m * kWidth,
                        [](C* sum, C* part, int64_t left) { store_up_to(sum, load(part), left); });
          }
        });
        k0 = k1;
      } while (k0 < rows);
    }
  }

  // f(elements of `row` under vector g of panel p, the vector in the tile, how many are left) for each vector
  template <class E, class F>
  static void for_vectors(E* row, int64_t N, int64_t p, C* tile, const F& f) {
    for (int g = 0; g < 4; ++g) {
      const int64_t n = p * kWidth + g * L;
      if (n < N) f(row + n, tile + g * L, N - n);
    }
  }

  void add_bias_grad(const Share& share, int64_t rows, bool start) const {
    const int64_t N = 4 * shape_.H;
    share.for_part(ceil_div(N, L), [&](int64_t part) {
      const int64_t n = part * L;
      Vec<C> sum = start ? Vec<C>{} : load_up_to(db_ + n, N - n);
      for (int64_t row = 0; row < rows; ++row) sum += load_up_to(dgates_ + row * N + n, N - n);
      store_up_to(db_ + n, sum, N - n);
    });
  }

  // A panel of w_ih stays near while rows pass.
  void input_grads(const Share& share, int64_t rows) const {
    for (int64_t p = 0; p < column_panels(shape_.I); ++p) {
      share.for_part(ceil_div(rows, kTileRows), [&](int64_t tile) {
        const int64_t first = tile * kTileRows, I = shape_.I, K = 4 * shape_.H;
        const int count = static_cast<int>(rows - first < kTileRows ? rows - first : kTileRows);
        alignas(64) C sums[kTileRows * kWidth] = {};
        const C* a[kTileRows];
        for (int m = 0; m < count; ++m) a[m] = dgates_ + (first + m) * K;
        multiply_panel(count, panel_vectors<C>(I, p), a, 1, K, w_ih_ + p * K * kWidth, sums);
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

  S* dx_row(int64_t s, int64_t slot) const {
    return static_cast<S*>(layer_.dx) + layer_.dx_map.at(steps_.time(s, slot, d_.reverse), steps_.row(slot));
  }

  // ---- after the first step ------------------------------------------------------------------------

  void finish(const Share& share) const {
    const auto [T, B, I, H, P, projected] = shape_;
    if (d_.dh0) {
      share.for_panels(column_panels(P), [&](int64_t p) {
        share.for_tiles(B, [&](int64_t first, int count) { initial_h_grad(first, count, p); });
      });
    }
    share.for_part(B, [&](int64_t slot) { finish_row(slot); });
    if (!d_.grads.wanted) return;
    convert_part(share, dw_ih_, 4 * H * I, d_.grads.w_ih);
    convert_part(share, dw_hh_, 4 * H * P, d_.grads.w_hh);
    if (projected) convert_part(share, dw_hr_, P * H, d_.grads.w_hr);
    if (db_) {
      convert_part(share, db_, 4 * H, d_.grads.b_ih);
      convert_part(share, db_, 4 * H, d_.grads.b_hh);
    }
  }

  void initial_h_grad(int64_t first, int count, int64_t p) const {
    alignas(64) C sums[kTileRows * kWidth];
    recurrent_grad(-1, first, count, p, later_dgates_, sums);
    for (int m = 0; m < count; ++m) {
      for_vectors(static_cast<S*>(d_.dh0) + steps_.row(first + m) * shape_.P, shape_.P, p, sums + m * kWidth,
                  [](S* dh0, C* sum, int64_t left) { store_up_to(dh0, load(sum), left); });
    }
  }

  void finish_row(int64_t slot) const {
    const int64_t b = steps_.row(slot), H = shape_.H, c_width = ceil_div(H, L) * L;
    if (d_.dc0) {
      for (int64_t u = 0; u < H; u += L) {
        const Vec<C> dc =
            steps_.length(slot) == 0 ? load_matrix(d_.dc_n, b, u, H - u, true) : load(dc_ + slot * c_width + u);
        store_up_to(static_cast<S*>(d_.dc0) + b * H + u, dc, H - u);
      }
    }
    if (!layer_.dx || add_to_dx_ || layer_.dx_map.packed_offset) return;
    for (int64_t t = steps_.length(slot); t < shape_.T; ++t) {
      S* dx = static_cast<S*>(layer_.dx) + layer_.dx_map.at(t, b);
      __builtin_memset(dx, 0, static_cast<size_t>(shape_.I) * sizeof(S));
    }
  }

  static void convert_part(const Share& share, const C* sums, int64_t count, void* out) {
    if (static_cast<const void*>(sums) == out) return;
    const int64_t parts = ceil_div(count, L);
    share.for_part(parts, [&](int64_t part) {
      const int64_t n = part * L;
      store_up_to(static_cast<S*>(out) + n, load_up_to(sums + n, count - n), count - n);
    });
  }

  const LayerBackward& layer_;
  const BackwardDirection& d_;
  const Steps& steps_;
  const SequenceShape shape_;
  const bool add_to_dx_;
  int64_t chunk_steps_, chunk_rows_;
  C* dgates_;                                    // [chunk_rows, 4H]
  C* later_dgates_;                              // [B, 4H], the first step of the chunk that was run before
  int64_t *row_slot_, *row_step_;                // [chunk_rows]
  C* dc_;                                        // [B, H rounded up to vectors]
  C *w_hh_, *w_hr_ = nullptr, *w_ih_ = nullptr;  // packed as columns
  C *dh_ = nullptr, *hidden_ = nullptr;          // [chunk_rows, P] and [chunk_rows, H], with a projection
  const S** source_rows_;                        // rows that are being packed
  C* columns_ = nullptr;                         // and where they are packed
  C *dw_ih_ = nullptr, *dw_hh_ = nullptr, *db_ = nullptr, *dw_hr_ = nullptr;
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
