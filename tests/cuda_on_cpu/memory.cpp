#include "memory.h"

#include <bit>
#include <unordered_map>

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace cuda_on_cpu {
namespace {

constexpr uint64_t kKeptVersions = 4;
constexpr size_t kYieldOneIn = 8;  // loads and stores

// How one of the last stores to a place found it, and who made it.
struct Store {
  uint64_t before;
  const Thread* thread;  // who stored
  int slot;
  uint32_t count;
  std::shared_ptr<const View> published;  // null: releases nothing
};

// 8 aligned bytes of memory that was stored to by a function of this file. Their newest value is in memory itself.
struct Place {
  uint64_t version = 0;  // how many stores there were
  Store stores[kKeptVersions];
  uint64_t oldest_for[kMostResidentBlocks] = {};  // by slot: the newest version that a load of the block has returned

  Store& store(uint64_t version) { return stores[version % kKeptVersions]; }
};

std::unordered_map<uintptr_t, Place> places;  // by address / 8
std::unordered_map<const void*, View> mbarrier_views;
uint32_t store_counts[kMostResidentBlocks] = {};

const void* granule(const void* address) {
  return reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(address) & ~uintptr_t{7});
}

int shift_of(const void* address) { return static_cast<int>(reinterpret_cast<uintptr_t>(address) % 8 * 8); }

uint64_t low_bits(uint64_t bits, int size) { return size == 8 ? bits : bits & ((uint64_t{1} << (8 * size)) - 1); }

// A whole granule, of which some bytes may lie outside the array that the kernel may access: it does not get those.
uint64_t read_granule(const void* address) { return *static_cast<const volatile uint64_t*>(granule(address)); }

bool must_see(const Place& place, const Store& store, uint64_t version) {
  return store.thread == current || current->view.seen[store.slot] >= store.count ||
         version <= place.oldest_for[current->block->slot];
}

// The version that a load returns: the newest, or an older one that nothing forbids.
uint64_t choose_version(Place& place) {
  uint64_t version = place.version;
  while (version > 0 && place.version - version + 1 < kKeptVersions &&
         !must_see(place, place.store(version), version) && chance.one_in(2)) {
    --version;
  }
  return version;
}

uint32_t count_store() { return current->last_store = ++store_counts[current->block->slot]; }

void acquire(const View& published, bool at_once) { (at_once ? current->view : current->unacquired).join(published); }

}  // namespace

void check_access(const void* address, int size, int alignment, Location where) {
  const char* fault = reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) ? "misaligned" : nullptr;
#ifdef CUDA_ON_CPU_ASAN
  if (__asan_region_is_poisoned(const_cast<void*>(address), static_cast<size_t>(size))) fault = "out-of-bounds";
#endif
  if (fault) fail(std::string(fault) + " access of " + std::to_string(size) + " bytes to " + text_of(address), where);
}

// Global memory -------------------------------------------------------------------------------------------------------

uint64_t load_bits(const void* address, int size, Order order, Location where) {
  check_access(address, size, size, where);
  count_load(where);
  if (chance.one_in(kYieldOneIn)) yield();
  uint64_t value, version;
  for (bool again = false;; again = true) {
    const auto found = places.find(reinterpret_cast<uintptr_t>(address) / 8);
    Place none, &place = found == places.end() ? none : found->second;
    version = choose_version(place);
    const bool newest = version == place.version;
    value = newest ? read_granule(address) : place.store(version + 1).before;
    // The same newest value twice in a row: the thread polls. It rests until something is stored there.
    const bool polls = newest && current->polled == address && current->polled_version == version;
    if (!polls || again) {
      current->polled = newest ? address : nullptr;
      current->polled_version = version;
      if (version) {
        place.oldest_for[current->block->slot] = version;
        const Store& store = place.store(version);
        if (store.published) acquire(*store.published, order == Order::kAcquire);
      }
      break;
    }
    wait_at(granule(address), {"a new value", address, 0, where});
  }
  return low_bits(value >> shift_of(address), size);
}

namespace {

// The thread stores at the address, once `before` was its granule; the raw memory is the caller's to change.
Store& add_version(void* address, uint64_t before, bool releases) {
  current->polled = nullptr;
  Place& place = places[reinterpret_cast<uintptr_t>(address) / 8];
  Store& store = place.store(++place.version);
  store = {before, current, current->block->slot, count_store(), nullptr};
  if (releases) {
    land_remote_stores(*current->block->cluster, current);
    store.published = std::make_shared<const View>(released_view(*current));
  } else if (current->has_fence) {
    store.published = std::make_shared<const View>(current->fenced);
  }
  return store;
}

}  // namespace

void store_bits(void* address, uint64_t bits, int size, Order order, Location where) {
  check_access(address, size, size, where);
  add_version(address, read_granule(address), order == Order::kRelease);
  memcpy(address, &bits, static_cast<size_t>(size));
  wake_waiters_at(granule(address));
  if (chance.one_in(kYieldOneIn)) yield();
}

uint64_t add_bits(void* address, uint64_t addend, int size, Order order, Location where) {
  check_access(address, size, size, where);
  const uint64_t before = read_granule(address), value = low_bits(before >> shift_of(address), size);
  const auto found = places.find(reinterpret_cast<uintptr_t>(address) / 8);
  std::shared_ptr<const View> head;  // the release sequence goes on
  if (found != places.end() && found->second.version) head = found->second.store(found->second.version).published;
  if (head) acquire(*head, order == Order::kAcquire || order == Order::kAcquireRelease);
  Store& store = add_version(address, before, order == Order::kRelease || order == Order::kAcquireRelease);
  if (head) {
    View both = *head;
    if (store.published) both.join(*store.published);
    store.published = std::make_shared<const View>(both);
  }
  const uint64_t sum = value + addend;
  memcpy(address, &sum, static_cast<size_t>(size));
  wake_waiters_at(granule(address));
  if (chance.one_in(kYieldOneIn)) yield();
  return value;
}

void fence(Location) {
  land_remote_stores(*current->block->cluster, current);
  current->view.join(current->unacquired);
  current->unacquired = {};
  current->fenced = released_view(*current);
  current->has_fence = true;
}

// cp.async ------------------------------------------------------------------------------------------------------------

namespace {

// `size` bytes of one number, at an address that is a multiple of it.
void land_number(char* to, const char* from, int size, Location where) {
  const uint64_t bits = load_bits(from, size, Order::kRelaxed, where);
  memcpy(to, &bits, static_cast<size_t>(size));
}

void land(const AsyncCopy& copy, Location where) {
  char* to = static_cast<char*>(copy.to);
  const char* from = static_cast<const char*>(copy.from);
  int at = 0;
  for (; at + 8 <= copy.size; at += 8) land_number(to + at, from + at, 8, where);
  for (; at + 2 <= copy.size; at += 2) land_number(to + at, from + at, 2, where);
  for (; at < copy.size; ++at) land_number(to + at, from + at, 1, where);
  memset(to + copy.size, 0, static_cast<size_t>(copy.filled - copy.size));
}

}  // namespace

void copy_async(void* to, const void* from, int size, int filled, Location where) {
  if (size < 0 || size > filled)
    fail("cp.async: " + std::to_string(size) + " bytes of " + std::to_string(filled), where);
  check_access(to, filled, filled, where);
  check_access(from, size, filled, where);
  const AsyncCopy copy{to, from, size, filled, current->copy_group};
  if (chance.one_in(2)) {
    land(copy, where);
  } else {
    current->copies.push_back(copy);
  }
}

void commit_copies() { ++current->copy_group; }

void wait_copies(int groups_left, Location where) {
  const auto due = [last = current->copy_group - groups_left](const AsyncCopy& copy) { return copy.group < last; };
  for (const AsyncCopy& copy : std::vector(current->copies)) {
    if (due(copy)) land(copy, where);
  }
  std::erase_if(current->copies, due);
}

// Distributed shared memory ---------------------------------------------------------------------------------------

void* map_rank(const void* local, int rank, Location where) {
  Cluster& cluster = *current->block->cluster;
  if (block_with_shared(cluster, local) != current->block) {
    fail("expected an address in the block's own shared memory, got " + text_of(local), where);
  }
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) {
    fail("the cluster has no block of rank " + std::to_string(rank), where);
  }
  if (!cluster.blocks[static_cast<size_t>(rank)]) {
    fail("use of the shared memory of a block that has ended, rank " + std::to_string(rank), where);
  }
  return cluster.blocks[static_cast<size_t>(rank)]->shared + (static_cast<const char*>(local) - current->block->shared);
}

namespace {

constexpr int kOffsetBits = 24;

}  // namespace

uint32_t address_of_rank(const void* local, int rank, Location where) {
  (void)map_rank(local, rank, where);
  const auto offset = static_cast<const char*>(local) - current->block->shared;
  return static_cast<uint32_t>(rank) << kOffsetBits | static_cast<uint32_t>(offset);
}

void* at_address(uint32_t address, Location where) {
  return map_rank(current->block->shared + (address & ((1u << kOffsetBits) - 1)),
                  static_cast<int>(address >> kOffsetBits), where);
}

void store_remote(void* to, uint64_t bits, int size, uint64_t* transaction, Location where) {
  check_access(to, size, size, where);
  current->polled = nullptr;
  Block& block = *current->block;
  block.cluster->remote_stores.push_back({to, bits, size, current, block.slot, count_store(), transaction});
  if (chance.one_in(kYieldOneIn)) yield();
}

namespace {

void land(Cluster& cluster, const RemoteStore& store) {
  if (!block_with_shared(cluster, store.to))
    return report("a store reaches the shared memory of a block that has ended");
  memcpy(store.to, &store.bits, static_cast<size_t>(store.size));
  if (store.transaction) mbarrier_count_bytes(store.transaction, store.size);
  progressed();
}

bool overlap(const RemoteStore& a, const RemoteStore& b) {
  const char *to_a = static_cast<const char*>(a.to), *to_b = static_cast<const char*>(b.to);
  return to_a < to_b + b.size && to_b < to_a + a.size;
}

}  // namespace

void land_some_remote_stores(Cluster& cluster) {
  std::vector<RemoteStore>& stores = cluster.remote_stores;
  if (!chance.one_in(16)) return;
  const RemoteStore any = stores[chance.below(stores.size())];
  if (!any.to) return;
  const auto first = std::find_if(stores.begin(), stores.end(),
                                  [&](const RemoteStore& store) { return store.to && overlap(store, any); });
  const RemoteStore store = *first;
  first->to = nullptr;
  land(cluster, store);
}

// What has landed stays in the list, with a null address, until most of the list has: releases are many.
bool land_remote_stores(Cluster& cluster, const Thread* releasing) {
  std::vector<RemoteStore>& stores = cluster.remote_stores;
  bool any = false;
  size_t landed = 0;
  for (RemoteStore& store : stores) {
    // st.async obeys its mbarrier alone.
    const bool covered = releasing && !store.transaction &&
                         (store.thread == releasing || store.count <= releasing->view.seen[store.slot]);
    if (store.to && (covered || !releasing)) {
      const RemoteStore due = store;
      store.to = nullptr;
      land(cluster, due);
      any = true;
    }
    landed += !store.to;
  }
  if (2 * landed >= stores.size()) std::erase_if(stores, [](const RemoteStore& store) { return !store.to; });
  return any;
}

// mbarriers -------------------------------------------------------------------------------------------------------

namespace {

constexpr uint64_t kInitialised = 0x5ca;

// What the 8 bytes hold.
struct MBarrier {
  uint64_t mark : 12, phase : 1, count : 14, pending : 14;
  int64_t bytes : 23;  // expected and not yet come
};
static_assert(sizeof(MBarrier) == 8);

MBarrier read_mbarrier(const uint64_t* barrier, Location where) {
  check_access(barrier, 8, 8, where);
  const auto state = std::bit_cast<MBarrier>(*barrier);
  if (state.mark != kInitialised) fail("no mbarrier was initialised at " + text_of(barrier), where);
  return state;
}

void write_mbarrier(uint64_t* barrier, MBarrier state) {
  const bool complete = state.pending == 0 && state.bytes == 0;
  if (complete) {
    state.phase ^= 1;
    state.pending = state.count;
  }
  *barrier = std::bit_cast<uint64_t>(state);
  progressed();
  if (complete) wake_waiters_at(barrier);
}

}  // namespace

void mbarrier_init(uint64_t* barrier, int count, Location where) {
  check_access(barrier, 8, 8, where);
  MBarrier state{};
  state.mark = kInitialised;
  state.count = state.pending = static_cast<uint64_t>(count) & 0x3fff;
  *barrier = std::bit_cast<uint64_t>(state);
  mbarrier_views[barrier] = {};
}

void mbarrier_arrive(uint64_t* barrier, int expected_bytes, bool release, Location where) {
  MBarrier state = read_mbarrier(barrier, where);
  if (release) {
    land_remote_stores(*current->block->cluster, current);
    mbarrier_views[barrier].join(released_view(*current));
  }
  --state.pending;
  state.bytes += expected_bytes;
  write_mbarrier(barrier, state);
  if (chance.one_in(kYieldOneIn)) yield();
}

void mbarrier_count_bytes(uint64_t* barrier, int bytes) {
  auto state = std::bit_cast<MBarrier>(*barrier);
  state.bytes -= bytes;
  write_mbarrier(barrier, state);
}

bool mbarrier_try_wait(uint64_t* barrier, int parity, bool acquire, Location where) {
  if (chance.one_in(kYieldOneIn)) yield();
  const auto has_ended = [&] { return read_mbarrier(barrier, where).phase != static_cast<unsigned>(parity); };
  if (!has_ended()) wait_at(barrier, {"the end of a phase of the mbarrier", barrier, 0, where});
  if (!has_ended()) return false;
  if (acquire) current->view.join(mbarrier_views[barrier]);
  return true;
}

View all_stores() {
  View view;
  std::copy_n(store_counts, kMostResidentBlocks, view.seen);
  return view;
}

void forget_versions() {
  places.clear();
  mbarrier_views.clear();
}

}  // namespace cuda_on_cpu
