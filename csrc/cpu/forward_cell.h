// The forward pass of a cell with options, beside the plain one of forward.h: its pointwise step by cell_math.h, rows
// with layer normalisation, and weights in TensorFlow's layout where they lie.
#pragma once

#include "forward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S, class Engine>
void Forward<S, Engine>::prepare_cell(Arena& arena) {
  const Cell& cell = cell_->options;
  units_width_ = ceil_div(shape_.P, L) * L;
  if (steps_.recurrent.possible) h_mask_ = arena.get<C>(shape_.B * units_width_);
  if (steps_.zoneout_h.wanted) h_kept_ = arena.get<C>(shape_.B * units_width_);
  if (cell.norm != Norm::kNone) norm_row_ = arena.get<C>(plan_.threads * kNormVectors * c_width_);
  if (cell.norm == Norm::kRows) of_h_ = arena.get<C>(panels_ * shape_.B * kPanelWidth<C>);
  if constexpr (Engine::kReadsInPlace) {
    if (!cell.tensorflow) return;
    w_ih_.lie_by_columns();
    w_hh_.lie_by_columns();
    kernel_in_place_ = plan_.in_place[kRecurrent];
  }
}

template <class S, class Engine>
void Forward<S, Engine>::pack_cell_bias(int64_t p) const {
  const S* from = cell_->options.norm == Norm::kRows ? nullptr : static_cast<const S*>(dir_.weights.b_ih);
  const int width = gates_.width(p);
  for (int g = 0; g < 4; ++g) {
    const Vec<C> value = from ? load_up_to(from + gates_.first_column(p, g), gates_.count(p, g)) : Vec<C>{};
    store_up_to(bias(p) + g * width, value, width);
  }
}

template <class S, class Engine>
void Forward<S, Engine>::draw_h_mask(int64_t slot) const {
  for (int64_t n = 0; n < shape_.P; n += L) {
    store(h_mask_ + slot * units_width_ + n, steps_.h_mask({0, walk_.row(slot), n}));
  }
}

template <class S, class Engine>
void Forward<S, Engine>::project_by_kernel(const Share& share, int64_t s0, int64_t s, int64_t s1) const {
  if constexpr (Engine::kReadsInPlace) {
    share.for_groups([&](const Share::Group& group) {
      const int64_t end = chunk_row(group, s0, s1);
      for (int64_t row = chunk_row(group, s0, s); row < end; row += Engine::kRows) {
        const int count = static_cast<int>(end - row < Engine::kRows ? end - row : Engine::kRows);
        share.for_panels(panels_, [&](int64_t p) {
          for (int m = 0; m < count; ++m) {
            __builtin_memcpy(tile(p, row + m), bias(p), kPanelWidth<C> * sizeof(C));
          }
        });
        multiply_by_kernel(share, w_ih_, count, x_rows_ + row, row);
      }
    });
  }
}

template <class S, class Engine>
void Forward<S, Engine>::recur_by_kernel(const Share& share, int64_t s0, int64_t s) const {
  if constexpr (Engine::kReadsInPlace) {
    share.for_groups([&](const Share::Group& group) {
      const int64_t row = chunk_row(group, s0, s) - group.first;
      share.for_tiles(group, walk_.active(s), [&](int64_t first, int count) {
        const F* a[Engine::kRows];
        for (int m = 0; m < count; ++m) a[m] = h(s, first + m);
        multiply_by_kernel(share, w_hh_, count, a, row + first);
      });
    });
  }
}

template <class S, class Engine>
void Forward<S, Engine>::multiply_by_kernel(const Share& share, const Weights<GateRows<C>>& weights, int count,
                                            const F* const* a, int64_t row) const {
  const auto [first, last] = share.panels_of_mine(panels_);
  if (first < last) weights.kernel().multiply(count, a, first, last, tile(first, row), chunk_rows_ * kPanelWidth<C>);
}

template <class S, class Engine>
void Forward<S, Engine>::pointwise_cell(int64_t s, int64_t first, int count, int64_t p, int64_t first_row) const {
  const Cell& cell = cell_->options;
  const int64_t u = p * L, units = gates_.count(p, 0), width = gates_.width(p);
  C* const sums = tile(p, first_row);
  C* const c = c_ + first * c_width_ + u;
  if constexpr (!Engine::kKeepsInfinity) {
    Engine::repair(count, gates_.vectors(p), sums, [&](int m, C*) { sum_exactly(s, first + m, p, first_row + m); });
  }
  alignas(64) C values[5 * Engine::kRows * L];
  const int64_t apart = count * L;
  C *const i = values, *const f = i + apart, *const g = f + apart, *const o = g + apart, *const output = o + apart;
  const Peephole<S> peephole(steps_.peephole(), shape_.H, u);
  const Outlet* const out = outlets(s) + first;

  for (int m = 0; m < count; ++m) {
    const auto sum = [&](int gate) { return load_up_to(sums + m * kPanelWidth<C> + gate * width, units); };
    const Vec<C> c_prev = load(c + m * c_width_);
    const Vec<C> biased = sum(1) + static_cast<C>(cell.forget_bias);
    store(i + m * L, peephole.there ? sum(0) + peephole.i * c_prev : sum(0));
    store(f + m * L, peephole.there ? biased + peephole.f * c_prev : biased);
    store(g + m * L, sum(2));
  }
  if (!cell.coupled) activate_all<C>(cell.recurrent_activation, i, count);
  activate_all<C>(cell.recurrent_activation, f, count);
  activate_all<C>(cell.activation, g, count);
  for (int m = 0; m < count; ++m) {
    if (cell.coupled) store(i + m * L, 1 - load(f + m * L));
    const Place place = out[m].place(u);
    const Vec<C> c_prev = load(c + m * c_width_), masked_g = computed(load(g + m * L) * steps_.g_mask(place));
    const Vec<C> new_c =
        steps_.clipped(steps_.unclipped_c(load(i + m * L), load(f + m * L), masked_g, c_prev), cell.cell_clip);
    const Vec<C> sum = load_up_to(sums + m * kPanelWidth<C> + 3 * width, units);
    store(output + m * L, new_c);
    store(o + m * L, peephole.there ? sum + peephole.o * new_c : sum);
    store(c + m * c_width_, steps_.next(steps_.zoneout_c, c_prev, new_c, place));
  }
  activate_all<C>(cell.recurrent_activation, o, count);
  activate_all<C>(cell.activation, output, count);
  for (int m = 0; m < count; ++m) {
    const Vec<C> h = first_lanes<C>(load(o + m * L) * load(output + m * L), units);
    save_cell(out[m], u, units, values + m * L, apart, c + m * c_width_);
    if (shape_.projected) {
      Engine::put_rounded(hidden_ + (first + m) * hidden_width_, u, h, shape_.H);
    } else {
      finish_cell_h(out[m], first + m, u, h);
    }
  }
}

template <class S, class Engine>
void Forward<S, Engine>::finish_cell_h(const Outlet& out, int64_t slot, int64_t n, Vec<C> value) const {
  const int64_t count = shape_.P - n;
  if (shape_.projected) value = steps_.clipped(value, cell_->options.proj_clip);
  if (h_kept_) value = steps_.next(steps_.zoneout_h, load(h_kept_ + slot * units_width_ + n), value, out.place(n));
  store_up_to(out.y + n, value, count);
  if (out.h_n) store_up_to(out.h_n + n, value, count);
  Engine::put_rounded(out.h, n, keep_h(slot, n, out.forgets ? Vec<C>{} : rounded_to<S>(value)), shape_.P);
}

template <class S, class Engine>
void Forward<S, Engine>::run_norm_step(const Share& share, int64_t s0, int64_t s) const {
  share.for_panels(panels_, [&](int64_t p) {
    share.for_groups([&](const Share::Group& group) {
      const int64_t row = chunk_row(group, s0, s) - group.first;
      share.for_tiles(group, walk_.active(s), [&](int64_t first, int count) { norm_sums(s, row, first, count, p); });
    });
  });
  share.sync_rows();
  share.for_groups([&](const Share::Group& group) {
    const int64_t row = chunk_row(group, s0, s) - group.first;
    share.for_slots(group, walk_.active(s), [&](int64_t slot) { norm_row(share, s, slot, row + slot); });
  });
  find_outlets(share, s + 1);
  share.sync_rows();
  if (shape_.projected) project_step(share, s);
}

template <class S, class Engine>
void Forward<S, Engine>::norm_sums(int64_t s, int64_t row, int64_t first, int count, int64_t p) const {
  const F* a[Engine::kRows];
  for (int m = 0; m < count; ++m) a[m] = h(s, first + m);
  C* sums = tile(p, row + first);
  if (of_h_) {
    sums = of_h_ + (p * shape_.B + first) * kPanelWidth<C>;
    __builtin_memset(sums, 0, static_cast<size_t>(count) * kPanelWidth<C> * sizeof(C));
  }
  if (!kernel_in_place_) {
    w_hh_.multiply(count, a, p, 0, shape_.P, sums, kPanelWidth<C>, sums);
  } else if constexpr (Engine::kReadsInPlace) {
    w_hh_.kernel().multiply(count, a, p, p + 1, sums, 0);
  }
  if constexpr (!Engine::kKeepsInfinity) {
    Engine::repair(count, gates_.vectors(p), sums, [&](int m, C* sum) {
      if (!of_h_) return sum_exactly(s, first + m, p, row + first + m);
      __builtin_memset(sum, 0, kPanelWidth<C> * sizeof(C));
      w_hh_.multiply_exactly(a[m], p, sum);
    });
  }
}

template <class S, class Engine>
void Forward<S, Engine>::gather_row(const C* tiles, int64_t panel_stride, C* gates) const {
  for (int64_t p = 0; p < panels_; ++p) {
    for (int g = 0; g < 4; ++g) {
      store(gates + g * c_width_ + p * L,
            load_up_to(tiles + p * panel_stride + g * gates_.width(p), gates_.count(p, g)));
    }
  }
}

template <class S, class Engine>
void Forward<S, Engine>::norm_row(const Share& share, int64_t s, int64_t slot, int64_t row) const {
  const Cell& cell = cell_->options;
  const auto& arrays = cell_->direction[steps_.direction];
  const Outlet& out = outlets(s)[slot];
  const int64_t H = shape_.H, vectors = c_width_ / L;
  C* const i = norm_row_ + share.team.rank * kNormVectors * c_width_;
  C *const f = i + c_width_, *const g = f + c_width_, *const o = g + c_width_, *const output = o + c_width_;
  C* const c = c_ + slot * c_width_;
  gather_row(tile(0, row), chunk_rows_ * kPanelWidth<C>, i);
  NormedGates<S>::of(
      cell, arrays, dir_.weights, H, i,
      [&](C* of_h) { gather_row(of_h_ + slot * kPanelWidth<C>, shape_.B * kPanelWidth<C>, of_h); }, output);

  for (int64_t u = 0; u < H; u += L) {
    const Peephole<S> peephole(arrays.peephole, H, u);
    const Vec<C> biased = load(f + u) + static_cast<C>(cell.forget_bias);
    store(f + u, peephole.there ? biased + peephole.f * load(c + u) : biased);
    if (peephole.there) store(i + u, load(i + u) + peephole.i * load(c + u));
  }
  const int count = static_cast<int>(vectors);
  if (!cell.coupled) activate_all<C>(cell.recurrent_activation, i, count);
  activate_all<C>(cell.recurrent_activation, f, count);
  activate_all<C>(cell.activation, g, count);
  for (int64_t u = 0; u < H; u += L) {
    if (cell.coupled) store(i + u, 1 - load(f + u));
    const Peephole<S> peephole(arrays.peephole, H, u);
    const Vec<C> masked_g = computed(load(g + u) * steps_.g_mask(out.place(u)));
    const Vec<C> new_c =
        steps_.clipped(steps_.unclipped_c(load(i + u), load(f + u), masked_g, load(c + u)), cell.cell_clip);
    store(output + u, new_c);
    if (peephole.there) store(o + u, load(o + u) + peephole.o * new_c);
  }
  activate_all<C>(cell.recurrent_activation, o, count);
  const Moments<C> moments = moments_of(output, 1, H, cell.norm_epsilon);
  for (int64_t u = 0; u < H; u += L) {
    const Vec<C> new_c = load(output + u), normed = scaled_c<S>(arrays, moments, new_c, H, u);
    const Vec<C> left = cell.norm == Norm::kGates ? normed : new_c;
    store(output + u, normed);
    store(c + u, steps_.next(steps_.zoneout_c, load(c + u), left, out.place(u)));
  }
  activate_all<C>(cell.activation, output, count);
  for (int64_t u = 0; u < H; u += L) {
    const Vec<C> h = first_lanes<C>(load(o + u) * load(output + u), H - u);
    save_cell(out, u, H - u, i + u, c_width_, c + u);
    if (shape_.projected) {
      Engine::put_rounded(hidden_ + slot * hidden_width_, u, h, H);
    } else {
      finish_cell_h(out, slot, u, h);
    }
  }
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
