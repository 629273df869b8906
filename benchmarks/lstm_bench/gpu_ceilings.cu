// What a step of a layer waits for on a GPU, and the rates of the units that compute it: a line of JSON for each.
// gpu_ceilings.py compiles and runs this.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>

namespace cg = cooperative_groups;

namespace {

constexpr int kHops = 20'000, kTurns = 5, kUnits = 8, kMufuSteps = 4'000, kMmaSteps = 4'000;
constexpr int kThreads = 256, kBlocksPerSm = 2, kMmaFlops = 2 * 16 * 8 * 16;
constexpr long long kPatience = 4'000'000'000;  // clocks that a hop may take, or it never comes

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

void report(const char* name, double value) {
  std::printf("{\"name\": \"%s\", \"value\": %.6g}\n", name, value);
  std::fflush(stdout);
}

__device__ void store(uint32_t* at, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ uint32_t load(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

// Two blocks pass a number to and fro through L2, as the strategy grid passes h. flags [2 * 32] are zeros; each has a
// cache line.
__global__ void hop_through_l2(uint32_t* flags, bool* lost) {
  uint32_t *const mine = flags + 32 * blockIdx.x, *const other = flags + 32 * (1 - blockIdx.x);
  const long long start = clock64();
  for (uint32_t n = 1; n <= kHops; ++n) {
    if (blockIdx.x == 0) store(other, n);
    while (load(mine) < n) {
      if (clock64() - start > kPatience) {
        *lost = true;
        return;
      }
    }
    if (blockIdx.x == 1) store(other, n);
  }
}

// The same between two blocks of a cluster, in their shared memory.
__global__ void hop_in_cluster(bool* lost) {
#if __CUDA_ARCH__ >= 900
  __shared__ uint32_t memory;
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank();
  volatile uint32_t *const mine = &memory, *const other = cluster.map_shared_rank(&memory, 1 - rank);
  *mine = 0;
  cluster.sync();
  const long long start = clock64();
  for (uint32_t n = 1; n <= kHops; ++n) {
    if (rank == 0) *other = n;
    while (*mine < n) {
      if (clock64() - start > kPatience) {
        *lost = true;
        break;
      }
    }
    if (rank == 1) *other = n;
  }
  cluster.sync();  // or one would write into a block that has ended
#endif
}

__global__ void cluster_barriers() {
#if __CUDA_ARCH__ >= 900
  const cg::cluster_group cluster = cg::this_cluster();
  for (int n = 0; n < kHops; ++n) cluster.sync();
#endif
}

__global__ void exponentials(float* out, float x) {
  float sums[kUnits];
  for (int n = 0; n < kUnits; ++n) sums[n] = x * n;
  for (int step = 0; step < kMufuSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kUnits; ++n) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(sums[n]));
  }
  float total = 0;
  for (int n = 0; n < kUnits; ++n) total += sums[n];
  if (total == -1) *out = total;  // never: or nothing would be computed
}

__global__ void products(float* out, uint32_t bits) {
#if __CUDA_ARCH__ >= 800
  float sums[kUnits][4] = {};
  for (int step = 0; step < kMmaSteps; ++step) {
#pragma unroll
    for (int n = 0; n < kUnits; ++n) {
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %4, %4, %4}, {%4, %4}, "
          "{%0, %1, %2, %3};"
          : "+f"(sums[n][0]), "+f"(sums[n][1]), "+f"(sums[n][2]), "+f"(sums[n][3])
          : "r"(bits));
    }
  }
  float total = 0;
  for (int n = 0; n < kUnits; ++n) total += sums[n][0] + sums[n][1] + sums[n][2] + sums[n][3];
  if (total == -1) *out = total;
#endif
}

// clocks and nanoseconds [2] of a while.
__global__ void clocks(long long* passed) {
  uint64_t before, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(before));
  const long long start = clock64();
  do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  while (now - before < 20'000'000);
  passed[0] = clock64() - start;
  passed[1] = static_cast<long long>(now - before);
}

// The shortest time of a launch in microseconds.
double time_of(const char* what, const std::function<void()>& launch) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), what);
  check(cudaEventCreate(&stop), what);
  float best = 1e30F;
  for (int turn = 0; turn < kTurns; ++turn) {
    check(cudaEventRecord(start), what);
    launch();
    check(cudaGetLastError(), what);
    check(cudaEventRecord(stop), what);
    check(cudaEventSynchronize(stop), what);
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, stop), what);
    best = std::min(best, milliseconds);
  }
  return 1e3 * best;
}

cudaLaunchConfig_t in_clusters(cudaLaunchAttribute& attribute, int size, int threads, int shared_bytes) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = size;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return config;
}

void measure_clusters(const cudaDeviceProp& device, bool* lost) {
  cudaLaunchAttribute attribute{};
  for (const int size : {8, 16}) {
    const auto kernel = reinterpret_cast<const void*>(cluster_barriers);
    const int shared_bytes = static_cast<int>(device.sharedMemPerBlockOptin);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters of 16");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
    cudaLaunchConfig_t config = in_clusters(attribute, size, kThreads, shared_bytes);
    int count = 0;
    check(cudaOccupancyMaxActiveClusters(&count, kernel, &config), "resident clusters");
    report(size == 8 ? "resident clusters of 8, all shared memory" : "resident clusters of 16, all shared memory",
           count);
    if (count == 0) continue;
    const double us =
        time_of("cluster barrier", [&] { check(cudaLaunchKernelEx(&config, cluster_barriers), "cluster barrier"); });
    report(size == 8 ? "barrier of a cluster of 8, ns" : "barrier of a cluster of 16, ns", 1e3 * us / kHops);
  }
  const cudaLaunchConfig_t pair = in_clusters(attribute, 2, 1, 0);
  const double us =
      time_of("hop in a cluster", [&] { check(cudaLaunchKernelEx(&pair, hop_in_cluster, lost), "hop in a cluster"); });
  if (!*lost) report("flag from block to block of a cluster, ns", 1e3 * us / (2 * kHops));
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "device");
  uint32_t* flags = nullptr;
  check(cudaMalloc(&flags, 64 * sizeof(uint32_t)), "memory");
  bool* lost = nullptr;
  check(cudaMallocHost(&lost, sizeof(bool)), "memory");
  long long* passed = nullptr;
  check(cudaMallocHost(&passed, 2 * sizeof(long long)), "memory");
  *lost = false;

  time_of("clocks", [&] { clocks<<<1, 1>>>(passed); });
  report("clock of one busy multiprocessor, MHz", 1e3 * passed[0] / passed[1]);
  const double hop = time_of("hop through L2", [&] {
    check(cudaMemsetAsync(flags, 0, 64 * sizeof(uint32_t)), "memory");
    hop_through_l2<<<2, 1>>>(flags, lost);
  });
  if (!*lost) report("flag from block to block through L2, ns", 1e3 * hop / (2 * kHops));

  const int blocks = device.multiProcessorCount * kBlocksPerSm;
  auto* const sink = reinterpret_cast<float*>(flags);
  const double threads = static_cast<double>(blocks) * kThreads;
  const double ex2 = time_of("ex2", [&] { exponentials<<<blocks, kThreads>>>(sink, 1e-3F); });
  report("ex2.approx of all multiprocessors, G/s", 1e-3 * threads * kUnits * kMufuSteps / ex2);
  if (device.major >= 8) {
    const double mma = time_of("mma", [&] { products<<<blocks, kThreads>>>(sink, 0x3F803F80U); });
    report("mma.sync bfloat16, TFLOP/s", 1e-6 * threads / 32 * kUnits * kMmaSteps * kMmaFlops / mma);
  }
  if (device.major >= 9) measure_clusters(device, lost);
  if (*lost) std::fprintf(stderr, "a flag never came\n");
  return *lost ? 1 : 0;
}
