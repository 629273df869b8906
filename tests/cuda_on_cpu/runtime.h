// What the CUDA runtime does: streams, launches with their checks, the occupancy of the device.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string>

#include "device.h"

namespace cuda_on_cpu {

struct Device {
  int compute_capability;
  int sms;
  int64_t shared_per_block;
  int clock_khz;
};

// A small Hopper, a smaller one, and a Turing.
inline constexpr std::array<Device, 3> devices = {
    {{90, 8, 227 * 1024, 1'700'000}, {90, 3, 227 * 1024, 1'700'000}, {75, 4, 64 * 1024, 1'500'000}}};

extern thread_local int current_device;  // its number; each thread of the host has its own, as in CUDA
inline const Device& device() { return devices[static_cast<size_t>(current_device)]; }

// A kernel that was compiled, by the address of its function: its name, and the body of its threads with given params.
struct KnownKernel {
  std::string name;
  std::function<std::function<void()>(const void* params)> with;
};
void add_kernel(const void* function, const char* name, std::function<std::function<void()>(const void*)> with);
KnownKernel known_kernel(const void* function);

// Work of one stream runs in its order, that of several in any. Nothing runs before synchronize.
void enqueue(void* stream, std::function<void()> work);

// Throws std::runtime_error for a launch that CUDA refuses. One that overlaps may start before the launch ahead of it
// in the stream has ended.
void launch(Grid grid, bool cooperative, bool overlaps, void* stream);

// Runs all that was enqueued, by whichever thread. The seed, which errors name, decides all schedules. What comes after
// an error is dropped.
void synchronize(uint64_t seed);

int blocks_per_sm(int threads, int64_t shared_bytes);

}  // namespace cuda_on_cpu
