// Python's lock, given away while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace lstm_ext::ops {

// Lets other Python threads go on until its end. pybind11's own guard ends the process where the interpreter has ended
// meanwhile: Python before 3.14 then ends the thread by unwinding its stack, which no destructor lets pass, and which
// would give up Python objects without the lock. As in 3.14 the thread sleeps instead, until the process is gone.
class GilRelease {
 public:
  explicit GilRelease(bool wanted = true) : state_(wanted ? PyEval_SaveThread() : nullptr) {}
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;
  ~GilRelease() {
    if (!state_) return;
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      for (;;) pause();
    }
  }

 private:
  PyThreadState* const state_;
};

}  // namespace lstm_ext::ops
