// Forward pass of one direction of a layer:
//
//     sums = x_t w_ihᵀ + b_ih + b_hh + h w_hhᵀ        [4H], then gates, c and h by gate_math.h; y_t = h, or w_hr h
//
// The steps go by in chunks of plan.chunk_steps. For a chunk, the input projection of all its rows is one product whose
// tiles start from the bias and land in `pre`; then, step by step, h times w_hh is added to the same tiles and the
// gates are taken from them. Where a chunk is one step, a panel goes through both products before the next one does.
//
//     pre:   panel 0              panel 1                   a panel: the gates of one vector of units
//          +--------------------+--------------------+--
//          | row 0    i f g o   | row 0              |      rows: those of a chunk, see chunk_row()
//          | row 1    i f g o   | row 1              |
//          | ...                | ...                |      each i, f, g, o a vector (the last panel's may share one)
//          +--------------------+--------------------+--
//
// A panel is always worked on by the same member of a team, so that `pre` needs no waiting; members who share rows wait
// once per step, for h.
#pragma once

#include "../gate_math.h"
#include "cell.h"
#include "narrow.h"
#include "product.h"
#include "share.h"
#include "tiles.h"
#include "vec_math.h"
#include "walk.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

template <class S, class Engine>
class Forward {
 public:
  using C = Compute<S>;
  using F = typename Engine::F;
  template <class Rows>
  using Weights = typename Engine::template WeightsOf<Rows>;
  static constexpr int L = kLanes<C>;
  static constexpr bool kDirectionsAtOnce = true;

  // `first_step`: how many steps calls before this one have done, which may have left weights in a cache.
  Forward(const LayerForward& layer, int direction, const Plan& plan, const Walk& walk, Arena& arena,
          int64_t first_step)
      : layer_(layer),
        dir_(layer.direction[direction]),
        plan_(plan),
        walk_(walk),
        shape_(layer.shape),
        first_step_(first_step),
        gates_{layer.shape.H},
        units_{layer.shape.P},
        cell_(layer.cell),
        steps_(layer.cell, direction) {
    const auto [T, B, I, H, P, projected] = shape_;
    const LayerWeights& weights = dir_.weights;
    packed_ = Engine::kKind == EngineKind::kVectors && dir_.packed;
    WeightSpace space{packed_ ? static_cast<char*>(dir_.packed) : nullptr, arena};
    panels_ = gates_.panels();
    w_ih_ = weights_in(weights.w_ih, weights.scales.w_ih, gates_, I, kInput, space);
    w_hh_ = weights_in(weights.w_hh, weights.scales.w_hh, gates_, P, kRecurrent, space);
    if (projected) w_hr_ = weights_in(weights.w_hr, weights.scales.w_hr, units_, H, kProjection, space);
    bias_ = space.template get<C>(panels_ * kPanelWidth<C>);

    x_width_ = Engine::row_size(I);
    chunk_rows_ = plan_.chunk_steps * B;
    pre_ = arena.get<C>(panels_ * chunk_rows_ * kPanelWidth<C>);
    x_rows_ = arena.get<const F*>(chunk_rows_);
    if (!plan_.borrow_x) x_copy_ = arena.get<F>(chunk_rows_ * x_width_);

    h_width_ = Engine::row_size(P);
    c_width_ = panels_ * L;
    h_ = arena.get<F>(2 * B * h_width_);
    outlets_ = arena.get<Outlet>(2 * B);
    c_ = arena.get<C>(B * c_width_);
    if (projected) {
      hidden_width_ = Engine::row_size(H);
      hidden_ = arena.get<F>(B * hidden_width_);
    }
    if (cell_) prepare_cell(arena);
  }

  // Packs the weights of a frozen layer to where its passes find them.
  void pack() const {
    for (int64_t p = 0; p < panels_; ++p) pack_gates(p);
    for (int64_t p = 0; p < w_hr_.panels(); ++p) w_hr_.pack(p);
  }

  void run(const Team& team) const {
    const Share share(team, plan_);
    [[maybe_unused]] const typename Engine::Session session;
    prepare(share);
    team.sync();
    for (int64_t s = 0; s < shape_.T; s += plan_.chunk_steps) run_chunk(share, s);
    share.for_part(shape_.B, [&](int64_t slot) { clear_padding(slot); });
  }

 private:
  // Where packed weights lie: one part after the other in those of a frozen layer, else in the arena.
  struct WeightSpace {
    char* frozen;
    Arena& arena;

    template <class T>
    T* get(int64_t count) {
      if (!frozen) return arena.get<T>(count);
      T* const at = reinterpret_cast<T*>(frozen);
      frozen += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
      return at;
    }
  };

  template <class Rows>
  Weights<Rows> weights_in(const Matrix& matrix, [[maybe_unused]] const float* scales, Rows rows, int64_t K,
                           Weight weight, WeightSpace& space) const {
    using W = Weights<Rows>;
    auto* const panels =
        plan_.in_place[weight] ? nullptr : space.template get<typename W::Packed>(W::packed_size(rows, K));
    if constexpr (Engine::kScaled) {
      return W(matrix.data, matrix.row_stride, scales, rows, K, panels, weight == kInput ? x_bits() : Bits::k16);
    } else {
      return W(matrix.data, matrix.row_stride, rows, K, panels);
    }
  }

  // Of the integers of x, where there are any.
  Bits x_bits() const { return bits_of_inputs(shape_.I, steps_.norm() != Norm::kNone); }

  void prepare_cell(Arena& arena);

  // f(k0, k1) for the blocks of 0 .. K, at least once
  template <class Body>
  static void for_blocks(int64_t K, int64_t depth, const Body& body) {
    int64_t k0 = 0;
    do {
      const int64_t k1 = K - k0 <= depth ? K : k0 + depth;
      body(k0, k1);
      k0 = k1;
    } while (k0 < K);
  }

  // ---- before the first step -------------------------------------------------------------------

  void prepare(const Share& share) const {
    if (!packed_) {
      share.for_part(panels_, [&](int64_t p) { pack_gates(p); });
      share.for_part(w_hr_.panels(), [&](int64_t p) { w_hr_.pack(p); });
    }
    share.for_part(shape_.B, [&](int64_t slot) { start_row(slot); });
    find_outlets(share, 0);
  }

  void pack_gates(int64_t p) const {
    w_ih_.pack(p);
    w_hh_.pack(p);
    pack_bias(p);
  }

  void pack_bias(int64_t p) const {
    if (cell_ && (cell_->options.tensorflow || cell_->options.norm == Norm::kRows)) return pack_cell_bias(p);
    const S* b_ih = static_cast<const S*>(dir_.weights.b_ih);
    const S* b_hh = static_cast<const S*>(dir_.weights.b_hh);
    const int width = gates_.width(p);
    for (int g = 0; g < 4; ++g) {
      const int64_t at = gates_.first(p, g), count = gates_.count(p, g);
      const Vec<C> sum = b_ih ? load_up_to(b_ih + at, count) + load_up_to(b_hh + at, count) : Vec<C>{};
      store_up_to(bias(p) + g * width, sum, width);
    }
  }

  // Where rows are normalised it is added afterwards.
  void pack_cell_bias(int64_t p) const;

  void start_row(int64_t slot) const {
    if (h_mask_) draw_h_mask(slot);
    const int64_t b = walk_.row(slot);
    const bool keep = !walk_.resets_before(0, slot, dir_.reverse);
    const bool empty = walk_.length(slot) == 0;
    if constexpr (Engine::kScaled) scale_rows(slot, keep);
    start_state(dir_.state.h0, b, keep, shape_.P, empty ? dir_.h_n : nullptr, [&](int64_t n, Vec<C> value) {
      if (cell_) value = keep_h(slot, n, value);
      Engine::put(h_ + slot * h_width_, n, value, shape_.P);
    });
    start_state(dir_.state.c0, b, keep, shape_.H, empty ? dir_.c_n : nullptr,
                [&](int64_t n, Vec<C> value) { store(c_ + slot * c_width_ + n, value); });
  }

  // What integers stand for in the rows of h: one scale for all steps, that of the largest number that may come.
  void scale_rows(int64_t slot, bool keep) const {
    const S* h0 = static_cast<const S*>(dir_.state.h0.data);
    C largest = dir_.h_bound;
    if (h0 && keep) {
      const C of_h0 = Engine::largest(h0 + walk_.row(slot) * dir_.state.h0.row_stride, shape_.P);
      if (of_h0 > largest) largest = of_h0;  // of NaN nothing is known: `put` marks it
    }
    for (int64_t s = 0; s < 2; ++s) Engine::scale_row(h(s, slot), largest, shape_.P);
    if (shape_.projected) Engine::scale_row(hidden_ + slot * hidden_width_, C(1), shape_.H);
  }

  void draw_h_mask(int64_t slot) const;

  // Of the h that a step starts from: what it keeps is remembered, what it multiplies returned.
  LSTM_EXT_INLINE Vec<C> keep_h(int64_t slot, int64_t n, Vec<C> h) const {
    if (h_kept_) store(h_kept_ + slot * units_width_ + n, h);
    return h_mask_ ? h * load(h_mask_ + slot * units_width_ + n) : h;
  }

  template <class Put>
  static void start_state(const Matrix& initial, int64_t b, bool keep, int64_t width, void* final, const Put& put) {
    const S* from = static_cast<const S*>(initial.data);
    for (int64_t n = 0; n < width; n += L) {
      const Vec<C> value = from ? load_up_to(from + b * initial.row_stride + n, width - n) : Vec<C>{};
      put(n, keep ? value : Vec<C>{});
      if (final) store_up_to(static_cast<S*>(final) + b * width + n, value, width - n);
    }
  }

  // ---- the input projection of a chunk ---------------------------------------------------------

  // Where the rows of step s of a group begin, in a chunk that begins at step s0. Rows lie group after group and, in a
  // group, step after step, without gaps for slots that have ended, so that a tile of rows may reach over steps. Of two
  // groups (0 to 1 and 2 to 3), in a chunk of three steps of which slot 1 has two and slot 3 has one:
  //
  //                    s0   s0+1  s0+2
  //         slot 0      0    2     4
  //         slot 1      1    3     -       row 5 stays free: the second group's rows begin at 2 slots * 3 steps = 6
  //         slot 2      6    8     9
  //         slot 3      7    -     -
  //
  // Members who have their own groups may be in different chunks at a time.
  int64_t chunk_row(const Share::Group& group, int64_t s0, int64_t s) const {
    return group.first * plan_.chunk_steps + walk_.count(group.first, group.last, s0, s);
  }

  void run_chunk(const Share& share, int64_t s0) const {
    const int64_t s1 = s0 + plan_.chunk_steps < shape_.T ? s0 + plan_.chunk_steps : shape_.T;
    if (plan_.alone && has_few_inputs()) return steps_alone(share, s0, s1);
    share.for_groups([&](const Share::Group& group) {
      for (int64_t s = s0; s < s1; ++s) {
        const int64_t row = chunk_row(group, s0, s) - group.first;
        share.for_slots(group, walk_.active(s), [&](int64_t slot) { fetch_x(s, slot, row + slot); });
      }
    });
    share.sync_rows();
    // Of one step a panel's sums go from one product to the other in a first-level cache.
    const bool one_step = s1 - s0 == 1 && steps_.norm() == Norm::kNone && !plan_.alone;
    if (!one_step && kernel_in_place_) project_by_kernel(share, s0, s0, s1);
    if (!one_step && !kernel_in_place_) share.for_panels(panels_, [&](int64_t p) { project_input(share, s0, s1, p); });
    if (plan_.alone) return steps_alone(share, s0, s1);
    for (int64_t s = s0; s < s1; ++s) norm_row_ ? run_norm_step(share, s0, s) : run_step(share, s0, s, one_step);
  }

  // One member computes them all.
  void steps_alone(const Share& share, int64_t s0, int64_t s1) const {
    share.team.sync();
    if (share.team.rank == 0) run_alone(s0, s1);
    share.team.sync();
  }

  void fetch_x(int64_t s, int64_t slot, int64_t row) const {
    const S* x = static_cast<const S*>(layer_.x) + layer_.x_map.at(walk_.time(s, slot, dir_.reverse), walk_.row(slot));
    if (plan_.borrow_x) {
      x_rows_[row] = reinterpret_cast<const F*>(x);
      return;
    }
    F* copy = x_copy_ + row * x_width_;
    if constexpr (Engine::kScaled) {
      Engine::put_inputs(copy, x, shape_.I, x_bits());
    } else {
      for (int64_t n = 0; n < shape_.I; n += L) Engine::put(copy, n, load_up_to(x + n, shape_.I - n), shape_.I);
    }
    x_rows_[row] = copy;
  }

  C* bias(int64_t p) const { return bias_ + p * kPanelWidth<C>; }
  C* tile(int64_t p, int64_t row) const { return pre_ + (p * chunk_rows_ + row) * kPanelWidth<C>; }

  void project_input(const Share& share, int64_t s0, int64_t s1, int64_t p) const {
    for_blocks(shape_.I, plan_.depth[kInput],
               [&](int64_t k0, int64_t k1) {  // at least once: with no input there is still the bias
                 share.for_groups([&](const Share::Group& group) {
                   const int64_t end = chunk_row(group, s0, s1);
                   for (int64_t row = chunk_row(group, s0, s0); row < end; row += Engine::kRows) {
                     const int count = static_cast<int>(end - row < Engine::kRows ? end - row : Engine::kRows);
                     const F* x[Engine::kRows];
                     for (int m = 0; m < count; ++m) x[m] = x_rows_[row + m] + k0;
                     const bool begins = k0 == 0;
                     w_ih_.multiply(count, x, p, k0, k1, begins ? bias(p) : tile(p, row), begins ? 0 : kPanelWidth<C>,
                                    tile(p, row));
                   }
                 });
               });
  }

  // The same of all panels of mine with TensorFlow's kernel in place: rows s .. s1 - 1 of a chunk that begins at s0
  void project_by_kernel(const Share& share, int64_t s0, int64_t s, int64_t s1) const;

  void recur_by_kernel(const Share& share, int64_t s0, int64_t s) const;

  void multiply_by_kernel(const Share& share, const Weights<GateRows<C>>& weights, int count, const F* const* a,
                          int64_t row) const;

  // ---- one step --------------------------------------------------------------------------------

  F* h(int64_t s, int64_t slot) const { return h_ + ((s % 2) * shape_.B + slot) * h_width_; }

  // Where what a slot computes at a step goes. What nobody wants is null: of gates and cells, and h_n and c_n but for
  // the slot's last step.
  struct Outlet {
    int64_t t, b;
    S *y, *gates;
    C* cells;
    S *h_n, *c_n;
    F* h;          // of the next step
    bool forgets;  // whether that begins from zeros

    Place place(int64_t unit) const { return {t, b, unit}; }
  };
  Outlet* outlets(int64_t s) const { return outlets_ + (s % 2) * shape_.B; }

  // Once for all panels, by who has the rows or a part of them: before the first step, and at each of those of the next
  // one, while others may still read the current ones; the wait at a step's end is theirs as it is that of h.
  void find_outlets(const Share& share, int64_t s) const {
    const auto find = [&](int64_t slot) {
      const int64_t b = walk_.row(slot), t = walk_.time(s, slot, dir_.reverse);
      const bool ends = s == walk_.length(slot) - 1;
      const auto row = [&](auto* array, const RowMap& map) { return array ? array + map.at(t, b) : nullptr; };
      outlets(s)[slot] = {t,
                          b,
                          row(static_cast<S*>(dir_.y), layer_.y_map),
                          row(static_cast<S*>(dir_.gates), layer_.gates_map),
                          row(static_cast<C*>(dir_.cells), layer_.cells_map),
                          ends && dir_.h_n ? static_cast<S*>(dir_.h_n) + b * shape_.P : nullptr,
                          ends ? static_cast<S*>(dir_.c_n) + b * shape_.H : nullptr,
                          h(s + 1, slot),
                          walk_.resets_before(s + 1, slot, dir_.reverse)};
    };
    share.for_groups([&](const Share::Group& group) { share.for_slots(group, walk_.active(s), find); });
  }

  // The panels go by forth and back on alternate steps: what a cache smaller than the weights has kept from the end of
  // one step is what the next one begins with.
  void run_step(const Share& share, int64_t s0, int64_t s, bool projects) const {
    const bool together = projects && plan_.one_sum;
    if (kernel_in_place_) {
      if (projects) project_by_kernel(share, s0, s, s + 1);
      recur_by_kernel(share, s0, s);
    }
    const auto run_panel = [&](int64_t p) {
      if (projects && !together && !kernel_in_place_) project_input(share, s, s + 1, p);
      const int64_t depth = together ? shape_.P : plan_.depth[kRecurrent];
      for_blocks(shape_.P, depth, [&](int64_t k0, int64_t k1) {
        share.for_groups([&](const Share::Group& group) {
          const int64_t row = chunk_row(group, s0, s) - group.first;
          share.for_tiles(group, walk_.active(s), [&](int64_t first, int count) {
            const F* a[Engine::kRows];
            for (int m = 0; m < count; ++m) a[m] = h(s, first + m) + k0;
            C* pre = tile(p, row + first);
            if (together) {
              multiply_together(count, x_rows_ + row + first, a, p, pre);
            } else if (!kernel_in_place_) {
              w_hh_.multiply(count, a, p, k0, k1, pre, kPanelWidth<C>, pre);
            }
            if (k1 < shape_.P) return;
            cell_ ? pointwise_cell(s, first, count, p, row + first)
                  : pointwise_forward(s, first, count, p, row + first);
          });
        });
      });
    };
    share.for_panels(panels_, run_panel, (s + first_step_) % 2 != 0);
    find_outlets(share, s + 1);
    share.sync_rows();
    if (shape_.projected) project_step(share, s);
  }

  // Of a sequence by itself (forward_alone.h)
  static constexpr bool kMayBeAlone = Engine::kReadsInPlace && sizeof(S) == sizeof(C);
  void run_alone(int64_t s0, int64_t s1) const;
  bool has_few_inputs() const { return shape_.I <= kFewInputs; }
  template <int vectors>
  void start_alone(int64_t row, const S* x, int64_t p, Vec<C>* sum) const;
  Vec<C> step_alone(int64_t s, int64_t row, const S* x, int64_t p) const;
  Vec<C> step_few_alone(int64_t s, int64_t row, const S* x, int64_t p) const;
  Vec<C> finish_alone(const GateValues<Vec<C>>& sums, int64_t s, int64_t p) const;
  [[gnu::noinline]] void save_alone(const GateValues<Vec<C>>& gates, Vec<C> c, int64_t s, int64_t p) const;

  void project_step(const Share& share, int64_t s) const {
    share.for_panels(w_hr_.panels(), [&](int64_t p) {
      share.for_tiles(walk_.active(s), [&](int64_t first, int count) { project_output(s, first, count, p); });
    });
    share.sync_rows();
  }

  // A step with layer normalisation: the products, then each row of the batch as a whole by one member.
  void run_norm_step(const Share& share, int64_t s0, int64_t s) const;

  // What h brings: to what x has brought, or apart, where each is normalised by itself.
  void norm_sums(int64_t s, int64_t row, int64_t first, int count, int64_t p) const;

  // The gates of a row from its tiles, one after the other: to [4][c_width]
  void gather_row(const C* tiles, int64_t panel_stride, C* gates) const;

  [[gnu::noinline]] void norm_row(const Share& share, int64_t s, int64_t slot, int64_t row) const;

  // Both products of a step as one sum, whose lanes are added up once; of weights in place.
  void multiply_together(int count, const F* const* x, const F* const* a, int64_t p, C* sums) const {
    if constexpr (Engine::kReadsInPlace) {
      for (int m = 0; m < count; ++m) __builtin_memcpy(sums + m * kPanelWidth<C>, bias(p), kPanelWidth<C> * sizeof(C));
      w_hh_.multiply_in_place(count, {w_ih_.in_place(x, 0, shape_.I), w_hh_.in_place(a, 0, shape_.P)}, p, sums);
    }
  }

  // Gates, c and h of some rows and one vector of units, from their sums. In passes over the rows, so that while one
  // waits for its exp or division the next ones are under way. Not inlined into the differently tall tiles: one piece
  // of code, so that a row's bits do not depend on the tile it was in.
  [[gnu::noinline]] void pointwise_forward(int64_t s, int64_t first, int count, int64_t p, int64_t first_row) const {
    const int64_t u = p * L, units = gates_.count(p, 0), width = gates_.width(p);
    C* const sums = tile(p, first_row);
    C* const c = c_ + first * c_width_ + u;
    if constexpr (!Engine::kKeepsInfinity) {
      Engine::repair(count, gates_.vectors(p), sums, [&](int m, C*) { sum_exactly(s, first + m, p, first_row + m); });
    }
    Vec<C> h[Engine::kRows];
    if (units == L) {  // as numbers that the compiler knows
      run_cells(sums, L, L, count, c, h);
    } else {
      run_cells(sums, units, width, count, c, h);
    }
    const Outlet* const out = outlets(s) + first;
    for (int m = 0; m < count; ++m) {
      save_cell(out[m], u, units, sums + m * kPanelWidth<C>, width, c + m * c_width_);
      if (shape_.projected) {
        Engine::put_rounded(hidden_ + (first + m) * hidden_width_, u, h[m], shape_.H);
      } else {
        finish_h(out[m], u, h[m]);
      }
    }
  }

  // The same of a cell with options, by cell_math.h. Each activation is chosen once for all rows; what passes between
  // the loops lies in `values`: i, f, g, o and what becomes the output, so many vectors of each as there are rows.
  [[gnu::noinline]] void pointwise_cell(int64_t s, int64_t first, int count, int64_t p, int64_t first_row) const;

  // As finish_h
  [[gnu::noinline]] void finish_cell_h(const Outlet& out, int64_t slot, int64_t n, Vec<C> value) const;

  // The sums become the gates.
  LSTM_EXT_INLINE void run_cells(C* sums, int64_t units, int64_t width, int count, C* c, Vec<C>* h) const {
    for (int m = 0; m < count; ++m) {
      C* gates = sums + m * kPanelWidth<C>;
      const auto sum = [&](int g) { return load_up_to(gates + g * width, units); };
      const auto state =
          cell_state<VecMath<C>>(GateValues<Vec<C>>{sum(0), sum(1), sum(2), sum(3)}, load(c + m * c_width_));
      const Vec<C> values[] = {computed(state.gates.i), computed(state.gates.f), computed(state.gates.g),
                               computed(state.gates.o)};
      store(c + m * c_width_, computed(state.c));
      for (int g = 0; g < 4; ++g) store_up_to(gates + g * width, values[g], units);
    }
    for (int m = 0; m < count; ++m) {
      const Vec<C> o = load_up_to(sums + m * kPanelWidth<C> + 3 * width, units);
      h[m] = computed(cell_output<VecMath<C>>(o, load(c + m * c_width_)));
    }
  }

  // To the outputs, of one row and vector of units; c is then what the next step starts from.
  LSTM_EXT_INLINE void save_cell(const Outlet& out, int64_t u, int64_t units, const C* gates, int64_t width,
                                 C* c) const {
    if (out.gates) {
      for (int g = 0; g < 4; ++g) {
        store_up_to(out.gates + g * shape_.H + u, load_up_to(gates + g * width, units), units);
      }
    }
    if (out.cells) store_up_to(out.cells + u, load(c), units);
    if (out.c_n) store_up_to(out.c_n + u, load(c), units);
    if (out.forgets) store(c, Vec<C>{});
  }

  // The sums of a row that has to be repaired
  void sum_exactly(int64_t s, int64_t slot, int64_t p, int64_t row) const {
    __builtin_memcpy(tile(p, row), bias(p), kPanelWidth<C> * sizeof(C));
    w_ih_.multiply_exactly(x_rows_[row], p, tile(p, row));
    w_hh_.multiply_exactly(h(s, slot), p, tile(p, row));
  }

  void project_output(int64_t s, int64_t first, int rows, int64_t p) const {
    alignas(64) C sums[Engine::kRows * kPanelWidth<C>] = {};
    const F* a[Engine::kRows] = {};
    for (int m = 0; m < rows; ++m) a[m] = hidden_ + (first + m) * hidden_width_;
    w_hr_.multiply(rows, a, p, 0, shape_.H, sums, kPanelWidth<C>, sums);
    if constexpr (!Engine::kKeepsInfinity) {
      Engine::repair(rows, units_.vectors(p), sums, [&](int m, C* row) {
        __builtin_memset(row, 0, kPanelWidth<C> * sizeof(C));
        w_hr_.multiply_exactly(a[m], p, row);
      });
    }
    for (int m = 0; m < rows; ++m) {
      const Outlet& out = outlets(s)[first + m];
      for (int g = 0; g < 4; ++g) {
        const int64_t n = p * kPanelWidth<C> + g * L;
        if (n >= shape_.P) break;
        const Vec<C> value = load(sums + (m * 4 + g) * L);
        cell_ ? finish_cell_h(out, first + m, n, value) : finish_h(out, n, value);
      }
    }
  }

  // Elements n .. n + lanes of the new h go to the output and to the next step.
  LSTM_EXT_INLINE void finish_h(const Outlet& out, int64_t n, Vec<C> value) const {
    const int64_t count = shape_.P - n;
    store_up_to(out.y + n, value, count);
    if (out.h_n) store_up_to(out.h_n + n, value, count);
    Engine::put_rounded(out.h, n, out.forgets ? Vec<C>{} : value, shape_.P);
  }

  // ---- after the last step ---------------------------------------------------------------------

  void clear_padding(int64_t slot) const {
    if (layer_.y_map.packed_offset) return;
    const int64_t b = walk_.row(slot);
    for (int64_t t = walk_.length(slot); t < shape_.T; ++t) {
      clear(static_cast<S*>(dir_.y) + layer_.y_map.at(t, b), shape_.P);
      if (dir_.cells) clear(static_cast<C*>(dir_.cells) + layer_.cells_map.at(t, b), shape_.H);
      if (dir_.gates) clear(static_cast<S*>(dir_.gates) + layer_.gates_map.at(t, b), 4 * shape_.H);
    }
  }

  template <class E>
  static void clear(E* row, int64_t width) {
    __builtin_memset(row, 0, static_cast<size_t>(width) * sizeof(E));
  }

  const LayerForward& layer_;
  const ForwardDirection& dir_;
  const Plan& plan_;
  const Walk& walk_;
  const SequenceShape shape_;
  const int64_t first_step_;
  const GateRows<C> gates_;
  const PlainRows<C> units_;
  Weights<GateRows<C>> w_ih_, w_hh_;
  Weights<PlainRows<C>> w_hr_;
  bool packed_;  // the layer is frozen
  int64_t panels_, chunk_rows_, x_width_, h_width_, c_width_, hidden_width_ = 0;
  C* bias_;              // [panels][4 * lanes]
  C* pre_;               // [panels][chunk_rows][4 * lanes]
  const F** x_rows_;     // [chunk_rows]
  F* x_copy_ = nullptr;  // [chunk_rows, x_width], where x cannot be multiplied as it lies
  F* h_;                 // [2][B, h_width]
  Outlet* outlets_;      // [2][B]
  C* c_;                 // [B, c_width]
  F* hidden_ = nullptr;  // [B, hidden_width], h before its projection
  // Of a cell with options:
  const LayerCell* const cell_;
  const CellSteps<C> steps_;
  bool kernel_in_place_ = false;
  int64_t units_width_ = 0;
  static constexpr int kNormVectors = 8;
  C* norm_row_ = nullptr;  // [threads][kNormVectors, c_width]: i f g o, what becomes the output, and what h brought
  C* of_h_ = nullptr;      // [panels][B][4 * lanes], the sums of h where they are normalised by themselves
  C* h_mask_ = nullptr;    // [B, units_width], what h is multiplied by before its products
  C* h_kept_ = nullptr;    // [B, units_width], the same h as h_, without that
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
