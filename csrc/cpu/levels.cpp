#include "levels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lstm_ext::cpu {

// simd_levels.inc is written by CMake: LSTM_EXT_LEVEL(name) for each level, narrowest first.
#define LSTM_EXT_LEVEL(name)     \
  namespace name {               \
  extern const Kernels kKernels; \
  }
#include "simd_levels.inc"
#undef LSTM_EXT_LEVEL

namespace {

#define LSTM_EXT_LEVEL(name) &name::kKernels,
constexpr const Kernels* kBuilt[] = {
#include "simd_levels.inc"
    nullptr};
#undef LSTM_EXT_LEVEL

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

#if defined(__x86_64__)
// Not all compilers know it by name. Its registers are those of AVX, which a system that has AVX2 saves.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;
}
#endif

// Of the features named, those of this machine. It is asked for tiles only if it has all the others: asking changes
// what the process may use.
unsigned features_of(unsigned needs) {
  unsigned found = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2")) found |= kAvx2;
  if (__builtin_cpu_supports("fma")) found |= kFma;
  if (has_f16c()) found |= kF16c;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    found |= kAvx512;
  }
  if (__builtin_cpu_supports("avx512bf16")) found |= kAvx512Bf16;
  if (__builtin_cpu_supports("avx512vnni")) found |= kAvx512Vnni;
#endif
  if (needs & kTiles && (needs & ~found) == kTiles && tiles_usable()) found |= kTiles;
  return found & needs;
}

struct Available {
  const Kernels* levels[sizeof(kBuilt) / sizeof(kBuilt[0])] = {};
  int count = 0;

  Available() {
    for (auto level = kBuilt; *level; ++level) {
      if (features_of((*level)->needs) == (*level)->needs) levels[count++] = *level;
    }
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
  const Kernels* widest = all.levels[0];  // that this machine runs, so far
  std::string names;
  for (auto level = kBuilt; *level; ++level) {
    if (features_of((*level)->needs) == (*level)->needs) widest = *level;
    if (std::string(wanted) == (*level)->name) return *widest;
    names += (names.empty() ? "" : ", ") + std::string((*level)->name);
  }
  std::string shown(wanted);
  for (char& letter : shown) letter = letter >= ' ' && letter <= '~' ? letter : '?';  // a message has to be UTF-8
  throw std::invalid_argument("LSTM_EXT_SIMD: expected one of " + names + ", got '" + shown + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& picked = pick();
  return picked;
}

const Kernels* const* built_kernels() { return kBuilt; }
const Kernels* const* available_kernels() { return available().levels; }

}  // namespace lstm_ext::cpu
