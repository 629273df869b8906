#include "device.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <unordered_map>
#include <utility>

#include "memory.h"

namespace cuda_on_cpu {

Thread* current = nullptr;
Chance chance(0);
int mute_block = -1;
bool device_is_lost = false;

namespace {

// How often threads that wait at addresses look again, with nothing else going on, before that is a deadlock.
constexpr int kIdleRounds = 40;
constexpr uint64_t kIdleNanoseconds = 500'000'000;  // that pass in each of these rounds
// How many loads may be made with nothing else going on before that is one.
constexpr int64_t kIdleLoads = 20'000'000;

// How a schedule, beside being random, prefers one block or one thread.
struct Preference {
  size_t leave_block_one_in;  // after a thread has run
  bool latest_first;          // of the ready threads of a block, not any
};
constexpr Preference kPreferences[] = {{1, false}, {64, false}, {1'000'000, false}, {256, true}};

// One of the grids that run.
struct Launch {
  const Grid* grid;
  std::vector<Index> to_start;     // first blocks of clusters, in the order from last to first
  int resident = 0;                // clusters
  int64_t blocks_before_next = 0;  // that have neither let the next launch start nor ended
  std::vector<Thread*> waiting;    // of the next launch, for the end of this one

  bool ended() const { return to_start.empty() && resident == 0; }
};

struct Running {
  std::vector<Launch> launches;
  Preference preference;
  Fiber host;
  std::vector<std::unique_ptr<Cluster>> resident;
  std::vector<int> free_slots;
  std::vector<Block*> ready_blocks;
  Block* favourite = nullptr;
  std::unordered_map<const void*, std::vector<Thread*>> at_address;
  int idle_rounds = 0;
  uint64_t nanoseconds = 1;
  uint64_t events = 0;  // of which threads may have been waiting for one
  int64_t idle_loads = 0;
  bool failed = false;
  std::string failure;
  bool host_acts = false;  // a block has ended, or a launch may start
};

Running* running = nullptr;
Fiber* previous = nullptr;  // who switched last

// The scheduler ---------------------------------------------------------------------------------------------------

void make_ready(Thread& thread) {
  thread.waits = {};
  Block& block = *thread.block;
  block.ready.push_back(&thread);
  if (!block.listed) running->ready_blocks.push_back(&block);
  block.listed = true;
}

// A ready thread, no longer among the ready ones; null: there is none.
Thread* pick() {
  Running& now = *running;
  if (now.host_acts || now.failed) return nullptr;  // the host has to act first
  while (!now.ready_blocks.empty()) {
    Block*& block = now.favourite;
    if (!block || block->ready.empty() || chance.one_in(now.preference.leave_block_one_in)) {
      const size_t n = chance.below(now.ready_blocks.size());
      block = now.ready_blocks[n];
      if (block->ready.empty()) {
        block->listed = false;
        now.ready_blocks[n] = now.ready_blocks.back();
        now.ready_blocks.pop_back();
        block = nullptr;
        continue;
      }
    }
    const size_t last = block->ready.size() - 1;
    std::swap(block->ready[now.preference.latest_first ? last : chance.below(last + 1)], block->ready[last]);
    Thread* thread = block->ready.back();
    block->ready.pop_back();
    return thread;
  }
  return nullptr;
}

// From the fiber that runs to another one, null: the host.
void go_to(Thread* thread, bool last = false) {
  Fiber& from = current ? current->fiber : running->host;
  Fiber& to = thread ? thread->fiber : running->host;
  current = thread;
  previous = &from;
  switch_fibers(from, to, last);
}

void rest(const Reason& reason) {
  current->waits = reason;
  Cluster& cluster = *current->block->cluster;
  if (!cluster.remote_stores.empty()) land_some_remote_stores(cluster);
  Thread* next = pick();
  if (next != current) go_to(next);
  current->waits = {};
}

// Threads, blocks and clusters ------------------------------------------------------------------------------------

void complete_collectives(Block& block, Warp& warp);
void complete_syncthreads(Block& block);
void complete_cluster(Cluster& cluster);

[[noreturn]] void end_thread() {
  Thread& self = *current;
  Block& block = *self.block;
  Cluster& cluster = *block.cluster;
  if (!self.copies.empty()) fail("a thread ends with a cp.async that it has not waited for", Location::current());
  self.done = true;
  Warp& warp = block.warps[self.rank / kWarpSize];
  warp.live &= ~(1u << self.lane());
  --block.live;
  --cluster.live;
  if (self.arrived_at_cluster && self.cluster_phase == cluster.phase) --cluster.arrived;
  progressed();
  complete_collectives(block, warp);
  complete_syncthreads(block);
  complete_cluster(cluster);
  if (cluster.live == 0) land_remote_stores(cluster, nullptr);
  running->host_acts |= block.live == 0;
  go_to(pick(), true);
  abort();  // nobody switches to a thread that has ended
}

void thread_main() {
  arrive(*previous);
  current->block->grid->body();
  end_thread();
}

std::unique_ptr<Block> start_block(Cluster& cluster, Index index) {
  const Grid& grid = *running->launches[cluster.launch].grid;
  auto block = std::make_unique<Block>();
  block->grid = &grid;
  block->cluster = &cluster;
  block->index = index;
  block->rank_in_cluster = static_cast<int>(cluster.blocks.size());
  block->slot = running->free_slots.back();
  running->free_slots.pop_back();
  if (grid.shared_size) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, grid.shared_size) != 0) throw std::bad_alloc();
    memset(memory, 0xff, grid.shared_size);  // NaN in every floating-point type
    block->shared = static_cast<char*>(memory);
  }
  const int threads = static_cast<int>(grid.block_dim.volume());
  block->threads.resize(threads);
  block->warps.resize((threads + kWarpSize - 1) / kWarpSize);
  block->live = threads;
  cluster.live += threads;
  for (int rank = 0; rank < threads; ++rank) {
    Thread& thread = block->threads[rank];
    thread.fiber = new_fiber(thread_main);
    thread.block = block.get();
    thread.rank = rank;
    const unsigned x = grid.block_dim.x, y = grid.block_dim.y, r = rank;
    thread.index = {r % x, r / x % y, r / x / y};
    block->warps[rank / kWarpSize].live |= 1u << thread.lane();
    make_ready(thread);
  }
  return block;
}

void start_cluster(size_t launch, Index first) {
  const Index size = running->launches[launch].grid->cluster_dim;
  auto cluster = std::make_unique<Cluster>();
  cluster->launch = launch;
  for (unsigned z = 0; z < size.z; ++z)
    for (unsigned y = 0; y < size.y; ++y)
      for (unsigned x = 0; x < size.x; ++x)
        cluster->blocks.push_back(start_block(*cluster, {first.x + x, first.y + y, first.z + z}));
  running->resident.push_back(std::move(cluster));
}

// The first blocks of all clusters, in a random order.
std::vector<Index> shuffled_clusters(const Grid& grid) {
  std::vector<Index> firsts;
  const Index size = grid.cluster_dim;
  for (unsigned z = 0; z < grid.grid_dim.z; z += size.z)
    for (unsigned y = 0; y < grid.grid_dim.y; y += size.y)
      for (unsigned x = 0; x < grid.grid_dim.x; x += size.x) firsts.push_back({x, y, z});
  for (size_t n = firsts.size(); n > 1; --n) std::swap(firsts[n - 1], firsts[chance.below(n)]);
  return firsts;
}

void start_what_fits() {
  Running& now = *running;
  for (size_t n = 0; n < now.launches.size(); ++n) {
    Launch& launch = now.launches[n];
    while (!launch.to_start.empty() && launch.resident < launch.grid->resident_clusters &&
           static_cast<int64_t>(now.free_slots.size()) >= launch.grid->cluster_dim.volume()) {
      start_cluster(n, launch.to_start.back());
      launch.to_start.pop_back();
      ++launch.resident;
    }
    if (launch.blocks_before_next > 0) return;
  }
}

void remove_ended_blocks() {
  Running& now = *running;
  for (auto& cluster : now.resident) {
    for (auto& block : cluster->blocks) {
      if (!block || block->live) continue;
      if (!block->lets_next_start) --now.launches[cluster->launch].blocks_before_next;
      for (Thread& thread : block->threads) recycle(thread.fiber, true);
      std::erase(now.ready_blocks, block.get());
      if (now.favourite == block.get()) now.favourite = nullptr;
      now.free_slots.push_back(block->slot);
      block.reset();
    }
  }
  for (const auto& cluster : now.resident) {
    if (cluster->live) continue;
    Launch& launch = now.launches[cluster->launch];
    --launch.resident;
    if (!launch.ended()) continue;
    for (Thread* thread : launch.waiting) make_ready(*thread);
    launch.waiting.clear();
    progressed();
  }
  std::erase_if(now.resident, [](const auto& cluster) { return cluster->live == 0; });
  now.host_acts = false;
}

// Time passes while nobody can run: whether that may let somebody run.
bool stir() {
  Running& now = *running;
  bool landed = false;
  for (auto& cluster : now.resident) landed |= land_remote_stores(*cluster, nullptr);
  if (landed) return true;
  if (now.at_address.empty() || now.idle_rounds++ == kIdleRounds) return false;
  now.nanoseconds += kIdleNanoseconds;
  for (auto& [address, threads] : std::exchange(now.at_address, {})) {
    for (Thread* thread : threads) make_ready(*thread);
  }
  return true;
}

// Reports ---------------------------------------------------------------------------------------------------------

std::string ranks_text(const std::vector<int>& ranks) {
  std::string text;
  for (size_t n = 0; n < ranks.size(); ++n) {
    size_t end = n;
    while (end + 1 < ranks.size() && ranks[end + 1] == ranks[end] + 1) ++end;
    text += (text.empty() ? "" : ", ") + std::to_string(ranks[n]);
    if (end > n) text += "-" + std::to_string(ranks[end]);
    n = end;
  }
  return text;
}

std::string deadlock_report() {
  std::string text = "deadlock";
  for (const auto& cluster : running->resident) {
    for (const auto& block : cluster->blocks) {
      if (!block) continue;
      std::map<std::string, std::vector<int>> waiting;
      for (const Thread& thread : block->threads) {
        if (thread.done) continue;
        const Reason& reason = thread.waits;
        std::string why = reason.what ? reason.what : "its turn";
        if (reason.address) why += " in " + text_of(reason.address);
        if (reason.number) why += " " + std::to_string(reason.number);
        waiting[why + ", at " + text_of(reason.where)].push_back(thread.rank);
      }
      for (const auto& [why, ranks] : waiting) {
        text += "\n  block " + text_of(block->index) + ": threads " + ranks_text(ranks) + " wait for " + why;
      }
    }
  }
  for (const Launch& launch : running->launches) {
    if (launch.to_start.empty()) continue;
    text += "\n  " + std::to_string(launch.to_start.size()) + " clusters (or blocks) cannot start: only " +
            std::to_string(launch.grid->resident_clusters) + " may be resident at a time";
  }
  return text;
}

void run_to_the_end() {
  Running& now = *running;
  while (true) {
    remove_ended_blocks();
    start_what_fits();
    if (now.resident.empty()) return;
    if (Thread* thread = pick()) {
      go_to(thread);
    } else if (!stir()) {
      report(deadlock_report());
    }
    if (now.failed) return;
  }
}

}  // namespace

Block::~Block() { free(shared); }

uint64_t Chance::bits() {  // splitmix64
  uint64_t z = state_ += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

void run_grids(const std::vector<Grid>& grids, uint64_t seed) {
  if (running) throw std::logic_error("run_grids: a grid is running already");
  chance = Chance(seed);
  Running now{};
  now.preference = kPreferences[seed % std::size(kPreferences)];
  for (const Grid& grid : grids) {
    now.launches.push_back({.grid = &grid, .to_start = shuffled_clusters(grid), .waiting = {}});
    now.launches.back().blocks_before_next = grid.grid_dim.volume();
  }
  for (int slot = kMostResidentBlocks; slot-- > 0;) now.free_slots.push_back(slot);
  running = &now;
  run_to_the_end();
  for (auto& cluster : now.resident) {  // what a failure has left
    for (auto& block : cluster->blocks) {
      for (size_t n = 0; block && n < block->threads.size(); ++n) {
        recycle(block->threads[n].fiber, block->threads[n].done);
      }
    }
  }
  forget_versions();
  running = nullptr;
  if (now.failed) {
    throw std::runtime_error(now.failure);
  }
}

void fail(const std::string& what, Location where) {
  report(what + ", at " + text_of(where) + ", thread " + text_of(current->index) + " of block " +
         text_of(current->block->index));
  go_to(nullptr, true);
  abort();  // the host does not come back after a failure
}

void report(const std::string& what) {
  const auto runs = [](const Launch& launch) { return !launch.ended(); };
  const Grid* grid =
      current ? current->block->grid : std::find_if(running->launches.begin(), running->launches.end(), runs)->grid;
  if (!running->failed) running->failure = "kernel " + grid->kernel + ": " + what;
  running->failed = true;
}

uint64_t nanoseconds(Location where) {
  Running& now = *running;
  if (current->events != now.events) {
    current->events = now.events;
    yield();
  } else {
    wait_at(&now.events, {"anything to happen", nullptr, 0, where});
  }
  return now.nanoseconds;
}

bool is_mute() { return static_cast<int>(current->block->index.x) == mute_block; }

void yield() {
  make_ready(*current);
  rest({});
}

void progressed() { running->idle_rounds = running->idle_loads = 0; }

void count_load(Location where) {
  if (++running->idle_loads == kIdleLoads) fail("threads do nothing but load. A " + deadlock_report(), where);
}

void wait_at(const void* address, const Reason& reason) {
  running->at_address[address].push_back(current);
  rest(reason);
}

void wake_waiters_at(const void* address) {
  progressed();
  ++running->events;
  for (const void* of : {address, static_cast<const void*>(&running->events)}) {
    const auto found = running->at_address.find(of);
    if (found == running->at_address.end()) continue;
    for (Thread* thread : found->second) make_ready(*thread);
    running->at_address.erase(found);
  }
}

View released_view(const Thread& thread) {
  View view = thread.view;
  uint32_t& own = view.seen[thread.block->slot];
  own = std::max(own, thread.last_store);
  return view;
}

// Barriers of a block -------------------------------------------------------------------------------------------------

namespace {

void complete_barrier(Barrier& barrier) {
  for (Thread* thread : barrier.waiting) {
    thread->view.join(barrier.view);
    thread->any_at_barrier = barrier.any;
    make_ready(*thread);
  }
  barrier.waiting.clear();
  barrier.arrived = barrier.expected = 0;
  barrier.any = false;
  barrier.view = {};
  progressed();
}

void complete_syncthreads(Block& block) {
  Barrier& barrier = block.barriers[0];
  if (barrier.arrived && !barrier.expected && barrier.arrived == block.live) complete_barrier(barrier);
}

bool same_place(Location a, Location b) {
  return a.line() == b.line() && (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

// Whether that was the last arrival.
bool arrive_at_barrier(Barrier& barrier, int threads, const char* what, Location where) {
  const bool first = barrier.arrived == 0;
  if (!first && barrier.expected != threads) {
    fail(std::string(what) + ": expects another number of threads than the one that others have reached at " +
             text_of(barrier.where),
         where);
  }
  if (first) {
    barrier.expected = threads;
    barrier.where = where;
  }
  ++barrier.arrived;
  barrier.view.join(released_view(*current));
  return barrier.arrived == (threads ? threads : current->block->live);
}

Barrier& named_barrier(int id, int threads, Location where) {
  if (id < 0 || id >= kNamedBarriers) fail("named barrier " + std::to_string(id) + " does not exist", where);
  if (threads <= 0 || threads % kWarpSize) {
    fail("named barrier: expected a multiple of the warp size, got " + std::to_string(threads), where);
  }
  return current->block->barriers[id];
}

}  // namespace

bool syncthreads(Location where, bool predicate) {
  Barrier& barrier = current->block->barriers[0];
  if (barrier.arrived && !same_place(barrier.where, where)) {
    fail("divergent barrier: other threads of the block are in the __syncthreads at " + text_of(barrier.where), where);
  }
  barrier.waiting.push_back(current);
  barrier.any |= predicate;
  if (arrive_at_barrier(barrier, 0, "__syncthreads", where)) {
    complete_barrier(barrier);
  }
  rest({"__syncthreads", nullptr, 0, where});
  return current->any_at_barrier;
}

void named_barrier_sync(int id, int threads, Location where) {
  Barrier& barrier = named_barrier(id, threads, where);
  barrier.waiting.push_back(current);
  if (arrive_at_barrier(barrier, threads, "named barrier", where)) complete_barrier(barrier);
  rest({"named barrier", nullptr, id, where});
}

void named_barrier_arrive(int id, int threads, Location where) {
  Barrier& barrier = named_barrier(id, threads, where);
  if (arrive_at_barrier(barrier, threads, "named barrier", where)) complete_barrier(barrier);
}

// The barrier of a cluster --------------------------------------------------------------------------------------------

namespace {

void complete_cluster(Cluster& cluster) {
  if (!cluster.arrived || cluster.arrived != cluster.live) return;
  ++cluster.phase;
  cluster.arrived = 0;
  for (Thread* thread : cluster.waiting) make_ready(*thread);
  cluster.waiting.clear();
  progressed();
}

}  // namespace

void cluster_arrive(bool release, Location where) {
  Cluster& cluster = *current->block->cluster;
  if (current->arrived_at_cluster) fail("a thread arrives twice at the cluster's barrier without waiting", where);
  current->arrived_at_cluster = true;
  current->cluster_phase = cluster.phase;
  if (release) {
    land_remote_stores(cluster, current);
    cluster.view.join(released_view(*current));
  }
  ++cluster.arrived;
  complete_cluster(cluster);
}

void cluster_wait(bool acquire, Location where) {
  Cluster& cluster = *current->block->cluster;
  if (!current->arrived_at_cluster) fail("a thread waits at the cluster's barrier without having arrived", where);
  if (current->cluster_phase == cluster.phase) {
    cluster.waiting.push_back(current);
    rest({"the cluster's barrier", nullptr, 0, where});
  }
  current->arrived_at_cluster = false;
  if (acquire) current->view.join(cluster.view);
}

// Launches that overlap -----------------------------------------------------------------------------------------------

void wait_for_previous_launch(Location where) {
  const size_t launch = current->block->cluster->launch;
  if (launch == 0) return;
  Launch& previous = running->launches[launch - 1];
  if (!previous.ended()) {
    previous.waiting.push_back(current);
    rest({"the end of the launch before it", nullptr, 0, where});
  }
  current->view.join(all_stores());
}

void let_next_launch_start() {
  Block& block = *current->block;
  if (std::exchange(block.lets_next_start, true)) return;
  if (--running->launches[block.cluster->launch].blocks_before_next == 0) running->host_acts = true;
}

// Warp collectives ----------------------------------------------------------------------------------------------------

namespace {

void complete_collectives(Block& block, Warp& warp) {
  const size_t first = static_cast<size_t>(&warp - block.warps.data()) * kWarpSize;
  for (size_t n = 0; n < warp.pending.size(); ++n) {
    if (warp.pending[n].arrived != (warp.pending[n].mask & warp.live) || !warp.pending[n].arrived) continue;
    const Collective ready = warp.pending[n];
    warp.pending.erase(warp.pending.begin() + static_cast<long>(n--));
    Thread* lanes[kWarpSize] = {};
    for (int lane = 0; lane < kWarpSize; ++lane) {
      if (ready.arrived >> lane & 1) lanes[lane] = &block.threads[first + static_cast<size_t>(lane)];
    }
    ready.run(lanes, ready.arrived, ready.operands);
    for (Thread* thread : lanes) {
      if (thread && thread != current) make_ready(*thread);
    }
    progressed();
  }
}

}  // namespace

void collective(const char* name, unsigned mask, Collective::Run run, void* operand, Location where) {
  Block& block = *current->block;
  Warp& warp = block.warps[current->rank / kWarpSize];
  const unsigned self = 1u << current->lane();
  if (!(mask & self)) fail(std::string(name) + ": the mask leaves out the lane that calls it", where);
  Collective* joined = nullptr;
  for (Collective& pending : warp.pending) {
    if (!(pending.mask & mask)) continue;
    if (pending.mask != mask || pending.run != run) {
      fail(std::string(name) + ": lanes of its mask are in " + pending.name + ", or have another mask", where);
    }
    joined = &pending;
  }
  if (!joined) joined = &warp.pending.emplace_back(Collective{name, mask, 0, run, {}});
  joined->arrived |= self;
  joined->operands[current->lane()] = operand;
  if (joined->arrived == (mask & warp.live)) {
    complete_collectives(block, warp);
  } else {
    rest({name, nullptr, 0, where});
  }
}

// Text ----------------------------------------------------------------------------------------------------------------

Block* block_with_shared(const Cluster& cluster, const void* address) {
  const char* at = static_cast<const char*>(address);
  for (const auto& block : cluster.blocks) {
    if (block && block->shared && at >= block->shared && at < block->shared + block->grid->shared_size) {
      return block.get();
    }
  }
  return nullptr;
}

std::string text_of(const Index& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string text_of(Location where) {
  const char* name = strrchr(where.file_name(), '/');
  return std::string(name ? name + 1 : where.file_name()) + ":" + std::to_string(where.line());
}

std::string text_of(const void* address) {
  for (const auto& cluster : running->resident) {
    if (const Block* block = block_with_shared(*cluster, address)) {
      const int64_t offset = static_cast<const char*>(address) - block->shared;
      return "shared memory of block " + text_of(block->index) + " + " + std::to_string(offset);
    }
  }
  char text[32];
  snprintf(text, sizeof text, "global memory %p", address);
  return text;
}

}  // namespace cuda_on_cpu
