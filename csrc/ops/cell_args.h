// What the cell has in common on every device: checking its arguments, and seeing it as a layer of one step.
#pragma once

#include "../array.h"

namespace lstm_ext::ops {

struct CellShape {
  Dtype dtype;
  int64_t B, I, H;
  Shape state;  // [B, H], or [H] without a batch
};

// Throws TypeError (dtype, not an array) and RuntimeError (rank, shape).
CellShape check_cell(const Array& x, const Array& h, const Array& c, const Array& w_ih, const Array& w_hh,
                     const Array& b_ih, const Array& b_hh);

// A cell is a sequence of one step: the same kernel, without the arrays that only a sequence has.
LayerForward cell_layer(const CellShape& cell, const Array& x, const Array& h, const Array& c, const Array& w_ih,
                        const Array& w_hh, const Array& b_ih, const Array& b_hh, const Output& h_next,
                        const Output& c_next);

}  // namespace lstm_ext::ops
