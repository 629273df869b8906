// A layer on a GPU. What is one large product over all steps is left to the framework: x W_ih' comes in as xw, and what
// the gradients of the weights and of x are computed from comes out. Everything is launched on the current stream.
#pragma once

#include "../array.h"

namespace lstm_ext::ops {

// xw [D, T, B, 4H], or packed rows [D, N, 4H], holds x W_ih': float32 also for half types, as rounding it before h
// W_hh' is added would lose more than the kernel does. With save 2 the activated gates take its place, where their
// dtype is the same. `weights` is for each direction w_hh [4H, P], then b_ih, b_hh [4H] if there is a bias, then w_hr
// [P, H] if h is projected; lengths [B], packed_offset [T] (with packed rows: where those of each time start) int64 and
// resets bool, laid out as y, all on the GPU. `strategy`: "" to choose, or the name of one.
// -> (y, h_n, c_n, cells or None, gates or None)
py::tuple cuda_layer_forward(py::handle xw, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                             py::handle resets, py::handle packed_offset, int directions, bool batch_first, int save,
                             bool tf32, const std::string& strategy);

// -> (d_gates [D, .., 4H], h_prev [D, .., P], d_h [D, .., P] or None, hidden [D, .., H] or None, dh0, dc0)
// d_gates are those before the activation, h_prev what each step started from, d_h and hidden (with a projection) the
// gradient of h and h before the projection; all are zero past a length. needs: 2 dh0, 4 dc0.
py::tuple cuda_layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle h0,
                              py::handle c0, py::sequence weights, py::handle y, py::handle cells, py::handle gates,
                              py::handle lengths, py::handle resets, py::handle packed_offset, int directions,
                              bool batch_first, int needs, bool tf32, const std::string& strategy);

// One step from x [B, I] and the state h, c [B, H] (both None: zeros) in one launch, nothing kept -> (h', c')
py::tuple cuda_cell_forward(py::handle x, py::handle h, py::handle c, py::handle w_ih, py::handle w_hh, py::handle b_ih,
                            py::handle b_hh, bool tf32);

// How a layer [T, B] of H units would run on a device -> dict
py::dict cuda_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                   int num_directions, bool backward, const std::string& strategy, int device);

}  // namespace lstm_ext::ops
