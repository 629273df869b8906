// The plan of a layer on the CPU, to be read and, by tests and benchmarks, to be forced; and what a call sets up for
// it.
#pragma once

#include <string>

#include "../cpu/plan.h"
#include "layer_args.h"

namespace lstm_ext::ops {

// `asked` threads; if that is 0, as many as the framework of x uses or, where it does not say, the process may.
int threads_for(const LayerArgs& args, int asked);

// All of cpu::Plan by its names, the reasons under "why"; num_threads 0 takes OMP_NUM_THREADS or the usable processors.
// Throws ValueError for sizes that no layer has, RuntimeError for those that no computer has room for, and ValueError
// for a forced plan that cannot be.
py::dict cpu_plan(int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, bool projected, const std::string& dtype,
                  int num_directions, bool backward, int num_threads);

// The same of a problem that has been checked.
py::dict described_plan(const cpu::Problem& problem);

// What all plans of this process shall be, None for as planned; without arguments nothing is forced. in_place is for
// all three matrices, or for w_ih, w_hh and w_hr. Throws ValueError for what no layer could do at the SIMD level in
// use.
void force_cpu_plan(const py::object& engine, const py::object& in_place, const py::object& one_sum,
                    const py::object& chunk_steps, const py::object& depth, const py::object& threads,
                    const py::object& by_rows);

}  // namespace lstm_ext::ops
