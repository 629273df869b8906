// The product of a step by itself, in a launch of its own: its sums go to memory as they are.
#pragma once

#include "step.cuh"

namespace lstm_ext::cuda {

// Where the row of a sequence that is multiplied starts; null for zeros.
template <class Tile, class Block>
__device__ __forceinline__ const typename Tile::Number* operand_row(const StepSums& params, const Block& block, int d,
                                                                    int n) {
  const Moment &moment = block.moment(n), &next = block.next_moment(n);
  const auto row = [&](bool there, int64_t start) {
    return there ? element<typename Tile::Number>(params.direction[d].operand, params.operand_map, start,
                                                  block.sequence(n), 0)
                 : nullptr;
  };
  switch (params.operand) {
    case StepSums::Operand::kBefore: return row(moment.active() && !moment.forgets(), moment.start_before);
    case StepSums::Operand::kThis: return row(moment.active(), moment.start);
    default: return row(next.active() && !next.forgets(), next.start);
  }
}

struct NoRows {
  static constexpr int kMoments = 2;
};

template <class Tile, int kBatchTiles, bool kTransposed>
__global__ void __launch_bounds__(kThreads, kStepBlocks<Tile, kBatchTiles>)
    step_sums(const __grid_constant__ StepSums params) {
  const int d = blockIdx.y;
  const SequenceShape& shape = params.shape;
  const auto& of = params.direction[d];
  StepBlock<Tile, kBatchTiles, kTransposed, NoRows> block(params.part, shape, params.masks, params.packed_offset,
                                                          of.reverse, params.s, NoRows());
  if (of.operand) block.add(of.weights, params.columns, [&](int n) { return operand_row<Tile>(params, block, d, n); });
  block.follow_previous_launch();
  block.template finish_items<NoRows>([](int) { return NoRows(); },
                                      [&](int n, int j, NoRows) {
                                        auto* const sums = static_cast<typename Tile::Sum*>(params.sums);
                                        const int64_t b = d * shape.B + block.sequence(n);
                                        sums[b * 4 * shape.H + block.unit()] = block.product(n, j).at[0].at[0];
                                      });
}

}  // namespace lstm_ext::cuda
