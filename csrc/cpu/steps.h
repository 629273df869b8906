// The order in which a kernel walks the rows of a batch.
//
// Rows are dealt to *slots* by falling length, so that those still running at step s are slots
// 0 .. active(s) - 1: a finished sequence costs nothing. Step s of a slot is time s, or length - 1 - s when
// the direction is reversed; both directions begin at step 0.
#pragma once

#include "../params.h"
#include "team.h"

namespace lstm_ext::cpu {

class Steps {
 public:
  Steps(const SequenceShape& shape, const Masks& masks, Arena& arena);

  int64_t T, B;

  int64_t row(int64_t slot) const { return rows_ ? rows_[slot] : slot; }
  int64_t length(int64_t slot) const { return rows_ ? lengths_[rows_[slot]] : T; }
  int64_t active(int64_t step) const { return rows_ ? active_[step] : (step < T ? B : 0); }

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

// What one member of a team does: some tiles of rows and all panels when there are rows enough for
// everybody (then members need not wait for each other), else all rows and some panels.
class Share {
 public:
  Share(const Team& team, int64_t rows, int tile_rows);

  const Team team;
  const bool by_rows;

  // f(first, count) for the tiles of mine among rows 0 .. active - 1
  template <class F>
  void for_tiles(int64_t active, const F& f) const {
    for (int64_t tile = by_rows ? team.rank : 0; tile < tiles_; tile += by_rows ? team.size : 1) {
      const int64_t first = tile * rows_ / tiles_;
      int64_t last = (tile + 1) * rows_ / tiles_;
      if (last > active) last = active;
      if (first < last) f(first, static_cast<int>(last - first));
    }
  }

  // f(panel) for the panels of mine, the last one first if `backwards`
  template <class F>
  void for_panels(int64_t panels, const F& f, bool backwards = false) const {
    const int64_t first = by_rows ? 0 : panels * team.rank / team.size;
    const int64_t last = by_rows ? panels : panels * (team.rank + 1) / team.size;
    for (int64_t n = first; n < last; ++n) f(backwards ? first + last - 1 - n : n);
  }

  // f(n) for an equal part of 0 .. count - 1, whichever way the work is split
  template <class F>
  void for_part(int64_t count, const F& f) const {
    const int64_t last = count * (team.rank + 1) / team.size;
    for (int64_t n = count * team.rank / team.size; n < last; ++n) f(n);
  }

  // Members who share rows wait for each other where one reads what another has written.
  void sync_rows() const {
    if (!by_rows) team.sync();
  }

 private:
  int64_t rows_, tiles_;
};

}  // namespace lstm_ext::cpu
