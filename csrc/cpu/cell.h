// What both passes know of a cell with options (params.h): its steps of one vector of units, on top of cell_math.h.
#pragma once

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

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
