#include "runtime.h"

#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace cuda_on_cpu {

thread_local int current_device = 0;

namespace {

constexpr int kThreadsPerSm = 2048, kThreadsPerBlock = 1024, kMostBlocksPerSm = 32, kMostBlocksPerCluster = 16;
constexpr int64_t kSharedReservedPerBlock = 1024;  // beside what it asks for, of 1024 more than a block may have
// Registers are not counted here: two blocks of 256 threads fit with 128 each, as the kernels use.
constexpr int kThreadsPerSmByRegisters = 512;
constexpr size_t kEndOverlapOneIn = 4;  // launches that may start before the one ahead of them has ended do not

// A grid, or something that the host does.
struct Work {
  std::function<void()> host;  // null: a grid
  Grid grid;
  bool cooperative, overlaps;
};

std::mutex mutex;  // of what threads of the host share: the next two
std::map<void*, std::deque<Work>> streams;
std::map<const void*, KnownKernel> kernels;
Chance host_chance(0);
uint64_t schedule_seed = 0;

[[noreturn]] void refuse(const std::string& why) { throw std::runtime_error("launch refused: " + why); }

void check(const Grid& grid, bool cooperative, int64_t capacity) {
  const int64_t threads = grid.block_dim.volume(), blocks = grid.grid_dim.volume(), cluster = grid.cluster_dim.volume();
  if (threads < 1 || threads > kThreadsPerBlock) refuse(std::to_string(threads) + " threads in a block");
  if (blocks < 1 || grid.grid_dim.y > 65535 || grid.grid_dim.z > 65535) {
    refuse("a grid of " + text_of(grid.grid_dim) + " blocks");
  }
  if (static_cast<int64_t>(grid.shared_size) > device().shared_per_block) {
    refuse(std::to_string(grid.shared_size) + " bytes of shared memory in a block");
  }
  if (cluster < 1 || cluster > kMostBlocksPerCluster || (cluster > 1 && device().compute_capability < 90)) {
    refuse("clusters of " + std::to_string(cluster) + " blocks");
  }
  if (grid.grid_dim.x % grid.cluster_dim.x || grid.grid_dim.y % grid.cluster_dim.y ||
      grid.grid_dim.z % grid.cluster_dim.z) {
    refuse("the grid is not a multiple of the cluster");
  }
  if (capacity < (cooperative ? blocks : cluster)) {
    refuse(std::to_string(blocks) + " blocks at the same time, of which " + std::to_string(capacity) + " fit");
  }
}

}  // namespace

int blocks_per_sm(int threads, int64_t shared_bytes) {
  const int64_t by_shared =
      (device().shared_per_block + kSharedReservedPerBlock) / (shared_bytes + kSharedReservedPerBlock);
  const int64_t by_threads = std::max(kThreadsPerSmByRegisters / threads, threads <= kThreadsPerBlock ? 1 : 0);
  return static_cast<int>(std::min({by_shared, by_threads, int64_t{kMostBlocksPerSm}}));
}

void add_kernel(const void* function, KnownKernel kernel) {
  const std::lock_guard<std::mutex> lock(mutex);
  kernels[function] = std::move(kernel);
}

KnownKernel known_kernel(const void* function) {
  const std::lock_guard<std::mutex> lock(mutex);
  return kernels.at(function);
}

void enqueue(void* stream, std::function<void()> work) {
  const std::lock_guard<std::mutex> lock(mutex);
  streams[stream].push_back({std::move(work), {}, false, false});
}

void launch(Grid grid, bool cooperative, bool overlaps, void* stream) {
  const int64_t per_sm =
      blocks_per_sm(static_cast<int>(grid.block_dim.volume()), static_cast<int64_t>(grid.shared_size));
  const int64_t capacity = std::min<int64_t>(device().sms * per_sm, kMostResidentBlocks);
  check(grid, cooperative, capacity);
  if (overlaps && device().compute_capability < 90) refuse("launches that overlap");
  grid.resident_clusters = static_cast<int>(capacity / grid.cluster_dim.volume());
  const std::lock_guard<std::mutex> lock(mutex);
  streams[stream].push_back({nullptr, std::move(grid), cooperative, overlaps});
}

namespace {

// Runs what stands first, and of launches that may overlap with it as many as chance has it.
void run_first(std::deque<Work>& stream) {
  std::vector<Grid> grids;
  do {
    Work work = std::move(stream.front());
    stream.pop_front();
    if (work.host) return work.host();
    Grid& grid = grids.emplace_back(std::move(work.grid));
    // Others may be using the device: a launch that does not insist gets any part of it.
    if (!work.cooperative)
      grid.resident_clusters = 1 + static_cast<int>(host_chance.below(static_cast<size_t>(grid.resident_clusters)));
  } while (!stream.empty() && stream.front().overlaps && !host_chance.one_in(kEndOverlapOneIn));
  run_grids(grids, schedule_seed);
  schedule_seed += 4;
}

}  // namespace

void synchronize(uint64_t seed) {
  host_chance = Chance(schedule_seed = seed);
  std::map<void*, std::deque<Work>> work;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    work.swap(streams);
  }
  try {
    while (!work.empty()) {
      const auto stream = std::next(work.begin(), static_cast<long>(host_chance.below(work.size())));
      run_first(stream->second);
      if (stream->second.empty()) work.erase(stream);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error("seed " + std::to_string(seed) + ", " + error.what());
  }
}

}  // namespace cuda_on_cpu
