// Who does what: how the members of a team share the work of a pass.
//
//   by rows: each member has sequences of its own        by panels: each has panels of the weights, for all sequences
//
//              panels                                                 panels
//            +--------+                                             +----+----+
//      rows  |   0    |   no waiting at steps; each member     rows | 0  | 1  |   each member reads its part of the
//            +--------+   reads all of the weights                  |    |    |   weights; all wait for h at each step
//            |   1    |                                             |    |    |
//            +--------+                                             +----+----+
#pragma once

#include "plan.h"
#include "team.h"

namespace lstm_ext::cpu {

class Share {
 public:
  Share(const Team& t, const Plan& plan)
      : team(t), by_rows(plan.divides_rows(t.size)), rows_(plan.load.rows), tiles_(tile_count(plan.load)) {
    if (by_rows) tiles_ = ceil_div(tiles_, team.size) * team.size;  // as many tiles for each
  }

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
      f(Group{part(rows_, tile, tiles_), part(rows_, tile + 1, tiles_)});
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
    for (int64_t tile = 0, first = group.first; tile < tiles && first < active; ++tile) {
      const int64_t last = group.first + part(slots, tile + 1, tiles), end = last < active ? last : active;
      if (first < end) f(first, static_cast<int>(end - first));
      first = last;
    }
  }
  template <class F>
  void for_tiles(int64_t active, const F& f) const {
    for_groups([&](const Group& group) { for_tiles(group, active, f); });
  }

  struct Panels {
    int64_t first, last;
  };
  Panels panels_of_mine(int64_t panels) const {
    if (by_rows) return {0, panels};
    return {part(panels, team.rank, team.size), part(panels, team.rank + 1, team.size)};
  }

  // f(panel) for the panels of mine, the last one first if `backwards`
  template <class F>
  void for_panels(int64_t panels, const F& f, bool backwards = false) const {
    const auto [first, last] = panels_of_mine(panels);
    for (int64_t n = first; n < last; ++n) f(backwards ? first + last - 1 - n : n);
  }

  // f(n) for an equal part of 0 .. count - 1, whichever way the work is split
  template <class F>
  void for_part(int64_t count, const F& f) const {
    const int64_t last = part(count, team.rank + 1, team.size);
    for (int64_t n = part(count, team.rank, team.size); n < last; ++n) f(n);
  }

  // Members who share rows wait for each other where one reads what another has written.
  void sync_rows() const {
    if (!by_rows) team.sync();
  }

 private:
  // Where part n of so many begins. Asked for each tile of each panel of a step: many processors divide 32 bits much
  // sooner than 64.
  static int64_t part(int64_t count, int64_t n, int64_t parts) {
    const int64_t product = count * n;
    if (static_cast<uint64_t>(product | parts) >> 32) return product / parts;
    return static_cast<uint32_t>(product) / static_cast<uint32_t>(parts);
  }

  static int64_t tile_count(const Load& load) { return ceil_div(load.rows, load.tile_rows); }

  int64_t rows_, tiles_;
};

}  // namespace lstm_ext::cpu
