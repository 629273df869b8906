// What nvcc knows without an include: qualifiers, built-in variables, vector types, the functions of warps and blocks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __shared__ shared_variables_do_not_work_here__use_dynamic_shared

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx (cuda_on_cpu::current->block->index)
#define blockDim (cuda_on_cpu::current->block->grid->block_dim)
#define gridDim (cuda_on_cpu::current->block->grid->grid_dim)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline int4 make_int4(int32_t x, int32_t y, int32_t z, int32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}

inline void __threadfence_system() {}  // what the host reads after a launch it sees

template <class T>
T rsqrt(T x) {
  return 1 / std::sqrt(x);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

inline void __syncthreads(cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  cuda_on_cpu::syncthreads(where);
}
inline int __syncthreads_or(int predicate, cuda_on_cpu::Location where = cuda_on_cpu::Location::current()) {
  return cuda_on_cpu::syncthreads(where, predicate != 0);
}
