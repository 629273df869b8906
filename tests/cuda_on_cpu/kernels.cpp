#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "cuda/layer.h"
#include "ops/layer_args.h"
#include "runtime.h"

namespace cuda_on_cpu {
namespace {

using namespace lstm_ext;
using ops::LayerArgs;

// Fresh device memory holds NaN in every floating-point type.
constexpr int kNanByte = 0xff;

Output fresh(const LayerArgs& args, bool wanted, Dtype dtype, const Shape& shape) {
  if (!wanted) return {};
  Output output = Allocator(args.x).empty(dtype, shape);
  int64_t bytes = ops::bytes_of(dtype);
  for (const int64_t size : shape) bytes *= size;
  if (bytes > 0) memset(output.data, kNanByte, static_cast<size_t>(bytes));
  return output;
}

std::unique_ptr<void, void (*)(void*)> fresh_workspace(int64_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, static_cast<size_t>(bytes)) != 0) throw std::bad_alloc();
  memset(memory, kNanByte, static_cast<size_t>(bytes));
  return {memory, free};
}

std::shared_ptr<const lstm_ext::cuda::Plan> plan_of(const LayerArgs& args, bool backward, const Options& options) {
  return cuda::plan_layer(args.shape, args.D, backward, {args.dtype, options.tf32, options.strategy}, options.device);
}

// Runs `work(plan, workspace, stream)` to its end.
template <class Work>
void run(const LayerArgs& args, bool backward, const Options& options, const Work& work) {
  const std::shared_ptr<const cuda::Plan> plan = plan_of(args, backward, options);
  const auto workspace = fresh_workspace(plan->workspace_bytes);
  device = devices.at(static_cast<size_t>(options.device));
  int stream = 0;  // its address is a stream of our own: what goes to another one runs in another order
  work(*plan, workspace.get(), &stream);
  synchronize(options.seed);
}

}  // namespace

py::tuple layer_forward(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                        py::handle resets, py::handle batch_sizes, int directions, bool batch_first, int save,
                        py::handle xw_, const Options& options) {
  const LayerArgs args(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const Array xw(xw_, "xw");
  const Output y = fresh(args, true, args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = fresh(args, true, args.dtype, {args.D, B, P});
  const Output c_n = fresh(args, true, args.dtype, {args.D, B, H});
  const Output cells = fresh(args, save >= 1, args.compute_dtype, args.saved_shape(H));
  const Output gates = fresh(args, save >= 2, args.dtype, args.saved_shape(4 * H));

  LayerForward layer = ops::describe_forward(args, y, h_n, c_n, cells, gates);
  layer.x = xw ? nullptr : args.x.data();
  layer.x_map = args.map_of(args.x);
  const void* projections[2] = {};
  const int64_t direction_bytes = args.saved_size(4 * H) * ops::bytes_of(args.compute_dtype);
  for (int n = 0; xw && n < args.D; ++n) {
    projections[n] = ops::at(xw, n, args.compute_dtype);
    void* to = layer.direction[n].gates;
    if (to && args.dtype == args.compute_dtype && direction_bytes > 0) {  // it may come in the array of the gates
      projections[n] = memcpy(to, projections[n], static_cast<size_t>(direction_bytes));
    }
  }
  run(args, false, options, [&](const cuda::Plan& plan, void* workspace, void* stream) {
    const cuda::LayerOptions how{args.dtype, options.tf32, options.strategy};
    cuda::layer_forward(layer, projections, plan, how, options.device, workspace, stream);
  });
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, gates.object);
}

py::tuple layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle x,
                         py::handle h0, py::handle c0, py::sequence weights, py::handle y, py::handle cells,
                         py::handle gates, py::handle lengths, py::handle resets, py::handle batch_sizes,
                         int directions, bool batch_first, int needs, const Options& options) {
  const LayerArgs args(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const ops::BackwardArrays arrays(args, args.x, dy, dh_n, dc_n, dcells, y, cells, gates);
  const Output d_gates = fresh(args, true, args.dtype, args.saved_shape(4 * H));
  const Output h_prev = fresh(args, true, args.dtype, args.saved_shape(P));
  const Output d_h = fresh(args, projected, args.dtype, args.saved_shape(P));
  const Output hidden = fresh(args, projected, args.dtype, args.saved_shape(H));
  const Output dh0 = fresh(args, needs & ops::kNeedH0, args.dtype, {args.D, B, P});
  const Output dc0 = fresh(args, needs & ops::kNeedC0, args.dtype, {args.D, B, H});

  cuda::BackwardPass pass{};
  pass.d_gates_map = args.saved_map(4 * H);
  pass.h_map = args.saved_map(P);
  pass.hidden_map = args.saved_map(H);
  pass.layer = arrays.describe(args, dh0, dc0);
  for (int n = 0; n < args.D; ++n) {
    pass.outputs[n] = {ops::offset_by(d_gates, n * args.saved_size(4 * H), args.dtype),
                       ops::offset_by(h_prev, n * args.saved_size(P), args.dtype),
                       ops::offset_by(d_h, n * args.saved_size(P), args.dtype),
                       ops::offset_by(hidden, n * args.saved_size(H), args.dtype)};
  }
  run(args, true, options, [&](const cuda::Plan& plan, void* workspace, void* stream) {
    const cuda::LayerOptions how{args.dtype, options.tf32, options.strategy};
    cuda::layer_backward(pass, plan, how, options.device, workspace, stream);
  });
  return py::make_tuple(d_gates.object, h_prev.object, dh0.object, dc0.object, d_h.object, hidden.object);
}

py::dict plan(py::handle x, py::sequence weights, int directions, bool backward, const Options& options) {
  const LayerArgs args(x, py::none(), py::none(), weights, py::none(), py::none(), py::none(), directions, false);
  const std::shared_ptr<const cuda::Plan> plan = plan_of(args, backward, options);
  py::dict facts;
  facts["strategy"] = plan->strategy;
  facts["column_tiles"] = plan->column_tiles;
  facts["ranks"] = plan->strategy == "step" ? 1 : plan->spread.ranks;
  facts["teams"] = plan->strategy == "step" ? 1 : plan->spread.teams;
  facts["blocks"] = plan->blocks;
  facts["shared_bytes"] = plan->shared_bytes;
  return facts;
}

}  // namespace cuda_on_cpu
