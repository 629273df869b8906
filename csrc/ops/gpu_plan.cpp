#include "gpu_plan.h"

#include <algorithm>

#include "../array.h"
#include "call.h"

namespace lstm_ext::ops {

std::optional<cuda::CellTraits> traits_of(const std::optional<Cell>& cell) {
  if (!cell) return {};
  return cuda::CellTraits::of(*cell);
}

py::dict describe(const cuda::Plan& plan) {
  py::dict result, refused;
  for (const auto& [other, why] : plan.refused) refused[cuda::name_of(other)] = why;
  result["strategy"] = cuda::name_of(plan.strategy);
  result["blocks"] = plan.blocks();
  result["team"] = plan.strategy == cuda::Strategy::kStep ? 1 : plan.layout.ranks;
  result["shared_bytes"] = plan.layout.shared_bytes;
  result["microseconds_per_step"] = plan.microseconds;
  result["source"] = plan.source;
  result["sm_margin"] = plan.sm_margin;
  result["refused"] = refused;
  return result;
}

py::dict gpu_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                  int num_directions, bool backward, const std::string& strategy, int compute_capability, int sms,
                  int gpcs, int64_t shared_bytes, int clock_khz, py::handle cell) {
  // The kernels of a whole sequence take more than half of a multiprocessor's registers: one block runs on each. Of
  // clusters from 4 blocks on an H100 runs one less than if its gpcs were equally large: 31 of 4, 15 of 8, 7 of 16.
  const auto resident = [=](const cuda::Problem& of, cuda::Strategy strategy, int tiles, int cluster, int64_t bytes) {
    const cuda::TileSizes& sizes = cuda::tile_sizes(of.arithmetic);
    constexpr int64_t kOfDriver = 1024;  // bytes of shared memory of each block
    const bool sums = of.normalises() && !of.shape.projected;
    const bool two = strategy == cuda::Strategy::kStep && (!of.cell || sums) && 2 * bytes + kOfDriver <= shared_bytes &&
                     cuda::step_blocks(sizes.row_tiles, tiles, sizes.number_bytes, compute_capability) == 2;
    const int clusters = cluster == 1 ? sms : std::max(0, gpcs * (sms / gpcs / cluster) - (cluster >= 4));
    return (two ? 2 : 1) * clusters;
  };
  cuda::Problem problem{cuda::arithmetic_of(dtype_named(dtype), tf32, compute_capability),
                        {T, B, 0, H, projected ? P : H, projected},
                        num_directions,
                        backward,
                        {compute_capability, sms, shared_bytes, clock_khz, true},
                        resident};
  problem.sm_margin = cuda::sm_margin();
  problem.cell = traits_of(cell_of(cell));
  return describe(cuda::make_plan(problem, cuda::forced_by(strategy)));
}

}  // namespace lstm_ext::ops
