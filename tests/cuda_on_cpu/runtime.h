// What the CUDA runtime does: streams, launches with their checks, the occupancy of the device.
#pragma once

#include <array>
#include <cstdint>
#include <functional>

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

extern int current_device;  // its number
inline const Device& device() { return devices[static_cast<size_t>(current_device)]; }

// Work of one stream runs in its order, that of several in any. Nothing runs before synchronize.
void enqueue(void* stream, std::function<void()> work);

// Throws std::runtime_error, naming the kernel, for a launch that CUDA refuses.
void launch(Grid grid, bool cooperative, void* stream);

// Runs all that was enqueued. The seed, which errors name, decides all schedules. What comes after an error is dropped.
void synchronize(uint64_t seed);

int blocks_per_sm(int threads, int64_t shared_bytes);

}  // namespace cuda_on_cpu
