#include "walk.h"

namespace lstm_ext::cpu {

Walk::Walk(const SequenceShape& shape, const Masks& masks, Arena& arena)
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

}  // namespace lstm_ext::cpu
