// What both passes know of a cell with options (params.h): its steps of one vector of units, on top of cell_math.h.
#pragma once

#include "product.h"
#include "vec_math.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

// So many vectors, one after the other; one piece of code for all that calls it.
template <class C>
[[gnu::noinline]] void activate_all(const ActivationSpec& spec, C* values, int count) {
  with_activation<VecMath<C>>(spec, [&](const auto& activation) {
    for (int m = 0; m < count; ++m) store(values + m * kLanes<C>, activation(load(values + m * kLanes<C>)));
  });
}

// The weights of units u .. of a layer of H
template <class S>
struct Peephole {
  const bool there;
  Vec<Compute<S>> i{}, f{}, o{};

  LSTM_EXT_INLINE Peephole(const Matrix& weights, int64_t H, int64_t u) : there(weights.data) {
    if (!there) return;
    const auto row = [&](int64_t n) {
      return load_up_to(static_cast<const S*>(weights.data) + n * weights.row_stride + u, H - u);
    };
    i = row(0), f = row(1), o = row(2);
  }
};

// Where a vector of units stands, for its random numbers: time, row of the batch, first unit.
struct Place {
  int64_t t, b, unit;
};

// Nothing of it is read where a layer is a plain LSTM.
template <class C>
class CellSteps {
 public:
  // A unit keeps what it was with some probability; where nothing is drawn, in that proportion.
  struct Zoneout {
    Draw draw;
    bool wanted, draws;
    Chance chance;
    C share;
  };

  const LayerCell* const cell;
  const int direction;
  const Zoneout zoneout_h, zoneout_c;
  const Chance candidate, recurrent;  // what is dropped

  CellSteps(const LayerCell* of, int n)
      : cell(of),
        direction(n),
        zoneout_h(zoneout_of(Draw::kZoneoutH, of ? of->options.zoneout_h : 0)),
        zoneout_c(zoneout_of(Draw::kZoneoutC, of ? of->options.zoneout_c : 0)),
        candidate(Chance::of(of && of->options.training ? of->options.candidate_dropout : 0)),
        recurrent(Chance::of(of && of->options.training ? of->options.recurrent_dropout : 0)) {}

  const Matrix& peephole() const { return cell->direction[direction].peephole; }

  Norm norm() const { return cell ? cell->options.norm : Norm::kNone; }

  static LSTM_EXT_INLINE Vec<C> clipped(Vec<C> value, double clip) {
    const C most = static_cast<C>(clip);
    return most > 0 ? at_most(at_least(value, -most), most) : value;
  }

  // What h is multiplied by before its products, and g before it is added
  LSTM_EXT_INLINE Vec<C> h_mask(const Place& at) const {
    return mask(recurrent, Draw::kRecurrentDropout, cell->options.recurrent_dropout, at);
  }
  LSTM_EXT_INLINE Vec<C> g_mask(const Place& at) const {
    return mask(candidate, Draw::kCandidateDropout, cell->options.candidate_dropout, at);
  }

  // c before it is clipped and before zoneout
  static LSTM_EXT_INLINE Vec<C> unclipped_c(Vec<C> i, Vec<C> f, Vec<C> masked_g, Vec<C> c_prev) {
    return computed(f * c_prev + i * masked_g);
  }

  // What the next step starts from
  LSTM_EXT_INLINE Vec<C> next(const Zoneout& zoneout, Vec<C> old, Vec<C> value, const Place& at) const {
    if (!zoneout.wanted) return value;
    if (zoneout.draws) return where_drawn<C>(zoneout.chance, key(zoneout.draw, at), at.unit, old, value);
    return computed(zoneout.share * old + (1 - zoneout.share) * value);
  }

  // What part of a gradient of that goes to the old value; the rest is of the new one.
  LSTM_EXT_INLINE Vec<C> kept_part(const Zoneout& zoneout, Vec<C> grad, const Place& at) const {
    if (!zoneout.wanted) return Vec<C>{};
    if (zoneout.draws) return where_drawn<C>(zoneout.chance, key(zoneout.draw, at), at.unit, grad, Vec<C>{});
    return zoneout.share * grad;
  }

 private:
  Zoneout zoneout_of(Draw draw, double probability) const {
    const bool draws = cell && cell->options.training;
    return {draw, probability > 0, draws, Chance::of(probability), static_cast<C>(probability)};
  }

  uint64_t key(Draw draw, const Place& at) const { return draw_key(cell->options.seed, draw, direction, at.t, at.b); }

  LSTM_EXT_INLINE Vec<C> mask(Chance dropped, Draw draw, double probability, const Place& at) const {
    if (!dropped.possible) return broadcast(C(1));
    const Vec<C> scale = broadcast(static_cast<C>(dropout_scale(probability)));
    return where_drawn<C>(dropped, key(draw, at), at.unit, Vec<C>{}, scale);
  }
};

// The first `count` lanes, zero in the others: what is multiplied holds nothing behind the last unit.
template <class C>
LSTM_EXT_INLINE Vec<C> first_lanes(Vec<C> value, int64_t count) {
  if (count >= kLanes<C>) return value;
  C some[kLanes<C>];
  store(some, value);
  return load_some(some, static_cast<int>(count));
}

// ---- layer normalisation: of whole rows, each by one member of a team -------------------------------------------

// (row - mean) * scale is normalised.
template <class C>
struct Moments {
  C mean, scale;

  LSTM_EXT_INLINE Vec<C> normalised(Vec<C> value) const { return (value - mean) * scale; }
};

// f(where the vector lies, elements of it that there are) for `rows` rows of `count`, each filled up to whole vectors
template <class C, class F>
LSTM_EXT_INLINE void for_row_vectors(int64_t rows, int64_t count, const F& f) {
  const int64_t width = ceil_div(count, kLanes<C>) * kLanes<C>;
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t u = 0; u < count; u += kLanes<C>) f(n * width + u, count - u);
  }
}

// Of such rows as one
template <class C>
[[gnu::noinline]] Moments<C> moments_of(const C* values, int64_t rows, int64_t count, double epsilon) {
  const C size = static_cast<C>(rows * count);
  Vec<C> sums{}, squares{};
  for_row_vectors<C>(rows, count, [&](int64_t at, int64_t left) { sums += first_lanes<C>(load(values + at), left); });
  const C mean = sum_of_lanes<C>(sums) / size;
  for_row_vectors<C>(rows, count, [&](int64_t at, int64_t left) {
    const Vec<C> centred = load(values + at) - mean;
    squares += first_lanes<C>(centred * centred, left);
  });
  const C variance = sum_of_lanes<C>(squares) / size;
  return {mean, static_cast<C>(1 / __builtin_sqrt(variance + static_cast<C>(epsilon)))};
}

// The gradient of such rows from that of what they are normalised to, in place
template <class C>
[[gnu::noinline]] void moments_backward(const Moments<C>& moments, const C* values, int64_t rows, int64_t count,
                                        C* grads) {
  const C size = static_cast<C>(rows * count);
  Vec<C> sums{}, products{};
  for_row_vectors<C>(rows, count, [&](int64_t at, int64_t left) {
    const Vec<C> grad = load(grads + at);
    sums += first_lanes<C>(grad, left);
    products += first_lanes<C>(grad * moments.normalised(load(values + at)), left);
  });
  const C sum = sum_of_lanes<C>(sums) / size, product = sum_of_lanes<C>(products) / size;
  for_row_vectors<C>(rows, count, [&](int64_t at, int64_t) {
    const Vec<C> value = moments.normalised(load(values + at));
    store(grads + at, moments.scale * (load(grads + at) - sum - value * product));
  });
}

// What the output sees of c where that is normalised
template <class S, class Arrays, class C = Compute<S>>
LSTM_EXT_INLINE Vec<C> scaled_c(const Arrays& arrays, const Moments<C>& moments, Vec<C> c, int64_t H, int64_t u) {
  const Vec<C> gamma = load_up_to(static_cast<const S*>(arrays.gamma_h) + u, H - u);
  return computed(gamma * moments.normalised(c) + load_up_to(static_cast<const S*>(arrays.beta_h) + u, H - u));
}

// The sums of a row, [4][H filled up] of i f g o, are normalised, scaled and shifted in place.
template <class S>
struct NormedGates {
  using C = Compute<S>;
  Moments<C> of_x, of_h;  // with Norm::kRows
  Moments<C> of_gate[4];  // with Norm::kGates

  // gather(rows): what h brought, where that is apart; `rows` are filled with it.
  template <class Arrays, class Gather>
  static LSTM_EXT_INLINE NormedGates of(const Cell& cell, const Arrays& arrays, const LayerWeights& weights, int64_t H,
                                        C* gates, const Gather& gather, C* rows) {
    constexpr int L = kLanes<C>;
    const int64_t width = ceil_div(H, L) * L;
    NormedGates normed;
    const bool by_rows = cell.norm == Norm::kRows;
    if (by_rows) {
      gather(rows);
      normed.of_x = moments_of(gates, 4, H, cell.norm_epsilon);
      normed.of_h = moments_of(rows, 4, H, cell.norm_epsilon);
    }
    for (int g = 0; g < 4; ++g) {
      if (!by_rows) normed.of_gate[g] = moments_of(gates + g * width, 1, H, cell.norm_epsilon);
      for (int64_t u = 0; u < H; u += L) {
        const auto weight = [&](const void* from, int64_t at) {
          return from ? load_up_to(static_cast<const S*>(from) + at + u, H - u) : Vec<C>{};
        };
        C* const at = gates + g * width + u;
        const Vec<C> gamma = weight(arrays.gamma.data, g * H), value = load(at);
        if (by_rows) {
          const int64_t quarter = cell.tensorflow ? kernel_quarter(g) : g;
          const Vec<C> bias = weight(weights.b_ih, quarter * H) + weight(weights.b_hh, g * H);
          const Vec<C> gamma_of_h = weight(arrays.gamma.data, arrays.gamma.row_stride + g * H);
          store(at, gamma * normed.of_x.normalised(value) +
                        gamma_of_h * normed.of_h.normalised(load(rows + g * width + u)) + bias);
        } else {
          store(at, gamma * normed.of_gate[g].normalised(value) + weight(arrays.beta, g * H));
        }
      }
    }
    return normed;
  }
};

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
