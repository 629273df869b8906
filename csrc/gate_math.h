// The mathematics of one LSTM unit, stated once for every backend.
//
// `Math` says what a number is and how to take its inverse, exp and tanh: a SIMD vector on the CPU
// (cpu/vec_math.h), a scalar on the GPU. Everything here is element-wise.
#pragma once

#if defined(__CUDACC__)
#define LSTM_EXT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LSTM_EXT_HOST_DEVICE __attribute__((always_inline)) inline
#endif

namespace lstm_ext {

template <class V>
struct GateValues {
  V i, f, g, o;
};

template <class V>
struct CellState {
  GateValues<V> gates;  // activated
  V c;
};

template <class V>
struct CellStepGrad {
  GateValues<V> d_pre;  // with respect to the gates before their activation
  V d_c_prev;
};

template <class Math, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE V sigmoid(V x) {
  return Math::inverse(1 + Math::exp(-x));
}

template <class V>
LSTM_EXT_HOST_DEVICE V d_sigmoid(V sigmoid_output) {
  return sigmoid_output * (1 - sigmoid_output);
}

template <class V>
LSTM_EXT_HOST_DEVICE V d_tanh(V tanh_output) {
  return 1 - tanh_output * tanh_output;
}

// c = f c_prev + i g
template <class Math, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE CellState<V> cell_state(const GateValues<V>& pre, V c_prev) {
  const GateValues<V> gates{sigmoid<Math>(pre.i), sigmoid<Math>(pre.f), Math::tanh(pre.g), sigmoid<Math>(pre.o)};
  return {gates, gates.f * c_prev + gates.i * gates.g};
}

// h before a projection
template <class Math, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE V cell_output(V o, V c) {
  return o * Math::tanh(c);
}

template <class V>
struct CellStep {
  V c, h;
};

// Both with two divisions instead of five, for whom they are the time that a step takes:
//
//     c = c_prev / F + G / (I D)     for f = 1 / F, i = 1 / I and tanh g = G / D;     h the same of o and tanh c
//
// `Math` has exp(-x) no larger than what products of two of them and a number leave finite, and tanh as a fraction.
template <class Math, class V = typename Math::Value>
LSTM_EXT_HOST_DEVICE CellStep<V> joint_cell(const GateValues<V>& pre, V c_prev) {
  const V i = 1 + Math::bounded_exp(-pre.i), f = 1 + Math::bounded_exp(-pre.f), o = 1 + Math::exp(-pre.o);
  const auto g = Math::tanh_fraction(pre.g);
  const V ig = i * g.under;
  const V c = (c_prev * ig + g.over * f) / (f * ig);
  const auto tanh_c = Math::tanh_fraction(c);
  return {c, tanh_c.over / (o * tanh_c.under)};
}

// d_c is what later steps and a caller of c want; what arrives through h is added here.
template <class V>
LSTM_EXT_HOST_DEVICE CellStepGrad<V> cell_backward(const GateValues<V>& gates, V c_prev, V tanh_c, V d_h, V d_c) {
  const V d_c_total = d_c + d_h * gates.o * d_tanh(tanh_c);
  return {{d_c_total * gates.g * d_sigmoid(gates.i), d_c_total * c_prev * d_sigmoid(gates.f),
           d_c_total * gates.i * d_tanh(gates.g), d_h * tanh_c * d_sigmoid(gates.o)},
          d_c_total * gates.f};
}

}  // namespace lstm_ext
