// What the CUDA runtime does: streams, launches with their checks, the occupancy of the device.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "device.h"

namespace cuda_on_cpu {

struct Device {
  int compute_capability;
  int sms;
  int64_t shared_per_block;
  int clock_khz;
};

// A small Hopper, a smaller one, a Turing, the first as a virtual GPU that does not tell its clock, one with little
// shared memory, and one with more multiprocessors than a warp has lanes. All others are the first again: for tests
// that leave something behind, as what is found out about a kernel is kept for its device.
inline constexpr std::array<Device, 512> devices = [] {
  std::array<Device, 512> all;
  all.fill({90, 8, 227 * 1024, 1'700'000});
  all[1] = {90, 3, 227 * 1024, 1'700'000};
  all[2] = {75, 4, 64 * 1024, 1'500'000};
  all[3] = {90, 8, 227 * 1024, 0};
  all[4] = {75, 4, 28 * 1024, 1'500'000};
  all[5] = {90, 36, 227 * 1024, 1'700'000};
  return all;
}();

extern thread_local int current_device;  // its number; each thread of the host has its own, as in CUDA
inline const Device& device() { return devices[static_cast<size_t>(current_device)]; }

// A kernel that was compiled, by the address of its function: its name, the body of its threads with given params, and
// what makes wrong what it has written.
struct KnownKernel {
  using With = std::function<std::function<void()>(const void* params)>;
  std::string name;
  With with, spoil;
};
void add_kernel(const void* function, KnownKernel kernel);
KnownKernel known_kernel(const void* function);

// Work of one stream runs in its order, that of several in any. Nothing runs before synchronize.
void enqueue(void* stream, std::function<void()> work);

// Throws std::runtime_error for a launch that CUDA refuses. One that overlaps may start before the launch ahead of it
// in the stream has ended.
void launch(Grid grid, bool cooperative, bool overlaps, void* stream);

// Runs all that was enqueued, by whichever thread. The seed, which errors name, decides all schedules. What comes after
// an error is dropped.
void synchronize(uint64_t seed);

// From now on what kernels write whose names have one of these parts is wrong. They write at least 8 bytes.
void spoil_kernels(std::vector<std::string> parts);

// The devices on which there is a context.
std::set<int> contexts();

// How often the code under test has asked for an occupancy.
int occupancy_queries();

int blocks_per_sm(int threads, int64_t shared_bytes);

}  // namespace cuda_on_cpu
