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

  // No row is shorter than another or forgets its state.
  bool uniform() const { return !rows_ && !masks_.resets; }

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

// What there is to share out at each step: sequences, and panels of the recurrent weights.
struct StepWork {
  int64_t rows;
  int tile_rows, least_rows;  // of a tile: as many as it holds, and as few as it is still worth having
  int64_t panels, bytes;      // of the weights
};

// What one member of a team does: some tiles of rows and all panels, or all rows and some panels. With rows of their
// own members need not wait for each other, but each reads all weights at each step: so they share rows where these are
// few, or the weights more than a core's cache holds.
class Share {
 public:
  Share(const Team& team, const StepWork& work);

  const Team team;
  const bool by_rows;

  // Slots first .. last - 1, whose work is done together: a tile of one member's own, or all of them.
  struct Group {
    int64_t first, last;
  };

  // f(group) for the groups of mine
  template <class F>
  void for_groups(const F& f) const {
    if (!by_rows) return f(Group{0, rows_});
    for (int64_t tile = team.rank; tile < tiles_; tile += team.size) {
      f(Group{tile * rows_ / tiles_, (tile + 1) * rows_ / tiles_});
    }
  }

  // f(slot) for those of a group among slots 0 .. active - 1, each done by one member
  template <class F>
  void for_slots(const Group& group, int64_t active, const F& f) const {
    if (!by_rows) return for_part(active, f);
    for (int64_t slot = group.first; slot < group.last && slot < active; ++slot) f(slot);
  }

  // f(first, count) for the tiles of a group among slots 0 .. active - 1
  template <class F>
  void for_tiles(const Group& group, int64_t active, const F& f) const {
    const int64_t slots = group.last - group.first, tiles = by_rows ? 1 : tiles_;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t first = group.first + tile * slots / tiles;
      int64_t last = group.first + (tile + 1) * slots / tiles;
      if (last > active) last = active;
      if (first < last) f(first, static_cast<int>(last - first));
    }
  }
  template <class F>
  void for_tiles(int64_t active, const F& f) const {
    for_groups([&](const Group& group) { for_tiles(group, active, f); });
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
