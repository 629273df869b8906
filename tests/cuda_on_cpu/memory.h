// Memory between threads of different blocks, made as weak as PTX allows where an access goes through these functions.
//
// A load of global memory may return an old value as long as nothing forbids it: what the reader's own block has loaded
// there before, its own stores, or a release by the writer that the reader has acquired (itself or through barriers).
// Plain loads and stores of a kernel see and make the newest value. Old values are kept for 8 aligned bytes at a time:
// an access within them is never torn, one of 16 bytes is two.
//
// A store to the shared memory of another block lands at some later time, but before a release that covers it.
#pragma once

#include <cstdint>
#include <cstring>

#include "device.h"

namespace cuda_on_cpu {

enum class Order { kRelaxed, kAcquire, kRelease, kAcquireRelease };

// Fails unless the kernel may access these bytes, and they are aligned.
void check_access(const void* address, int size, int alignment, Location where);

// `size` is 1, 2, 4 or 8 bytes, at an address that is a multiple of it.
uint64_t load_bits(const void* address, int size, Order order, Location where);
void store_bits(void* address, uint64_t bits, int size, Order order, Location where);
uint64_t add_bits(void* address, uint64_t addend, int size, Order order, Location where);  // returns the value before
void fence(Location where);

template <class T>
T load(const T* address, Order order, Location where) {
  constexpr size_t kPart = std::min(sizeof(T), size_t{8});
  T value;
  for (size_t at = 0; at < sizeof(T); at += kPart) {
    const uint64_t bits = load_bits(reinterpret_cast<const char*>(address) + at, kPart, order, where);
    memcpy(reinterpret_cast<char*>(&value) + at, &bits, kPart);
  }
  return value;
}

template <class T>
void store(T* address, const T& value, Order order, Location where) {
  constexpr size_t kPart = std::min(sizeof(T), size_t{8});
  for (size_t at = 0; at < sizeof(T); at += kPart) {
    uint64_t bits = 0;
    memcpy(&bits, reinterpret_cast<const char*>(&value) + at, kPart);
    store_bits(reinterpret_cast<char*>(address) + at, bits, kPart, order, where);
  }
}

// cp.async: copies `size` bytes and puts zeros up to `filled`; lands at once or as late as the wait for its group.
void copy_async(void* to, const void* from, int size, int filled, Location where);
void commit_copies();
void wait_copies(int groups_left, Location where);

// The same place in the shared memory of another block of the cluster.
void* map_rank(const void* local, int rank, Location where);

// The same as a number of 32 bits, as kernels hold addresses in the cluster; and what stands there.
uint32_t address_of_rank(const void* local, int rank, Location where);
void* at_address(uint32_t address, Location where);

template <class T>
T* map_rank(T* local, int rank, Location where) {
  return static_cast<T*>(map_rank(static_cast<const void*>(local), rank, where));
}

// `transaction` not null: st.async, of which that mbarrier hears.
void store_remote(void* to, uint64_t bits, int size, uint64_t* transaction, Location where);

// mbarriers: 8 bytes of any block's shared memory.
void mbarrier_init(uint64_t* barrier, int count, Location where);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes, bool release, Location where);
void mbarrier_count_bytes(uint64_t* barrier, int bytes);
// Whether the phase has ended; rests until something happens if not.
bool mbarrier_try_wait(uint64_t* barrier, int parity, bool acquire, Location where);

// For the scheduler -----------------------------------------------------------------------------------------------

void land_some_remote_stores(Cluster& cluster);  // now and then
// What a release by the thread covers, null: all; whether there was any.
bool land_remote_stores(Cluster& cluster, const Thread* releasing);
void forget_versions();  // between grids everything is seen
View all_stores();       // that were made up to now

}  // namespace cuda_on_cpu
