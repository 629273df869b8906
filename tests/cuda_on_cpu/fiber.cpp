#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <new>
#include <vector>

#ifdef CUDA_ON_CPU_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef CUDA_ON_CPU_UCONTEXT
// The System V ABI asks a function to keep rbx, rbp, r12 to r15: the rest the compiler has saved around the call.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.hidden cuda_on_cpu_switch
.globl cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");
#endif

namespace cuda_on_cpu {
namespace {

constexpr size_t kPage = 4096, kStackSize = 16 * kPage;

// Kept for the life of the process.
std::vector<char*> free_stacks;

// A stack grows down into a page that may not be touched.
char* new_stack() {
  if (!free_stacks.empty()) {
    char* stack = free_stacks.back();
    free_stacks.pop_back();
    return stack;
  }
  void* memory = mmap(nullptr, kPage + kStackSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<char*>(memory) + kPage;
}

// Stacks begin at different cache lines: at equal offsets in their pages they would evict each other.
size_t colour(const char* stack) { return reinterpret_cast<uintptr_t>(stack) / (kPage + kStackSize) % 61 * 64; }

}  // namespace

Fiber new_fiber(void (*entry)()) {
  Fiber fiber;
  fiber.stack = new_stack();
  fiber.stack_size = kStackSize;
#ifdef CUDA_ON_CPU_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_size - colour(fiber.stack);
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  // What cuda_on_cpu_switch pops: six registers and the return address, which leaves the stack as a call would.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackSize - colour(fiber.stack));
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  fiber.stack_pointer = top - 6;
#endif
  return fiber;
}

void recycle(Fiber& fiber, bool unwound) {
#ifdef CUDA_ON_CPU_ASAN
  if (!unwound) __asan_unpoison_memory_region(fiber.stack, fiber.stack_size);
#else
  (void)unwound;
#endif
  free_stacks.push_back(fiber.stack);
  fiber.stack = nullptr;
}

void switch_fibers(Fiber& from, Fiber& to, bool last) {
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.stack_size);
#else
  (void)last;
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
#endif
#ifdef CUDA_ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrive(Fiber& from) {
#ifdef CUDA_ON_CPU_ASAN
  const void* bottom = nullptr;
  size_t size = 0;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (!from.stack_size) {  // the host's stack, whose bounds nobody else tells
    from.stack = static_cast<char*>(const_cast<void*>(bottom));
    from.stack_size = size;
  }
#else
  (void)from;
#endif
}

}  // namespace cuda_on_cpu
