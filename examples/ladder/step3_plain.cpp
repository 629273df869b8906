// Step 3: the formulas in C++, as they are written. No temporary arrays and no Python between steps, but each sum is
// one number after the other, so it waits for its own last addition, and the vector units are idle.
#include <cmath>
#include <vector>

static float sigmoid(float v) { return 1 / (1 + std::exp(-v)); }

// x [T, B, I], w_ih [4H, I], w_hh [4H, H], bias [4H], the gates in the order i, f, g, o; y [T, B, H].
extern "C" void lstm(long T, long B, long I, long H, const float* x, const float* w_ih, const float* w_hh,
                     const float* bias, float* y) {
  std::vector<float> c(B * H), zeros(H);
  for (long t = 0; t < T; ++t) {
    for (long b = 0; b < B; ++b) {
      const float* x_t = x + (t * B + b) * I;
      const float* h = t == 0 ? zeros.data() : y + ((t - 1) * B + b) * H;
      float* h_new = y + (t * B + b) * H;
      for (long unit = 0; unit < H; ++unit) {
        float gates[4];
        for (long gate = 0; gate < 4; ++gate) {
          const long row = gate * H + unit;
          float sum = bias[row];
          for (long k = 0; k < I; ++k) sum += x_t[k] * w_ih[row * I + k];
          for (long k = 0; k < H; ++k) sum += h[k] * w_hh[row * H + k];
          gates[gate] = sum;
        }
        float& c_unit = c[b * H + unit];
        c_unit = sigmoid(gates[1]) * c_unit + sigmoid(gates[0]) * std::tanh(gates[2]);
        h_new[unit] = sigmoid(gates[3]) * std::tanh(c_unit);
      }
    }
  }
}
