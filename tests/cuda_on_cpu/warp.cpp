#include "warp.h"

#include "memory.h"
#include "numbers.h"

namespace cuda_on_cpu {
namespace {

template <class Operand>
Operand& of(void* const operands[kWarpSize], int lane) {
  return *static_cast<Operand*>(operands[lane]);
}

}  // namespace

// Votes and shuffles --------------------------------------------------------------------------------------------------

void syncwarp(unsigned mask, Location where) {
  const auto run = [](Thread* const lanes[kWarpSize], unsigned, void* const*) {
    View all;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes[lane]) all.join(released_view(*lanes[lane]));
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (lanes[lane]) lanes[lane]->view = all;
    }
  };
  collective("__syncwarp", mask, run, nullptr, where);
}

unsigned ballot(unsigned mask, bool predicate, Location where) {
  struct Vote {
    bool predicate;
    unsigned result;
  } vote{predicate, 0};
  const auto run = [](Thread* const*, unsigned arrived, void* const operands[kWarpSize]) {
    unsigned result = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (arrived >> lane & 1 && of<Vote>(operands, lane).predicate) result |= 1u << lane;
    }
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (arrived >> lane & 1) of<Vote>(operands, lane).result = result;
    }
  };
  collective("a vote", mask, run, &vote, where);
  return vote.result;
}

uint64_t shuffle(unsigned mask, uint64_t bits, int source, Location where) {
  struct Shuffle {
    uint64_t bits, result;
    int source;
    bool found;
  } self{bits, 0, source, false};
  const auto run = [](Thread* const*, unsigned arrived, void* const operands[kWarpSize]) {
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (!(arrived >> lane & 1)) continue;
      auto& to = of<Shuffle>(operands, lane);
      to.found = arrived >> to.source & 1;
      if (to.found) to.result = of<Shuffle>(operands, to.source).bits;
    }
  };
  collective("a shuffle", mask, run, &self, where);
  if (!self.found) {
    fail("a shuffle reads from lane " + std::to_string(source) + ", which is not in its mask or has ended", where);
  }
  return self.result;
}

// Tensor cores --------------------------------------------------------------------------------------------------------

namespace {

struct Fragments {
  float* d;           // 4
  const uint32_t* a;  // 4
  const uint32_t* b;  // 2
};

struct Fp16 {
  static constexpr int kPerWord = 2;
  static float number(uint32_t word, int n) { return __half2float({static_cast<uint16_t>(word >> 16 * n)}); }
};
struct Bf16 {
  static constexpr int kPerWord = 2;
  static float number(uint32_t word, int n) { return __bfloat162float({static_cast<uint16_t>(word >> 16 * n)}); }
};
struct Tf32 {
  static constexpr int kPerWord = 1;
  static float number(uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); }  // what the hardware reads
};

// Lane 4 g + t holds, of matrices with n numbers to a word:
//   a: words {g, t}, {g + 8, t}, {g, t + 4}, {g + 8, t + 4}, where {row, word of columns n word, n word + 1, ..}
//   b: words {t, g}, {t + 4, g}, where {word of rows, column}
//   d: {g, 2 t}, {g, 2 t + 1}, {g + 8, 2 t}, {g + 8, 2 t + 1}
// The sum of products is exact to double and rounded once; what a tensor core rounds on the way no manual says.
template <class Number>
void multiply(Thread* const*, unsigned arrived, void* const operands[kWarpSize]) {
  constexpr int n = Number::kPerWord, kDepth = 8 * n;
  if (arrived != kFullMask) {
    report("mma.sync: expected all lanes of the warp, got mask " + std::to_string(arrived));
    return;
  }
  float a[kDepth][16], b[kDepth][8];
  double d[16][8] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& from = of<Fragments>(operands, lane);
    const int g = lane / 4, t = lane % 4;
    for (int part = 0; part < n; ++part) {
      a[n * t + part][g] = Number::number(from.a[0], part);
      a[n * t + part][g + 8] = Number::number(from.a[1], part);
      a[n * (t + 4) + part][g] = Number::number(from.a[2], part);
      a[n * (t + 4) + part][g + 8] = Number::number(from.a[3], part);
      b[n * t + part][g] = Number::number(from.b[0], part);
      b[n * (t + 4) + part][g] = Number::number(from.b[1], part);
    }
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) d[row][column] += static_cast<double>(a[k][row]) * b[k][column];
    }
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    float* to = of<Fragments>(operands, lane).d;
    for (int n = 0; n < 4; ++n) {
      to[n] = static_cast<float>(to[n] + d[lane / 4 + n / 2 * 8][lane % 4 * 2 + n % 2]);
    }
  }
}

template <class Number>
void mma(const char* name, float (&d)[4], const uint4& a, const uint2& b, Location where) {
  const uint32_t a_words[] = {a.x, a.y, a.z, a.w}, b_words[] = {b.x, b.y};
  Fragments fragments{d, a_words, b_words};
  collective(name, kFullMask, multiply<Number>, &fragments, where);
}

}  // namespace

void mma_fp16(float (&d)[4], const uint4& a, const uint2& b, Location where) {
  mma<Fp16>("mma.sync f16", d, a, b, where);
}
void mma_bf16(float (&d)[4], const uint4& a, const uint2& b, Location where) {
  mma<Bf16>("mma.sync bf16", d, a, b, where);
}
void mma_tf32(float (&d)[4], const uint4& a, const uint2& b, Location where) {
  mma<Tf32>("mma.sync tf32", d, a, b, where);
}

void ldmatrix(uint32_t* fragments, int count, bool transposed, const void* row, Location where) {
  struct Rows {
    const char* row;
    uint32_t* fragments;
    int count;
    bool transposed;
  } rows{static_cast<const char*>(row), fragments, count, transposed};
  if (current->lane() < 8 * count) check_access(row, 16, 16, where);
  const auto run = [](Thread* const*, unsigned arrived, void* const operands[kWarpSize]) {
    if (arrived != kFullMask) return report("ldmatrix: expected all lanes of the warp");
    for (int matrix = 0; matrix < of<Rows>(operands, 0).count; ++matrix) {
      uint16_t numbers[8][8];
      for (int r = 0; r < 8; ++r) memcpy(numbers[r], of<Rows>(operands, 8 * matrix + r).row, 16);
      for (int lane = 0; lane < kWarpSize; ++lane) {
        const Rows& to = of<Rows>(operands, lane);
        const int g = lane / 4, t = lane % 4;
        const uint32_t low = to.transposed ? numbers[2 * t][g] : numbers[g][2 * t];
        const uint32_t high = to.transposed ? numbers[2 * t + 1][g] : numbers[g][2 * t + 1];
        to.fragments[matrix] = low | high << 16;
      }
    }
  };
  collective("ldmatrix", kFullMask, run, &rows, where);
}

}  // namespace cuda_on_cpu
