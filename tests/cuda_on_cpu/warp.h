// The collectives of a warp: votes, shuffles, tensor cores. Lanes of the mask must all come, with the same call.
#pragma once

#include "builtins.h"

namespace cuda_on_cpu {

constexpr unsigned kFullMask = ~0u;

void syncwarp(unsigned mask, Location where);
unsigned ballot(unsigned mask, bool predicate, Location where);
// The bits that lane `source` of the warp brings; it must be in the mask and live.
uint64_t shuffle(unsigned mask, uint64_t bits, int source, Location where);

// d [16, 8] += a [16, k] b [k, 8]; every lane brings its fragment as the PTX manual lays it out.
void mma_fp16(float (&d)[4], const uint4& a, const uint2& b, Location where);  // k = 16
void mma_bf16(float (&d)[4], const uint4& a, const uint2& b, Location where);  // k = 16
void mma_tf32(float (&d)[4], const uint4& a, const uint2& b, Location where);  // k = 8

// ldmatrix .x1, .x2 or .x4: `count` matrices of 8 rows of 8 16-bit numbers; lane 8 m + r brings the address of row r of
// matrix m. Each lane gets two numbers of each matrix.
void ldmatrix(uint32_t* fragments, int count, bool transposed, const void* row, Location where);

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = ~0u, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::syncwarp(mask, where);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate,
                              cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::ballot(mask, predicate, where);
}
inline bool __any_sync(unsigned mask, bool predicate, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::ballot(mask, predicate, where) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::ballot(mask, !predicate, where) == 0;
}

namespace cuda_on_cpu {

template <class T>
T shuffle_value(unsigned mask, T value, int source, Location where) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, where);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

// Segments narrower than a warp are left out: nobody uses them.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle_value(mask, value, source & 31, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::shuffle_value(mask, value, cuda_on_cpu::current->lane() ^ bits, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  const int lane = cuda_on_cpu::current->lane();
  return cuda_on_cpu::shuffle_value(mask, value, lane + by < 32 ? lane + by : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  const int lane = cuda_on_cpu::current->lane();
  return cuda_on_cpu::shuffle_value(mask, value, lane >= by ? lane - by : lane, where);
}
