#include "steps.h"

namespace lstm_ext::cpu {

Steps::Steps(const SequenceShape& shape, const Masks& masks, Arena& arena)
    : T(shape.T), B(shape.B), masks_(masks), lengths_(masks.lengths) {
  if (!lengths_) return;
  rows_ = arena.get<int64_t>(B);
  active_ = arena.get<int64_t>(T + 1);
  // Counting sort by falling length, stable: active_[s] counts first the rows of length s + 1 and more,
  // which is also where the rows of length s begin.
  for (int64_t s = 0; s <= T; ++s) active_[s] = 0;
  for (int64_t b = 0; b < B; ++b) {
    if (lengths_[b] > 0) ++active_[lengths_[b] - 1];
  }
  for (int64_t s = T - 1; s >= 0; --s) active_[s] += active_[s + 1];
  int64_t* next = arena.get<int64_t>(T + 1);
  for (int64_t s = 0; s <= T; ++s) next[s] = active_[s];
  for (int64_t b = 0; b < B; ++b) rows_[next[lengths_[b]]++] = b;
}

namespace {

constexpr int64_t kHeldBytes = 1 << 19;  // of weights: half of a usual second-level cache

bool divide_rows(const Team& team, const StepWork& work) {
  if (team.size == 1) return true;
  const int64_t most_panels = (work.panels + team.size - 1) / team.size;  // of one member
  const bool even = 10 * most_panels * team.size <= 11 * work.panels;
  const int64_t least_rows = work.least_rows * static_cast<int64_t>(team.size);  // a tile for each member
  return even ? work.rows >= least_rows && work.bytes <= kHeldBytes : 2 * work.rows >= least_rows;
}

}  // namespace

Share::Share(const Team& t, const StepWork& work) : team(t), by_rows(divide_rows(t, work)), rows_(work.rows) {
  tiles_ = (work.rows + work.tile_rows - 1) / work.tile_rows;
  if (by_rows) tiles_ = (tiles_ + t.size - 1) / t.size * t.size;
}

}  // namespace lstm_ext::cpu
