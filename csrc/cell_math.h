// What a cell may have beside the plain LSTM: its activations and its random numbers. Beside gate_math.h, for every
// backend; `Math` is as there, and has expm1, log1p of 0 .. 1, and the scalar type Number as well.
#pragma once

#include <cstdint>

#include "gate_math.h"
#include "params.h"

namespace lstm_ext {

// ---- activations ------------------------------------------------------------------------------------------

template <class V>
LSTM_EXT_HOST_DEVICE V not_below_zero(V x) {
  return x < 0 ? V{} : x;  // NaN stays NaN
}

// f(the activation as a function of one V): the choice is made once for all that f does with it.
// `Spec` is an ActivationSpec, or the same with other numbers.
template <class Math, class Spec, class F>
LSTM_EXT_HOST_DEVICE void with_activation(const Spec& spec, const F& f) {
  using V = typename Math::Value;
  const auto alpha = static_cast<typename Math::Number>(spec.alpha),
             beta = static_cast<typename Math::Number>(spec.beta);
  switch (spec.kind) {
    case Activation::kTanh: return f([](V x) { return Math::tanh(x); });
    case Activation::kSigmoid: return f([](V x) { return sigmoid<Math>(x); });
    case Activation::kHardSigmoid:
      return f([=](V x) {
        const V y = not_below_zero(alpha * x + beta);
        return y > 1 ? V{} + 1 : y;
      });
    case Activation::kRelu: return f([](V x) { return not_below_zero(x); });
    case Activation::kLeakyRelu: return f([=](V x) { return x < 0 ? alpha * x : x; });
    case Activation::kElu: return f([=](V x) { return x < 0 ? alpha * Math::expm1(x) : x; });
    case Activation::kSoftsign: return f([](V x) { return x / (1 + (x < 0 ? -x : x)); });
    case Activation::kSoftplus:
      return f([](V x) { return not_below_zero(x) + Math::log1p(Math::exp(x < 0 ? x : -x)); });
    case Activation::kLinear: return f([](V x) { return x; });
  }
}

template <class Math, class Spec, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE V activate(const Spec& spec, V x) {
  V result{};
  with_activation<Math>(spec, [&](const auto& activation) { result = activation(x); });
  return result;
}

// The derivative, from the output. Where the function has a corner it is what torch takes.
template <class Math, class Spec, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE V d_activation(const Spec& spec, V output) {
  const V one = V{} + 1, alpha = V{} + static_cast<typename Math::Number>(spec.alpha);
  switch (spec.kind) {
    case Activation::kTanh: return d_tanh(output);
    case Activation::kSigmoid: return d_sigmoid(output);
    case Activation::kHardSigmoid: {
      const V above = output > 0 ? alpha : V{};
      return output < 1 ? above : V{};
    }
    case Activation::kRelu: return output > 0 ? one : V{};
    case Activation::kLeakyRelu: return output > 0 ? one : alpha;
    case Activation::kElu: return output > 0 ? one : output + alpha;
    case Activation::kSoftsign: {
      const V rest = 1 - (output < 0 ? -output : output);
      return rest * rest;
    }
    case Activation::kSoftplus: return -Math::expm1(-output);
    case Activation::kLinear: break;
  }
  return one;
}

// ---- random numbers: by counter, the same on every backend ------------------------------------------------

enum class Draw : uint64_t { kRecurrentDropout = 0, kCandidateDropout = 1, kZoneoutH = 2, kZoneoutC = 3 };

// Steele, Lea and Flood 2014
LSTM_EXT_HOST_DEVICE constexpr uint64_t splitmix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// Of the units of row b at time t in a direction
LSTM_EXT_HOST_DEVICE constexpr uint64_t draw_key(uint64_t seed, Draw draw, int direction, int64_t t, int64_t b) {
  const uint64_t place = 2 * static_cast<uint64_t>(t) + static_cast<uint64_t>(direction);
  return splitmix64(splitmix64(splitmix64(seed + static_cast<uint64_t>(draw)) ^ place) ^ static_cast<uint64_t>(b));
}

// Wellons' lowbias32; W is uint32_t, or a vector of them
template <class W>
LSTM_EXT_HOST_DEVICE constexpr W mix32(W v) {
  v ^= v >> 16;
  v *= 0x7feb352du;
  v ^= v >> 15;
  v *= 0x846ca68bu;
  return v ^ v >> 16;
}

template <class W>
LSTM_EXT_HOST_DEVICE constexpr W draw_bits(uint64_t key, W unit) {
  return mix32<W>(mix32<W>(unit + static_cast<uint32_t>(key)) ^ static_cast<uint32_t>(key >> 32));
}

// An event of some probability: bits up to `last`, if it may happen at all.
struct Chance {
  bool possible;
  uint32_t last;

  static constexpr Chance of(double probability) {
    const auto count = static_cast<uint64_t>(probability * 4294967296.);
    return {count > 0, static_cast<uint32_t>(count - 1)};
  }
};

// What is left of what is dropped with a probability is multiplied by this.
constexpr double dropout_scale(double probability) { return probability < 1 ? 1 / (1 - probability) : 0; }

}  // namespace lstm_ext
