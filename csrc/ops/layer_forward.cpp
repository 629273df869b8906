#include "../cpu/levels.h"
#include "../cpu/team.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {

py::tuple layer_forward(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                        py::handle resets, py::handle batch_sizes, int directions, bool batch_first, int save,
                        int num_threads) {
  const LayerArgs args(x, h0, c0, weights, lengths, resets, batch_sizes, directions, batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;

  const Allocator allocator(args.x);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = allocator.empty(args.dtype, {args.D, B, P});
  const Output c_n = allocator.empty(args.dtype, {args.D, B, H});
  const Output cells = save >= 1 ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output gates = save >= 2 ? allocator.empty(args.dtype, args.saved_shape(4 * H)) : Output{};

  LayerForward layer = describe_forward(args, y, h_n, c_n, cells, gates);
  layer.x = args.x.data();
  layer.x_map = args.map_of(args.x);
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();

  const cpu::Plan plan = cpu::plan_forward(layer);
  {
    py::gil_scoped_release release;
    cpu::kernels().layer_forward(layer, plan);
  }
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, gates.object);
}

}  // namespace lstm_ext::ops
