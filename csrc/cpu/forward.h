// Forward pass of one direction of a layer.
//
// The steps go by in chunks. For a chunk, the input projection of all its rows is one product whose tiles
// start from the bias and land in `pre` as [panel][row][4 gates][width]; then, step by step, h times w_hh is added
// to the same tiles and the gates are taken from them. A panel is always worked on by the same member, so
// that `pre` needs no waiting; members who share rows wait once per step, for h.
#pragma once

#include "../gate_math.h"
#include "product.h"
#include "steps.h"
#include "vec_math.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

inline constexpr int64_t kChunkBytes = 1 << 19;  // of `pre`: half of a usual second-level cache
inline constexpr int64_t kBlockDepth = 512;      // of a product: a block of the panel stays near while rows pass

template <class S>
class Forward {
 public:
  using C = Compute<S>;
  using F = Factor<S>;
  static constexpr int L = kLanes<C>;

  Forward(const LayerForward& layer, const ForwardDirection& direction, const Steps& steps, Arena& arena)
      : layer_(layer), d_(direction), steps_(steps), shape_(layer.shape), gates_{layer.shape.H} {
    const auto [T, B, I, H, P, projected] = shape_;
    const int64_t rows = T * B;
    panels_ = gates_.panels<C>();
    w_ih_ = place<GateRows>(d_.weights.w_ih, gates_, I, rows, arena);
    w_hh_ = place<GateRows>(d_.weights.w_hh, gates_, P, rows, arena);
    bias_ = arena.get<C>(panels_ * kPanelWidth<C>);

    const int64_t row_bytes = panels_ * kPanelWidth<C> * static_cast<int64_t>(sizeof(C));
    chunk_steps_ = row_bytes * B > 0 ? kChunkBytes / (row_bytes * B) : T;
    if (chunk_steps_ < 1) chunk_steps_ = 1;
    if (chunk_steps_ > T) chunk_steps_ = T;
    chunk_rows_ = chunk_steps_ * B;
    pre_ = arena.get<C>(panels_ * chunk_rows_ * kPanelWidth<C>);
    x_rows_ = arena.get<const F*>(chunk_rows_);
    x_width_ = ceil_div(I, kFactorsPerLane<F>) * kFactorsPerLane<F>;
    if (sizeof(S) != sizeof(F) || x_width_ != I) x_copy_ = arena.get<F>(chunk_rows_ * x_width_);

    h_width_ = ceil_div(P, L) * L;
    c_width_ = panels_ * L;
    h_ = arena.get<F>(2 * B * h_width_);
    c_ = arena.get<C>(B * c_width_);
    if (projected) {
      const PlainRows units{P};
      w_hr_ = place<PlainRows>(d_.weights.w_hr, units, H, rows, arena);
      unprojected_ = arena.get<F>(B * c_width_);
    }
  }

  StepWork step_work() const {
    return {shape_.B, kTileRows, panels_, w_hh_.packed_size() * static_cast<int64_t>(sizeof(C))};
  }

  void run(const Team& team) const {
    const Share share(team, step_work());
    prepare(share);
    team.sync();
    for (int64_t s = 0; s < shape_.T; s += chunk_steps_) run_chunk(share, s);
    share.for_part(shape_.B, [&](int64_t slot) { clear_padding(slot); });
  }

 private:
  template <class Rows>
  static Weights<S, Rows> place(const Matrix& matrix, Rows rows, int64_t K, int64_t product_rows, Arena& arena) {
    using W = Weights<S, Rows>;
    C* panels = W::in_place_pays(product_rows, K) ? nullptr : arena.get<C>(W::packed_size(rows, K));
    return W(matrix.data, matrix.row_stride, rows, K, panels);
  }

  // ---- before the first step -------------------------------------------------------------------

  void prepare(const Share& share) const {
    share.for_part(panels_, [&](int64_t p) {
      w_ih_.pack(p);
      w_hh_.pack(p);
      pack_bias(p);
    });
    share.for_part(w_hr_.panels(), [&](int64_t p) { w_hr_.pack(p); });
    share.for_part(shape_.B, [&](int64_t slot) { start_row(slot); });
  }

  void pack_bias(int64_t p) const {
    const S* b_ih = static_cast<const S*>(d_.weights.b_ih);
    const S* b_hh = static_cast<const S*>(d_.weights.b_hh);
    const int width = gates_.width<C>(p);
    for (int g = 0; g < 4; ++g) {
      const int64_t at = gates_.first<C>(p, g), count = gates_.count<C>(p, g);
      const Vec<C> sum = b_ih ? load_up_to(b_ih + at, count) + load_up_to(b_hh + at, count) : Vec<C>{};
      store_up_to(bias_ + p * kPanelWidth<C> + g * width, sum, width);
    }
  }

  void start_row(int64_t slot) const {
    const int64_t b = steps_.row(slot);
    const bool keep = !steps_.resets_before(0, slot, d_.reverse);
    const bool empty = steps_.length(slot) == 0;
    start_state(d_.state.h0, b, keep, h_ + slot * h_width_, shape_.P, empty ? d_.h_n : nullptr);
    start_state(d_.state.c0, b, keep, c_ + slot * c_width_, shape_.H, empty ? d_.c_n : nullptr);
  }

  template <class E>
  static void start_state(const Matrix& initial, int64_t b, bool keep, E* state, int64_t width, void* final) {
    const S* from = static_cast<const S*>(initial.data);
    for (int64_t n = 0; n < width; n += L) {
      const Vec<C> value = from ? load_up_to(from + b * initial.row_stride + n, width - n) : Vec<C>{};
      store(state + n, keep ? value : Vec<C>{});
      if (final) store_up_to(static_cast<S*>(final) + b * width + n, value, width - n);
    }
  }

  // ---- the input projection of a chunk ---------------------------------------------------------

  // The rows of a chunk lie group after group and, in a group, step after step, without gaps for slots that have ended:
  // a tile of rows may reach over steps. Members who have their own groups may be in different chunks at a time.
  int64_t place(const Share::Group& group, int64_t s0, int64_t s) const {
    return group.first * chunk_steps_ + steps_.count(group.first, group.last, s0, s);
  }

  void run_chunk(const Share& share, int64_t s0) const {
    const int64_t s1 = s0 + chunk_steps_ < shape_.T ? s0 + chunk_steps_ : shape_.T;
    share.for_groups([&](const Share::Group& group) {
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t row = place(group, s0, s) - group.first;
        share.for_slots(group, steps_.active(s), [&](int64_t slot) { fetch_x(s, slot, row + slot); });
      }
    });
    share.sync_rows();
    share.for_panels(panels_, [&](int64_t p) { project_input(share, s0, s1, p); });
    for (int64_t s = s0; s < s1; ++s) run_step(share, s0, s);
  }

  void fetch_x(int64_t s, int64_t slot, int64_t row) const {
    const S* x = static_cast<const S*>(layer_.x) + layer_.x_map.at(steps_.time(s, slot, d_.reverse), steps_.row(slot));
    if (!x_copy_) {
      x_rows_[row] = reinterpret_cast<const F*>(x);
      return;
    }
    F* copy = x_copy_ + row * x_width_;
    for (int64_t n = 0; n < shape_.I; n += L) store_up_to(copy + n, load_up_to(x + n, shape_.I - n), x_width_ - n);
    x_rows_[row] = copy;
  }

  C* tile(int64_t p, int64_t row) const { return pre_ + (p * chunk_rows_ + row) * kPanelWidth<C>; }

  void project_input(const Share& share, int64_t s0, int64_t s1, int64_t p) const {
    const int64_t I = shape_.I;
    int64_t k0 = 0;
    do {  // at least once: with no input there is still the bias
      const int64_t k1 = I - k0 < kBlockDepth ? I : k0 + kBlockDepth;
      share.for_groups([&](const Share::Group& group) {
        const int64_t end = place(group, s0, s1);
        for (int64_t row = place(group, s0, s0); row < end; row += kTileRows) {
          const int count = static_cast<int>(end - row < kTileRows ? end - row : kTileRows);
          if (k0 == 0) start_from_bias(p, row, count);
          const F* x[kTileRows];
          for (int m = 0; m < count; ++m) x[m] = x_rows_[row + m] + k0;
          w_ih_.multiply(count, x, p, k0, k1, tile(p, row));
        }
      });
      k0 = k1;
    } while (k0 < I);
  }

  void start_from_bias(int64_t p, int64_t row, int count) const {
    for (int m = 0; m < count; ++m) {
      for (int g = 0; g < gates_.vectors<C>(p); ++g) {
        store(tile(p, row + m) + g * L, load(bias_ + p * kPanelWidth<C> + g * L));
      }
    }
  }

  // ---- one step --------------------------------------------------------------------------------

  F* h(int64_t s, int64_t slot) const { return h_ + ((s % 2) * shape_.B + slot) * h_width_; }

  // The panels go by forth and back on alternate steps: what a cache smaller than the weights has kept from the end of
  // one step is what the next one begins with.
  void run_step(const Share& share, int64_t s0, int64_t s) const {
    const auto run_panel = [&](int64_t p) {
      share.for_groups([&](const Share::Group& group) {
        const int64_t row = place(group, s0, s) - group.first;
        share.for_tiles(group, steps_.active(s), [&](int64_t first, int count) {
          const F* a[kTileRows];
          for (int m = 0; m < count; ++m) a[m] = h(s, first + m);
          C* pre = tile(p, row + first);
          w_hh_.multiply(count, a, p, 0, shape_.P, pre);
          for (int m = 0; m < count; ++m) finish_unit(s, first + m, p, pre + m * kPanelWidth<C>);
        });
      });
    };
    share.for_panels(panels_, run_panel, s % 2 != 0);
    share.sync_rows();
    if (!shape_.projected) return;
    share.for_panels(w_hr_.panels(), [&](int64_t p) {
      share.for_tiles(steps_.active(s), [&](int64_t first, int count) { project_output(s, first, count, p); });
    });
    share.sync_rows();
  }

  // Gates, c and h of one row and one vector of units, from their sums. Not inlined into the differently
  // tall tiles: one piece of code, so that a row's bits do not depend on the tile it was in.
  [[gnu::noinline]] void finish_unit(int64_t s, int64_t slot, int64_t p, const C* pre) const {
    using Math = VecMath<C>;
    const int64_t u = p * L, count = gates_.count<C>(p, 0), width = gates_.width<C>(p);
    C* c = c_ + slot * c_width_ + u;
    const auto sum = [&](int g) { return load_up_to(pre + g * width, count); };
    const auto step = cell_forward<Math>(GateValues<Vec<C>>{sum(0), sum(1), sum(2), sum(3)}, load(c));

    const int64_t b = steps_.row(slot), t = steps_.time(s, slot, d_.reverse);
    if (d_.gates) {
      S* gates = static_cast<S*>(d_.gates) + layer_.gates_map.at(t, b) + u;
      store_up_to(gates, step.gates.i, count);
      store_up_to(gates + shape_.H, step.gates.f, count);
      store_up_to(gates + 2 * shape_.H, step.gates.g, count);
      store_up_to(gates + 3 * shape_.H, step.gates.o, count);
    }
    if (d_.cells) store_up_to(static_cast<C*>(d_.cells) + layer_.cells_map.at(t, b) + u, step.c, count);
    if (s == steps_.length(slot) - 1) store_up_to(static_cast<S*>(d_.c_n) + b * shape_.H + u, step.c, count);
    store(c, steps_.resets_before(s + 1, slot, d_.reverse) ? Vec<C>{} : step.c);

    if (shape_.projected) {
      store_factors<S>(unprojected_ + slot * c_width_ + u, step.h);
    } else {
      finish_h(s, slot, u, step.h);
    }
  }

  void project_output(int64_t s, int64_t first, int rows, int64_t p) const {
    alignas(64) C sums[kTileRows * kPanelWidth<C>] = {};
    const F* a[kTileRows];
    for (int m = 0; m < rows; ++m) a[m] = unprojected_ + (first + m) * c_width_;
    w_hr_.multiply(rows, a, p, 0, shape_.H, sums);
    for (int m = 0; m < rows; ++m) {
      for (int g = 0; g < 4; ++g) {
        const int64_t n = p * kPanelWidth<C> + g * L;
        if (n < shape_.P) finish_h(s, first + m, n, load(sums + (m * 4 + g) * L));
      }
    }
  }

  // Elements n .. n + lanes of the new h go to the output and to the next step.
  void finish_h(int64_t s, int64_t slot, int64_t n, Vec<C> value) const {
    const int64_t b = steps_.row(slot), t = steps_.time(s, slot, d_.reverse), count = shape_.P - n;
    store_up_to(static_cast<S*>(d_.y) + layer_.y_map.at(t, b) + n, value, count);
    if (d_.h_n && s == steps_.length(slot) - 1) {
      store_up_to(static_cast<S*>(d_.h_n) + b * shape_.P + n, value, count);
    }
    const bool forget = steps_.resets_before(s + 1, slot, d_.reverse);
    store_factors<S>(h(s + 1, slot) + n, forget ? Vec<C>{} : value);
  }

  // ---- after the last step ---------------------------------------------------------------------

  void clear_padding(int64_t slot) const {
    if (layer_.y_map.packed_offset) return;
    const int64_t b = steps_.row(slot);
    for (int64_t t = steps_.length(slot); t < shape_.T; ++t) {
      clear(static_cast<S*>(d_.y) + layer_.y_map.at(t, b), shape_.P);
      if (d_.cells) clear(static_cast<C*>(d_.cells) + layer_.cells_map.at(t, b), shape_.H);
      if (d_.gates) clear(static_cast<S*>(d_.gates) + layer_.gates_map.at(t, b), 4 * shape_.H);
    }
  }

  template <class E>
  static void clear(E* row, int64_t width) {
    __builtin_memset(row, 0, static_cast<size_t>(width) * sizeof(E));
  }

  const LayerForward& layer_;
  const ForwardDirection& d_;
  const Steps& steps_;
  const SequenceShape shape_;
  const GateRows gates_;
  Weights<S, GateRows> w_ih_, w_hh_;
  Weights<S, PlainRows> w_hr_;
  int64_t panels_, chunk_steps_, chunk_rows_, x_width_, h_width_, c_width_;
  C* bias_;                   // [panels][4 * lanes]
  C* pre_;                    // [panels][chunk_rows][4 * lanes]
  const F** x_rows_;          // [chunk_rows]
  F* x_copy_ = nullptr;       // [chunk_rows, x_width], where x cannot be multiplied as it lies
  F* h_;                      // [2][B, h_width]
  C* c_;                      // [B, c_width]
  F* unprojected_ = nullptr;  // [B, c_width]
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
