// Small kernels, each with one fault that it has only if `broken`. The harness must catch the fault, and nothing else.
#include "broken_kernels.h"

#include <limits>
#include <map>
#include <stdexcept>
#include <vector>

#include "cuda/launch.h"
#include "ptx.h"

namespace cuda_on_cpu {
namespace {

using lstm_ext::cuda::Kernel;
using lstm_ext::cuda::LaunchConfig;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr unsigned kEvenLanes = 0x55555555;
constexpr int kMBarrierFloats = 4;  // of shared memory, after a float for each thread

struct Params {
  bool broken;
  float* out;
  uint32_t* flag;
};

float* shared_floats() { return reinterpret_cast<float*>(lstm_ext::cuda::dynamic_shared()); }

float value_of(int n) { return static_cast<float>(3 * n + 1); }

// What every thread of block 0 has to bring to `out`: the number of the thread after it.
float next_value() { return value_of(static_cast<int>((threadIdx.x + 1) % blockDim.x)); }

// Within a block ------------------------------------------------------------------------------------------------------

void neighbour_across_barrier(Params p) {
  const int i = threadIdx.x, next = (i + 1) % blockDim.x;
  shared_floats()[i] = value_of(i);
  if (!p.broken) __syncthreads();
  p.out[i] = shared_floats()[next];
}

// A second round may not overwrite what the first one has still to read.
void overwrite_across_barrier(Params p) {
  const int i = threadIdx.x, next = (i + 1) % blockDim.x;
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    shared_floats()[i] = value_of(i) + round - 1;
    __syncthreads();
    sum += shared_floats()[next];
    if (!p.broken) __syncthreads();
  }
  p.out[i] = sum / 3;
}

void neighbour_in_warp(Params p) {
  const int i = threadIdx.x, next = i / 32 * 32 + (i + 1) % 32;
  shared_floats()[i] = value_of(i);
  if (!p.broken) __syncwarp();
  p.out[i] = shared_floats()[next] - value_of(next) + next_value();
}

void divergent_barrier(Params p) {
  const int i = threadIdx.x;
  shared_floats()[i] = value_of(i);
  if (p.broken && i < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  p.out[i] = shared_floats()[(i + 1) % blockDim.x];
}

// Threads that have ended count as arrived.
void barrier_after_exit(Params p) {
  const int i = threadIdx.x;
  p.out[i] = next_value();
  if (i >= 40) return;
  if (p.broken && i == 7) named_barrier_sync(1, 64, Location::current());
  __syncthreads();
}

void uninitialised_shared(Params p) {
  const int i = threadIdx.x;
  if (!p.broken || i % 2) shared_floats()[i] = 0;
  shared_floats()[i] += next_value();
  p.out[i] = shared_floats()[i];
}

void shared_overrun(Params p) {
  const int i = threadIdx.x;
  const int at = p.broken ? i + kMBarrierFloats + 1 : i;
  shared_floats()[at] = next_value();
  p.out[i] = shared_floats()[at];
}

void global_overrun(Params p) {
  const int i = threadIdx.x;
  p.out[p.broken ? i + 1 : i] = next_value();
}

void shuffle_mask(Params p) {
  const int i = threadIdx.x;
  const unsigned mask = p.broken ? kEvenLanes : ~0u;
  const float next = __shfl_sync(mask, value_of(i), (i + 1) % 32);
  p.out[i] = i % 32 == 31 ? next_value() : next;
}

void shuffle_from_outside_the_mask(Params p) {
  const int i = threadIdx.x;
  p.out[i] = next_value();
  if (i % 2 == 0) {
    const float even = __shfl_sync(kEvenLanes, value_of(i), p.broken ? 1 : 2);
    if (even != value_of(i / 32 * 32 + 2)) p.out[i] = kNan;
  }
}

void copy_without_wait(Params p) {
  const int i = threadIdx.x;
  p.out[i] = value_of(i);
  lstm_ext::cuda::cp_async_4(shared_floats() + i, p.out + i);
  lstm_ext::cuda::cp_async_commit();
  if (p.broken) {
    __syncthreads();
    lstm_ext::cuda::cp_async_wait<0>();
  } else {
    lstm_ext::cuda::cp_async_wait<0>();
    __syncthreads();
  }
  const float next = shared_floats()[(i + 1) % blockDim.x];
  __syncthreads();
  p.out[i] = next;
}

// Between blocks ------------------------------------------------------------------------------------------------------

// Block 0 publishes, block 1 reads and writes back what it has read.
void publish_and_read(Params p, Order flag_store, Order flag_load) {
  const Location here = Location::current();
  if (blockIdx.x == 0) {
    store(p.out + threadIdx.x, next_value(), Order::kRelaxed, here);
    __syncthreads();
    if (threadIdx.x == 0) store(p.flag, 1u, flag_store, here);
    return;
  }
  if (threadIdx.x == 0) {
    while (load(p.flag, flag_load, here) == 0) {
    }
  }
  __syncthreads();
  const float seen = load(p.out + threadIdx.x, Order::kRelaxed, here);
  p.out[threadIdx.x] = seen;
}

void flag_release(Params p) { publish_and_read(p, p.broken ? Order::kRelaxed : Order::kRelease, Order::kAcquire); }
void flag_acquire(Params p) { publish_and_read(p, Order::kRelease, p.broken ? Order::kRelaxed : Order::kAcquire); }

// A relaxed store and load, each with a fence at its side, order as well.
void flag_fence(Params p) {
  const Location here = Location::current();
  if (blockIdx.x == 0) {
    store(p.out + threadIdx.x, next_value(), Order::kRelaxed, here);
    __syncthreads();
    if (threadIdx.x == 0) {
      if (!p.broken) fence(here);
      store(p.flag, 1u, Order::kRelaxed, here);
    }
    return;
  }
  while (load(p.flag, Order::kRelaxed, here) == 0) {
  }
  fence(here);
  const float seen = load(p.out + threadIdx.x, Order::kRelaxed, here);
  p.out[threadIdx.x] = seen;
}

// Every block counts itself in and waits for all: a barrier of the grid, which needs them all resident.
void grid_barrier(Params p) {
  const Location here = Location::current();
  if (threadIdx.x == 0) {
    add_bits(p.flag, 1, 4, Order::kAcquireRelease, here);
    while (load(p.flag, Order::kAcquire, here) < gridDim.x) {
    }
  }
  __syncthreads();
  if (blockIdx.x == 0) p.out[threadIdx.x] = next_value();
}

// Clusters ------------------------------------------------------------------------------------------------------------

uint64_t* mbarrier() { return reinterpret_cast<uint64_t*>(shared_floats() + blockDim.x); }
enum class Fault { kNone, kExpectsTooFew, kWrongParity, kLeavesEarly };

// Block 0 pushes a number per thread to block 1, 16 bytes at a time, which hears of them from its mbarrier.
void push(Params p, Fault fault) {
  const int i = threadIdx.x, bytes = static_cast<int>(blockDim.x) * 4;
  if (i == 0) lstm_ext::cuda::mbarrier_init(mbarrier(), 1);
  lstm_ext::cuda::cluster_sync();
  auto* piece = reinterpret_cast<uint4*>(shared_floats()) + i;
  if (blockIdx.x == 0) {
    const float value = next_value();
    __syncthreads();
    shared_floats()[i] = value;
    __syncthreads();
    if (i < bytes / 16)
      lstm_ext::cuda::st_async(lstm_ext::cuda::shared_address_of_rank(piece, 1), *piece,
                               lstm_ext::cuda::shared_address_of_rank(mbarrier(), 1));
  } else if (fault == Fault::kLeavesEarly) {
    p.out[i] = next_value();
    return;
  } else {
    if (i == 0) lstm_ext::cuda::mbarrier_expect(mbarrier(), fault == Fault::kExpectsTooFew ? 16 : bytes);
    while (!lstm_ext::cuda::mbarrier_try_wait(mbarrier(), fault == Fault::kWrongParity)) {
    }
    p.out[i] = shared_floats()[i];
  }
  if (fault != Fault::kLeavesEarly) lstm_ext::cuda::cluster_sync();
}

void push_of_more_than_expected(Params p) { push(p, p.broken ? Fault::kExpectsTooFew : Fault::kNone); }
void push_to_ended_block(Params p) { push(p, p.broken ? Fault::kLeavesEarly : Fault::kNone); }
void push_with_wrong_parity(Params p) { push(p, p.broken ? Fault::kWrongParity : Fault::kNone); }

void wait_for_all_threads(int count, bool initialised) {
  if (initialised && threadIdx.x == 0) lstm_ext::cuda::mbarrier_init(mbarrier(), count);
  __syncthreads();
  lstm_ext::cuda::mbarrier_expect(mbarrier(), 0);
  while (!lstm_ext::cuda::mbarrier_try_wait(mbarrier(), 0)) {
  }
}

void mbarrier_of_nobody(Params p) {
  wait_for_all_threads(static_cast<int>(blockDim.x), !p.broken);
  if (blockIdx.x == 0) p.out[threadIdx.x] = next_value();
}

void mbarrier_count(Params p) {
  wait_for_all_threads(static_cast<int>(blockDim.x) + (p.broken ? 1 : 0), true);
  if (blockIdx.x == 0) p.out[threadIdx.x] = next_value();
}

// Launches that overlap -----------------------------------------------------------------------------------------------

// Each launch counts the flag up, and the last of three brings the numbers: it must have waited for those before it.
void launch_without_wait(Params p) {
  const Location here = Location::current();
  const int i = threadIdx.x;
  if (!p.broken) lstm_ext::cuda::wait_for_previous_launch();
  const uint32_t launch = *p.flag;
  lstm_ext::cuda::let_next_launch_start();
  __syncthreads();
  if (i == 0) store(p.flag, launch + 1, Order::kRelaxed, here);
  if (launch == 2) p.out[i] = next_value();
}

// -----------------------------------------------------------------------------------------------------------------

struct Test {
  void (*kernel)(Params);
  int blocks = 1, cluster = 1;
  int launches = 1;
};

const std::map<std::string, Test> kTests = {
    {"neighbour_across_barrier", {neighbour_across_barrier}},
    {"overwrite_across_barrier", {overwrite_across_barrier}},
    {"neighbour_in_warp", {neighbour_in_warp}},
    {"divergent_barrier", {divergent_barrier}},
    {"barrier_after_exit", {barrier_after_exit}},
    {"uninitialised_shared", {uninitialised_shared}},
    {"shared_overrun", {shared_overrun}},
    {"global_overrun", {global_overrun}},
    {"shuffle_mask", {shuffle_mask}},
    {"shuffle_from_outside_the_mask", {shuffle_from_outside_the_mask}},
    {"copy_without_wait", {copy_without_wait}},
    {"launch_without_wait", {launch_without_wait, 1, 1, 3}},
    {"flag_release", {flag_release, 2}},
    {"flag_acquire", {flag_acquire, 2}},
    {"flag_fence", {flag_fence, 2}},
    {"grid_barrier", {grid_barrier, 12}},
    {"push_of_more_than_expected", {push_of_more_than_expected, 2, 2}},
    {"push_to_ended_block", {push_to_ended_block, 2, 2}},
    {"push_with_wrong_parity", {push_with_wrong_parity, 2, 2}},
    {"mbarrier_of_nobody", {mbarrier_of_nobody, 2, 2}},
    {"mbarrier_count", {mbarrier_count, 2, 2}},
};

}  // namespace

std::vector<std::string> broken_kernels() {
  std::vector<std::string> names;
  for (const auto& [name, test] : kTests) names.push_back(name);
  return names;
}

bool run_broken_kernel(const std::string& name, bool broken, uint64_t seed) {
  const Test& test = kTests.at(name);
  constexpr int kThreads = 96;
  const auto out = std::make_unique<float[]>(kThreads);  // of exactly this size
  std::fill_n(out.get(), kThreads, kNan);
  uint32_t flag = 0;
  LaunchConfig config;
  config.grid_x = test.blocks;
  config.threads = kThreads;
  config.shared_bytes = (kThreads + kMBarrierFloats) * static_cast<int64_t>(sizeof(float));
  config.cluster = test.cluster;
  config.cooperative = !broken || name != "grid_barrier";
  for (int n = 0; n < test.launches; ++n) {
    config.overlaps = n > 0;
    lstm_ext::cuda::launch(Kernel<Params>{name.c_str(), test.kernel}, config, Params{broken, out.get(), &flag},
                           nullptr);
  }
  synchronize(seed);
  for (int i = 0; i < kThreads; ++i) {
    if (out[static_cast<size_t>(i)] != value_of((i + 1) % kThreads)) return false;
  }
  return true;
}

}  // namespace cuda_on_cpu
