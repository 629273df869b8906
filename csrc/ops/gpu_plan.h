// The plan of a layer on a GPU, to be read: as text for Python, and for a GPU that need not be there.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <string>

#include "../cuda/plan.h"

namespace lstm_ext::ops {

namespace py = pybind11;

// None for none.
std::optional<cuda::CellTraits> traits_of(const std::optional<Cell>& cell);

// By the names of lstm_ext.Plan, without the registers.
py::dict describe(const cuda::Plan& plan);

// How a layer [T, B] of H units would run on a GPU that is described by these: gpcs are its clusters of
// multiprocessors, within one of which a thread-block cluster lies; shared_bytes are those that a block may ask for;
// `cell` is as in a call.
// Throws RuntimeError for a strategy that cannot run this.
py::dict gpu_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                  int num_directions, bool backward, const std::string& strategy, int compute_capability, int sms,
                  int gpcs, int64_t shared_bytes, int clock_khz, py::handle cell);

}  // namespace lstm_ext::ops
