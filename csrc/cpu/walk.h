// The order in which a kernel walks the rows of a batch.
//
// Rows are dealt to *slots* by falling length, so that those still running at step s are slots 0 .. active(s) - 1: a
// finished sequence costs nothing. Step s of a slot is time s, or length - 1 - s when the direction is reversed; both
// directions begin at step 0.
//
//     row    length                slot   row   step 0 1 2 3
//      0       2                    0      1         x x x x
//      1       4         ->         1      2         x x x           active: 3 3 2 1
//      2       3                    2      0         x x
#pragma once

#include "../params.h"
#include "arena.h"

namespace lstm_ext::cpu {

class Walk {
 public:
  Walk(const SequenceShape& shape, const Masks& masks, Arena& arena);

  int64_t T, B;

  int64_t row(int64_t slot) const { return rows_ ? rows_[slot] : slot; }
  int64_t length(int64_t slot) const { return rows_ ? lengths_[rows_[slot]] : T; }
  int64_t active(int64_t step) const { return rows_ ? active_[step] : (step < T ? B : 0); }

  // How many of the slots first .. last - 1 are active at the steps from .. to - 1, all steps together.
  int64_t count(int64_t first, int64_t last, int64_t from, int64_t to) const {
    if (!rows_) return (last - first) * (to - from);
    int64_t sum = 0;
    for (int64_t slot = first; slot < last && length(slot) > from; ++slot) {
      sum += (length(slot) < to ? length(slot) : to) - from;
    }
    return sum;
  }

  int64_t time(int64_t step, int64_t slot, bool reverse) const { return reverse ? length(slot) - 1 - step : step; }

  // Whether the state is forgotten before this step.
  bool resets_before(int64_t step, int64_t slot, bool reverse) const {
    if (!masks_.resets || step >= length(slot)) return false;
    return masks_.resets[time(step, slot, reverse) * masks_.reset_t_stride + row(slot) * masks_.reset_b_stride] != 0;
  }

 private:
  Masks masks_;
  const int64_t* lengths_;
  int64_t* rows_ = nullptr;    // [B], null: all rows have length T
  int64_t* active_ = nullptr;  // [T + 1]
};

}  // namespace lstm_ext::cpu
