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

constexpr int kNeedH0 = 2, kNeedC0 = 4;

// The tests run these functions with the kernels on the CPU.
#if defined(LSTM_EXT_CUDA_ON_CPU)
constexpr dlpack::DeviceType kDevice = dlpack::kCpu;
#else
constexpr dlpack::DeviceType kDevice = dlpack::kCuda;
#endif

Array on_gpu(py::handle object, const char* name) { return {object, name, kDevice}; }

// The arguments that both passes have. `like` is the array [D, T, B, 4H] or [D, N, 4H] that shows the shape, dtype that
// of the layer.
struct CudaArgs {
  CudaArgs(const Array& like, Dtype dtype_, py::handle h0_, py::handle c0_, py::sequence weights, py::handle lengths_,
           py::handle resets_, py::handle packed_offset_, int directions_, bool batch_first_)
      : h0(on_gpu(h0_, "h0")),
        c0(on_gpu(c0_, "c0")),
        lengths(on_gpu(lengths_, "lengths")),
        resets(on_gpu(resets_, "resets")),
        packed_offset(on_gpu(packed_offset_, "packed_offset")),
        directions(static_cast<Directions>(directions_)),
        batch_first(batch_first_),
        D(directions == Directions::kBoth ? 2 : 1),
        dtype(dtype_),
        compute_dtype(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32) {
    for (const Array* array : {&h0, &c0, &lengths, &resets, &packed_offset}) array->expect_kind_of(like);
    like.expect_dims(packed() ? 3 : 4);
    if (packed() && !lengths) throw py::type_error("lengths: expected an array with packed_offset, got None");
    shape.T = packed() ? packed_offset.size(0) : like.size(1);
    shape.B = packed() ? lengths.size(0) : like.size(2);
    shape.H = like.size(like.ndim() - 1) / 4;
    rows = packed() ? like.size(1) : shape.T * shape.B;
    read_weights(like, weights);
    check_state();
    read_masks();
  }

  bool packed() const { return static_cast<bool>(packed_offset); }
  bool reverse(int n) const { return directions == Directions::kReverse || n == 1; }
  const int64_t* offsets() const { return static_cast<const int64_t*>(packed_offset.data()); }
  InitialState state(int n) const { return {matrix_at(h0, n, dtype), matrix_at(c0, n, dtype)}; }

  // As LayerArgs has them.
  Shape sequence_shape(int64_t width) const {
    if (packed()) return {rows, width};
    return batch_first ? Shape{shape.B, shape.T, width} : Shape{shape.T, shape.B, width};
  }
  Shape saved_shape(int64_t width) const {
    return packed() ? Shape{D, rows, width} : Shape{D, shape.T, shape.B, width};
  }
  RowMap map_of(const Array& sequence) const {
    if (!sequence) return {};
    if (packed()) return {0, sequence.stride(0), offsets()};
    return {sequence.stride(batch_first ? 1 : 0), sequence.stride(batch_first ? 0 : 1), nullptr};
  }
  RowMap contiguous_map(int64_t width) const {
    if (packed()) return {0, width, offsets()};
    return batch_first ? RowMap{width, shape.T * width, nullptr} : RowMap{shape.B * width, width, nullptr};
  }
  RowMap saved_map(int64_t width) const { return {packed() ? 0 : shape.B * width, width, offsets()}; }
  RowMap saved_map_of(const Array& saved) const {
    if (!saved) return {};
    return packed() ? RowMap{0, saved.stride(1), offsets()} : RowMap{saved.stride(1), saved.stride(2), nullptr};
  }

  Array h0, c0, lengths, resets, packed_offset;
  Directions directions;
  bool batch_first;
  int D;
  Dtype dtype, compute_dtype;
  SequenceShape shape{};
  Masks masks{};
  int64_t rows;
  DirectionArrays direction[2];

 private:
  void read_weights(const Array& like, const py::sequence& weights) {
    const size_t each = weights.size() / static_cast<size_t>(D);
    if (each < 1 || each > 4 || each * static_cast<size_t>(D) != weights.size()) {
      throw std::runtime_error("weights: expected 1 to 4 arrays for each direction, got " +
                               std::to_string(weights.size()) + " for " + std::to_string(D));
    }
    shape.projected = each % 2 == 0;
    for (size_t n = 0; n < static_cast<size_t>(D); ++n) {
      const auto get = [&](size_t index, const char* name, const Shape& expected) {
        Array array = on_gpu(weights[n * each + index], name);
        if (!array) throw py::type_error(std::string(name) + ": expected an array, got None");
        array.expect_kind_of(like);
        array.expect_dtype(dtype);
        array.expect_dims(expected.size());
        if (index == 0 && n == 0) shape.P = array.size(1);
        if (index > 0) array.expect_shape(expected);
        return array;
      };
      DirectionArrays& to = direction[n];
      to.w_hh = get(0, "w_hh", {4 * shape.H, shape.P});
      to.w_hh.expect_shape({4 * shape.H, shape.projected ? shape.P : shape.H});
      if (each >= 3) {
        to.b_ih = get(1, "b_ih", {4 * shape.H});
        to.b_hh = get(2, "b_hh", {4 * shape.H});
      }
      if (shape.projected) to.w_hr = get(each - 1, "w_hr", {shape.P, shape.H});
      const bool alike = to.w_hh.stride(0) == direction[0].w_hh.stride(0) &&
                         (!to.w_hr || to.w_hr.stride(0) == direction[0].w_hr.stride(0));
      if (!alike) throw std::runtime_error("weights: expected the same strides in both directions, got others");
    }
  }

  void check_state() const {
    if (h0) h0.expect_dtype(dtype), h0.expect_shape({D, shape.B, shape.P});
    if (c0) c0.expect_dtype(dtype), c0.expect_shape({D, shape.B, shape.H});
  }

  void read_masks() {
    if (packed()) packed_offset.expect_int64(), packed_offset.expect_shape({shape.T});
    if (lengths) {
      lengths.expect_int64();
      lengths.expect_shape({shape.B});
      masks.lengths = static_cast<const int64_t*>(lengths.data());
      if (lengths.stride(0) != 1 && shape.B > 1) throw std::runtime_error("lengths: expected a contiguous tensor");
    }
    if (!resets) return;
    resets.expect_bool();
    resets.expect_shape(batch_first ? Shape{shape.B, shape.T} : Shape{shape.T, shape.B});
    masks.resets = static_cast<const uint8_t*>(resets.data());
    masks.reset_t_stride = resets.stride(batch_first ? 1 : 0);
    masks.reset_b_stride = resets.stride(batch_first ? 0 : 1);
  }
};

Array expect_like(const Array& like, py::handle object, const char* name, Dtype dtype, const Shape& shape) {
  Array array = on_gpu(object, name);
  if (!array) return array;
  array.expect_kind_of(like);
  array.expect_dtype(dtype);
  array.expect_shape(shape);
  return array;
}

// Memory for one call, from the framework's allocator: it stays valid in stream order.
Output workspace_of(const Allocator& allocator, int64_t bytes) {
  return bytes > 0 ? allocator.empty(Dtype::kFloat32, {(bytes + 3) / 4}) : Output{};
}

#if defined(LSTM_EXT_CUDA_ON_CPU)
struct OnDevice {
  explicit OnDevice(int) {}
};
#else
using OnDevice = cuda::DeviceGuard;
#endif

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
  const OnDevice guard(xw.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, strategy};
  const cuda::Plan& plan = cuda::plan_layer(args.shape, args.D, false, options, xw.device().id);

  const Allocator allocator(xw);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = allocator.empty(args.dtype, {args.D, B, P});
  const Output c_n = allocator.empty(args.dtype, {args.D, B, H});
  const Output cells = save >= 1 ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const bool in_place = args.dtype == args.compute_dtype;
  const Output gates = save >= 2 && !in_place ? allocator.empty(args.dtype, args.saved_shape(4 * H)) : Output{};
  const Output workspace = workspace_of(allocator, plan.workspace_bytes);

  LayerForward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  layer.y_map = args.contiguous_map(args.D * P);
  layer.cells_map = args.saved_map(H);
  layer.gates_map = args.saved_map(4 * H);
  layer.num_directions = args.D;
  const void* projected_x[2] = {};
  for (int n = 0; n < args.D; ++n) {
    projected_x[n] = at(xw, n, args.compute_dtype);
    layer.direction[n] = {args.reverse(n),
                          args.direction[n].pointers(),
                          args.state(n),
                          offset_by(y, n * P, args.dtype),
                          offset_by(h_n, n * B * P, args.dtype),
                          offset_by(c_n, n * B * H, args.dtype),
                          offset_by(cells, n * args.rows * H, args.compute_dtype),
                          save < 2   ? nullptr
                          : in_place ? const_cast<void*>(projected_x[n])
                                     : offset_by(gates, n * args.rows * 4 * H, args.dtype)};
  }
  void* const stream = xw.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_forward(layer, projected_x, plan, options, xw.device().id, workspace.data, stream);
  }
  const py::object saved = save >= 2 && in_place ? py::reinterpret_borrow<py::object>(xw_) : gates.object;
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, saved);
}

py::tuple cuda_layer_backward(py::handle dy_, py::handle dh_n_, py::handle dc_n_, py::handle dcells_, py::handle h0,
                              py::handle c0, py::sequence weights, py::handle y_, py::handle cells_, py::handle gates_,
                              py::handle lengths, py::handle resets, py::handle packed_offset, int directions,
                              bool batch_first, int needs, bool tf32, const std::string& strategy) {
  const Array gates = on_gpu(gates_, "gates");
  if (!gates) throw py::type_error("gates: expected an array, got None");
  const CudaArgs args(gates, gates.float_dtype(), h0, c0, weights, lengths, resets, packed_offset, directions,
                      batch_first);
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t D = args.D;
  const Array dy = expect_like(gates, dy_, "dy", args.dtype, args.sequence_shape(D * P));
  const Array dh_n = expect_like(gates, dh_n_, "dh_n", args.dtype, {D, B, P});
  const Array dc_n = expect_like(gates, dc_n_, "dc_n", args.dtype, {D, B, H});
  const Array dcells = expect_like(gates, dcells_, "dcells", args.compute_dtype, args.saved_shape(H));
  const Array y = expect_like(gates, y_, "y", args.dtype, args.sequence_shape(D * P));
  const Array cells = expect_like(gates, cells_, "cells", args.compute_dtype, args.saved_shape(H));
  if (!y || !cells) throw py::type_error("y, cells: expected what cuda_layer_forward left with save=2, got None");
  const OnDevice guard(gates.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, strategy};
  const cuda::Plan& plan = cuda::plan_layer(args.shape, args.D, true, options, gates.device().id);

  const Allocator allocator(gates);
  const Output d_gates = allocator.empty(args.dtype, args.saved_shape(4 * H));
  const Output h_prev = allocator.empty(args.dtype, args.saved_shape(P));
  const Output d_h = projected ? allocator.empty(args.dtype, args.saved_shape(P)) : Output{};
  const Output hidden = projected ? allocator.empty(args.dtype, args.saved_shape(H)) : Output{};
  const Output dh0 = needs & kNeedH0 ? allocator.empty(args.dtype, {D, B, P}) : Output{};
  const Output dc0 = needs & kNeedC0 ? allocator.empty(args.dtype, {D, B, H}) : Output{};
  const Output workspace = workspace_of(allocator, plan.workspace_bytes);

  cuda::BackwardPass pass{};
  pass.d_gates_map = args.saved_map(4 * H);
  pass.h_map = args.saved_map(P);
  pass.hidden_map = args.saved_map(H);
  LayerBackward& layer = pass.layer;
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  layer.y_map = args.map_of(y);
  layer.dy_map = args.map_of(dy);
  layer.cells_map = args.saved_map_of(cells);
  layer.d_cells_map = args.saved_map_of(dcells);
  layer.gates_map = args.saved_map_of(gates);
  layer.num_directions = args.D;
  for (int n = 0; n < D; ++n) {
    BackwardDirection& to = layer.direction[n];
    to.reverse = args.reverse(n);
    to.weights = args.direction[n].pointers();
    to.state = args.state(n);
    to.y = column_of(y, n * P, args.dtype);
    to.cells = at(cells, n, args.compute_dtype);
    to.gates = at(gates, n, args.dtype);
    to.dy = column_of(dy, n * P, args.dtype);
    to.d_cells = at(dcells, n, args.compute_dtype);
    to.dh_n = matrix_at(dh_n, n, args.dtype);
    to.dc_n = matrix_at(dc_n, n, args.dtype);
    to.dh0 = offset_by(dh0, n * B * P, args.dtype);
    to.dc0 = offset_by(dc0, n * B * H, args.dtype);
    pass.outputs[n] = {offset_by(d_gates, n * args.rows * 4 * H, args.dtype),
                       offset_by(h_prev, n * args.rows * P, args.dtype), offset_by(d_h, n * args.rows * P, args.dtype),
                       offset_by(hidden, n * args.rows * H, args.dtype)};
  }
  void* const stream = gates.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_backward(pass, plan, options, gates.device().id, workspace.data, stream);
  }
  return py::make_tuple(d_gates.object, h_prev.object, d_h.object, hidden.object, dh0.object, dc0.object);
}

py::tuple cuda_cell_forward(py::handle x_, py::handle h_, py::handle c_, py::handle w_ih_, py::handle w_hh_,
                            py::handle b_ih_, py::handle b_hh_, bool tf32) {
  const Array x = on_gpu(x_, "x"), h = on_gpu(h_, "h"), c = on_gpu(c_, "c"), w_ih = on_gpu(w_ih_, "w_ih"),
              w_hh = on_gpu(w_hh_, "w_hh"), b_ih = on_gpu(b_ih_, "b_ih"), b_hh = on_gpu(b_hh_, "b_hh");
  const CellShape cell = check_cell(x, h, c, w_ih, w_hh, b_ih, b_hh);
  const OnDevice guard(x.device().id);
  const cuda::LayerOptions options{cell.dtype, tf32, "step"};
  const SequenceShape shape{1, cell.B, cell.I, cell.H, cell.H, false};
  const cuda::Plan& plan = cuda::plan_layer(shape, 1, false, options, x.device().id);

  const Allocator allocator(x);
  const Output h_next = allocator.empty(cell.dtype, cell.state);
  const Output c_next = allocator.empty(cell.dtype, cell.state);

  const LayerForward layer = cell_layer(cell, x, h, c, w_ih, w_hh, b_ih, b_hh, h_next, c_next);
  void* const stream = x.current_stream();
  {
    py::gil_scoped_release release;
    cuda::layer_forward(layer, {}, plan, options, x.device().id, nullptr, stream);
  }
  return py::make_tuple(h_next.object, c_next.object);
}

py::dict cuda_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                   int num_directions, bool backward, const std::string& strategy, int device) {
  const OnDevice guard(device);
  const SequenceShape shape{T, B, 0, H, projected ? P : H, projected};
  const cuda::LayerOptions options{dtype_named(dtype), tf32, strategy};
  const cuda::Plan& plan = cuda::plan_layer(shape, num_directions, backward, options, device);
  py::dict result, refused;
  for (const auto& [name, why] : plan.refused) refused[py::str(name)] = why;
  result["strategy"] = plan.strategy;
  result["blocks"] = plan.blocks;
  result["team"] = plan.strategy == "step" ? 1 : plan.spread.ranks;
  result["registers"] = cuda::plan_registers(plan, shape, backward, options, device);
  result["shared_bytes"] = plan.shared_bytes;
  result["microseconds_per_step"] = plan.microseconds;
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
