#include "arena.h"

#include <cstdlib>
#include <new>

namespace lstm_ext::cpu {
namespace {

constexpr size_t kAlignment = 64;

struct KeptScratch {
  unsigned char* memory = nullptr;
  size_t size = 0;

  ~KeptScratch() { std::free(memory); }
  void resize(size_t bytes) {
    std::free(memory);
    memory = static_cast<unsigned char*>(std::aligned_alloc(kAlignment, bytes));
    size = memory ? bytes : 0;
  }
};

thread_local KeptScratch kept_scratch;

}  // namespace

struct Arena::Block {
  Block* next;
};

Arena::~Arena() {
  while (blocks_) {
    Block* next = blocks_->next;
    std::free(blocks_);
    blocks_ = next;
  }
  if (used_ > kept_scratch.size && used_ <= kKeptScratchBytes) kept_scratch.resize(used_);
}

void* Arena::allocate(size_t bytes) {
  bytes = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const size_t start = used_;
  used_ += bytes;
  if (used_ <= kept_scratch.size) return kept_scratch.memory + start;
  void* memory = std::aligned_alloc(kAlignment, kAlignment + bytes);
  if (!memory) throw std::bad_alloc();
  Block* block = static_cast<Block*>(memory);
  block->next = blocks_;
  blocks_ = block;
  return static_cast<unsigned char*>(memory) + kAlignment;
}

}  // namespace lstm_ext::cpu
