// csrc/cuda/ptx.h for threads that are fibers: the same functions, whose comments stand there.
#pragma once

#include "memory.h"
#include "numbers.h"
#include "warp.h"

namespace lstm_ext::cuda {

using cuda_on_cpu::Location;

inline char* dynamic_shared() { return cuda_on_cpu::current->block->shared; }

// ---- Words between blocks

inline uint64_t ld_relaxed_gpu(const uint64_t* address, Location where = Location::current()) {
  return cuda_on_cpu::load(address, cuda_on_cpu::Order::kRelaxed, where);
}

inline void st_relaxed_gpu(uint64_t* address, uint64_t value, Location where = Location::current()) {
  cuda_on_cpu::store(address, value, cuda_on_cpu::Order::kRelaxed, where);
}

// ---- cp.async

inline void cp_async_4(void* shared, const void* global, int bytes, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, bytes, 4, where);
}
inline void cp_async_8(void* shared, const void* global, int bytes, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, bytes, 8, where);
}
inline void cp_async_16(void* shared, const void* global, int bytes, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, bytes, 16, where);
}
inline void cp_async_16_if(bool there, void* shared, const void* global, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, there ? 16 : 0, 16, where);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int kGroupsLeft>
void cp_async_wait(Location where = Location::current()) {
  cuda_on_cpu::wait_copies(kGroupsLeft, where);
}

// ---- ldmatrix

inline uint2 ldmatrix_x2(const void* row, Location where = Location::current()) {
  uint32_t words[2];
  cuda_on_cpu::ldmatrix(words, 2, false, row, where);
  return {words[0], words[1]};
}
inline uint4 ldmatrix_x4(const void* row, Location where = Location::current()) {
  uint32_t words[4];
  cuda_on_cpu::ldmatrix(words, 4, false, row, where);
  return {words[0], words[1], words[2], words[3]};
}
inline uint4 ldmatrix_x4_transposed(const void* row, Location where = Location::current()) {
  uint32_t words[4];
  cuda_on_cpu::ldmatrix(words, 4, true, row, where);
  return {words[0], words[1], words[2], words[3]};
}

// ---- Tensor cores

inline void mma_fp16(float (&d)[4], const uint4& a, const uint2& b, Location where = Location::current()) {
  cuda_on_cpu::mma_fp16(d, a, b, where);
}

inline void mma_bf16(float (&d)[4], const uint4& a, const uint2& b, Location where = Location::current()) {
  cuda_on_cpu::mma_bf16(d, a, b, where);
}

inline void mma_tf32(float (&d)[4], const uint4& a, const uint2& b, Location where = Location::current()) {
  cuda_on_cpu::mma_tf32(d, a, b, where);
}

// Rounds to nearest, ties away from zero.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  return std::isfinite(value) ? (bits + 0x1000) & 0xffffe000u : bits;
}

// ---- Clusters

inline void cluster_sync(Location where = Location::current()) {
  cuda_on_cpu::cluster_arrive(true, where);
  cuda_on_cpu::cluster_wait(true, where);
}

inline void st_cluster(uint32_t* shared, int rank, uint32_t value, Location where = Location::current()) {
  cuda_on_cpu::store_remote(cuda_on_cpu::map_rank(shared, rank, where), value, 4, nullptr, where);
}

template <class T>
const T* shared_of_rank(const T* shared, int rank, Location where = Location::current()) {
  return cuda_on_cpu::map_rank(shared, rank, where);
}

inline void mbarrier_init(uint64_t* barrier, int count, Location where = Location::current()) {
  cuda_on_cpu::mbarrier_init(barrier, count, where);
}

inline void mbarrier_arrive(uint64_t* barrier, int rank, Location where = Location::current()) {
  cuda_on_cpu::mbarrier_arrive(cuda_on_cpu::map_rank(barrier, rank, where), 0, true, where);
}

inline void mbarrier_wait(uint64_t* barrier, int parity, Location where = Location::current()) {
  cuda_on_cpu::mbarrier_wait(barrier, parity, true, where);
}

// ---- Launches that overlap

inline void wait_for_previous_launch(Location where = Location::current()) {
  cuda_on_cpu::wait_for_previous_launch(where);
}
inline void let_next_launch_start() { cuda_on_cpu::let_next_launch_start(); }
inline void prefetch_to_l2(const void*) {}

// ---- Numbers

inline float fast_exp(float x) { return std::exp(x); }

}  // namespace lstm_ext::cuda
