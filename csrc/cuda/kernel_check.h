// What is known of each kernel on each device: whether it was held against float64 on a tiny case, and how that went.
// Plans refuse one that failed (lstm_ext/self_check.py runs the cases).
#pragma once

#include <atomic>
#include <string>

namespace lstm_ext::cuda {

enum class Verdict : int { kUnknown, kRight, kWrong };

struct KernelCheck {
  std::atomic<Verdict> verdict{Verdict::kUnknown};
  std::string why;  // of kWrong; written before the verdict is, once
};

// Of the kernel with this name. Never freed: plans keep it.
KernelCheck& kernel_check(int device, const char* kernel);

}  // namespace lstm_ext::cuda
