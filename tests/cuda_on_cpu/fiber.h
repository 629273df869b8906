// A fiber: a stack, and the place where its execution rests. Switching is a plain call, with no system call on x86-64.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || !defined(__ELF__)
#define CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

#ifdef CUDA_ON_CPU_ASAN  // from the build: the kernels are compiled with AddressSanitizer
constexpr bool kAddressSanitizer = true;
#else
constexpr bool kAddressSanitizer = false;
#endif

struct Fiber {
  char* stack = nullptr;  // lowest address; null: the stack of whoever called in
  size_t stack_size = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's, while the fiber rests
#ifdef CUDA_ON_CPU_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
};

// A fiber that calls `entry` when it is first switched to. `entry` must not return; it begins with arrive(from).
Fiber new_fiber(void (*entry)());

// Gives the stack back to the pool. `unwound` false: frames still lie on it, left by a failed launch.
void recycle(Fiber& fiber, bool unwound);

// Lets `from` rest and goes on with `to`; returns when somebody switches back. `last` true: nobody will.
void switch_fibers(Fiber& from, Fiber& to, bool last = false);

// What the entry function of a fiber must call first; `from` is the fiber that switched to it.
void arrive(Fiber& from);

}  // namespace cuda_on_cpu
