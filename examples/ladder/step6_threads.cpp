// Step 6: all cores. The rows of a batch never meet, so each thread takes some of them through all steps, and none
// waits for another before the end. (With one row, threads would have to share the units, and meet at every step.)
#include <thread>

#include "packed.h"

static void run_rows(long T, long B, long I, long H, const float* x, const float* packed, long begin, long end,
                     float* y) {
  const long K = I + H + 1, blocks = (H + kLanes - 1) / kLanes;
  std::vector<float> c((end - begin) * blocks * kLanes), row(K);
  for (long t = 0; t < T; ++t) {
    for (long b = begin; b < end; ++b) {
      std::copy_n(x + (t * B + b) * I, I, row.data());  // x, then h, then 1
      if (t > 0) std::copy_n(y + ((t - 1) * B + b) * H, H, row.data() + I);
      row[I + H] = 1;
      for (long first = 0; first < H; first += kLanes) {
        const float* weights = packed + first / kLanes * K * kWidth;
        float gates[kWidth] = {};
        for (long k = 0; k < K; ++k)
          for (long n = 0; n < kWidth; ++n) gates[n] += row[k] * weights[k * kWidth + n];
        float* c_block = &c[((b - begin) * blocks + first / kLanes) * kLanes];
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
