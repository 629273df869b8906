#include "../cpu/levels.h"
#include "cpu_plan.h"
#include "gil.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {

py::object layer_forward(const LayerCall& call, Save save, int num_threads) {
  if (!takes(call)) return not_implemented();
  LayerArgs args(call);
  const auto [T, B, I, H, P, projected] = args.shape;

  const Allocator allocator(args.x);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = args.step ? Output{} : allocator.empty(args.dtype, args.state_shape(P));
  const Output c_n = allocator.empty(args.dtype, args.state_shape(H));
  const Output cells = save >= Save::kCells ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output gates = save >= Save::kAll ? allocator.empty(args.dtype, args.saved_shape(4 * H)) : Output{};

  args.read_contents();
  LayerForward layer = describe_forward(args, y, h_n, c_n, cells, gates);
  layer.x = args.x.data();
  layer.x_map = args.map_of(args.x);
  layer.num_threads = threads_for(args, num_threads);
  LayerCell cell;
  if (args.cell) layer.cell = &(cell = args.describe_cell());

  const cpu::Plan plan = cpu::plan_forward(layer);
  {
    const GilRelease release(!cpu::is_brief(layer.shape));
    cpu::kernels().layer_forward(layer, plan);
  }
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, gates.object);
}

}  // namespace lstm_ext::ops
