// What the kernels need of a GPU beyond plain C++, as small named functions: the only file with inline assembly.
// The tests put a host implementation in its place (LSTM_EXT_CUDA_ON_CPU).
#pragma once

#if defined(LSTM_EXT_CUDA_ON_CPU)
#include "cuda_on_cpu/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lstm_ext::cuda {

// ---- Shared memory ----------------------------------------------------------------------------------------

// The start of the block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ uint4 lstm_ext_dynamic_shared[];
  return reinterpret_cast<char*>(lstm_ext_dynamic_shared);
}

// ---- Registers --------------------------------------------------------------------------------------------------

// The value, of 32 or 64 bits, is in registers from here on: the compiler may not compute it again where it is used.
template <class T>
__device__ __forceinline__ void keep(T& value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" : "+l"(value));
  } else {
    asm volatile("" : "+r"(value));
  }
}

// ---- Numbers between blocks, through the L2 cache -------------------------------------------------------------

// Of 64 bits, and of 16 bytes that are numbers of kBytes bytes (4 or 8). A number is written and read whole (no half of
// one with half of another), and ordered with nothing else: of 16 bytes one may be older than another.
__device__ __forceinline__ void st_relaxed_gpu(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

template <int kBytes>
__device__ __forceinline__ void st_relaxed_gpu(uint4* address, const uint4& value) {
  if constexpr (kBytes == 4) {
    asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
  } else {
    asm volatile(
        "{\n.reg .u64 a, b;\nmov.b64 a, {%1, %2};\nmov.b64 b, {%3, %4};\nst.relaxed.gpu.global.v2.u64 [%0], {a, "
        "b};\n}" ::"l"(address),
        "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
        : "memory");
  }
}

template <int kBytes>
__device__ __forceinline__ uint4 ld_relaxed_gpu(const uint4* address) {
  if constexpr (kBytes == 4) {
    uint4 value;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
  } else {
    uint64_t low, high;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(address) : "memory");
    return {static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
            static_cast<uint32_t>(high >> 32)};
  }
}

// ---- Waiting no longer than can be meant ----------------------------------------------------------------------------

inline constexpr uint32_t kPollsPerLook = 1024;  // that fail before somebody looks at the clock

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Ends the launch, and everything else in this context, with an error that the runtime reports. The host sees what this
// thread has stored in its memory before.
__device__ __forceinline__ void trap() {
  __threadfence_system();
  __trap();
}

// ---- Copies from global to shared memory that nobody waits for (cp.async) -------------------------------------------
//
// Each copies so many bytes as its name says, of which both addresses are multiples. What a thread has copied since its
// last commit is a group; cp_async_wait<n> returns when all but its latest n groups have landed, for this thread:
// others see them after a barrier. Turing copies at once.

#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(global) : "memory");
}
// Through L2 alone.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// 16 bytes or zeros.
__device__ __forceinline__ void cp_async_16_if(bool there, void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %2, 0;\ncp.async.cg.shared.global [%0], [%1], 16, p;\n}" ::"r"(to),
               "l"(global), "r"(static_cast<uint32_t>(there))
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}
#else
__device__ __forceinline__ void cp_async_4(void* shared, const void* global) {
  *static_cast<uint32_t*>(shared) = *static_cast<const uint32_t*>(global);
}
__device__ __forceinline__ void cp_async_8(void* shared, const void* global) {
  *static_cast<uint2*>(shared) = *static_cast<const uint2*>(global);
}
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
}
__device__ __forceinline__ void cp_async_16_if(bool there, void* shared, const void* global) {
  *static_cast<uint4*>(shared) = there ? *static_cast<const uint4*>(global) : uint4{};
}
__device__ __forceinline__ void cp_async_commit() {}
template <int kGroupsLeft>
__device__ __forceinline__ void cp_async_wait() {}
#endif

// ---- Matrices from shared memory, in the order of mma.sync (ldmatrix)
// --------------------------------------------------
//
// 8 x 8 numbers of 16 bits for each register of a lane, or 8 x 4 words: lane 8 m + r brings the address, a multiple of
// 16, of row r of matrix m, and gets of each matrix the word {row lane / 4, word lane % 4}; transposed, the numbers
// {column lane / 4, rows 2 (lane % 4) and the next}.

__device__ __forceinline__ uint2 ldmatrix_x2(const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  uint2 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "r"(address)
               : "memory");
  return words;
}

__device__ __forceinline__ uint4 ldmatrix_x4(const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

__device__ __forceinline__ uint4 ldmatrix_x4_transposed(const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  uint4 words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  return words;
}

// ---- Tensor cores ---------------------------------------------------------------------------------------------
//
// d [16, 8] += a [16, k] b [k, 8] by one warp, all lanes together. With row = lane / 4, column = lane % 4 a lane holds
//   d: {row, 2 column}, {row, 2 column + 1}, {row + 8, 2 column}, {row + 8, 2 column + 1}
//   k = 16 (16-bit numbers, two of adjacent k in a word): a: {row, 2 column}, {row + 8, 2 column}, {row, 2 column + 8},
//     {row + 8, 2 column + 8};  b: {2 column, row}, {2 column + 8, row}
//   k = 8 (TF32): a: {row, column}, {row + 8, column}, {row, column + 4}, {row + 8, column + 4};
//     b: {column, row}, {column + 4, row}

__device__ __forceinline__ void mma_fp16(float (&d)[4], const uint4& a, const uint2& b) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#else  // Turing has half of it
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.x), "r"(a.y), "r"(b.x));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a.z), "r"(a.w), "r"(b.y));
#endif
}

#if __CUDA_ARCH__ < 800
// Turing has no tensor cores for bfloat16: the same sum from the numbers of the lanes that hold them. Not inlined, as
// it stands in a hundred places of a kernel.
inline __device__ __noinline__ float4 mma_bf16_by_shuffles(float4 d, uint4 a, uint2 b) {
  const int lane = threadIdx.x % 32, row = lane & ~3, column = lane % 4 * 8;
  const auto low = [](uint32_t word) { return __uint_as_float(word << 16); };
  const auto high = [](uint32_t word) { return __uint_as_float(word & 0xffff0000u); };
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const uint32_t top = __shfl_sync(~0u, k < 4 ? a.x : a.z, row + k % 4);
    const uint32_t bottom = __shfl_sync(~0u, k < 4 ? a.y : a.w, row + k % 4);
    const uint32_t left = __shfl_sync(~0u, k < 4 ? b.x : b.y, column + k % 4);
    const uint32_t right = __shfl_sync(~0u, k < 4 ? b.x : b.y, column + 4 + k % 4);
    d.x += low(top) * low(left) + high(top) * high(left);
    d.y += low(top) * low(right) + high(top) * high(right);
    d.z += low(bottom) * low(left) + high(bottom) * high(left);
    d.w += low(bottom) * low(right) + high(bottom) * high(right);
  }
  return d;
}
#endif

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint4& a, const uint2& b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#else
  const float4 sums = mma_bf16_by_shuffles(make_float4(d[0], d[1], d[2], d[3]), a, b);
  d[0] = sums.x, d[1] = sums.y, d[2] = sums.z, d[3] = sums.w;
#endif
}

// From sm_80 on; the operands as to_tf32 gives them.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint4& a, const uint2& b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
#else
  __trap();
#endif
}

// Rounded to the 10 bits of mantissa that the tensor cores read.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#if __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#else
  return __float_as_uint(value);
#endif
}

// ---- Clusters of blocks, from sm_90 on ------------------------------------------------------------------------
//
// Shared memory of another block of the cluster is named by the own address of the same place and the block's rank.
// Below sm_90 no cluster is ever launched, and these are never reached.

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ uint32_t shared_address_of_rank(const void* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  return address;
#else
  __trap();
  return 0;
#endif
}

// All threads of all blocks of the cluster meet; what they wrote before, to whichever shared memory, is seen after.
__device__ __forceinline__ void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// The same, but what they wrote may be seen later: for blocks whose memory others have read, or written, before they
// end.
__device__ __forceinline__ void cluster_meet() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
  __trap();
#endif
}

// Stores 16 bytes into shared memory of the cluster, at an address from shared_address_of_rank, and counts them at a
// barrier of the same block once they are there. Ordered with nothing else.
__device__ __forceinline__ void st_async(uint32_t to, const uint4& value, uint32_t barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(barrier)
      : "memory");
#else
  __trap();
#endif
}

// The same place in the shared memory of block `rank`, for plain loads after a cluster_sync.
template <class T>
__device__ __forceinline__ const T* shared_of_rank(const T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
  return reinterpret_cast<const T*>(address);
#else
  __trap();
  return shared;
#endif
}

// A barrier in shared memory: a phase ends when `count` arrivals and the bytes that they announce have come, and the
// next begins. By one thread, and followed by cluster_sync before any other thread of the cluster uses it.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int count) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#else
  __trap();
#endif
}

// Arrives at a barrier of the own block, and announces bytes that st_async brings: they may have come before.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, int bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
#else
  __trap();
#endif
}

// Whether the phase of this parity (0 for the first) of the own block's barrier has ended; rests a little if not. What
// st_async has brought is seen after.
__device__ __forceinline__ bool mbarrier_try_wait(uint64_t* barrier, int parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
#else
  __trap();
  return true;
#endif
}

// ---- Launches that overlap (programmatic dependent launch), from sm_90 on -------------------------------------
//
// A launch that LaunchConfig lets overlap may start when all blocks of the one before it have called
// let_next_launch_start or ended. Until it has called wait_for_previous_launch, which returns when that one has ended
// whole, it may read nothing that it writes, and write nothing that it reads. Without such a launch both do nothing.

__device__ __forceinline__ void wait_for_previous_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_launch_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Asks for the line of that address to be brought into L2.
__device__ __forceinline__ void prefetch_to_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// ---- Numbers --------------------------------------------------------------------------------------------------

// exp and 1 / x by the special function unit, to 2 ulps (exp to |x| of them for large x), and denormals are zero:
// several are under way at a time, as none has steps of its own for a special case.
__device__ __forceinline__ float fast_exp(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.4426950408889634f));
  return result;
}

__device__ __forceinline__ float fast_inverse(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace lstm_ext::cuda

#endif
