#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace lstm_ext::cpu {

namespace baseline {
extern const Kernels kKernels;
}
#if defined(LSTM_EXT_HAVE_AVX2)
namespace avx2 {
extern const Kernels kKernels;
}
#endif
#if defined(LSTM_EXT_HAVE_AVX512)
namespace avx512 {
extern const Kernels kKernels;
}
#endif
#if defined(LSTM_EXT_HAVE_AVX512BF16)
namespace avx512bf16 {
extern const Kernels kKernels;
}
#endif
#if defined(LSTM_EXT_HAVE_AMX)
namespace amx {
extern const Kernels kKernels;
}
#endif

namespace {

// Linux lends the tile registers only to a process that asks for them.
[[maybe_unused]] bool tiles_usable() {
#if defined(LSTM_EXT_TILES_IN_ARRAYS)
  return true;
#elif defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;          // in edx of leaf 7
  constexpr unsigned long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, of asm/prctl.h
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && d & kAmxBf16 && d & kAmxTile &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Available {
  const Kernels* levels[6] = {};
  int count = 0;

  Available() {
    levels[count++] = &baseline::kKernels;
#if defined(LSTM_EXT_HAVE_AVX2)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) levels[count++] = &avx2::kKernels;
#endif
#if defined(LSTM_EXT_HAVE_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      levels[count++] = &avx512::kKernels;
    }
#endif
#if defined(LSTM_EXT_HAVE_AVX512BF16)
    if (count > 1 && levels[count - 1] == &avx512::kKernels && __builtin_cpu_supports("avx512bf16")) {
      levels[count++] = &avx512bf16::kKernels;
    }
#endif
#if defined(LSTM_EXT_HAVE_AMX)
    if (levels[count - 1] == &avx512bf16::kKernels && tiles_usable()) levels[count++] = &amx::kKernels;
#endif
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

const Kernels& pick() {
  const Available& all = available();
  const char* wanted = std::getenv("LSTM_EXT_SIMD");
  if (!wanted || !*wanted) return *all.levels[all.count - 1];
  std::string names;
  for (int n = 0; n < all.count; ++n) {
    if (std::string(wanted) == all.levels[n]->level) return *all.levels[n];
    names += (n ? ", " : "") + std::string(all.levels[n]->level);
  }
  throw std::runtime_error("LSTM_EXT_SIMD: expected one of " + names + " on this machine, got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

const Kernels* const* available_kernels() { return available().levels; }

}  // namespace lstm_ext::cpu
