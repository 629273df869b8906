#include "../cpu/kernels.h"
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

  LayerForward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  layer.x = args.x.data();
  layer.x_map = args.map_of(args.x);
  layer.y_map = args.contiguous_map(args.D * P);
  layer.cells_map = args.saved_map(H);
  layer.gates_map = args.saved_map(4 * H);
  layer.num_directions = args.D;
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();
  for (int n = 0; n < args.D; ++n) {
    layer.direction[n] = {args.reverse(n),
                          args.direction[n].pointers(),
                          args.state(n),
                          offset_by(y, n * P, args.dtype),
                          offset_by(h_n, n * B * P, args.dtype),
                          offset_by(c_n, n * B * H, args.dtype),
                          offset_by(cells, n * args.saved_size(H), args.compute_dtype),
                          offset_by(gates, n * args.saved_size(4 * H), args.dtype)};
  }

  {
    py::gil_scoped_release release;
    cpu::kernels().layer_forward(layer);
  }
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, gates.object);
}

}  // namespace lstm_ext::ops
