// Step 4: sums side by side. A vector holds the sums of neighbouring units, each of which goes its own way through k,
// so none waits for another. The weights that one k needs have to lie side by side for that: they are copied once, in
// the order of use.
#include <algorithm>
#include <cmath>
#include <vector>

constexpr long kLanes = 16;          // units of a block: a vector register of 64 bytes
constexpr long kWidth = 4 * kLanes;  // their four gates

static float sigmoid(float v) { return 1 / (1 + std::exp(-v)); }

// [blocks of units][K][4 gates][kLanes units], zero where a block is wider than what is left; K counts x, h, and 1 for
// the bias.
static std::vector<float> pack(long I, long H, const float* w_ih, const float* w_hh, const float* bias) {
  const long K = I + H + 1, blocks = (H + kLanes - 1) / kLanes;
  std::vector<float> packed(blocks * K * kWidth);
  for (long row = 0; row < 4 * H; ++row) {
    const long gate = row / H, unit = row % H;
    float* to = &packed[unit / kLanes * K * kWidth + gate * kLanes + unit % kLanes];
    for (long k = 0; k < I; ++k) to[k * kWidth] = w_ih[row * I + k];
    for (long k = 0; k < H; ++k) to[(I + k) * kWidth] = w_hh[row * H + k];
    to[(I + H) * kWidth] = bias[row];
  }
  return packed;
}

// x [T, B, I], w_ih [4H, I], w_hh [4H, H], bias [4H], the gates in the order i, f, g, o; y [T, B, H].
extern "C" void lstm(long T, long B, long I, long H, const float* x, const float* w_ih, const float* w_hh,
                     const float* bias, float* y) {
  const long K = I + H + 1;
  const std::vector<float> packed = pack(I, H, w_ih, w_hh, bias);
  std::vector<float> c(B * H), row(K);
  for (long t = 0; t < T; ++t) {
    for (long b = 0; b < B; ++b) {
      std::copy_n(x + (t * B + b) * I, I, row.data());  // x, then h, then 1
      if (t > 0) std::copy_n(y + ((t - 1) * B + b) * H, H, row.data() + I);
      row[I + H] = 1;
      for (long first = 0; first < H; first += kLanes) {
        const float* weights = &packed[first / kLanes * K * kWidth];
        float gates[kWidth] = {};
        for (long k = 0; k < K; ++k)
          for (long n = 0; n < kWidth; ++n) gates[n] += row[k] * weights[k * kWidth + n];
        for (long n = 0; n < std::min(kLanes, H - first); ++n) {
          float& c_unit = c[b * H + first + n];
          c_unit = sigmoid(gates[kLanes + n]) * c_unit + sigmoid(gates[n]) * std::tanh(gates[2 * kLanes + n]);
          y[(t * B + b) * H + first + n] = sigmoid(gates[3 * kLanes + n]) * std::tanh(c_unit);
        }
      }
    }
  }
}
