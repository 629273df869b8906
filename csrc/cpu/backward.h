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

  void prepare_cell(Arena& arena) {
    static_assert(Engine::kSplitsFloats || std::is_same_v<Factor<S>, C>);  // a kernel in place is multiplied by these
    const auto [T, B, I, H, P, projected] = shape_;
    h_width_ = ceil_div(P, L) * L;
    if (steps_.recurrent.possible) h_mask_ = arena.get<C>(B * h_width_);
    if (steps_.zoneout_h.wanted) kept_dh_ = arena.get<C>(B * h_width_);
    if (dir_.grads.wanted && h_mask_ && !by_kernel_) masked_h_ = arena.get<S>(chunk_rows_ * P);
    if (cell_->options.norm != Norm::kNone) prepare_norm(arena);
    if (!dir_.grads.wanted) return;
    if (steps_.peephole().data) d_peephole_ = arena.get<C>(B * 3 * ceil_div(H, L) * L);
  }

  // What gates were normalised from is computed again, of all rows of a chunk.
  void prepare_norm(Arena& arena) {
    const auto [T, B, I, H, P, projected] = shape_;
    const int64_t width = ceil_div(H, L) * L, panels = column_panels(4 * H);
    norm_ = arena.get<C>(plan_.threads * kNormVectors * width);
    norm_dh_ = arena.get<C>(B * width);
    norm_sums_ = arena.get<C>(B * kNormSums * width);
    x_values_ = grad_rows(chunk_rows_, I, I, arena);
    h_values_ = grad_rows(chunk_rows_, P, P, arena);
    sums_x_ = arena.get<C>(chunk_rows_ * 4 * H);
    sums_h_ = arena.get<C>(chunk_rows_ * 4 * H);
    x_panels_ = arena.get<Packed>(panels * Engine::panel_size(I));
    h_panels_ = arena.get<Packed>(panels * Engine::panel_size(P));
    if (cell_->options.norm != Norm::kRows) return;
    dgates_h_ = grad_rows(chunk_rows_, 4 * H, 4 * gate_size_, arena);
  }

  void prepare_grads(Arena& arena) {
    const auto [T, B, I, H, P, projected] = shape_;
    if (!cell_ && (T > 1 || projected)) h_ = hidden_ = arena.get<S>((B + chunk_rows_) * H) + B * H;
    if (!cell_ && T > 1 && projected) project_again_in(arena);
    if (cell_ && projected) hidden_ = arena.get<S>(chunk_rows_ * H);
    dw_ih_ = product_for(dir_.grads.w_ih, 4 * H, I, arena);
    dw_hh_ = product_for(dir_.grads.w_hh, 4 * H, P, arena);
    if (dir_.grads.b_ih) db_ = sums_for(dir_.grads.b_ih, 4 * H, arena);
    if (projected) dw_hr_ = product_for(dir_.grads.w_hr, P, H, arena);
  }

  // Of TensorFlow's kernel: here gate gradients are what is packed, and x and h are transposed.
  void prepare_kernel_grads(Arena& arena) {
    const auto [T, B, I, H, P, projected] = shape_;
    if (!norm_) x_values_ = grad_rows(chunk_rows_, I, I, arena);
    if (!norm_) h_values_ = grad_rows(chunk_rows_, H, H, arena);
    dgate_rows_ = arena.get<const C*>(chunk_rows_);
    Packed* const panels = arena.get<Packed>(column_panels(4 * H) * Engine::panel_size(chunk_rows_));
    dw_ih_ = {nullptr, panels, 4 * H, sums_for(dir_.grads.w_ih, I * 4 * H, arena)};
    dw_hh_ = {nullptr, panels, 4 * H, sums_for(dir_.grads.w_hh, H * 4 * H, arena)};
    if (dir_.grads.b_ih) db_ = sums_for(dir_.grads.b_ih, 4 * H, arena);
  }

  void project_again_in(Arena& arena) {
    const auto [T, B, I, H, P, projected] = shape_;
    h_ = arena.get<S>((B + chunk_rows_) * P) + B * P;
    w_hr_columns_ = arena.get<S>(H * P);
    w_hr_again_ = arena.get<Packed>(column_panels(P) * Engine::panel_size(H));
    factors_ = grad_rows(plan_.threads * Engine::kRows, H, H, arena);
  }

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
  void pack_kernel(const Share& share, const Matrix& matrix, int64_t N, Packed* panels) const {
    if constexpr (!Engine::kSplitsFloats) {
      if (!panels) return;
      const int64_t K = 4 * shape_.H;
      share.for_part(column_panels(N),
                     [&](int64_t p) { pack_rows_as_columns<S>(matrix, K, N, p, panels + p * Engine::panel_size(K)); });
    }
  }

  // The weights as a forward pass multiplies by them
  void pack_again(const Share& share) const {
    if constexpr (!Engine::kSplitsFloats) {
      const auto pack = [&](const Matrix& matrix, int64_t K, Packed* panels) {
        const int64_t N = 4 * shape_.H;
        if (by_kernel_) return pack_matrix(share, matrix, 1, K, K, N, panels);
        share.for_part(column_panels(N), [&](int64_t p) {
          pack_rows_as_columns<S>(matrix, K, N, p, panels + p * Engine::panel_size(K));
        });
      };
      pack(dir_.weights.w_ih, shape_.I, x_panels_);
      pack(dir_.weights.w_hh, shape_.P, h_panels_);
    }
  }

  void start_cell_row(int64_t slot) const {
    if (norm_) {
      const int64_t size = kNormSums * ceil_div(shape_.H, L) * L;
      __builtin_memset(norm_sums_ + slot * size, 0, static_cast<size_t>(size) * sizeof(C));
    }
    if (h_mask_) {
      for (int64_t n = 0; n < shape_.P; n += L) {
        store(h_mask_ + slot * h_width_ + n, steps_.h_mask({0, walk_.row(slot), n}));
      }
    }
    if (d_peephole_) {
      const int64_t size = 3 * ceil_div(shape_.H, L) * L;
      __builtin_memset(d_peephole_ + slot * size, 0, static_cast<size_t>(size) * sizeof(C));
    }
  }

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
    const int64_t N = shape_.P, active = walk_.active(s);
    share.for_panels(column_panels(N), [&](int64_t p) {
      share.for_tiles(active, [&](int64_t first, int count) {
        alignas(64) C sums[Engine::kRows * kWidth];
        recurrent_grad(s, first, count, p, later, sums);
        for (int m = 0; m < count; ++m) {
          for (int g = 0; g < 4; ++g) {
            const int64_t n = p * kWidth + g * L;
            if (n < N) add_dy(s, first + m, first_row + first + m, n, load(sums + (m * 4 + g) * L));
          }
        }
      });
    });
    share.sync_rows();
    if (shape_.projected) {
      share.for_panels(column_panels(shape_.H), [&](int64_t p) {
        share.for_tiles(active, [&](int64_t first, int count) { unproject(s, first, count, first_row, p); });
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
  void pass_to_h(int64_t first, int rows, int64_t p, C* sums) const {
    for (int m = 0; m < rows; ++m) {
      for (int64_t n = p * kWidth; n < shape_.P && n < (p + 1) * kWidth; n += L) {
        const int64_t at = (first + m) * h_width_ + n;
        C* const sum = sums + m * kWidth + (n - p * kWidth);
        Vec<C> value = load(sum);
        if (h_mask_) value = computed(value * load(h_mask_ + at));
        if (kept_dh_) value += load(kept_dh_ + at);
        store(sum, value);
      }
    }
  }

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
                              C* sums) {
    if constexpr (!Engine::kSplitsFloats) {
      const InPlace<S> rows{static_cast<const S*>(matrix.data), matrix.row_stride, a, K};
      InPlaceProduct<S>::multiply(count, {rows}, PanelGroups(PlainRows<C>{N}, p), sums);
    }
  }

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

  void add_dy(int64_t s, int64_t slot, int64_t row, int64_t n, Vec<C> dh) const {
    const int64_t b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse), count = shape_.P - n;
    if (dir_.dy) dh += load_up_to(static_cast<const S*>(dir_.dy) + layer_.dy_map.at(t, b) + n, count);
    if (cell_) return pass_to_cell(s, slot, row, n, dh);
    if (shape_.projected) {
      dh_.put(row, n, n, dh, count);
    } else {
      pointwise_backward(s, slot, row, n, dh);
    }
  }

  void unproject(int64_t s, int64_t first, int rows, int64_t first_row, int64_t p) const {
    alignas(64) C sums[Engine::kRows * kWidth];
    multiply(dh_, first_row + first, rows, w_hr_, dir_.weights.w_hr, shape_.H, p, sums);
    for (int m = 0; m < rows; ++m) {
      for (int g = 0; g < 4; ++g) {
        const int64_t u = p * kWidth + g * L;
        if (u >= shape_.H) break;
        const Vec<C> dh = load(sums + (m * 4 + g) * L);
        const int64_t slot = first + m, row = first_row + first + m;
        cell_ ? cell_pointwise_backward(s, slot, row, u, dh) : pointwise_backward(s, slot, row, u, dh);
      }
    }
  }

  // Gate gradients of one row and one vector of units; not inlined, as Forward::pointwise_forward.
  [[gnu::noinline]] void pointwise_backward(int64_t s, int64_t slot, int64_t row, int64_t u, Vec<C> dh) const {
    const int64_t H = shape_.H, count = H - u, b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
    const S* gates = static_cast<const S*>(dir_.gates) + layer_.gates_map.at(t, b) + u;
    const GateValues<Vec<C>> gate{load_up_to(gates, count), load_up_to(gates + H, count),
                                  load_up_to(gates + 2 * H, count), load_up_to(gates + 3 * H, count)};
    const C* cell = static_cast<const C*>(dir_.cells) + layer_.cells_map.at(t, b) + u;
    const Vec<C> tanh_c = VecMath<C>::tanh(load_up_to(cell, count));

    const int64_t c_width = ceil_div(H, L) * L;
    C* dc_state = dc_ + slot * c_width + u;
    Vec<C> dc = load_matrix(dir_.dc_n, b, u, count, s == walk_.length(slot) - 1);
    if (s < walk_.length(slot) - 1) dc = load(dc_state);
    if (dir_.d_cells) dc += load_up_to(static_cast<const C*>(dir_.d_cells) + layer_.d_cells_map.at(t, b) + u, count);

    const auto grad = cell_backward(gate, c_before(s, slot, u, count), tanh_c, dh, dc);
    dgates_.put(row, u, u, grad.d_pre.i, count);
    dgates_.put(row, H + u, gate_size_ + u, grad.d_pre.f, count);
    dgates_.put(row, 2 * H + u, 2 * gate_size_ + u, grad.d_pre.g, count);
    dgates_.put(row, 3 * H + u, 3 * gate_size_ + u, grad.d_pre.o, count);
    store(dc_state, walk_.resets_before(s, slot, dir_.reverse) ? Vec<C>{} : grad.d_c_prev);
    if (hidden_) store_up_to(hidden_ + row * H + u, gate.o * tanh_c, count);
  }

  // The gradient of what a step of a cell with options returns as h becomes that of what it computes.
  [[gnu::noinline]] void pass_to_cell(int64_t s, int64_t slot, int64_t row, int64_t n, Vec<C> dh) const {
    const Place place = place_of(s, slot, n);
    if (kept_dh_) {
      store(kept_dh_ + slot * h_width_ + n, steps_.kept_part(steps_.zoneout_h, dh, place));
      dh = steps_.next(steps_.zoneout_h, Vec<C>{}, dh, place);
    }
    if (!shape_.projected) return cell_pointwise_backward(s, slot, row, n, dh);
    if (const C most = static_cast<C>(cell_->options.proj_clip); most > 0) {
      const Vec<C> y = load_up_to(y_row(place), shape_.P - n), bound = rounded_to<S>(broadcast(most));
      dh = (y < 0 ? -y : y) >= bound ? Vec<C>{} : dh;
    }
    dh_.put(row, n, n, dh, shape_.P - n);
  }

  // As pointwise_backward, by cell_math.h
  [[gnu::noinline]] void cell_pointwise_backward(int64_t s, int64_t slot, int64_t row, int64_t u, Vec<C> dh) const {
    using Math = VecMath<C>;
    const Cell& cell = cell_->options;
    const Place place = place_of(s, slot, u);
    const int64_t H = shape_.H, count = H - u, c_width = ceil_div(H, L) * L;
    if (norm_) return store(norm_dh_ + slot * c_width + u, dh);
    const S* gates = static_cast<const S*>(dir_.gates) + layer_.gates_map.at(place.t, place.b) + u;
    const Vec<C> i = load_up_to(gates, count), f = load_up_to(gates + H, count), g = load_up_to(gates + 2 * H, count),
                 o = load_up_to(gates + 3 * H, count);
    const Vec<C> c_prev = c_before(s, slot, u, count), mask = steps_.g_mask(place), masked_g = computed(g * mask);
    const Vec<C> c = c_computed(i, f, masked_g, c_prev, place);
    alignas(64) C output[L];
    store(output, steps_.clipped(c, cell.cell_clip));
    const Vec<C> clipped_c = load(output);
    activate_all(cell.activation, output, 1);
    const Vec<C> out = load(output);

    Vec<C> dc = dc_of(s, slot, place);
    const Vec<C> kept_dc = steps_.kept_part(steps_.zoneout_c, dc, place);
    dc = steps_.next(steps_.zoneout_c, Vec<C>{}, dc, place);

    const Peephole<S> peephole(steps_.peephole(), H, u);
    const auto d_gate = [&](Vec<C> gate) { return d_activation<Math>(cell.recurrent_activation, gate); };
    const Vec<C> d_o = dh * out * d_gate(o);
    dc += dh * o * d_activation<Math>(cell.activation, out);
    if (peephole.there) dc += d_o * peephole.o;
    if (const C most = static_cast<C>(cell.cell_clip); most > 0) dc = is_cut(c, most) ? Vec<C>{} : dc;
    const auto [d_i, d_f, d_g] = inner_grads(i, f, g, mask, masked_g, c_prev, dc);
    Vec<C> dc_prev = dc * f + kept_dc;
    if (peephole.there) dc_prev += d_i * peephole.i + d_f * peephole.f;
    put_gate_grads(row, u, {d_i, d_f, d_g, d_o}, count);
    store(dc_ + slot * c_width + u, walk_.resets_before(s, slot, dir_.reverse) ? Vec<C>{} : dc_prev);
    if (hidden_) store_up_to(hidden_ + row * H + u, o * out, count);
    if (d_peephole_) add_to_peephole(slot, u, d_i, d_f, d_o, c_prev, clipped_c);
  }

  // c as the step computed it, which is what it left where nothing is kept. Where it was cut it was left as the bound.
  LSTM_EXT_INLINE Vec<C> c_computed(Vec<C> i, Vec<C> f, Vec<C> masked_g, Vec<C> c_prev, const Place& place) const {
    const bool left_other = steps_.zoneout_c.wanted || steps_.norm() == Norm::kGates;
    if (left_other) return steps_.unclipped_c(i, f, masked_g, c_prev);
    const C* cell = static_cast<const C*>(dir_.cells) + layer_.cells_map.at(place.t, place.b) + place.unit;
    return load_up_to(cell, shape_.H - place.unit);
  }
  static LSTM_EXT_INLINE auto is_cut(Vec<C> c, C most) { return (c < 0 ? -c : c) >= most; }

  void put_gate_grads(int64_t row, int64_t u, const GateValues<Vec<C>>& grad, int64_t count) const {
    const Vec<C> values[] = {grad.i, grad.f, grad.g, grad.o};
    for (int gate = 0; gate < 4; ++gate) {
      dgates_.put(row, quarter(gate) * shape_.H + u, quarter(gate) * gate_size_ + u, values[gate], count);
    }
  }
  int64_t quarter(int gate) const { return by_kernel_ ? kernel_quarter(gate) : gate; }

  // What x and h brought to the gates of all rows of a chunk; with Norm::kGates both together, and the bias.
  void sum_again(const Share& share, int64_t rows) const {
    if constexpr (!Engine::kSplitsFloats) {
      share.team.sync();
      share.for_part(rows, [&](int64_t row) { read_row(row); });
      share.team.sync();
      const int64_t N = 4 * shape_.H;
      const bool apart = steps_.norm() == Norm::kRows;
      for (int64_t p = 0; p < column_panels(N); ++p) {
        share.for_part(ceil_div(rows, Engine::kRows), [&](int64_t tile) {
          const int64_t first = tile * Engine::kRows;
          const int count = tile_count(rows, first);
          alignas(64) C of_x[Engine::kRows * kWidth], of_h[Engine::kRows * kWidth];
          multiply(x_values_, first, count, x_panels_, {}, N, p, of_x);
          multiply(h_values_, first, count, h_panels_, {}, N, p, of_h);
          for (int m = 0; m < count; ++m) {
            const C* h = of_h + m * kWidth;
            C* const x = of_x + m * kWidth;
            for_vectors(sums_x_ + (first + m) * N, N, p, x, [&](C* to, C* sum, int64_t left) {
              const Vec<C> value = load(sum), bias = apart ? Vec<C>{} : bias_at(to - sums_x_ - (first + m) * N, left);
              store_up_to(to, apart ? value : value + load(h + (sum - x)) + bias, left);
            });
            if (!apart) continue;
            for_vectors(sums_h_ + (first + m) * N, N, p, of_h + m * kWidth,
                        [](C* to, C* sum, int64_t left) { store_up_to(to, load(sum), left); });
          }
        });
      }
      share.team.sync();
    }
  }

  // Of the gates from n on, in the order of the weights
  Vec<C> bias_at(int64_t n, int64_t count) const {
    const auto part = [&](const void* bias) {
      return bias ? load_up_to(static_cast<const S*>(bias) + n, count) : Vec<C>{};
    };
    return part(dir_.weights.b_ih) + part(dir_.weights.b_hh);
  }

  // A row of sums [4H] as [4][H filled up] of i f g o
  void gather_row(const C* sums, C* gates) const {
    const int64_t H = shape_.H, width = ceil_div(H, L) * L;
    for (int g = 0; g < 4; ++g) {
      for (int64_t u = 0; u < H; u += L) store(gates + g * width + u, load_up_to(sums + quarter(g) * H + u, H - u));
    }
  }

  // As cell_pointwise_backward with layer normalisation: a row as a whole, from norm_dh_.
  [[gnu::noinline]] void norm_row_backward(const Share& share, int64_t s, int64_t slot, int64_t row) const {
    using Math = VecMath<C>;
    const Cell& cell = cell_->options;
    const auto& arrays = cell_->direction[steps_.direction];
    const bool by_rows = cell.norm == Norm::kRows;
    const int64_t H = shape_.H, width = ceil_div(H, L) * L, N = 4 * H;
    const int64_t b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
    C* const c = norm_ + share.team.rank * kNormVectors * width;
    C *const out = c + width, *const d_c = out + width, *const d_left = d_c + width, *const d_pre = d_left + width;
    C *const of_x = d_pre + 4 * width, *const of_h = of_x + 4 * width, *const d_sum = of_h + 4 * width;
    C* const totals = norm_sums_ + slot * kNormSums * width;
    C *const d_gamma = totals, *const d_other = d_gamma + 4 * width, *const d_bias = d_other + 4 * width;
    C *const d_gamma_h = d_bias + 4 * width, *const d_beta_h = d_gamma_h + width;
    const S* const gates = static_cast<const S*>(dir_.gates) + layer_.gates_map.at(t, b);
    const C* const dh = norm_dh_ + slot * width;
    const auto gate = [&](int n, int64_t u) { return load_up_to(gates + n * H + u, H - u); };
    const auto d_gate = [&](Vec<C> value) { return d_activation<Math>(cell.recurrent_activation, value); };
    const auto add_to = [](C* total, Vec<C> value) { store(total, load(total) + value); };

    for (int64_t u = 0; u < H; u += L) {
      const Place place = place_of(s, slot, u);
      const Vec<C> masked_g = computed(gate(2, u) * steps_.g_mask(place));
      const Vec<C> value = c_computed(gate(0, u), gate(1, u), masked_g, c_before(s, slot, u, H - u), place);
      store(c + u, steps_.clipped(value, cell.cell_clip));
    }
    const Moments<C> of_c = moments_of(c, 1, H, cell.norm_epsilon);
    for (int64_t u = 0; u < H; u += L) store(out + u, scaled_c<S>(arrays, of_c, load(c + u), H, u));
    activate_all<C>(cell.activation, out, static_cast<int>(width / L));
    for (int64_t u = 0; u < H; u += L) {
      const Place place = place_of(s, slot, u);
      const Vec<C> dc = steps_.next(steps_.zoneout_c, Vec<C>{}, dc_of(s, slot, place), place);
      Vec<C> d_seen = load(dh + u) * gate(3, u) * d_activation<Math>(cell.activation, load(out + u));
      if (!by_rows) d_seen += dc;
      store(d_left + u, by_rows ? dc : Vec<C>{});
      add_to(d_gamma_h + u, d_seen * of_c.normalised(load(c + u)));
      add_to(d_beta_h + u, d_seen);
      store(d_c + u, d_seen * load_up_to(static_cast<const S*>(arrays.gamma_h) + u, H - u));
    }
    moments_backward(of_c, c, 1, H, d_c);
    for (int64_t u = 0; u < H; u += L) {
      const Place place = place_of(s, slot, u);
      const int64_t count = H - u;
      const Vec<C> i = gate(0, u), f = gate(1, u), g = gate(2, u), o = gate(3, u);
      const Vec<C> c_prev = c_before(s, slot, u, count), mask = steps_.g_mask(place), masked_g = computed(g * mask);
      const Peephole<S> peephole(arrays.peephole, H, u);
      const Vec<C> d_o = load(dh + u) * load(out + u) * d_gate(o);
      Vec<C> dc = load(d_c + u) + load(d_left + u);
      if (peephole.there) dc += d_o * peephole.o;
      if (const C most = static_cast<C>(cell.cell_clip); most > 0) dc = is_cut(load(c + u), most) ? Vec<C>{} : dc;
      const CellInner inner = inner_grads(i, f, g, mask, masked_g, c_prev, dc);
      const Vec<C> kept_dc = steps_.kept_part(steps_.zoneout_c, dc_of(s, slot, place), place);
      Vec<C> dc_prev = dc * f + kept_dc;
      if (peephole.there) dc_prev += inner.d_i * peephole.i + inner.d_f * peephole.f;
      const Vec<C> grads[] = {inner.d_i, inner.d_f, inner.d_g, d_o};
      for (int n = 0; n < 4; ++n) store(d_pre + n * width + u, grads[n]);
      store(dc_ + slot * width + u, walk_.resets_before(s, slot, dir_.reverse) ? Vec<C>{} : dc_prev);
      if (hidden_) store_up_to(hidden_ + row * H + u, o * load(out + u), count);
      if (d_peephole_) add_to_peephole(slot, u, inner.d_i, inner.d_f, d_o, c_prev, load(c + u));
    }

    gather_row(sums_x_ + row * N, of_x);
    // Adds to the totals of gamma, and puts what the sums want of one or all gates.
    const auto pass = [&](const C* values, int first, int last, int64_t gamma_at, C* total, const GradRows& to) {
      const Moments<C> moments = moments_of(values + first * width, last - first, H, cell.norm_epsilon);
      for (int n = first; n < last; ++n) {
        for (int64_t u = 0; u < H; u += L) {
          const Vec<C> d = load(d_pre + n * width + u);
          const Vec<C> gamma = load_up_to(static_cast<const S*>(arrays.gamma.data) + gamma_at + n * H + u, H - u);
          add_to(total + n * width + u, d * moments.normalised(load(values + n * width + u)));
          store(d_sum + n * width + u, d * gamma);
        }
      }
      moments_backward(moments, values + first * width, last - first, H, d_sum + first * width);
      for (int n = first; n < last; ++n) {
        for (int64_t u = 0; u < H; u += L) {
          to.put(row, quarter(n) * H + u, quarter(n) * gate_size_ + u, load(d_sum + n * width + u), H - u);
        }
      }
    };
    if (by_rows) {
      gather_row(sums_h_ + row * N, of_h);
      pass(of_x, 0, 4, 0, d_gamma, dgates_);
      pass(of_h, 0, 4, arrays.gamma.row_stride, d_other, dgates_h_);
    } else {
      for (int n = 0; n < 4; ++n) pass(of_x, n, n + 1, 0, d_gamma, dgates_);
    }
    C* const shifted = by_rows ? d_bias : d_other;
    for (int64_t u = 0; u < 4 * width; u += L) add_to(shifted + u, load(d_pre + u));
  }

  // What later steps, a caller and the end want of c
  LSTM_EXT_INLINE Vec<C> dc_of(int64_t s, int64_t slot, const Place& place) const {
    const int64_t u = place.unit, count = shape_.H - u, width = ceil_div(shape_.H, L) * L;
    Vec<C> dc = load_matrix(dir_.dc_n, place.b, u, count, s == walk_.length(slot) - 1);
    if (s < walk_.length(slot) - 1) dc = load(dc_ + slot * width + u);
    if (dir_.d_cells) {
      dc += load_up_to(static_cast<const C*>(dir_.d_cells) + layer_.d_cells_map.at(place.t, place.b) + u, count);
    }
    return dc;
  }

  struct CellInner {
    Vec<C> d_i, d_f, d_g;
  };
  LSTM_EXT_INLINE CellInner inner_grads(Vec<C> i, Vec<C> f, Vec<C> g, Vec<C> mask, Vec<C> masked_g, Vec<C> c_prev,
                                        Vec<C> dc) const {
    using Math = VecMath<C>;
    const Cell& cell = cell_->options;
    const auto d_gate = [&](Vec<C> gate) { return d_activation<Math>(cell.recurrent_activation, gate); };
    const Vec<C> d_g = dc * i * mask * d_activation<Math>(cell.activation, g);
    const Vec<C> d_i = dc * masked_g, d_f = dc * c_prev;
    if (cell.coupled) return {Vec<C>{}, (d_f - d_i) * d_gate(f), d_g};
    return {d_i * d_gate(i), d_f * d_gate(f), d_g};
  }

  void add_to_peephole(int64_t slot, int64_t u, Vec<C> d_i, Vec<C> d_f, Vec<C> d_o, Vec<C> c_prev, Vec<C> c) const {
    const int64_t width = ceil_div(shape_.H, L) * L;
    C* const sums = d_peephole_ + slot * 3 * width + u;
    store(sums, load(sums) + d_i * c_prev);
    store(sums + width, load(sums + width) + d_f * c_prev);
    store(sums + 2 * width, load(sums + 2 * width) + d_o * c);
  }

  Place place_of(int64_t s, int64_t slot, int64_t unit) const {
    return {walk_.time(s, slot, dir_.reverse), walk_.row(slot), unit};
  }

  // At the unit of a place
  const S* y_row(const Place& place) const {
    const S* y = static_cast<const S*>(cell_->direction[steps_.direction].y);
    return y + cell_->y_map.at(place.t, place.b) + place.unit;
  }

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
  void add_weight_grads(const Share& share, int64_t s0, int64_t s1, int64_t rows) const {
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
    for (const WeightGrad* grad : {&dw_ih_, &dw_hh_, &dw_hr_})
      pack_rows(share, grad->rows, rows, grad->N, grad->panels);
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

  void pack_rows(const Share& share, const S* const* from, int64_t rows, int64_t N, Packed* panels) const {
    share.for_part(column_panels(N),
                   [&](int64_t p) { Engine::pack(from, rows, N, p, panels + p * Engine::panel_size(rows)); });
  }

  // h of rows first .. last - 1 from their hidden
  void project_again(const Share& share, int64_t first, int64_t last) const {
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
  const S* masked_h_before(int64_t s, int64_t slot, int64_t row) const {
    const S* h = h_before(s, slot, row);
    if (!h || !masked_h_) return h;
    S* const to = masked_h_ + row * shape_.P;
    for (int64_t n = 0; n < shape_.P; n += L) store_up_to(to + n, masked_h(h, slot, n), shape_.P - n);
    return to;
  }
  Vec<C> masked_h(const S* h, int64_t slot, int64_t n) const {
    const Vec<C> value = load_up_to(h + n, shape_.P - n);
    return h_mask_ ? rounded_to<S>(value * load(h_mask_ + slot * h_width_ + n)) : value;
  }

  void add_kernel_grads(const Share& share, int64_t s1, int64_t rows) const {
    if constexpr (!Engine::kSplitsFloats) {
      const bool start = s1 == shape_.T;
      if (!norm_) share.for_part(rows, [&](int64_t row) { read_row(row); });
      pack_gate_grads(share, dgates_, rows);
      add_products(share, x_values_, rows, {&dw_ih_}, start);
      if (dgates_h_.values) pack_gate_grads(share, dgates_h_, rows);
      add_products(share, h_values_, rows, {&dw_hh_}, start);
      if (db_) add_bias_grad(share, rows, start);
    }
  }

  void pack_gate_grads(const Share& share, const GradRows& grads, int64_t rows) const {
    share.team.sync();
    share.for_part(rows, [&](int64_t row) { dgate_rows_[row] = grads.row(row); });
    share.team.sync();
    share.for_part(column_panels(4 * shape_.H), [&](int64_t p) {
      Engine::pack(dgate_rows_, rows, 4 * shape_.H, p, dw_ih_.panels + p * Engine::panel_size(rows));
    });
    share.team.sync();
  }

  // x and h of a row of the chunk as numbers
  void read_row(int64_t row) const {
    const int64_t s = row_step_[row], slot = row_slot_[row];
    const int64_t x_row = layer_.x_map.at(walk_.time(s, slot, dir_.reverse), walk_.row(slot));
    const S* const x = static_cast<const S*>(layer_.x) + x_row;
    const S* const h = h_before(s, slot, row);
    for (int64_t n = 0; n < shape_.I; n += L) {
      store_up_to(x_values_.row(row) + n, load_up_to(x + n, shape_.I - n), shape_.I - n);
    }
    for (int64_t n = 0; n < shape_.P; n += L) {
      store_up_to(h_values_.row(row) + n, h ? masked_h(h, slot, n) : Vec<C>{}, shape_.P - n);
    }
  }

  // The sums of each += transpose of some rows of a, times its own rows; if `start`, whatever the sums held. What has
  // to be transposed for it serves all panels; otherwise a panel stays near while columns pass.
  void add_products(const Share& share, const GradRows& a, int64_t rows, std::initializer_list<const WeightGrad*> grads,
                    bool start) const {
    const int64_t M = a.width, tiles = ceil_div(M, Engine::kRows);
    int64_t k0 = 0;
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
        for (const WeightGrad* grad : grads) {
          for (int64_t p = 0; p < column_panels(grad->N); ++p) {
            share.for_part(tiles, [&](int64_t tile) { add(tile, columns(tile), *grad, p); });
          }
        }
      }
      k0 += K;
    } while (k0 < rows);
  }

  static int tile_count(int64_t M, int64_t m) {
    return static_cast<int>(M - m < Engine::kRows ? M - m : Engine::kRows);
  }

  void add_tile(const GradRows& a, int64_t m0, const typename Engine::Transposed& transposed, int64_t k0, int64_t K,
                int64_t rows, int64_t p, bool start, const WeightGrad& grad) const {
    const int64_t N = grad.N;
    const int count = tile_count(a.width, m0), vectors = panel_vectors<C>(N, p);
    alignas(64) C product[Engine::kRows * kWidth];
    const auto load_sums = [&](int m) {
      for_vectors(grad.sums + (m0 + m) * N, N, p, product + m * kWidth,
                  [&](C* sum, C* part, int64_t left) { store(part, start ? Vec<C>{} : load_up_to(sum, left)); });
    };
    for (int m = 0; m < count; ++m) load_sums(m);
    Engine::multiply(count, vectors, transposed, k0, K, grad.panels + p * Engine::panel_size(rows), product);
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
      for (int64_t row = 0; row < rows; ++row) sum += load_up_to(dgates_.row(row) + n, N - n);
      store_up_to(db_ + n, sum, N - n);
    });
  }

  // A panel of w_ih stays near while rows pass.
  void input_grads(const Share& share, int64_t rows) const {
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
  void add_rows_of_batch(const Share& share, const C* sums, int64_t size, int64_t vectors_of_H, void* out) const {
    const int64_t H = shape_.H, width = ceil_div(H, L) * L, vectors = width / L;
    if (!out) return;
    share.for_part(vectors_of_H * vectors, [&](int64_t part) {
      const int64_t gate = part / vectors, u = part % vectors * L;
      Vec<C> sum{};
      for (int64_t slot = 0; slot < shape_.B; ++slot) sum += load(sums + slot * size * width + part * L);
      store_up_to(static_cast<S*>(out) + gate * H + u, sum, H - u);
    });
  }

  void add_peephole_grads(const Share& share) const {
    add_rows_of_batch(share, d_peephole_, 3, 3, cell_->direction[steps_.direction].d_peephole);
  }

  void add_norm_grads(const Share& share) const {
    const auto& arrays = cell_->direction[steps_.direction];
    const int64_t H = shape_.H, width = ceil_div(H, L) * L;
    const bool by_rows = steps_.norm() == Norm::kRows;
    S* const d_gamma = static_cast<S*>(arrays.d_gamma);
    const auto add = [&](int64_t first, int64_t count, void* out) {
      add_rows_of_batch(share, norm_sums_ + first * width, kNormSums, count, out);
    };
    add(0, 4, d_gamma);
    add(4, 4, by_rows ? d_gamma + 4 * H : arrays.d_beta);
    add(12, 1, arrays.d_gamma_h);
    add(13, 1, arrays.d_beta_h);
    if (!by_rows) return;
    for (void* out : {dir_.grads.b_ih, dir_.grads.b_hh}) {
      for (int n = 0; n < 4 && out; ++n) add(8 + n, 1, static_cast<S*>(out) + quarter(n) * H);
    }
  }

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
  Packed *w_hh_ = nullptr, *w_hr_ = nullptr, *w_ih_ = nullptr;  // packed as columns
  GradRows dh_;                                                 // [chunk_rows, P], with a projection
  S *hidden_ = nullptr, *h_ = nullptr;  // [-B .. chunk_rows, H or P], the same without a projection
  const S** matrix_rows_;               // of a weight matrix that is being packed
  WeightGrad dw_ih_, dw_hh_, dw_hr_;
  C* db_ = nullptr;
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
