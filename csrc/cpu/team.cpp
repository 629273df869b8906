#include "team.h"

#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>

#include "crowding.h"

namespace lstm_ext::cpu {
namespace {

// Threads that a call may have on a machine of few processors. OpenMP ends the process if it gets fewer than it wants.
constexpr int kMostThreads = 64;

constexpr int kSpins = 1000;  // some twenty microseconds, longer than the steps of a small layer

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <class Ready>
bool spin_until(const Ready& ready) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (ready()) return true;
    relax();
  }
  return ready();
}

using std::chrono::milliseconds;

// Longer than a member that is about to run needs to get there: one that sleeps may be woken on the CPU of the one that
// wakes it, for both to share.
constexpr Clock::duration kYielding = milliseconds(1);

thread_local Clock::duration slept{};  // in barriers, since the member's call began

Crowding crowding;

constexpr Clock::duration kAwake = milliseconds(5);  // after a team's call; then OpenMP's threads sleep too
std::atomic<Clock::rep> last_end{0};                 // of a team's call

// Workers sleep on a condition variable between calls. The pool is never destroyed: at exit its sleeping
// threads end with the process.
class Pool {
 public:
  void run(int threads, void (*body)(void*, int, int), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    const int size = owner ? 1 + grow(threads - 1) : 1;
    if (size == 1) return body(context, 0, 1);

    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      size_ = size;
      running_.store(size - 1, std::memory_order_relaxed);
      call_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(context, 0, size);
    const auto done = [&] { return running_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, done);
    }
  }

 private:
  // Makes sure that `wanted` workers exist, as far as the system allows; returns how many may be used.
  int grow(int wanted) {
    while (workers_ < wanted) {
      try {
        const int rank = workers_ + 1;
        std::thread([this, rank, seen = call_.load()] { work(rank, seen); }).detach();
      } catch (const std::system_error&) {
        break;
      }
      ++workers_;
    }
    return workers_ < wanted ? workers_ : wanted;
  }

  void work(int rank, unsigned seen) {
    for (;;) {
      const auto called = [&] { return call_.load(std::memory_order_acquire) != seen; };
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
      }
      // The number of a call and its size are read together: a worker outside the team of one call may be
      // so late that the next has begun. A member cannot be late, since its call waits for it.
      int size;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = call_.load(std::memory_order_relaxed);
        size = size_;
      }
      if (rank >= size) continue;
      body_(context_, rank, size);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_one();
      }
    }
  }

  std::mutex owner_;  // held by the call that uses the pool
  std::mutex mutex_;  // for sleeping
  std::condition_variable wake_, finished_;
  std::atomic<unsigned> call_{0};
  std::atomic<int> running_{0};
  int size_ = 0;
  int workers_ = 0;
  void (*body_)(void*, int, int) = nullptr;
  void* context_ = nullptr;
};

Pool* pool = nullptr;

// The entry points of an OpenMP runtime with the interface of GNU's, which LLVM's and Intel's have too.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

OpenMp openmp;

// A forked child inherits no thread, and perhaps a locked mutex: it starts with a new pool of its own.
void start_over() {
  pool = new Pool;
  openmp = {};
}

Pool& the_pool() {
  static const bool ready = [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, start_over);
    return true;
  }();
  (void)ready;
  return *pool;
}

struct Region {
  void (*body)(void*, int, int);
  void* context;
  int size;

  static void enter(void* self) {
    const Region& region = *static_cast<Region*>(self);
    const int rank = openmp.thread_num(), given = openmp.num_threads();
    const int size = given < region.size ? given : region.size;
    if (rank < size) region.body(region.context, rank, size);
  }
};

}  // namespace

void Barrier::wait(int size) {
  const int phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
    return;
  }
  const auto passed = [&] { return phase_.load(std::memory_order_acquire) != phase; };
  if (spin_until(passed)) return;
  const Clock::time_point start = Clock::now();
  while (!passed() && Clock::now() - start < kYielding) std::this_thread::yield();
  while (!passed()) phase_.wait(phase, std::memory_order_acquire);
  slept += Clock::now() - start;
}

int current_cpu() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

int usable_processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
  const unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

// Moves the calling thread away from a CPU, if it is there and may be elsewhere.
void leave_cpu(int cpu) {
#if defined(__linux__)
  cpu_set_t allowed, others;
  if (sched_getcpu() != cpu || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  others = allowed;
  CPU_CLR(static_cast<size_t>(cpu), &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
#else
  (void)cpu;
#endif
}

// What every member does around the body. Members compute in the caller's floating-point mode
// (torch.set_flush_denormal changes it for one thread), so that results do not depend on who computed them.
struct Member {
  void (*body)(void*, int, int);
  void* context;
  std::atomic<Clock::rep> all_slept{0};
  Clock::time_point first_done{};  // rank 0
  int caller_cpu = current_cpu();
  bool asleep = false;  // the others, most likely
#if defined(__x86_64__)
  unsigned mode = __builtin_ia32_stmxcsr();
#endif

  static void run(void* self, int rank, int size) {
    Member& member = *static_cast<Member*>(self);
    slept = {};
    // Linux, most of all on virtual machines, may wake a thread on the CPU of the one that calls it, idle ones or not.
    // There it would wait, to be moved some milliseconds later: it moves at once instead.
    if (rank > 0) leave_cpu(member.caller_cpu);
    if (rank == 0 && member.asleep) std::this_thread::yield();
#if defined(__x86_64__)
    const unsigned own_mode = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(member.mode);
#endif
    member.body(member.context, rank, size);
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(own_mode);
#endif
    if (slept.count()) member.all_slept.fetch_add(slept.count(), std::memory_order_relaxed);
    if (rank == 0) member.first_done = Clock::now();
  }
};

void run_team(int threads, int size, void (*body)(void*, int, int), void* context, bool even) {
  if (size <= 1) return body(context, 0, 1);
  if (threads > kMostThreads) threads = std::min(threads, std::max(kMostThreads, usable_processors()));
  size = std::min(size, threads);
  const Clock::time_point start = Clock::now();
  if (crowding.alone(start)) return body(context, 0, 1);
  Member member{body, context};
  member.asleep = start.time_since_epoch() - Clock::duration(last_end.load(std::memory_order_relaxed)) > kAwake;
  if (!openmp.parallel) {
    the_pool().run(size, Member::run, &member);
  } else {
    // All threads enter, since an OpenMP team that is made smaller ends the threads it loses.
    Region region{Member::run, &member, size};
    openmp.parallel(Region::enter, &region, static_cast<unsigned>(threads), 0);
  }
  const Clock::time_point end = Clock::now();
  last_end.store(end.time_since_epoch().count(), std::memory_order_relaxed);
  if (!even) return;
  // While one member is late all others sleep in a barrier, or the caller waits here at the end.
  const Clock::duration in_barriers(member.all_slept.load(std::memory_order_relaxed) / (size - 1));
  crowding.learn(start, end, in_barriers + (end - member.first_done), size);
}

bool share_openmp_threads(const char* library) {
  the_pool();  // from here on a fork starts over
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return false;
  OpenMp found;  // by the library or by what it depends on; the handle stays open, as the functions stay in use
  found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(handle, "GOMP_parallel"));
  found.thread_num = reinterpret_cast<decltype(found.thread_num)>(dlsym(handle, "omp_get_thread_num"));
  found.num_threads = reinterpret_cast<decltype(found.num_threads)>(dlsym(handle, "omp_get_num_threads"));
  if (!found.parallel || !found.thread_num || !found.num_threads) return false;
  openmp = found;
  return true;
}

int default_threads() {
  const int processors = usable_processors();
  if (const char* text = std::getenv("OMP_NUM_THREADS")) {
    const long value = std::strtol(text, nullptr, 10);
    if (value >= 1 && value < processors) return static_cast<int>(value);
  }
  return processors;
}

}  // namespace lstm_ext::cpu
