// The device: every CUDA thread is a fiber, and all of them run on the one host thread that calls run_grids. A fiber
// runs until it must wait (or chooses to yield); then a seeded random choice says who goes on.
//
// What a thread must see of the stores of others is kept as vector clocks. Each resident block has a slot, and counts
// its stores to memory that others see; a thread's View holds for each slot the count up to which it must see them.
// Barriers join views, and so do releases that an acquire reads. memory.h returns anything that a view allows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include "fiber.h"

namespace cuda_on_cpu {

using Location = std::source_location;  // of the kernel's line that waits, loads or stores

constexpr int kMostResidentBlocks = 36, kWarpSize = 32, kNamedBarriers = 16;

struct Index {
  unsigned x = 0, y = 0, z = 0;
  int64_t volume() const { return static_cast<int64_t>(x) * y * z; }
};

struct View {
  uint32_t seen[kMostResidentBlocks] = {};
  void join(const View& other) {
    for (int slot = 0; slot < kMostResidentBlocks; ++slot) seen[slot] = std::max(seen[slot], other.seen[slot]);
  }
};

struct Block;
struct Cluster;
struct Grid;

// What a thread waits for, for reports.
struct Reason {
  const char* what = nullptr;     // null: it does not wait
  const void* address = nullptr;  // may be null
  int64_t number = 0;             // of a named barrier
  Location where = {};
};

// A cp.async that has not landed.
struct AsyncCopy {
  void* to;
  const void* from;
  int size, filled;  // bytes copied; bytes written with the zeros after them
  int group;
};

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  Index index;
  int rank = 0;  // in the block
  bool done = false;
  Reason waits;

  View view;                // with its own stores only as far as a barrier has made others see them
  uint32_t last_store = 0;  // its block's count at its own last store
  View unacquired;          // what its relaxed loads have read of releases; a fence makes it seen
  View fenced;              // what its relaxed stores publish since its last fence
  bool has_fence = false;

  uint64_t events = 0;          // that had happened when it last looked at the clock
  bool any_at_barrier = false;  // what the last barrier found

  const void* polled = nullptr;  // address of its last load, and the version that came
  uint64_t polled_version = 0;

  std::vector<AsyncCopy> copies;
  int copy_group = 0;
  bool arrived_at_cluster = false;
  int cluster_phase = 0;  // in which it arrived

  int lane() const { return rank % kWarpSize; }
};

struct Barrier {
  int arrived = 0, expected = 0;
  bool any = false;  // of those that have arrived, for __syncthreads_or
  View view;
  Location where;
  std::vector<Thread*> waiting;
};

// Some lanes of a warp on their way into one collective; the last to come runs it for all.
struct Collective {
  using Run = void (*)(Thread* const lanes[kWarpSize], unsigned arrived, void* const operands[kWarpSize]);
  const char* name;
  unsigned mask, arrived;
  Run run;
  void* operands[kWarpSize];
};

struct Warp {
  unsigned live = 0;
  std::vector<Collective> pending;
};

// A store to the shared memory of a block of the cluster that has not landed.
struct RemoteStore {
  void* to;
  uint64_t bits;
  int size;
  const Thread* thread;   // who stored
  int slot;               // of its block
  uint32_t count;         // the block's count at the store
  uint64_t* transaction;  // the mbarrier that hears of it (st.async); may be null
};

struct Block {
  const Grid* grid = nullptr;
  Cluster* cluster = nullptr;
  bool lets_next_start = false;
  Index index;
  int slot = 0, rank_in_cluster = 0;
  std::vector<Thread> threads;
  int live = 0;  // threads
  std::vector<Warp> warps;
  std::vector<Thread*> ready;
  bool listed = false;  // among the blocks with ready threads
  Barrier barriers[kNamedBarriers];
  char* shared = nullptr;  // a heap block of exactly the size asked for, gone when the block has ended

  ~Block();
};

struct Cluster {
  size_t launch = 0;                           // which of the grids that run
  std::vector<std::unique_ptr<Block>> blocks;  // null: ended
  int live = 0;                                // threads
  int phase = 0, arrived = 0;
  View view;
  std::vector<Thread*> waiting;
  std::vector<RemoteStore> remote_stores;
};

struct Grid {
  std::string kernel;
  Index grid_dim, block_dim, cluster_dim;
  size_t shared_size = 0;
  int resident_clusters = 1;   // at most so many at a time
  std::function<void()> body;  // what each thread does
};

// Random choices that a seed decides.
class Chance {
 public:
  explicit Chance(uint64_t seed) : state_(seed) {}
  uint64_t bits();
  size_t below(size_t n) { return static_cast<size_t>(((bits() >> 32) * n) >> 32); }
  bool one_in(size_t n) { return below(n) == 0; }

 private:
  uint64_t state_;
};

extern Thread* current;  // the thread that runs; null: the host
extern Chance chance;    // reseeded by run_grids

// Runs grids to their end, in the schedule of the seed. Each but the first may start when all blocks of the one before
// have let it or ended. Throws std::runtime_error, which names the kernel, for a deadlock and for what CUDA leaves
// undefined. Seeds of equal remainder modulo 4 prefer blocks and threads in the same way.
void run_grids(const std::vector<Grid>& grids, uint64_t seed);

// For threads ---------------------------------------------------------------------------------------------------------

[[noreturn]] void fail(const std::string& what, Location where);
void report(const std::string& what);  // fails the launch; on behalf of no thread

View released_view(const Thread& thread);  // what its release, or its arrival at a barrier, makes others see

// Time passes only while nobody can run, and then in large steps: a kernel that gives up waiting does so before the
// device calls it a deadlock. Who looks at the clock polls in vain: it rests until something happens that it has not
// seen.
uint64_t nanoseconds(Location where);

// Whether this block's words to other blocks are lost, as those of block `mute_block` are: a partner that never sends.
bool is_mute();
extern int mute_block;       // its number along x; -1: none
extern bool device_is_lost;  // to a trap: it takes no launch any more

void yield();
void progressed();                // something happened that others may wait for
void count_load(Location where);  // fails where threads do nothing but load for ever

// Until somebody wakes those that wait at the address.
void wait_at(const void* address, const Reason& reason);
void wake_waiters_at(const void* address);

bool syncthreads(Location where, bool predicate = false);  // whether it is true of any thread
void named_barrier_sync(int id, int threads, Location where);
void named_barrier_arrive(int id, int threads, Location where);
void cluster_arrive(bool release, Location where);
void cluster_wait(bool acquire, Location where);

// Of grids that run together: until the one before has ended, whose stores are then seen; and lets the one after start.
void wait_for_previous_launch(Location where);
void let_next_launch_start();

// Every live lane of the mask must come with the same collective.
void collective(const char* name, unsigned mask, Collective::Run run, void* operand, Location where);

Block* block_with_shared(const Cluster& cluster, const void* address);  // null: none has it
std::string text_of(const Index& index);
std::string text_of(Location where);
std::string text_of(const void* address);  // "shared memory of block (1,0,0) + 16" where it is

}  // namespace cuda_on_cpu
