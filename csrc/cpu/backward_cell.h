// The backward pass of a cell with options, beside the plain one of backward.h: its pointwise step by cell_math.h, rows
// with layer normalisation, and weights in TensorFlow's layout where they lie.
#pragma once

#include "backward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S, class Engine>
void Backward<S, Engine>::prepare_cell(Arena& arena) {
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

template <class S, class Engine>
void Backward<S, Engine>::prepare_norm(Arena& arena) {
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

template <class S, class Engine>
void Backward<S, Engine>::prepare_kernel_grads(Arena& arena) {
  const auto [T, B, I, H, P, projected] = shape_;
  if (!norm_) x_values_ = grad_rows(chunk_rows_, I, I, arena);
  if (!norm_) h_values_ = grad_rows(chunk_rows_, H, H, arena);
  dgate_rows_ = arena.get<const C*>(chunk_rows_);
  Packed* const panels = arena.get<Packed>(column_panels(4 * H) * Engine::panel_size(chunk_rows_));
  dw_ih_ = {nullptr, panels, 4 * H, sums_for(dir_.grads.w_ih, I * 4 * H, arena)};
  dw_hh_ = {nullptr, panels, 4 * H, sums_for(dir_.grads.w_hh, H * 4 * H, arena)};
  if (dir_.grads.b_ih) db_ = sums_for(dir_.grads.b_ih, 4 * H, arena);
  if (Engine::kGathersColumns && 4 * H >= kLeastGatheredFor) columns_ = arena.get<C>(plan_.threads * kMostGathered);
}

template <class S, class Engine>
void Backward<S, Engine>::pack_kernel(const Share& share, const Matrix& matrix, int64_t N, Packed* panels) const {
  if constexpr (!Engine::kSplitsFloats) {
    if (!panels) return;
    const int64_t K = 4 * shape_.H;
    share.for_part(column_panels(N),
                   [&](int64_t p) { pack_rows_as_columns<S>(matrix, K, N, p, panels + p * Engine::panel_size(K)); });
  }
}

template <class S, class Engine>
void Backward<S, Engine>::pack_again(const Share& share) const {
  if constexpr (!Engine::kSplitsFloats) {
    const auto pack = [&](const Matrix& matrix, int64_t K, Packed* panels) {
      const int64_t N = 4 * shape_.H;
      if (by_kernel_) return pack_matrix(share, matrix, 1, K, K, N, panels);
      share.for_part(column_panels(N),
                     [&](int64_t p) { pack_rows_as_columns<S>(matrix, K, N, p, panels + p * Engine::panel_size(K)); });
    };
    pack(dir_.weights.w_ih, shape_.I, x_panels_);
    pack(dir_.weights.w_hh, shape_.P, h_panels_);
  }
}

template <class S, class Engine>
void Backward<S, Engine>::start_cell_row(int64_t slot) const {
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

template <class S, class Engine>
void Backward<S, Engine>::pass_to_h(int64_t first, int rows, int64_t p, C* sums) const {
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

template <class S, class Engine>
void Backward<S, Engine>::multiply_kernel(int count, const F* const* a, int64_t K, const Matrix& matrix, int64_t N,
                                          int64_t p, C* sums) {
  if constexpr (!Engine::kSplitsFloats) {
    const InPlace<S> rows{static_cast<const S*>(matrix.data), matrix.row_stride, a, K};
    InPlaceProduct<S>::multiply(count, {rows}, PanelGroups(PlainRows<C>{N}, p), sums);
  }
}

template <class S, class Engine>
void Backward<S, Engine>::pass_to_cell(int64_t s, int64_t slot, int64_t row, int64_t n, Vec<C> dh) const {
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

template <class S, class Engine>
void Backward<S, Engine>::cell_pointwise_backward(int64_t s, int64_t slot, int64_t row, int64_t u, Vec<C> dh) const {
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

template <class S, class Engine>
auto Backward<S, Engine>::c_computed(Vec<C> i, Vec<C> f, Vec<C> masked_g, Vec<C> c_prev, const Place& place) const
    -> Vec<C> {
  const bool left_other = steps_.zoneout_c.wanted || steps_.norm() == Norm::kGates;
  if (left_other) return steps_.unclipped_c(i, f, masked_g, c_prev);
  const C* cell = static_cast<const C*>(dir_.cells) + layer_.cells_map.at(place.t, place.b) + place.unit;
  return load_up_to(cell, shape_.H - place.unit);
}

template <class S, class Engine>
void Backward<S, Engine>::put_gate_grads(int64_t row, int64_t u, const GateValues<Vec<C>>& grad, int64_t count) const {
  const Vec<C> values[] = {grad.i, grad.f, grad.g, grad.o};
  for (int gate = 0; gate < 4; ++gate) {
    dgates_.put(row, quarter(gate) * shape_.H + u, quarter(gate) * gate_size_ + u, values[gate], count);
  }
}

template <class S, class Engine>
auto Backward<S, Engine>::dc_of(int64_t s, int64_t slot, const Place& place) const -> Vec<C> {
  const int64_t u = place.unit, count = shape_.H - u, width = ceil_div(shape_.H, L) * L;
  Vec<C> dc = load_matrix(dir_.dc_n, place.b, u, count, s == walk_.length(slot) - 1);
  if (s < walk_.length(slot) - 1) dc = load(dc_ + slot * width + u);
  if (dir_.d_cells) {
    dc += load_up_to(static_cast<const C*>(dir_.d_cells) + layer_.d_cells_map.at(place.t, place.b) + u, count);
  }
  return dc;
}

template <class S, class Engine>
auto Backward<S, Engine>::inner_grads(Vec<C> i, Vec<C> f, Vec<C> g, Vec<C> mask, Vec<C> masked_g, Vec<C> c_prev,
                                      Vec<C> dc) const -> CellInner {
  using Math = VecMath<C>;
  const Cell& cell = cell_->options;
  const auto d_gate = [&](Vec<C> gate) { return d_activation<Math>(cell.recurrent_activation, gate); };
  const Vec<C> d_g = dc * i * mask * d_activation<Math>(cell.activation, g);
  const Vec<C> d_i = dc * masked_g, d_f = dc * c_prev;
  if (cell.coupled) return {Vec<C>{}, (d_f - d_i) * d_gate(f), d_g};
  return {d_i * d_gate(i), d_f * d_gate(f), d_g};
}

template <class S, class Engine>
void Backward<S, Engine>::add_to_peephole(int64_t slot, int64_t u, Vec<C> d_i, Vec<C> d_f, Vec<C> d_o, Vec<C> c_prev,
                                          Vec<C> c) const {
  const int64_t width = ceil_div(shape_.H, L) * L;
  C* const sums = d_peephole_ + slot * 3 * width + u;
  store(sums, load(sums) + d_i * c_prev);
  store(sums + width, load(sums + width) + d_f * c_prev);
  store(sums + 2 * width, load(sums + 2 * width) + d_o * c);
}

template <class S, class Engine>
void Backward<S, Engine>::sum_again(const Share& share, int64_t rows) const {
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

template <class S, class Engine>
auto Backward<S, Engine>::bias_at(int64_t n, int64_t count) const -> Vec<C> {
  const auto part = [&](const void* bias) {
    return bias ? load_up_to(static_cast<const S*>(bias) + n, count) : Vec<C>{};
  };
  return part(dir_.weights.b_ih) + part(dir_.weights.b_hh);
}

template <class S, class Engine>
void Backward<S, Engine>::gather_row(const C* sums, C* gates) const {
  const int64_t H = shape_.H, width = ceil_div(H, L) * L;
  for (int g = 0; g < 4; ++g) {
    for (int64_t u = 0; u < H; u += L) store(gates + g * width + u, load_up_to(sums + quarter(g) * H + u, H - u));
  }
}

template <class S, class Engine>
void Backward<S, Engine>::norm_row_backward(const Share& share, int64_t s, int64_t slot, int64_t row) const {
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

template <class S, class Engine>
auto Backward<S, Engine>::y_row(const Place& place) const -> const S* {
  const S* y = static_cast<const S*>(cell_->direction[steps_.direction].y);
  return y + cell_->y_map.at(place.t, place.b) + place.unit;
}

template <class S, class Engine>
auto Backward<S, Engine>::masked_h_before(int64_t s, int64_t slot, int64_t row) const -> const S* {
  const S* h = h_before(s, slot, row);
  if (!h || !masked_h_) return h;
  S* const to = masked_h_ + row * shape_.P;
  for (int64_t n = 0; n < shape_.P; n += L) store_up_to(to + n, masked_h(h, slot, n), shape_.P - n);
  return to;
}

template <class S, class Engine>
auto Backward<S, Engine>::masked_h(const S* h, int64_t slot, int64_t n) const -> Vec<C> {
  const Vec<C> value = load_up_to(h + n, shape_.P - n);
  return h_mask_ ? rounded_to<S>(value * load(h_mask_ + slot * h_width_ + n)) : value;
}

template <class S, class Engine>
void Backward<S, Engine>::add_kernel_grads(const Share& share, int64_t s1, int64_t rows) const {
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

template <class S, class Engine>
void Backward<S, Engine>::pack_gate_grads(const Share& share, const GradRows& grads, int64_t rows) const {
  share.team.sync();
  share.for_part(rows, [&](int64_t row) { dgate_rows_[row] = grads.row(row); });
  share.team.sync();
  share.for_part(column_panels(4 * shape_.H), [&](int64_t p) {
    Engine::pack(dgate_rows_, rows, 4 * shape_.H, p, dw_ih_.panels + p * Engine::panel_size(rows));
  });
  share.team.sync();
}

template <class S, class Engine>
void Backward<S, Engine>::read_row(int64_t row) const {
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

template <class S, class Engine>
void Backward<S, Engine>::add_rows_of_batch(const Share& share, const C* sums, int64_t size, int64_t vectors_of_H,
                                            void* out) const {
  const int64_t H = shape_.H, width = ceil_div(H, L) * L, vectors = width / L;
  if (!out) return;
  share.for_part(vectors_of_H * vectors, [&](int64_t part) {
    const int64_t gate = part / vectors, u = part % vectors * L;
    Vec<C> sum{};
    for (int64_t slot = 0; slot < shape_.B; ++slot) sum += load(sums + slot * size * width + part * L);
    store_up_to(static_cast<S*>(out) + gate * H + u, sum, H - u);
  });
}

template <class S, class Engine>
void Backward<S, Engine>::add_peephole_grads(const Share& share) const {
  add_rows_of_batch(share, d_peephole_, 3, 3, cell_->direction[steps_.direction].d_peephole);
}

template <class S, class Engine>
void Backward<S, Engine>::add_norm_grads(const Share& share) const {
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

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
