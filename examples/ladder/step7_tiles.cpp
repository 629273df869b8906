// Step 7: tiles. So far each weight that is read is used once, and reading is what takes the time. Here it is used for
// several rows while it is in a register: the sums of kRows rows × 4 gates × 16 units stay in registers for all k.
#include <cstring>
#include <thread>

#include "packed.h"

#ifdef __AVX512F__
constexpr long kRows = 4;  // 16 sums, 4 factors and the weights: 21 of 32 registers
#else
constexpr long kRows = 1;  // 16 registers of half that length
#endif
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float))));

// One time step of kRows rows, whose K factors lie in `in`; of the last tile some rows are made up, and not kept.
static void run_tile(long H, long K, const float* in, const float* packed, long rows, float* c, float* y) {
  for (long first = 0; first < H; first += kLanes, packed += K * kWidth) {
    Vector sums[kRows][4] = {};
    for (long k = 0; k < K; ++k)
      for (long gate = 0; gate < 4; ++gate) {
        const Vector weights = *reinterpret_cast<const Vector*>(packed + k * kWidth + gate * kLanes);
        for (long r = 0; r < kRows; ++r) sums[r][gate] += in[r * K + k] * weights;
      }
    float gates[kRows][kWidth], h[kLanes];
    std::memcpy(gates, sums, sizeof(gates));
    for (long r = 0; r < rows; ++r) {
      float *z = gates[r], *c_block = c + r * (H + kLanes) + first;
      for (long n = 0; n < kLanes; ++n) {
        c_block[n] = sigmoid(z[kLanes + n]) * c_block[n] + sigmoid(z[n]) * tanh(z[2 * kLanes + n]);
        h[n] = sigmoid(z[3 * kLanes + n]) * tanh(c_block[n]);
      }
      std::copy_n(h, std::min(kLanes, H - first), y + r * H + first);
    }
  }
}

static void run_rows(long T, long B, long I, long H, const float* x, const float* packed, long begin, long end,
                     float* y) {
  const long K = I + H + 1;
  std::vector<float> c((end - begin) * (H + kLanes)), in(kRows * K);
  for (long t = 0; t < T; ++t)
    for (long b = begin; b < end; b += kRows) {
      const long rows = std::min(kRows, end - b);
      for (long r = 0; r < rows; ++r) {
        std::copy_n(x + (t * B + b + r) * I, I, &in[r * K]);  // x, then h, then 1
        if (t > 0) std::copy_n(y + ((t - 1) * B + b + r) * H, H, &in[r * K + I]);
        in[r * K + I + H] = 1;
      }
      run_tile(H, K, in.data(), packed, rows, &c[(b - begin) * (H + kLanes)], y + (t * B + b) * H);
    }
}

// x [T, B, I], w_ih [4H, I], w_hh [4H, H], bias [4H], the gates in the order i, f, g, o; y [T, B, H].
extern "C" void lstm(long T, long B, long I, long H, const float* x, const float* w_ih, const float* w_hh,
                     const float* bias, float* y) {
  const std::vector<float> packed = pack(I, H, w_ih, w_hh, bias);
  const long threads = std::clamp<long>(std::thread::hardware_concurrency(), 1, B);
  std::vector<std::jthread> others;  // joined where they go out of scope
  for (long n = 1; n < threads; ++n)
    others.emplace_back(
        [=, &packed] { run_rows(T, B, I, H, x, packed.data(), B * n / threads, B * (n + 1) / threads, y); });
  run_rows(T, B, I, H, x, packed.data(), 0, B / threads, y);
}
