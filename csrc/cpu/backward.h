// Backward pass of one direction of a layer, from its last step to its first:
//
//     dh_t              = dy_t + dgates_t+1 w_hh                        [P]; with a projection, times w_hr: [H]
//     dgates_t, dc_t    from dh_t, dc_t+1 and what the forward pass saved: cell_backward() of gate_math.h
//
//     dx                = dgates w_ih                                   of all steps of a chunk in one product
//     dw_ih             = Σ dgates_tᵀ x_t          dw_hh = Σ dgates_tᵀ h_t-1
//     db                = Σ dgates_t               dw_hr = Σ dh_tᵀ hidden_t
//
// hidden, h before its projection, is o tanh(c), which a step has at hand; it is kept for the products of its chunk,
// with that of the step before the chunk. h is hidden, or w_hr times it once more, rounded as y was: no y is read.
//
// Chunks of steps are walked from the last to the first. Within a chunk only the recurrence is sequential. Its gate
// gradients are kept as rows [4H] of `dgates_`, step after step, the active slots of each; the weight gradients and dx
// are then plain products over all these rows, each element summed in the order of the rows:
//
//     dgates_:  | step s0: slots 0 .. active(s0) - 1 | step s0 + 1: slots 0 .. active(s0 + 1) - 1 | ...
//
// Here the weights are matrices [4H, N] whose columns stay columns (N = P, I or H), packed into panels of four vectors.
#pragma once

#include <initializer_list>

#include "forward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S, class Engine>
class Backward {
 public:
  using C = Compute<S>;
  using F = typename Engine::F;
  using Packed = typename Engine::Packed;
  static constexpr int L = kLanes<C>;
  static constexpr bool kDirectionsAtOnce = false;
  static constexpr int kWidth = kPanelWidth<C>;

  // `direction` 1 adds to the dx of direction 0.
  Backward(const LayerBackward& layer, int direction, const Plan& plan, const Walk& walk, Arena& arena)
      : layer_(layer),
        dir_(layer.direction[direction]),
        plan_(plan),
        walk_(walk),
        shape_(layer.shape),
        add_to_dx_(direction > 0),
        cell_(layer.cell),
        steps_(layer.cell, direction) {
    const auto [T, B, I, H, P, projected] = shape_;
    chunk_rows_ = plan_.chunk_steps * B;

    gate_size_ = Engine::kSplitsFloats ? ceil_div(H, L) * L : H;
    dgates_ = grad_rows(chunk_rows_, 4 * H, 4 * gate_size_, arena);
    later_dgates_ = grad_rows(B, 4 * H, 4 * gate_size_, arena);
    row_slot_ = arena.get<int64_t>(chunk_rows_);
    row_step_ = arena.get<int64_t>(chunk_rows_);
    dc_ = arena.get<C>(B * ceil_div(H, L) * L);
    const int64_t gate_panel = Engine::panel_size(4 * gate_size_);
    by_kernel_ = cell_ && cell_->options.tensorflow;
    if (!plan_.in_place[kRecurrent]) w_hh_ = arena.get<Packed>(column_panels(P) * gate_panel);
    if (projected) {
      dh_ = grad_rows(chunk_rows_, P, P, arena);
      w_hr_ = arena.get<Packed>(column_panels(H) * Engine::panel_size(P));
    }
    if (layer_.dx && !plan_.in_place[kInput]) w_ih_ = arena.get<Packed>(column_panels(I) * gate_panel);
    const int64_t most_rows = 4 * gate_size_ > P ? 4 * gate_size_ : P;
    matrix_rows_ = arena.get<const S*>(most_rows > I ? most_rows : I);
    sums_width_ = column_panels(P > H ? P : H) * kWidth;
    sums_ = arena.get<C>(B * sums_width_);
    if (cell_) prepare_cell(arena);
    if (dir_.grads.wanted) by_kernel_ ? prepare_kernel_grads(arena) : prepare_grads(arena);
  }

  void run(const Team& team) const {
    const Share share(team, plan_);
    [[maybe_unused]] const typename Engine::Session session;
    prepare(share);
    const int64_t chunks = ceil_div(shape_.T, plan_.chunk_steps);
    for (int64_t n = chunks - 1; n >= 0; --n) run_chunk(share, n * plan_.chunk_steps);
    finish(share);
    team.sync();
  }

 private:
  // Rows of floats, and the same as they are multiplied
  struct GradRows {
    C* values = nullptr;
    F* factors = nullptr;
    int64_t width = 0, factors_width = 0, factors_size = 0;

    C* row(int64_t n) const { return values + n * width; }
    F* factors_of(int64_t n) const { return factors + n * factors_size; }
    GradRows from(int64_t n) const { return {row(n), factors_of(n), width, factors_width, factors_size}; }

    // `count` elements of row n, which among its factors start elsewhere
    void put(int64_t n, int64_t at, int64_t at_factors, Vec<C> value, int64_t count) const {
      store_up_to(row(n) + at, value, count);
      if constexpr (Engine::kSplitsFloats) {
        const Vec<C> kept = count >= L ? value : load_up_to(row(n) + at, count);  // nothing in the lanes behind
        Engine::put(factors_of(n), at_factors, kept, factors_width);
      }
    }
    void copy_row(int64_t n, const GradRows& to) const {
      __builtin_memcpy(to.row(n), row(n), static_cast<size_t>(width) * sizeof(C));
      if constexpr (Engine::kSplitsFloats) {
        __builtin_memcpy(to.factors_of(n), factors_of(n), static_cast<size_t>(factors_size) * sizeof(F));
      }
    }
  };

  static GradRows grad_rows(int64_t rows, int64_t width, int64_t factors_width, Arena& arena) {
    GradRows made{arena.get<C>(rows * width), nullptr, width, factors_width, width};
    if constexpr (Engine::kSplitsFloats) {
      made.factors_size = Engine::row_size(factors_width);
      made.factors = arena.get<F>(rows * made.factors_size);
    } else {
      made.factors = made.values;
    }
    return made;
  }

  // A weight gradient: sums over a chunk's rows of the products of gradients and these
  struct WeightGrad {
    const S** rows = nullptr;  // [chunk_rows], null for zeros
    Packed* panels = nullptr;  // the same, packed as columns
    int64_t N = 0;
    C* sums = nullptr;  // [.., N]
  };

  WeightGrad product_for(void* out, int64_t M, int64_t N, Arena& arena) const {
    return {arena.get<const S*>(chunk_rows_), arena.get<Packed>(column_panels(N) * Engine::panel_size(chunk_rows_)), N,
            sums_for(out, M * N, arena)};
  }

  void prepare_cell(Arena& arena);

  // What gates were normalised from is computed again, of all rows of a chunk.
  void prepare_norm(Arena& arena);

  void prepare_grads(Arena& arena);

  // Of TensorFlow's kernel: here gate gradients are what is packed, and x and h are transposed.
  void prepare_kernel_grads(Arena& arena);

  void project_again_in(Arena& arena);

  static int64_t column_panels(int64_t N) { return ceil_div(N, kWidth); }

  // Weight gradients are summed in place where storage can hold the sums.
  static C* sums_for(void* out, int64_t count, Arena& arena) {
    return sizeof(S) == sizeof(C) ? static_cast<C*>(out) : arena.get<C>(count);
  }

  // ---- before the last step ----------------------------------------------------------------------

  void prepare(const Share& share) const {
    const auto [T, B, I, H, P, projected] = shape_;
    if (by_kernel_) {
      pack_kernel(share, dir_.weights.w_hh, P, w_hh_);
      pack_kernel(share, dir_.weights.w_ih, I, w_ih_);
    } else {
      pack_matrix(share, dir_.weights.w_hh, 4, H, gate_size_, P, w_hh_);
      if (projected) pack_matrix(share, dir_.weights.w_hr, 1, P, P, H, w_hr_);
      if (layer_.dx) pack_matrix(share, dir_.weights.w_ih, 4, H, gate_size_, I, w_ih_);
    }
    if (cell_) share.for_part(B, [&](int64_t slot) { start_cell_row(slot); });
    if (norm_) pack_again(share);
    if (w_hr_again_) {
      share.for_part(H, [&](int64_t u) {
        for (int64_t n = 0; n < P; ++n) w_hr_columns_[u * P + n] = matrix_row(dir_.weights.w_hr, n)[u];
      });
      pack_matrix(share, w_hr_by_columns(), 1, H, H, P, w_hr_again_);
    }
    share.team.sync();
  }

  // [N, 4H] in panels, or nothing where it is multiplied as it lies
  void pack_kernel(const Share& share, const Matrix& matrix, int64_t N, Packed* panels) const;

  // The weights as a forward pass multiplies by them
  void pack_again(const Share& share) const;

  void start_cell_row(int64_t slot) const;

  Matrix w_hr_by_columns() const { return {w_hr_columns_, shape_.P}; }

  // Some blocks of rows, each filled up to `size`
  void pack_matrix(const Share& share, const Matrix& matrix, int64_t blocks, int64_t rows, int64_t size, int64_t N,
                   Packed* panels) const {
    share.team.sync();  // matrix_rows_ is shared
    share.for_part(blocks * size, [&](int64_t k) {
      const int64_t block = k / size, row = k % size;
      matrix_rows_[k] = row < rows ? matrix_row(matrix, block * rows + row) : nullptr;
    });
    share.team.sync();
    pack_rows(share, matrix_rows_, blocks * size, N, panels);
  }

  static const S* matrix_row(const Matrix& matrix, int64_t row) {
    return static_cast<const S*>(matrix.data) + row * matrix.row_stride;
  }

  // ---- a chunk: the recurrence, then the products over all of its rows ---------------------------

  void run_chunk(const Share& share, int64_t s0) const {
    const int64_t s1 = s0 + plan_.chunk_steps < shape_.T ? s0 + plan_.chunk_steps : shape_.T;
    int64_t rows = 0;
    for (int64_t s = s0; s < s1; ++s) {
      share.for_part(walk_.active(s), [&](int64_t slot) {
        row_slot_[rows + slot] = slot;
        row_step_[rows + slot] = s;
      });
      rows += walk_.active(s);
    }
    if (hidden_ && !cell_ && s0 > 0) recall_hidden(share, s0 - 1);
    if (norm_) sum_again(share, rows);
    const GradRows& dgates = steps_.norm() == Norm::kRows ? dgates_h_ : dgates_;  // those that h_t-1 is multiplied by
    // dgates rows of the step after the current one: in the chunk, or left over from the chunk before
    GradRows later = later_dgates_;
    int64_t end = rows;
    for (int64_t s = s1 - 1; s >= s0; --s) {
      const int64_t first_row = end - walk_.active(s);
      run_step(share, s, first_row, later);
      later = dgates.from(first_row);
      end = first_row;
    }
    if (share.by_rows) share.team.sync();  // members who share rows have just waited
    share.for_part(walk_.active(s0), [&](int64_t slot) { dgates.copy_row(slot, later_dgates_); });
    if (dir_.grads.wanted) by_kernel_ ? add_kernel_grads(share, s1, rows) : add_weight_grads(share, s0, s1, rows);
    if (layer_.dx) input_grads(share, rows);
    share.team.sync();
  }

  void run_step(const Share& share, int64_t s, int64_t first_row, const GradRows& later) const {
    const int64_t active = walk_.active(s);
    share.for_panels(column_panels(shape_.P), [&](int64_t p) {
      share.for_tiles(active, [&](int64_t first, int count) {
        alignas(64) C sums[Engine::kRows * kWidth];
        recurrent_grad(s, first, count, p, later, sums);
        keep_sums(first, count, p, sums);
      });
    });
    for_my_rows(share, active, shape_.P,
                [&](int64_t slot, int64_t n0, int64_t n1) { take_h_grad(s, slot, first_row + slot, n0, n1); });
    share.sync_rows();
    if (shape_.projected) {
      share.for_panels(column_panels(shape_.H), [&](int64_t p) {
        share.for_tiles(active, [&](int64_t first, int count) {
          alignas(64) C sums[Engine::kRows * kWidth];
          multiply(dh_, first_row + first, count, w_hr_, dir_.weights.w_hr, shape_.H, p, sums);
          keep_sums(first, count, p, sums);
        });
      });
      for_my_rows(share, active, shape_.H, [&](int64_t slot, int64_t u0, int64_t u1) {
        const C* const dh = sums_ + slot * sums_width_;
        if (!cell_) return pointwise_backward(s, slot, first_row + slot, u0, u1, dh, nullptr);
        for (int64_t u = u0; u < u1; u += L) cell_pointwise_backward(s, slot, first_row + slot, u, load(dh + u));
      });
      share.sync_rows();
    }
    if (!norm_) return;
    share.for_groups([&](const Share::Group& group) {
      share.for_slots(group, active, [&](int64_t slot) { norm_row_backward(share, s, slot, first_row + slot); });
    });
    share.sync_rows();
  }

  // sums = what the step after s, or the end of the sequence, wants of h at step s
  void recurrent_grad(int64_t s, int64_t first, int count, int64_t p, const GradRows& later, C* sums) const {
    const int64_t running = walk_.active(s + 1) - first;  // slots that go on after s come first
    const int rows = running < count ? (running > 0 ? static_cast<int>(running) : 0) : count;
    multiply(later, first, rows, w_hh_, dir_.weights.w_hh, shape_.P, p, sums);
    __builtin_memset(sums + rows * kWidth, 0, static_cast<size_t>(count - rows) * kWidth * sizeof(C));
    if (h_mask_ || kept_dh_) pass_to_h(first, rows, p, sums);
    for (int m = 0; m < rows; ++m) {
      if (walk_.resets_before(s + 1, first + m, dir_.reverse)) {
        __builtin_memset(sums + m * kWidth, 0, kWidth * sizeof(C));
      }
    }
    for (int m = rows; m < count; ++m) {
      copy_from(dir_.dh_n, walk_.row(first + m), shape_.P, p, sums + m * kWidth);
    }
  }

  // What products with h want of it becomes what is wanted of h, which later steps may have kept besides.
  void pass_to_h(int64_t first, int rows, int64_t p, C* sums) const;

  // sums = rows first .. first + count of a times panel p of a matrix [a.width, N]
  void multiply(const GradRows& a, int64_t first, int count, const Packed* panels, const Matrix& matrix, int64_t N,
                int64_t p, C* sums) const {
    if (count <= 0) return;
    const F* factors[Engine::kRows] = {};
    for (int m = 0; m < count; ++m) factors[m] = a.factors_of(first + m);
    __builtin_memset(sums, 0, static_cast<size_t>(count) * kWidth * sizeof(C));
    if (!panels) return multiply_kernel(count, factors, a.factors_width, matrix, N, p, sums);
    Engine::multiply(count, panel_vectors<C>(N, p), factors, a.factors_width,
                     panels + p * Engine::panel_size(a.factors_width), sums);
    if constexpr (!Engine::kKeepsInfinity) {
      Engine::repair(count, panel_vectors<C>(N, p), sums, [&](int m, C* row) {
        __builtin_memset(row, 0, kWidth * sizeof(C));
        multiply_exactly(a.row(first + m), 1, a.width, [&](int64_t k) { return matrix_row(matrix, k); }, N, p, row);
      });
    }
  }

  // The same with TensorFlow's kernel in place: rows [N, K] whose sums over K are columns here
  static void multiply_kernel(int count, const F* const* a, int64_t K, const Matrix& matrix, int64_t N, int64_t p,
                              C* sums);

  // sum += K numbers, some way apart, times rows of N at panel p, slowly: to repair a row
  template <class RowOf>
  static void multiply_exactly(const C* a, int64_t apart, int64_t K, const RowOf& row_of, int64_t N, int64_t p,
                               C* sum) {
    for (int64_t k = 0; k < K; ++k) {
      const S* row = row_of(k);  // null for zeros, which are not nothing to an infinity
      for (int64_t n = p * kWidth; n < N && n < (p + 1) * kWidth; n += L) {
        C* part = sum + (n - p * kWidth);
        store(part, load(part) + a[k * apart] * (row ? load_up_to(row + n, N - n) : Vec<C>{}));
      }
    }
  }

  static void copy_from(const Matrix& matrix, int64_t row, int64_t N, int64_t p, C* sums) {
    if (!matrix.data) return;
    const S* from = static_cast<const S*>(matrix.data) + row * matrix.row_stride;
    for (int64_t n = p * kWidth; n < N && n < (p + 1) * kWidth; n += L) {
      store(sums + (n - p * kWidth), load_up_to(from + n, N - n));
    }
  }

  // Of a step, what is wanted of h: tile by tile from the products, then row by row into the pointwise part, which
  // reads and writes much that lies side by side in a row.
  void keep_sums(int64_t first, int count, int64_t p, const C* sums) const {
    for (int m = 0; m < count; ++m) {
      for (int g = 0; g < 4; ++g) {
        store(sums_ + (first + m) * sums_width_ + p * kWidth + g * L, load(sums + (m * 4 + g) * L));
      }
    }
  }

  // f(slot, n0, n1) for the slots whose columns n0 .. n1 - 1 of N are mine
  template <class Body>
  static void for_my_rows(const Share& share, int64_t active, int64_t N, const Body& f) {
    const auto [first, last] = share.panels_of_mine(column_panels(N));
    const int64_t n1 = last * kWidth < N ? last * kWidth : N;
    if (first * kWidth >= n1) return;
    share.for_groups([&](const Share::Group& group) {
      for (int64_t slot = group.first; slot < group.last && slot < active; ++slot) f(slot, first * kWidth, n1);
    });
  }

  void take_h_grad(int64_t s, int64_t slot, int64_t row, int64_t n0, int64_t n1) const {
    const int64_t b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
    const C* const sums = sums_ + slot * sums_width_;
    const S* const dy = dir_.dy ? static_cast<const S*>(dir_.dy) + layer_.dy_map.at(t, b) : nullptr;
    if (!cell_ && !shape_.projected) return pointwise_backward(s, slot, row, n0, n1, sums, dy);
    for (int64_t n = n0; n < n1; n += L) {
      Vec<C> dh = load(sums + n);
      if (dy) dh += load_up_to(dy + n, shape_.P - n);
      if (cell_) {
        pass_to_cell(s, slot, row, n, dh);
      } else {
        dh_.put(row, n, n, dh, shape_.P - n);
      }
    }
  }

  // Gate gradients of units u0 .. u1 - 1 of a row, from what later steps (`dh`) and a caller (`dy`) want of h. Not
  // inlined: its numbers need all registers.
  [[gnu::noinline]] void pointwise_backward(int64_t s, int64_t slot, int64_t row, int64_t u0, int64_t u1, const C* dh,
                                            const S* dy) const {
    const int64_t H = shape_.H, b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
    const S* const gates = static_cast<const S*>(dir_.gates) + layer_.gates_map.at(t, b);
    const C* const cell = static_cast<const C*>(dir_.cells) + layer_.cells_map.at(t, b);
    const C* const d_cell = dir_.d_cells ? static_cast<const C*>(dir_.d_cells) + layer_.d_cells_map.at(t, b) : nullptr;
    const bool ends = s == walk_.length(slot) - 1, forgets = walk_.resets_before(s, slot, dir_.reverse);
    C* const dc_state = dc_ + slot * (ceil_div(H, L) * L);
    const auto take = [&](int64_t u, int64_t count) {
      const auto gate = [&](int g) { return load_up_to(gates + g * H + u, count); };
      const GateValues<Vec<C>> values{gate(0), gate(1), gate(2), gate(3)};
      const Vec<C> tanh_c = VecMath<C>::tanh(load_up_to(cell + u, count));
      Vec<C> d_h = load(dh + u), d_c = ends ? load_matrix(dir_.dc_n, b, u, count, true) : load(dc_state + u);
      if (dy) d_h += load_up_to(dy + u, count);
      if (d_cell) d_c += load_up_to(d_cell + u, count);
      const auto grad = cell_backward(values, c_before(s, slot, u, count), tanh_c, d_h, d_c);
      dgates_.put(row, u, u, grad.d_pre.i, count);
      dgates_.put(row, H + u, gate_size_ + u, grad.d_pre.f, count);
      dgates_.put(row, 2 * H + u, 2 * gate_size_ + u, grad.d_pre.g, count);
      dgates_.put(row, 3 * H + u, 3 * gate_size_ + u, grad.d_pre.o, count);
      store(dc_state + u, forgets ? Vec<C>{} : grad.d_c_prev);
      if (hidden_) store_up_to(hidden_ + row * H + u, values.o * tanh_c, count);
    };
    int64_t u = u0;
    for (; u + L <= u1; u += L) take(u, L);  // as a number that the compiler knows
    if (u < u1) take(u, H - u);
  }

  // The gradient of what a step of a cell with options returns as h becomes that of what it computes.
  [[gnu::noinline]] void pass_to_cell(int64_t s, int64_t slot, int64_t row, int64_t n, Vec<C> dh) const;

  // As pointwise_backward, by cell_math.h
  [[gnu::noinline]] void cell_pointwise_backward(int64_t s, int64_t slot, int64_t row, int64_t u, Vec<C> dh) const;

  // c as the step computed it, which is what it left where nothing is kept. Where it was cut it was left as the bound.
  LSTM_EXT_INLINE Vec<C> c_computed(Vec<C> i, Vec<C> f, Vec<C> masked_g, Vec<C> c_prev, const Place& place) const;
  static LSTM_EXT_INLINE auto is_cut(Vec<C> c, C most) { return (c < 0 ? -c : c) >= most; }

  void put_gate_grads(int64_t row, int64_t u, const GateValues<Vec<C>>& grad, int64_t count) const;
  int64_t quarter(int gate) const { return by_kernel_ ? kernel_quarter(gate) : gate; }

  // What x and h brought to the gates of all rows of a chunk; with Norm::kGates both together, and the bias.
  void sum_again(const Share& share, int64_t rows) const;

  // Of the gates from n on, in the order of the weights
  Vec<C> bias_at(int64_t n, int64_t count) const;

  // A row of sums [4H] as [4][H filled up] of i f g o
  void gather_row(const C* sums, C* gates) const;

  // As cell_pointwise_backward with layer normalisation: a row as a whole, from norm_dh_.
  [[gnu::noinline]] void norm_row_backward(const Share& share, int64_t s, int64_t slot, int64_t row) const;

  // What later steps, a caller and the end want of c
  LSTM_EXT_INLINE Vec<C> dc_of(int64_t s, int64_t slot, const Place& place) const;

  struct CellInner {
    Vec<C> d_i, d_f, d_g;
  };
  LSTM_EXT_INLINE CellInner inner_grads(Vec<C> i, Vec<C> f, Vec<C> g, Vec<C> mask, Vec<C> masked_g, Vec<C> c_prev,
                                        Vec<C> dc) const;

  void add_to_peephole(int64_t slot, int64_t u, Vec<C> d_i, Vec<C> d_f, Vec<C> d_o, Vec<C> c_prev, Vec<C> c) const;

  Place place_of(int64_t s, int64_t slot, int64_t unit) const {
    return {walk_.time(s, slot, dir_.reverse), walk_.row(slot), unit};
  }

  // At the unit of a place
  const S* y_row(const Place& place) const;

  static Vec<C> load_matrix(const Matrix& matrix, int64_t row, int64_t n, int64_t count, bool wanted) {
    if (!wanted || !matrix.data) return Vec<C>{};
    return load_up_to(static_cast<const S*>(matrix.data) + row * matrix.row_stride + n, count);
  }

  Vec<C> c_before(int64_t s, int64_t slot, int64_t u, int64_t count) const {
    const int64_t b = walk_.row(slot);
    if (walk_.resets_before(s, slot, dir_.reverse)) return Vec<C>{};
    if (s == 0) return load_matrix(dir_.state.c0, b, u, count, true);
    const int64_t t = walk_.time(s - 1, slot, dir_.reverse);
    return load_up_to(static_cast<const C*>(dir_.cells) + layer_.cells_map.at(t, b) + u, count);
  }

  // Of the step before a chunk; its rows end where those of the chunk begin.
  void recall_hidden(const Share& share, int64_t s) const {
    const int64_t active = walk_.active(s), H = shape_.H;
    share.for_part(active, [&](int64_t slot) {
      const int64_t b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
      const S* o = static_cast<const S*>(dir_.gates) + layer_.gates_map.at(t, b) + 3 * H;
      const C* cell = static_cast<const C*>(dir_.cells) + layer_.cells_map.at(t, b);
      for (int64_t u = 0; u < H; u += L) {
        const Vec<C> h = cell_output<VecMath<C>>(load_up_to(o + u, H - u), load_up_to(cell + u, H - u));
        store_up_to(hidden_ + (slot - active) * H + u, h, H - u);
      }
    });
  }

  // ---- products over the rows of a chunk ---------------------------------------------------------

  // Of steps s0 .. s1 - 1, which have so many rows together.
  void add_weight_grads(const Share& share, int64_t s0, int64_t s1, int64_t rows) const;

  void pack_rows(const Share& share, const S* const* from, int64_t rows, int64_t N, Packed* panels) const {
    share.for_part(column_panels(N),
                   [&](int64_t p) { Engine::pack(from, rows, N, p, panels + p * Engine::panel_size(rows)); });
  }

  // h of rows first .. last - 1 from their hidden
  void project_again(const Share& share, int64_t first, int64_t last) const;

  // What row `row` of the chunk, that of a slot at step s, started from
  const S* h_before(int64_t s, int64_t slot, int64_t row) const {
    const int64_t b = walk_.row(slot);
    if (walk_.resets_before(s, slot, dir_.reverse)) return nullptr;
    if (s == 0) {
      const S* h0 = static_cast<const S*>(dir_.state.h0.data);
      return h0 ? h0 + b * dir_.state.h0.row_stride : nullptr;
    }
    if (cell_) return y_row(place_of(s - 1, slot, 0));
    return h_ + (row - walk_.active(s - 1)) * shape_.P;
  }

  // The same as it was multiplied
  const S* masked_h_before(int64_t s, int64_t slot, int64_t row) const;
  Vec<C> masked_h(const S* h, int64_t slot, int64_t n) const;

  void add_kernel_grads(const Share& share, int64_t s1, int64_t rows) const;

  void pack_gate_grads(const Share& share, const GradRows& grads, int64_t rows) const;

  // x and h of a row of the chunk as numbers
  void read_row(int64_t row) const;

  // The sums of each += transpose of some rows of a, times its own rows; if `start`, whatever the sums held. What has
  // to be transposed for it serves all panels; otherwise a panel stays near while columns pass.
  void add_products(const Share& share, const GradRows& a, int64_t rows, std::initializer_list<const WeightGrad*> grads,
                    bool start) const;

  // Columns that are brought together to be multiplied by all panels, and how many tiles of K rows they are
  static constexpr int64_t kMostGathered = kGatheredBytes / sizeof(C);
  static int64_t tiles_gathered(int64_t K) { return kMostGathered / (K > 1 ? K * Engine::kRows : Engine::kRows); }
  void gather_columns(const GradRows& a, int64_t k0, int64_t K, int64_t first, int64_t last, C* to) const;

  static int tile_count(int64_t M, int64_t m) {
    return static_cast<int>(M - m < Engine::kRows ? M - m : Engine::kRows);
  }

  void add_tile(const GradRows& a, int64_t m0, const typename Engine::Transposed& transposed, int64_t k0, int64_t K,
                int64_t rows, int64_t p, bool start, const WeightGrad& grad) const;

  // f(elements of `row` under vector g of panel p, the vector in the tile, how many are left) for each vector
  template <class E, class F>
  static void for_vectors(E* row, int64_t N, int64_t p, C* tile, const F& f) {
    for (int g = 0; g < 4; ++g) {
      const int64_t n = p * kWidth + g * L;
      if (n < N) f(row + n, tile + g * L, N - n);
    }
  }

  void add_bias_grad(const Share& share, int64_t rows, bool start) const;

  // A panel of w_ih stays near while rows pass.
  void input_grads(const Share& share, int64_t rows) const;

  S* dx_row(int64_t s, int64_t slot) const {
    return static_cast<S*>(layer_.dx) + layer_.dx_map.at(walk_.time(s, slot, dir_.reverse), walk_.row(slot));
  }

  // ---- after the first step ------------------------------------------------------------------------

  void finish(const Share& share) const {
    const auto [T, B, I, H, P, projected] = shape_;
    if (dir_.dh0) {
      share.for_panels(column_panels(P), [&](int64_t p) {
        share.for_tiles(B, [&](int64_t first, int count) { initial_h_grad(first, count, p); });
      });
    }
    share.for_part(B, [&](int64_t slot) { finish_row(slot); });
    if (!dir_.grads.wanted) return;
    convert_part(share, dw_ih_.sums, 4 * H * I, dir_.grads.w_ih);
    convert_part(share, dw_hh_.sums, 4 * H * P, dir_.grads.w_hh);
    if (projected) convert_part(share, dw_hr_.sums, P * H, dir_.grads.w_hr);
    if (db_ && steps_.norm() != Norm::kRows) {
      convert_part(share, db_, 4 * H, dir_.grads.b_ih);
      if (dir_.grads.b_hh) convert_part(share, db_, 4 * H, dir_.grads.b_hh);
    }
    if (d_peephole_) add_peephole_grads(share);
    if (norm_) add_norm_grads(share);
  }

  // Each row of the batch has its own sums: vectors n .. of `size` of them, to vectors of H in `out`.
  void add_rows_of_batch(const Share& share, const C* sums, int64_t size, int64_t vectors_of_H, void* out) const;

  void add_peephole_grads(const Share& share) const;

  void add_norm_grads(const Share& share) const;

  void initial_h_grad(int64_t first, int count, int64_t p) const {
    alignas(64) C sums[Engine::kRows * kWidth];
    recurrent_grad(-1, first, count, p, later_dgates_, sums);
    for (int m = 0; m < count; ++m) {
      for_vectors(static_cast<S*>(dir_.dh0) + walk_.row(first + m) * shape_.P, shape_.P, p, sums + m * kWidth,
                  [](S* dh0, C* sum, int64_t left) { store_up_to(dh0, load(sum), left); });
    }
  }

  void finish_row(int64_t slot) const {
    const int64_t b = walk_.row(slot), H = shape_.H, c_width = ceil_div(H, L) * L;
    if (dir_.dc0) {
      for (int64_t u = 0; u < H; u += L) {
        const Vec<C> dc =
            walk_.length(slot) == 0 ? load_matrix(dir_.dc_n, b, u, H - u, true) : load(dc_ + slot * c_width + u);
        store_up_to(static_cast<S*>(dir_.dc0) + b * H + u, dc, H - u);
      }
    }
    if (!layer_.dx || add_to_dx_ || layer_.dx_map.packed_offset) return;
    for (int64_t t = walk_.length(slot); t < shape_.T; ++t) {
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
  const BackwardDirection& dir_;
  const Plan& plan_;
  const Walk& walk_;
  const SequenceShape shape_;
  const bool add_to_dx_;
  int64_t chunk_rows_;
  int64_t gate_size_;              // H, filled up
  GradRows dgates_;                // [chunk_rows, 4H]
  GradRows later_dgates_;          // [B, 4H], the first step of the chunk that was run before
  int64_t *row_slot_, *row_step_;  // [chunk_rows]
  C* dc_;                          // [B, H rounded up to vectors]
  int64_t sums_width_;             // P or H, filled up to panels
  C* sums_;                        // [B, sums_width_], of a step
  Packed *w_hh_ = nullptr, *w_hr_ = nullptr, *w_ih_ = nullptr;  // packed as columns
  GradRows dh_;                                                 // [chunk_rows, P], with a projection
  S *hidden_ = nullptr, *h_ = nullptr;  // [-B .. chunk_rows, H or P], the same without a projection
  const S** matrix_rows_;               // of a weight matrix that is being packed
  WeightGrad dw_ih_, dw_hh_, dw_hr_;
  C* db_ = nullptr;
  C* columns_ = nullptr;  // [threads][kMostGathered] of what is transposed for the weights' gradients, where that pays
  // To project hidden again:
  S* w_hr_columns_ = nullptr;     // [H, P], w_hr transposed
  Packed* w_hr_again_ = nullptr;  // the same packed
  GradRows factors_;              // [threads * kRows, H], rows of hidden as they are multiplied
  // Of a cell with options:
  const LayerCell* const cell_;
  const CellSteps<C> steps_;
  bool by_kernel_ = false;          // weights in TensorFlow's layout, whose order of gates dgates_ then has too
  int64_t h_width_ = 0;             // P, filled up
  C* h_mask_ = nullptr;             // [B, h_width], as Forward has it
  C* kept_dh_ = nullptr;            // [B, h_width], what of the gradient of h goes to the step before
  S* masked_h_ = nullptr;           // [chunk_rows, P]
  C* d_peephole_ = nullptr;         // [B, 3, H filled up]
  GradRows x_values_, h_values_;    // [chunk_rows, I or H]
  const C** dgate_rows_ = nullptr;  // [chunk_rows]
  // Of layer normalisation:
  static constexpr int kNormVectors = 20, kNormSums = 14;  // vectors of H units
  C* norm_ = nullptr;       // [threads][kNormVectors, H filled up], of a row that is worked on
  C* norm_dh_ = nullptr;    // [B, H filled up], what is wanted of h before a projection
  C* norm_sums_ = nullptr;  // [B][kNormSums, H filled up], gradients of gamma 4, gamma or beta 4, bias 4,
                            // gamma_h and beta_h
  C *sums_x_ = nullptr, *sums_h_ = nullptr;           // [chunk_rows, 4H], gates before they are normalised
  Packed *x_panels_ = nullptr, *h_panels_ = nullptr;  // w_ih and w_hh as a forward pass multiplies by them
  GradRows dgates_h_;  // [chunk_rows, 4H], of what h brings, where that is normalised by itself
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
