// The operations of the module. Each is four visible blocks: check, allocate, fill the params, launch.
#pragma once

#include "../array.h"

namespace lstm_ext::ops {

// -> (y, h_n, c_n, cells or None, gates or None); save: 0 neither, 1 cells, 2 cells and gates
py::tuple layer_forward(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                        py::handle resets, py::handle batch_sizes, int directions, bool batch_first, int save,
                        int num_threads);

// -> (dx, dh0, dc0, dweights), None for what `needs` (1 dx, 2 dh0, 4 dc0, 8 dweights) leaves out
py::tuple layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle x,
                         py::handle h0, py::handle c0, py::sequence weights, py::handle y, py::handle cells,
                         py::handle gates, py::handle lengths, py::handle resets, py::handle batch_sizes,
                         int directions, bool batch_first, int needs, int num_threads);

// One step, nothing kept for a backward pass: x [B, I] or [I] -> (h', c'); h and c both None are zeros
py::tuple cell_forward(py::handle x, py::handle h, py::handle c, py::handle w_ih, py::handle w_hh, py::handle b_ih,
                       py::handle b_hh, int num_threads);

}  // namespace lstm_ext::ops
