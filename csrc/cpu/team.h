// The threads of one kernel call, and the pool they come from.
#pragma once

#include <atomic>

namespace lstm_ext::cpu {

// `size` members wait for each other; reusable. Spins a little, then yields, then sleeps.
class Barrier {
 public:
  void wait(int size);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<int> phase_{0};
};

struct Team {
  int rank, size;
  Barrier* barrier;

  void sync() const {
    if (size > 1) barrier->wait(size);
  }
};

// Runs body(context, rank, size) on `size` of the `threads` threads that the caller may use, the calling
// thread being rank 0, and returns when all are done. The body may be told of a smaller size: of 1 when
// another call has the pool, when the system gives no more threads, where that many are no use (64, or the usable
// processors if they are more), or for a while after calls in which the
// members waited so long for one that did not run, its core being taken by others, that one alone would have been
// faster. Where `even` is false members have unequal work, and it is not judged how long they wait for each other.
void run_team(int threads, int size, void (*body)(void* context, int rank, int size), void* context, bool even = true);

// From now on teams are made of the OpenMP threads that the loaded library of this name uses, if it uses
// any: two pools would take the processors from each other, since OpenMP's threads spin when they wait.
// Returns whether it does.
bool share_openmp_threads(const char* library);

// The number of threads to use where the caller names none: OMP_NUM_THREADS, and the usable processors at the most.
int default_threads();

}  // namespace lstm_ext::cpu
