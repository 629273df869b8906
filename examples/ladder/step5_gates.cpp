// Step 5: activations without calls. std::exp and std::tanh are functions for one number; a unit needs five of them,
// which is as much work as some hundred weights. An exp without a branch is computed for all lanes at once.
#include <algorithm>
#include <bit>
#include <vector>

constexpr long kLanes = 16;          // units of a block: a vector register of 64 bytes
constexpr long kWidth = 4 * kLanes;  // their four gates

// 2^n times e^r, |r| ≤ log(2) / 2, whose Taylor series ends early; adding 1.5·2^23 rounds to whole numbers.
static inline float exponential(float v) {
  v = std::min(std::max(v, -87.0f), 87.0f);
  const float n = (v * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = (v - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p =
      1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (0.00833333333f + r * 0.00138888889f)))));
  return p * std::bit_cast<float>((static_cast<int>(n) + 127) << 23);
}
static inline float sigmoid(float v) { return 1 / (1 + exponential(-v)); }
static inline float tanh(float v) { return 2 * sigmoid(2 * v) - 1; }

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
  const long K = I + H + 1, blocks = (H + kLanes - 1) / kLanes;
  const std::vector<float> packed = pack(I, H, w_ih, w_hh, bias);
  std::vector<float> c(B * blocks * kLanes), row(K);
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
        float* c_block = &c[(b * blocks + first / kLanes) * kLanes];
        float h[kLanes];
        for (long n = 0; n < kLanes; ++n) {
          const float* of_unit = gates + n;
          c_block[n] = sigmoid(of_unit[kLanes]) * c_block[n] + sigmoid(of_unit[0]) * tanh(of_unit[2 * kLanes]);
          h[n] = sigmoid(of_unit[3 * kLanes]) * tanh(c_block[n]);
        }
        std::copy_n(h, std::min(kLanes, H - first), y + (t * B + b) * H + first);
      }
    }
  }
}
