// csrc/cuda/ptx.h for threads that are fibers: the same functions, whose comments stand there.
#pragma once

#include "memory.h"
#include "numbers.h"
#include "warp.h"

namespace lstm_ext::cuda {

using cuda_on_cpu::Location;

inline char* dynamic_shared() { return cuda_on_cpu::current->block->shared; }

template <class T>
void keep(T&) {}

// ---- Numbers between blocks

template <class Number>
void st_relaxed_gpu(Number* address, Number value, Location where = Location::current()) {
  if (cuda_on_cpu::is_mute()) return;
  cuda_on_cpu::store(address, value, cuda_on_cpu::Order::kRelaxed, where);
}

template <int kBytes>
struct NumbersOf16Bytes {
  using Number = std::conditional_t<kBytes == 4, uint32_t, uint64_t>;
  Number at[16 / kBytes];
};

template <int kBytes>
void st_relaxed_gpu(uint4* address, const uint4& value, Location where = Location::current()) {
  cuda_on_cpu::check_access(address, 16, 16, where);
  NumbersOf16Bytes<kBytes> numbers;
  memcpy(&numbers, &value, 16);
  auto* to = reinterpret_cast<typename NumbersOf16Bytes<kBytes>::Number*>(address);
  for (const auto number : numbers.at) st_relaxed_gpu(to++, number, where);
}

template <int kBytes>
uint4 ld_relaxed_gpu(const uint4* address, Location where = Location::current()) {
  cuda_on_cpu::check_access(address, 16, 16, where);
  NumbersOf16Bytes<kBytes> numbers;
  const auto* from = reinterpret_cast<const typename NumbersOf16Bytes<kBytes>::Number*>(address);
  for (auto& number : numbers.at) number = cuda_on_cpu::load(from++, cuda_on_cpu::Order::kRelaxed, where);
  uint4 value;
  memcpy(&value, &numbers, 16);
  return value;
}

// ---- Waiting

inline constexpr uint32_t kPollsPerLook = 1;  // time passes only while nobody can run: see `stir` in device.cpp

inline uint64_t nanoseconds(Location where = Location::current()) { return cuda_on_cpu::nanoseconds(where); }

inline void trap(Location where = Location::current()) {
  cuda_on_cpu::device_is_lost = true;
  cuda_on_cpu::fail("trap", where);
}

// ---- cp.async

inline void cp_async_4(void* shared, const void* global, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, 4, 4, where);
}
inline void cp_async_8(void* shared, const void* global, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, 8, 8, where);
}
inline void cp_async_16(void* shared, const void* global, Location where = Location::current()) {
  cuda_on_cpu::copy_async(shared, global, 16, 16, where);
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

inline void cluster_meet(Location where = Location::current()) {
  cuda_on_cpu::cluster_arrive(false, where);
  cuda_on_cpu::cluster_wait(false, where);
}

// Here an address in the cluster is its offset in the block's shared memory, and above that the rank of the block.
inline uint32_t shared_address_of_rank(const void* shared, int rank, Location where = Location::current()) {
  return cuda_on_cpu::address_of_rank(shared, rank, where);
}

inline void st_async(uint32_t to, const uint4& value, uint32_t barrier, Location where = Location::current()) {
  if (cuda_on_cpu::is_mute()) return;
  auto* there = static_cast<uint32_t*>(cuda_on_cpu::at_address(to, where));
  cuda_on_cpu::check_access(there, 16, 16, where);
  auto* counts = static_cast<uint64_t*>(cuda_on_cpu::at_address(barrier, where));
  cuda_on_cpu::store_remote(there, value.x | uint64_t{value.y} << 32, 8, counts, where);
  cuda_on_cpu::store_remote(there + 2, value.z | uint64_t{value.w} << 32, 8, counts, where);
}

template <class T>
const T* shared_of_rank(const T* shared, int rank, Location where = Location::current()) {
  return cuda_on_cpu::map_rank(shared, rank, where);
}

inline void mbarrier_init(uint64_t* barrier, int count, Location where = Location::current()) {
  cuda_on_cpu::mbarrier_init(barrier, count, where);
}

inline void mbarrier_expect(uint64_t* barrier, int bytes, Location where = Location::current()) {
  cuda_on_cpu::mbarrier_arrive(cuda_on_cpu::map_rank(barrier, cuda_on_cpu::current->block->rank_in_cluster, where),
                               bytes, true, where);
}

inline bool mbarrier_try_wait(uint64_t* barrier, int parity, Location where = Location::current()) {
  return cuda_on_cpu::mbarrier_try_wait(barrier, parity, true, where);
}

// ---- Launches that overlap

inline void wait_for_previous_launch(Location where = Location::current()) {
  cuda_on_cpu::wait_for_previous_launch(where);
}
inline void let_next_launch_start() { cuda_on_cpu::let_next_launch_start(); }
inline void prefetch_to_l2(const void*) {}

// ---- Numbers

inline float fast_exp(float x) { return std::exp(x); }
inline float fast_inverse(float x) { return 1 / x; }

}  // namespace lstm_ext::cuda
