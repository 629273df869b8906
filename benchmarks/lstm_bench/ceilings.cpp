// Measures what this machine can do at most, all threads at once, and prints it as JSON:
//
//     ceilings THREADS BYTES...
//
// fma_gflops   multiply-adds of the widest vectors in registers, by dtype, and of bfloat16 in tile registers ("tiles",
//              of numbers at random: those draw more power than zeros, and slow a core down); all threads together
// read_gbs     reads of a buffer of BYTES that each thread has for itself, one figure for each BYTES; per thread
// barrier_us   a barrier of all threads, from one to the next
//
// Compiled for this machine when the benchmark runs; the best of several repetitions counts.

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Enough independent chains for latency times throughput of every known core, as far as the registers hold them.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif

constexpr double kSeconds = 0.02;
constexpr int kRepetitions = 7;

template <class T>
struct Vector {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};

double now(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

volatile double seed = 1.0;         // unknown to the compiler, so that nothing is computed ahead
thread_local volatile double sink;  // what is stored here cannot be left out

// Spelled out for the compiler: it turns a loop inside out, and chains in registers into chains in memory.
template <class Body, size_t... n>
inline void unroll(Body body, std::index_sequence<n...>) {
  (body(n), ...);
}

template <int count, class Body>
inline void unroll(Body body) {
  unroll(body, std::make_index_sequence<count>());
}

// A burst is called again and again; work() is what one call does, in flops or bytes.
// The chains start at different values; equal ones would be merged into one.
template <class T>
struct FmaBurst {
  static constexpr int kSteps = 4096, kLanes = kVectorBytes / sizeof(T);
  static double work() { return 2.0 * kSteps * kChains * kLanes; }

  void operator()() const {
    typename Vector<T>::type chains[kChains], total{};
    unroll<kChains>([&](size_t n) { chains[n] = total + T((n + 1) * seed); });
    const auto scale = total + T(0.999 * seed), shift = total + T(0.001 * seed);
    for (int step = 0; step < kSteps; ++step) unroll<kChains>([&](size_t n) { chains[n] = chains[n] * scale + shift; });
    unroll<kChains>([&](size_t n) { total += chains[n]; });
    unroll<kLanes>([&](size_t lane) { sink = total[lane]; });
  }
};

#if defined(__AVX512BF16__)
struct Bf16Burst {
  static constexpr int kSteps = 4096, kProducts = 32;
  static double work() { return 2.0 * kSteps * kChains * kProducts; }

  void operator()() const {
    __m512 chains[kChains], total = _mm512_setzero_ps();
    unroll<kChains>([&](size_t n) { chains[n] = _mm512_set1_ps(float((n + 1) * seed)); });
    const __m512bh a = _mm512_cvtne2ps_pbh(chains[0], chains[1]), b = _mm512_cvtne2ps_pbh(chains[2], chains[3]);
    for (int step = 0; step < kSteps; ++step)
      unroll<kChains>([&](size_t n) { chains[n] = _mm512_dpbf16_ps(chains[n], a, b); });
    unroll<kChains>([&](size_t n) { total = _mm512_add_ps(total, chains[n]); });
    sink = total[0];
  }
};
#endif

#if defined(__AMX_BF16__)
#define HAVE_TILES
// Linux lends the tile registers only to a process that asks for them.
bool tiles_usable() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

class TileBurst {
 public:
  TileBurst() {
    struct alignas(64) {
      unsigned char palette = 1, start = 0, reserved[14] = {};
      unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    unsigned state = 1;
    for (unsigned short& factor : factors_) {  // from -2 to 2
      state = state * 1664525u + 1013904223u;
      factor = static_cast<unsigned short>((state >> 16 & 0x807f) | (0x3f00 + (state >> 9 & 0x80)));
    }
  }

  static double work() { return 4.0 * kSteps * 2 * 16 * 16 * 32; }

  void operator()() const {
    for (int step = 0; step < kSteps; ++step) {
      _tile_loadd(4, factors_, 64);
      _tile_loadd(5, factors_ + 512, 64);
      _tile_loadd(6, factors_ + 1024, 64);
      _tile_loadd(7, factors_ + 1536, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

 private:
  static constexpr int kSteps = 4096;
  alignas(64) unsigned short factors_[2048];
};
#endif

class ReadBurst {
 public:
  explicit ReadBurst(size_t bytes)
      : data_(bytes / sizeof(Lanes), Lanes{} + 1), passes_(std::max<size_t>(1, kEnoughBytes / bytes)) {}

  double work() const { return double(passes_ * data_.size() * sizeof(Lanes)); }

  void operator()() const {
    for (size_t pass = 0; pass < passes_; ++pass) {
      Lanes sums[kSums] = {}, total{};
      for (size_t n = 0; n + kSums <= data_.size(); n += kSums)
        unroll<kSums>([&](size_t k) { sums[k] ^= data_[n + k]; });
      unroll<kSums>([&](size_t k) { total ^= sums[k]; });
      sink = double(total[0]);
    }
  }

 private:
  using Lanes = Vector<long long>::type;
  static constexpr size_t kSums = 8, kEnoughBytes = 1 << 20;

  std::vector<Lanes> data_;
  size_t passes_;
};

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    } else {
      while (round_.load(std::memory_order_acquire) == round) {
      }
    }
  }

 private:
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

cpu_set_t usable_cores() {
  cpu_set_t cores;
  sched_getaffinity(0, sizeof cores, &cores);
  return cores;
}

// Puts this thread on the n-th usable core, in turn.
void pin(int n) {
  static const cpu_set_t cores = usable_cores();
  int core = -1;
  for (n %= CPU_COUNT(&cores); n >= 0; --n) do
      ++core;
    while (!CPU_ISSET(core, &cores));
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(core, &one);
  sched_setaffinity(0, sizeof one, &one);
}

// work(n) on the n-th thread.
template <class Work>
void on_threads(int threads, Work work) {
  const auto pinned = [&](int n) {
    pin(n);
    work(n);
  };
  std::vector<std::thread> others;
  for (int n = 1; n < threads; ++n) others.emplace_back(pinned, n);
  pinned(0);
  for (std::thread& each : others) each.join();
}

// Work per second of all threads together, each with a burst of its own.
template <class MakeBurst>
double rate(int threads, MakeBurst make_burst) {
  Barrier barrier(threads);
  std::vector<std::vector<double>> rates(threads, std::vector<double>(kRepetitions));
  on_threads(threads, [&](int thread) {
    const auto burst = make_burst();
    for (double& own : rates[thread]) {
      barrier.wait();
      burst();
      const double start = now(CLOCK_THREAD_CPUTIME_ID);  // what others take of the core is no limit of the core
      double work = 0, seconds = 0;
      while (seconds < kSeconds) {
        burst();
        work += burst.work();
        seconds = now(CLOCK_THREAD_CPUTIME_ID) - start;
      }
      own = work / seconds;
    }
  });
  double best = 0;
  for (int n = 0; n < kRepetitions; ++n) {
    double total = 0;
    for (const auto& own : rates) total += own[n];
    best = std::max(best, total);
  }
  return best;
}

// The least that a few barriers in a row took: somewhere in between, nobody disturbed them.
double barrier_seconds(int threads) {
  constexpr int kRounds = 16;
  Barrier barrier(threads);
  std::atomic<bool> stop{false};
  double best = 1;
  on_threads(threads, [&](int thread) {
    const double start = now(CLOCK_MONOTONIC);
    for (double last = start; !stop;) {
      for (int n = 0; n < kRounds; ++n) barrier.wait();
      if (thread == 0) {
        const double time = now(CLOCK_MONOTONIC);
        best = std::min(best, (time - last) / kRounds);
        stop = time > start + kSeconds * kRepetitions;
        last = now(CLOCK_MONOTONIC);
      }
      barrier.wait();  // so that all read the same `stop`
    }
  });
  return best;
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = std::atoi(argv[1]);
  std::printf("{\"fma_gflops\": {\"float32\": %.1f, ", 1e-9 * rate(threads, [] { return FmaBurst<float>(); }));
#if defined(__AVX512BF16__)
  std::printf("\"bfloat16\": %.1f, ", 1e-9 * rate(threads, [] { return Bf16Burst(); }));
#endif
#if defined(HAVE_TILES)
  if (tiles_usable()) std::printf("\"tiles\": %.1f, ", 1e-9 * rate(threads, [] { return TileBurst(); }));
#endif
  std::printf("\"float64\": %.1f}, \"read_gbs\": [", 1e-9 * rate(threads, [] { return FmaBurst<double>(); }));
  for (int n = 2; n < argc; ++n) {
    const size_t bytes = std::strtoull(argv[n], nullptr, 10);
    const double all = rate(threads, [bytes] { return ReadBurst(bytes); });
    std::printf("%s%.1f", n == 2 ? "" : ", ", 1e-9 * all / threads);
  }
  std::printf("], \"barrier_us\": %.3f}\n", threads == 1 ? 0.0 : 1e6 * barrier_seconds(threads));
}
