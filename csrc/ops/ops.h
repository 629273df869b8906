// The operations on a layer. Each is four visible blocks: check, allocate, fill the params, launch. Each answers
// NotImplemented where something in the call is no plain array, and nothing else stops it but an exception.
#pragma once

#include <string>

#include "call.h"

namespace lstm_ext::ops {

// -> (y, h_n or None, c_n, cells or None, gates or None): `Outputs` in lstm_ext/call.py
py::object layer_forward(const LayerCall& call, Save save, int num_threads);

// -> (dx, dh0, dc0, dweights), None for what is not needed: `Grads` in lstm_ext/call.py
py::object layer_backward(const LayerCall& call, const Saved& saved, const OutputGrads& grads, Needs needs,
                          int num_threads);

// The same on a GPU. What is one large product over all steps is left to the framework: x W_ih' comes in, and what the
// gradients of the weights and of x are computed from comes out. Everything is launched on the current stream.
//
// In `steps` x is xw [D, T, B, 4H], or of packed rows [D, N, 4H], holding x W_ih': float32 also for half types, since
// rounding x W_ih' before h W_hh' is added would lose more than the kernel does. With Save::kAll the activated gates
// take its place where their dtype is the same. `weights` lacks the w_ih of each direction; batch_sizes [T] says where
// the packed rows of each time start, and lengths [B] how long each row is, both int64. All is on the GPU. `strategy`:
// "" to choose, the name of one, or one kernel as in "grid/2" or "step/2/32". -> as layer_forward
py::object cuda_layer_forward(const LayerCall& steps, Save save, bool tf32, const std::string& strategy);

// `steps` as above, but x is `saved.gates`.
// -> (d_gates [D, .., 4H], h_prev [D, .., P], d_h [D, .., P], hidden [D, .., H], hidden_prev [D, .., H], dh0, dc0,
//     c_prev [D, .., H], c_new [D, .., H], ..)
// d_gates are those before the activation, h_prev what each step started from. The three that follow are None without a
// projection. With one, d_h and hidden are the gradient of h and h before the projection, and what a step started from
// is h_prev + hidden_prev W_hr': one of the two terms is zero, as h_prev holds h0 alone. All are zero past a length.
//
// Of a cell with options h_prev is what each step multiplied in any case, and hidden_prev None; d_h is the gradient
// before a clip; d_gates are in the order of the weights. c_prev and c_new are None without a peephole: c as each step
// found it, and as its gates left it.
//
// A cell that normalises is given what it has normalised, `normed` [D, .., 4H] in the order of the weights, and
// `scales`, 1 / its deviations: of the sums of h [D, .., 1] with Norm::kRows, else of whole sums [D, .., 4]. Both are
// float32 for half types. Forward its xw is normalised and scaled already with Norm::kRows. d_gates are those of what
// was normalised; three more results follow, float32 for half types, which are None for any other cell: d_pre [D, ..,
// 4H], those before the activation, and d_seen and d_gamma_h [D, .., H], None where gradients of weights are not
// needed: of c as the output sees it, and that times the normalised c. `normed` becomes its product with d_pre.
py::object cuda_layer_backward(const LayerCall& steps, const Saved& saved, const OutputGrads& grads, Needs needs,
                               bool tf32, const std::string& strategy, py::handle normed, py::handle scales);

// Of such a cell h_prev by itself, before there is `normed`; `steps` and `saved` are as for the backward pass.
py::object cuda_h_before(const LayerCall& steps, const Saved& saved);

// A call without a time axis, nothing saved, in one launch -> as layer_forward
py::object cuda_step_forward(const LayerCall& call, bool tf32);

// Each of the three gives a text instead, and launches nothing, where self-checks leave no kernel to launch: why.

// How a layer [T, B] of H units would run on a device; `cell` as in a call -> dict
py::dict cuda_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                   int num_directions, bool backward, const std::string& strategy, int device, py::handle cell);

}  // namespace lstm_ext::ops
