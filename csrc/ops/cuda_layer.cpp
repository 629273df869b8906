#include "cuda_layer.h"

#include <stdexcept>

#include "cell_args.h"
#include "layer_args.h"
#if defined(LSTM_EXT_WITH_CUDA)
#include "../cuda/layer.h"
#endif

namespace lstm_ext::ops {

#if defined(LSTM_EXT_WITH_CUDA)
namespace {

Array on_gpu(py::handle object, const char* name) { return {object, name, dlpack::kCuda}; }

struct CudaArgs : LayerLayout {
  // `like` is the array [D, T, B, 4H] or [D, N, 4H] that shows the shape, dtype that of the layer; `weights` is without
  // the w_ih of each direction.
  CudaArgs(const Array& like, Dtype layer_dtype, py::handle h0_, py::handle c0_, py::sequence weights,
           py::handle lengths_, py::handle resets_, py::handle packed_offset_, int directions_, bool batch_first_)
      : LayerLayout(layer_dtype, directions_, batch_first_, !packed_offset_.is_none()),
        lengths(on_gpu(lengths_, "lengths")),
        offsets(on_gpu(packed_offset_, "packed_offset")) {
    h0 = on_gpu(h0_, "h0");
    c0 = on_gpu(c0_, "c0");
    resets = on_gpu(resets_, "resets");
    for (const Array* array : {&h0, &c0, &lengths, &resets, &offsets}) array->expect_kind_of(like);
    like.expect_dims(packed ? 3 : 4);
    if (packed && !lengths) throw py::type_error("lengths: expected an array with packed_offset, got None");
    shape.T = packed ? offsets.size(0) : like.size(1);
    shape.B = packed ? lengths.size(0) : like.size(2);
    shape.H = like.size(like.ndim() - 1) / 4;
    rows = packed ? like.size(1) : shape.T * shape.B;
    read_weights(like, weights, false);
    expect_same_strides();
    check_state();
    read_lengths();
    read_resets();
  }

  Array lengths, offsets;

 private:
  // One launch walks both directions with one description of the weights.
  void expect_same_strides() const {
    const DirectionArrays &first = direction[0], &last = direction[D - 1];
    if (first.w_hh.stride(0) != last.w_hh.stride(0) || (last.w_hr && first.w_hr.stride(0) != last.w_hr.stride(0)))
      throw std::runtime_error("weights: expected the same strides in both directions, got others");
  }

  // They stay on the device, whose kernels clamp them.
  void read_lengths() {
    if (packed) {
      offsets.expect_int64();
      offsets.expect_shape({shape.T});
      packed_offset = static_cast<const int64_t*>(offsets.data());
    }
    if (!lengths) return;
    lengths.expect_int64();
    lengths.expect_shape({shape.B});
    masks.lengths = static_cast<const int64_t*>(lengths.data());
    if (!lengths.contiguous()) throw std::runtime_error("lengths: expected a contiguous tensor");
  }
};

// Memory for one call, from the framework's allocator: it stays valid in stream order.
Output workspace_of(const Allocator& allocator, int64_t bytes) {
  return bytes > 0 ? allocator.empty(Dtype::kFloat32, {(bytes + 3) / 4}) : Output{};
}

Dtype dtype_named(const std::string& name) {
  if (name == "float32") return Dtype::kFloat32;
  if (name == "float64") return Dtype::kFloat64;
  if (name == "bfloat16") return Dtype::kBFloat16;
  if (name == "float16") return Dtype::kFloat16;
  throw py::value_error("dtype: expected float32, float64, bfloat16 or float16, got '" + name + "'");
}

}  // namespace

py::tuple cuda_layer_forward(py::handle xw_, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths,
                             py::handle resets, py::handle packed_offset, int directions, bool batch_first, int save,
                             bool tf32, const std::string& strategy) {
  const Array xw = on_gpu(xw_, "xw");
  if (!xw) throw py::type_error("xw: expected an array, got None");
  if (weights.size() == 0) throw py::type_error("weights: expected at least one array, got none");
  const CudaArgs args(xw, on_gpu(weights[0], "w_hh").float_dtype(), h0, c0, weights, lengths, resets, packed_offset,
                      directions, batch_first);
  xw.expect_dtype(args.compute_dtype);
  if (!xw.contiguous()) throw std::runtime_error("xw: expected a contiguous tensor, got another");
  const auto [T, B, I, H, P, projected] = args.shape;
  const cuda::DeviceGuard guard(xw.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, cuda::strategy_named(strategy)};
  const std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(args.shape, args.D, false, options, xw.device().id);

  const Allocator allocator(xw);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = allocator.empty(args.dtype, {args.D, B, P});
  const Output c_n = allocator.empty(args.dtype, {args.D, B, H});
  const Output cells = save >= 1 ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const bool in_place = args.dtype == args.compute_dtype;
  const Output gates = save >= 2 && !in_place ? allocator.empty(args.dtype, args.saved_shape(4 * H)) : Output{};
  const Output workspace = workspace_of(allocator, plan->workspace_bytes);

  LayerForward layer = describe_forward(args, y, h_n, c_n, cells, gates);
  const void* projected_x[2] = {};
  for (int n = 0; n < args.D; ++n) {
    projected_x[n] = at(xw, n, args.compute_dtype);
    if (save >= 2 && in_place) layer.direction[n].gates = const_cast<void*>(projected_x[n]);
  }
  void* const stream = xw.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_forward(layer, projected_x, *plan, workspace.data, stream);
  }
  const py::object saved = save >= 2 && in_place ? py::reinterpret_borrow<py::object>(xw_) : gates.object;
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, saved);
}

py::tuple cuda_layer_backward(py::handle dy, py::handle dh_n, py::handle dc_n, py::handle dcells, py::handle h0,
                              py::handle c0, py::sequence weights, py::handle y, py::handle cells, py::handle gates_,
                              py::handle lengths, py::handle resets, py::handle packed_offset, int directions,
                              bool batch_first, int needs, bool tf32, const std::string& strategy) {
  const Array gates = on_gpu(gates_, "gates");
  if (!gates) throw py::type_error("gates: expected an array, got None");
  const CudaArgs args(gates, gates.float_dtype(), h0, c0, weights, lengths, resets, packed_offset, directions,
                      batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t D = args.D;
  const BackwardArrays arrays(args, gates, dy, dh_n, dc_n, dcells, y, cells, gates_);
  const cuda::DeviceGuard guard(gates.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, cuda::strategy_named(strategy)};
  const std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(args.shape, args.D, true, options, gates.device().id);

  const Allocator allocator(gates);
  const Output d_gates = allocator.empty(args.dtype, args.saved_shape(4 * H));
  const Output h_prev = allocator.empty(args.dtype, args.saved_shape(P));
  const Output d_h = projected ? allocator.empty(args.dtype, args.saved_shape(P)) : Output{};
  const Output hidden = projected ? allocator.empty(args.dtype, args.saved_shape(H)) : Output{};
  const Output dh0 = needs & kNeedH0 ? allocator.empty(args.dtype, {D, B, P}) : Output{};
  const Output dc0 = needs & kNeedC0 ? allocator.empty(args.dtype, {D, B, H}) : Output{};
  const Output workspace = workspace_of(allocator, plan->workspace_bytes);

  cuda::BackwardPass pass{};
  pass.d_gates_map = args.saved_map(4 * H);
  pass.h_map = args.saved_map(P);
  pass.hidden_map = args.saved_map(H);
  pass.layer = arrays.describe(args, dh0, dc0);
  for (int n = 0; n < D; ++n) {
    pass.outputs[n] = {offset_by(d_gates, n * args.saved_size(4 * H), args.dtype),
                       offset_by(h_prev, n * args.saved_size(P), args.dtype),
                       offset_by(d_h, n * args.saved_size(P), args.dtype),
                       offset_by(hidden, n * args.saved_size(H), args.dtype)};
  }
  void* const stream = gates.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_backward(pass, *plan, workspace.data, stream);
  }
  return py::make_tuple(d_gates.object, h_prev.object, d_h.object, hidden.object, dh0.object, dc0.object);
}

py::tuple cuda_cell_forward(py::handle x_, py::handle h_, py::handle c_, py::handle w_ih_, py::handle w_hh_,
                            py::handle b_ih_, py::handle b_hh_, bool tf32) {
  const Array x = on_gpu(x_, "x"), h = on_gpu(h_, "h"), c = on_gpu(c_, "c"), w_ih = on_gpu(w_ih_, "w_ih"),
              w_hh = on_gpu(w_hh_, "w_hh"), b_ih = on_gpu(b_ih_, "b_ih"), b_hh = on_gpu(b_hh_, "b_hh");
  const CellShape cell = check_cell(x, h, c, w_ih, w_hh, b_ih, b_hh);
  const cuda::DeviceGuard guard(x.device().id);
  const cuda::LayerOptions options{cell.dtype, tf32, cuda::Strategy::kStep};
  const SequenceShape shape{1, cell.B, cell.I, cell.H, cell.H, false};
  const std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(shape, 1, false, options, x.device().id);

  const Allocator allocator(x);
  const Output h_next = allocator.empty(cell.dtype, cell.state);
  const Output c_next = allocator.empty(cell.dtype, cell.state);

  const LayerForward layer = cell_layer(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, c_next);
  void* const stream = x.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_forward(layer, {}, *plan, nullptr, stream);
  }
  return py::make_tuple(h_next.object, c_next.object);
}

py::dict cuda_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                   int num_directions, bool backward, const std::string& strategy, int device) {
  const cuda::DeviceGuard guard(device);
  const SequenceShape shape{T, B, 0, H, projected ? P : H, projected};
  const cuda::LayerOptions options{dtype_named(dtype), tf32, cuda::strategy_named(strategy)};
  const std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(shape, num_directions, backward, options, device);
  py::dict result, refused;
  for (const auto& [other, why] : plan->refused) refused[cuda::name_of(other)] = why;
  result["strategy"] = cuda::name_of(plan->strategy);
  result["blocks"] = plan->blocks();
  result["team"] = plan->strategy == cuda::Strategy::kStep ? 1 : plan->layout.ranks;
  result["registers"] = cuda::plan_registers(*plan);
  result["shared_bytes"] = plan->layout.shared_bytes;
  result["microseconds_per_step"] = plan->microseconds;
  result["refused"] = refused;
  return result;
}

#else

namespace {

[[noreturn]] void refuse() { throw std::runtime_error("this build of lstm_ext has no CUDA part"); }

}  // namespace

py::tuple cuda_layer_forward(py::handle, py::handle, py::handle, py::sequence, py::handle, py::handle, py::handle, int,
                             bool, int, bool, const std::string&) {
  refuse();
}

py::tuple cuda_layer_backward(py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::sequence,
                              py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int, bool, int,
                              bool, const std::string&) {
  refuse();
}

py::tuple cuda_cell_forward(py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, bool) {
  refuse();
}

py::dict cuda_plan(int64_t, int64_t, int64_t, int64_t, bool, const std::string&, bool, int, bool, const std::string&,
                   int) {
  refuse();
}

#endif

}  // namespace lstm_ext::ops
