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
bool rows_for_all(const Team& team, int64_t rows, int tile_rows) {
  return team.size == 1 || 2 * rows >= tile_rows * static_cast<int64_t>(team.size);
}
}  // namespace

Share::Share(const Team& t, int64_t rows, int tile_rows)
    : team(t), by_rows(rows_for_all(t, rows, tile_rows)), rows_(rows) {
  tiles_ = (rows + tile_rows - 1) / tile_rows;
  if (by_rows) tiles_ = (tiles_ + t.size - 1) / t.size * t.size;
}

}  // namespace lstm_ext::cpu
