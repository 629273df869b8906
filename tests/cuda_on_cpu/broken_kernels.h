// Kernels with one fault each, to see that the harness catches it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace cuda_on_cpu {

std::vector<std::string> broken_kernels();

// Whether the kernel's result is right; throws what the harness finds. Without `broken` the fault is not there.
bool run_broken_kernel(const std::string& name, bool broken, uint64_t seed);

}  // namespace cuda_on_cpu
