// A scheduler's view of teams: they pay only where their members run at the same time, and other processes may want the
// same cores.
#pragma once

#include <atomic>
#include <chrono>

namespace lstm_ext::cpu {

using Clock = std::chrono::steady_clock;

// Whether teams pay at the moment.
class Crowding {
 public:
  bool alone(Clock::time_point now) const {
    return now.time_since_epoch().count() < until_.load(std::memory_order_relaxed);
  }

  // A call of `size` members went on from `start` to `now`, `lost` of it waiting for members that did not run. Judged
  // each 5 ms of calls, as a single short one may have waited for a thread that slept: if one thread alone would have
  // been sooner ((total - lost) * size < total), teams pause for 10 ms, and twice as long each time that this is found
  // again soon after a pause, up to 160 ms.
  void learn(Clock::time_point start, Clock::time_point now, Clock::duration lost, int size) {
    const Clock::rep total = spent_.fetch_add((now - start).count(), std::memory_order_relaxed) + (now - start).count();
    const Clock::rep in_vain = lost_.fetch_add(lost.count(), std::memory_order_relaxed) + lost.count();
    if (total < kJudged) return;
    spent_.store(0, std::memory_order_relaxed);
    lost_.store(0, std::memory_order_relaxed);
    if ((total - in_vain) * size >= total) return;
    const Clock::rep since = start.time_since_epoch().count() - until_.load(std::memory_order_relaxed);
    Clock::rep pause = pause_.load(std::memory_order_relaxed);
    pause = since < pause ? (pause < kLongest ? 2 * pause : pause) : kShortest;
    pause_.store(pause, std::memory_order_relaxed);
    until_.store(now.time_since_epoch().count() + pause, std::memory_order_relaxed);
  }

 private:
  static constexpr Clock::rep kJudged = Clock::duration(std::chrono::milliseconds(5)).count();
  static constexpr Clock::rep kShortest = Clock::duration(std::chrono::milliseconds(10)).count();
  static constexpr Clock::rep kLongest = 16 * kShortest;
  std::atomic<Clock::rep> spent_{0}, lost_{0}, until_{0}, pause_{0};
};

}  // namespace lstm_ext::cpu
