// Scratch memory for one call of a kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace lstm_ext::cpu {

// How much of it a thread keeps for the next call: fresh memory from the system costs more than small kernels do.
#if defined(__SANITIZE_ADDRESS__)
inline constexpr size_t kKeptScratchBytes = 0;  // each array is then a block of its own, watched at its ends
#else
inline constexpr size_t kKeptScratchBytes = size_t{64} << 20;
#endif

// Arrays of one call on this thread, which are given back together. What the thread has kept holds them one after the
// other; those that do not fit are blocks of their own, and the next call finds room for all.
class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Uninitialised and aligned to 64 bytes. Throws std::bad_alloc.
  template <class T>
  T* get(int64_t count) {
    if (count < 0 || count > PTRDIFF_MAX / static_cast<ptrdiff_t>(sizeof(T))) throw std::bad_alloc();
    return static_cast<T*>(allocate(static_cast<size_t>(count) * sizeof(T)));
  }

 private:
  struct Block;
  void* allocate(size_t bytes);

  size_t used_ = 0;          // in all
  Block* blocks_ = nullptr;  // what the kept memory could not hold
};

}  // namespace lstm_ext::cpu
