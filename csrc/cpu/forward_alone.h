// The steps of one sequence by itself, of a layer that is so narrow that a step is no work but waiting: each needs all
// of the h before. So nothing goes through memory between the product and the gates but h itself; each gate's
// sum is several that do not wait for each other, added up at the end; and the gates of a frozen layer's step take two
// divisions instead of five (joint_cell in gate_math.h).
#pragma once

#include "forward.h"

namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL {

// Sums of a gate, so that their registers are a half of those that there are.
inline constexpr int kSumParts = kRegisters / 8;

// A walk along k over a panel of so many vectors and K lanes.
template <int vectors, class C>
struct PanelWalk {
  static constexpr int L = kLanes<C>, kFirst = vectors < kBeside ? vectors : kBeside, kOthers = vectors - kFirst;
  const C *panel, *beyond;

  LSTM_EXT_INLINE PanelWalk(const C* begin, int64_t K) : panel(begin), beyond(begin + kFirst * K * L) {}
  // Vector n, k after the current one
  LSTM_EXT_INLINE Vec<C> at(int k, int n) const {
    return load(n < kFirst ? panel + (k * kFirst + n) * L : beyond + (k * kOthers + n - kFirst) * L);
  }
  LSTM_EXT_INLINE void pass(int k) {
    panel += k * kFirst * L;
    if constexpr (kOthers > 0) beyond += k * kOthers * L;
  }
};

// sum[n] += h, K numbers, times vectors first .. first + count - 1 of a panel of so many vectors
template <int vectors, int first, int count, class C>
LSTM_EXT_INLINE void multiply_alone(const C* h, int64_t K, const C* panel, Vec<C>* sum) {
  Vec<C> parts[kSumParts][count] = {};
  PanelWalk<vectors, C> walk(panel, K);
  sum += first;
#pragma GCC unroll 4
  for (int n = 0; n < count; ++n) parts[0][n] = sum[n];
  int64_t k = 0;
  for (; k + kSumParts <= K; k += kSumParts, walk.pass(kSumParts)) {
#pragma GCC unroll 4
    for (int part = 0; part < kSumParts; ++part) {
      const Vec<C> value = broadcast(h[k + part]);
#pragma GCC unroll 4
      for (int n = 0; n < count; ++n) parts[part][n] += value * walk.at(part, first + n);
    }
  }
  for (; k < K; ++k, walk.pass(1)) {
    const Vec<C> value = broadcast(h[k]);
#pragma GCC unroll 4
    for (int n = 0; n < count; ++n) parts[0][n] += value * walk.at(0, first + n);
  }
#pragma GCC unroll 4
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int half = kSumParts / 2; half > 0; half /= 2) {
#pragma GCC unroll 4
      for (int part = 0; part < half; ++part) parts[part][n] += parts[part + half][n];
    }
    sum[n] = parts[0][n];
  }
}

// Steps s0 .. s1 - 1 of a chunk.
template <class S, class Engine>
void Forward<S, Engine>::run_alone(int64_t s0, int64_t s1) const {
  if constexpr (kMayBeAlone) {
    const int64_t P = shape_.P;
    for (int64_t s = s0; s < s1; ++s) {
      const int64_t t = walk_.time(s, 0, dir_.reverse);
      const S* const x = static_cast<const S*>(layer_.x) + layer_.x_map.at(t, 0);
      S* const y = static_cast<S*>(dir_.y) + layer_.y_map.at(t, 0);
      for (int64_t p = 0; p < panels_; ++p) {
        const int64_t u = p * L;
        const bool full = gates_.vectors(p) == 4;
        const Vec<C> value = full ? step_alone(s, s - s0, x, p) : step_few_alone(s, s - s0, x, p);
        store(h(s + 1, 0) + u, value);
        store_up_to(y + u, value, P - u);
      }
    }
    if (s1 < shape_.T) return;
    for (int64_t u = 0; u < P; u += L) {
      if (dir_.h_n) store_up_to(static_cast<S*>(dir_.h_n) + u, load(h(s1, 0) + u), P - u);
      store_up_to(static_cast<S*>(dir_.c_n) + u, load(c_ + u), P - u);
    }
  }
}

// What x brings to the sums of a panel: the product of the chunk, or, of few inputs, made here meanwhile.
template <class S, class Engine>
template <int vectors>
LSTM_EXT_INLINE void Forward<S, Engine>::start_alone(int64_t row, const S* x, int64_t p, Vec<C>* sum) const {
  const C* const start = has_few_inputs() ? bias(p) : tile(p, row);
#pragma GCC unroll 4
  for (int n = 0; n < vectors; ++n) sum[n] = load(start + n * L);
  if (!has_few_inputs()) return;
  PanelWalk<vectors, C> walk(w_ih_.panel(p), shape_.I);
  for (int64_t k = 0; k < shape_.I; ++k, walk.pass(1)) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[n] += broadcast(C(x[k])) * walk.at(0, n);
  }
}

// The new h of a panel with a vector for each gate; its c is the next one then. The output gate comes last: nobody
// waits for it before c is there.
template <class S, class Engine>
LSTM_EXT_INLINE auto Forward<S, Engine>::step_alone(int64_t s, int64_t row, const S* x, int64_t p) const -> Vec<C> {
  Vec<C> sum[4];
  start_alone<4>(row, x, p, sum);
  multiply_alone<4, 0, 3>(h(s, 0), shape_.P, w_hh_.panel(p), sum);
  multiply_alone<4, 3, 1>(h(s, 0), shape_.P, w_hh_.panel(p), sum);
  return finish_alone({sum[0], sum[1], sum[2], sum[3]}, s, p);
}

// The same of one whose few units share vectors.
template <class S, class Engine>
auto Forward<S, Engine>::step_few_alone(int64_t s, int64_t row, const S* x, int64_t p) const -> Vec<C> {
  alignas(64) C sums[2 * L];
  const int64_t units = gates_.count(p, 0), width = gates_.width(p);
  with_count<2>(gates_.vectors(p), [&](auto vectors) {
    Vec<C> sum[vectors];
    this->template start_alone<vectors>(row, x, p, sum);
    multiply_alone<vectors, 0, vectors>(h(s, 0), shape_.P, w_hh_.panel(p), sum);
    for (int n = 0; n < vectors; ++n) store(sums + n * L, sum[n]);
  });
  const auto gate = [&](int g) { return load_up_to(sums + g * width, units); };
  return finish_alone({gate(0), gate(1), gate(2), gate(3)}, s, p);
}

// A frozen layer saves nothing. Of others a backward pass has h again from the gates and c, bit for bit, and what is
// saved changes no output: their gates are computed one by one, as those of several rows are.
template <class S, class Engine>
LSTM_EXT_INLINE auto Forward<S, Engine>::finish_alone(const GateValues<Vec<C>>& sums, int64_t s, int64_t p) const
    -> Vec<C> {
  if (packed_) {
    const auto [c, h] = joint_cell<SoonMath<C>>(sums, load(c_ + p * L));
    store(c_ + p * L, c);
    return h;
  }
  const auto state = cell_state<VecMath<C>>(sums, load(c_ + p * L));
  const Vec<C> c = computed(state.c), o = computed(state.gates.o);
  store(c_ + p * L, c);
  if (dir_.gates || dir_.cells) save_alone(state.gates, c, s, p);
  return computed(cell_output<VecMath<C>>(o, c));
}

template <class S, class Engine>
void Forward<S, Engine>::save_alone(const GateValues<Vec<C>>& gates, Vec<C> c, int64_t s, int64_t p) const {
  const int64_t t = walk_.time(s, 0, dir_.reverse), u = p * L, units = gates_.count(p, 0);
  if (dir_.cells) store_up_to(static_cast<C*>(dir_.cells) + layer_.cells_map.at(t, 0) + u, c, units);
  if (!dir_.gates) return;
  S* const to = static_cast<S*>(dir_.gates) + layer_.gates_map.at(t, 0) + u;
  const Vec<C> values[] = {gates.i, gates.f, gates.g, gates.o};
  for (int gate = 0; gate < 4; ++gate) store_up_to(to + gate * shape_.H, computed(values[gate]), units);
}

}  // namespace lstm_ext::cpu::LSTM_EXT_SIMD_LEVEL
