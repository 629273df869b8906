// What the files norm_kernels_*.cu have in common: instantiating the kernels of cells that normalise.
#pragma once

#include "kernels.cuh"
#include "norm_backward.cuh"
#include "norm_forward.cuh"
#include "step_sums.cuh"

namespace lstm_ext::cuda {

template <Arithmetic arithmetic, class Tile>
NormKernelSet norm_kernel_set(const char* arithmetic_name, Norm norm, bool tensorflow) {
  constexpr int kTiles = cell_step_tiles(arithmetic);
  const std::string rest = std::string(norm == Norm::kRows ? ", rows" : ", gates") + (tensorflow ? ", TensorFlow" : "");
  const auto name = [&](const char* kernel, const char* of = "") {
    return kernel_name(kernel, arithmetic_name, kTiles * kBatchColumns, *of ? of : rest.c_str());
  };
  NormKernelSet set{{},
                    {},
                    {{name("step_sums", ", rows"), step_sums<Tile, kTiles, false>},
                     {name("step_sums", ", columns"), step_sums<Tile, kTiles, true>}},
                    {name("norm_forward"), norm_forward<Tile>},
                    {name("norm_backward"), norm_backward<Tile>},
                    {name("norm_h_before"), norm_h_before<Tile>}};
  constexpr const char* kExchanges[] = {", block", ", cluster", ", grid"};
  for (int n = 0; n < 3; ++n) {
    const auto of_all = [&](const char* kernel) {
      return kernel_name(kernel, arithmetic_name, kBatchColumns, (rest + kExchanges[n]).c_str());
    };
    set.sequence_forward[n] = {of_all("norm_sequence_forward"), norm_sequence_forward<Tile, 1>};
    set.sequence_backward[n] = {of_all("norm_sequence_backward"), norm_sequence_backward<Tile, 1>};
  }
  return set;
}

template <Arithmetic arithmetic, class Tile>
const NormKernelSet& norm_kernels(const char* name, Norm norm, bool tensorflow) {
  static const NormKernelSet sets[2][2] = {{norm_kernel_set<arithmetic, Tile>(name, Norm::kRows, false),
                                            norm_kernel_set<arithmetic, Tile>(name, Norm::kRows, true)},
                                           {norm_kernel_set<arithmetic, Tile>(name, Norm::kGates, false),
                                            norm_kernel_set<arithmetic, Tile>(name, Norm::kGates, true)}};
  return sets[norm == Norm::kGates][tensorflow];
}

}  // namespace lstm_ext::cuda
