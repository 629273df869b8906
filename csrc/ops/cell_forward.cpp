#include "../cpu/levels.h"
#include "../cpu/team.h"
#include "cell_args.h"
#include "ops.h"

namespace lstm_ext::ops {

py::tuple cell_forward(py::handle x_, py::handle h_, py::handle c_, py::handle w_ih_, py::handle w_hh_,
                       py::handle b_ih_, py::handle b_hh_, int num_threads) {
  const Array x(x_, "x"), h(h_, "h"), c(c_, "c"), w_ih(w_ih_, "w_ih"), w_hh(w_hh_, "w_hh"), b_ih(b_ih_, "b_ih"),
      b_hh(b_hh_, "b_hh");
  const CellShape cell = check_cell(x, h, c, w_ih, w_hh, b_ih, b_hh);

  const Allocator allocator(x);
  const Output h_next = allocator.empty(cell.dtype, cell.state);
  const Output c_next = allocator.empty(cell.dtype, cell.state);

  LayerForward layer = cell_layer(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, c_next);
  layer.num_threads = num_threads > 0 ? num_threads : cpu::default_threads();

  const cpu::Plan plan = cpu::plan_forward(layer);
  {
    py::gil_scoped_release release;
    cpu::kernels().layer_forward(layer, plan);
  }
  return py::make_tuple(h_next.object, c_next.object);
}

}  // namespace lstm_ext::ops
