#if defined(LSTM_EXT_WITH_CUDA)
#include <algorithm>
#include <stdexcept>

#include "../cuda/layer.h"
#include "../sizes.h"
#include "gil.h"
#include "gpu_hooks.h"
#include "gpu_plan.h"
#include "layer_args.h"
#include "ops.h"

namespace lstm_ext::ops {
namespace {

// Those of a pass whose steps alone run here, as ops.h describes them.
struct StepsArgs : LayerLayout {
  // `like` is the array [D, T, B, 4H] or [D, N, 4H] that shows the shape, `dtype` that of the layer.
  StepsArgs(const LayerCall& steps, const Array& like, Dtype dtype)
      : LayerLayout(steps, dtype),
        lengths(steps.lengths, "lengths", like),
        offsets(steps.batch_sizes, "batch_sizes", like),
        seed(steps.seed, "seed", like) {
    h0 = Array(steps.h0, "h0", like);
    c0 = Array(steps.c0, "c0", like);
    resets = Array(steps.resets, "resets", like);
    like.expect_dims(packed ? 3 : 4);
    if (packed && !lengths) throw py::type_error("lengths: expected an array with batch_sizes, got None");
    shape.T = packed ? offsets.size(0) : like.size(1);
    shape.B = packed ? lengths.size(0) : like.size(2);
    shape.H = like.size(like.ndim() - 1) / 4;
    if (cell && cell->tensorflow) shape.P = shape.H;
    rows = packed ? like.size(1) : saturated_product(shape.T, shape.B);
    read_weights(like, steps.weights, false);
    expect_steps(like);
    expect_countable(shape, std::max(rows, shape.B));
    check_state();
    check_resets();
    if (cell) check_seed(seed);
    settle();
    seed.settle();
    lengths.settle();
    offsets.settle();
    expect_same_strides();
    read_lengths();
  }

  // None for the plain LSTM; `y` is that of a backward pass.
  std::optional<LayerCell> described_cell(const Array& y = {}) const {
    if (!cell) return {};
    LayerCell described = describe_cell(y);
    described.seed = static_cast<const int64_t*>(seed.data());
    return described;
  }

  Array lengths, offsets, seed;

 private:
  // One launch walks both directions with one description of the weights.
  void expect_same_strides() const {
    const DirectionArrays &first = direction[0], &last = direction[D - 1];
    const bool same_kernel = !first.w_ih || first.w_ih.stride(0) == last.w_ih.stride(0);
    if (!same_kernel || (first.w_hh && first.w_hh.stride(0) != last.w_hh.stride(0)) ||
        (last.w_hr && first.w_hr.stride(0) != last.w_hr.stride(0)))
      throw std::runtime_error("weights: expected the same strides in both directions, got others");
  }

  // They stay on the device, whose kernels clamp them.
  void read_lengths() {
    if (packed) {
      offsets.expect_int64();
      offsets.expect_shape({shape.T}, "T");
      packed_offset = static_cast<const int64_t*>(offsets.data());
    }
    if (!lengths) return;
    lengths.expect_int64();
    check_lengths(lengths);
    masks.lengths = static_cast<const int64_t*>(lengths.data());
    if (!lengths.contiguous()) throw std::runtime_error("lengths: expected a contiguous tensor");
  }
};

// What a cell that normalises has normalised, for its backward pass; nothing of another.
struct NormArrays {
  NormArrays(const StepsArgs& args, const Array& like, py::handle normed_, py::handle scales_) {
    if (!args.cell || args.cell->norm == Norm::kNone) return;
    num_scales = args.cell->norm == Norm::kRows ? 1 : 4;
    normed = get(args, like, normed_, "normed", 4 * args.shape.H);
    scales = get(args, like, scales_, "scales", num_scales);
  }

  explicit operator bool() const { return num_scales > 0; }

  Array normed, scales;
  int64_t num_scales = 0;

 private:
  static Array get(const StepsArgs& args, const Array& like, py::handle object, const char* name, int64_t width) {
    Array array(object, name, like);
    if (!array) throw py::type_error(std::string(name) + ": expected an array for a cell that normalises, got None");
    array.expect_dtype(args.compute_dtype);
    array.expect_shape(args.saved_shape(width));
    array.settle();
    if (!array.contiguous()) throw std::runtime_error(std::string(name) + ": expected a contiguous tensor");
    return array;
  }
};

// Memory for one call, from the framework's allocator: it stays valid in stream order.
Output workspace_of(const Allocator& allocator, int64_t bytes) {
  return bytes > 0 ? allocator.empty(Dtype::kFloat32, {(bytes + 3) / 4}) : Output{};
}

}  // namespace

py::object cuda_layer_forward(const LayerCall& steps, Save save, bool tf32, const std::string& strategy) {
  if (!takes(steps)) return not_implemented();
  Array xw(steps.x, "xw", dlpack::kCuda);
  xw.settle();
  const auto weights = py::reinterpret_borrow<py::sequence>(steps.weights);
  if (weights.size() == 0) throw py::type_error("weights: expected at least one array, got none");
  const StepsArgs args(steps, xw, Array(weights[0], "w_hh", xw).float_dtype());
  xw.expect_dtype(args.compute_dtype);
  if (!xw.contiguous()) throw std::runtime_error("xw: expected a contiguous tensor, got another");
  const auto [T, B, I, H, P, projected] = args.shape;
  const cuda::DeviceGuard guard(xw.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, cuda::forced_by(strategy), traits_of(args.cell)};
  std::string refused;
  const auto plan = plan_to_launch(args.shape, args.D, false, options, xw.device().id, refused);
  if (!plan) return py::str(refused);

  const Allocator allocator(xw);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * P));
  const Output h_n = allocator.empty(args.dtype, args.state_shape(P));
  const Output c_n = allocator.empty(args.dtype, args.state_shape(H));
  const Output cells = save >= Save::kCells ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const bool saves_gates = save >= Save::kAll, in_place = args.dtype == args.compute_dtype;
  const Output gates = saves_gates && !in_place ? allocator.empty(args.dtype, args.saved_shape(4 * H)) : Output{};
  const Output workspace = workspace_of(allocator, plan->workspace_bytes);

  LayerForward layer = describe_forward(args, y, h_n, c_n, cells, gates);
  const std::optional<LayerCell> cell = args.described_cell();
  if (cell) layer.cell = &*cell;
  const void* projected_x[2] = {};
  for (int n = 0; n < args.D; ++n) {
    projected_x[n] = xw.at(n);
    if (saves_gates && in_place) layer.direction[n].gates = const_cast<void*>(projected_x[n]);
  }
  void* const stream = xw.current_stream();
  {
    const GilRelease release;
    cuda::layer_forward(layer, projected_x, *plan, workspace.data, stream);
  }
  const py::object saved = saves_gates && in_place ? py::reinterpret_borrow<py::object>(steps.x) : gates.object;
  return py::make_tuple(y.object, h_n.object, c_n.object, cells.object, saved);
}

py::object cuda_h_before(const LayerCall& steps, const Saved& saved) {
  const py::handle none(Py_None);
  const OutputGrads no_grads{none, none, none, none};
  if (!takes(steps, saved, no_grads)) return not_implemented();
  Array gates(steps.x, "gates", dlpack::kCuda);
  gates.settle();
  const StepsArgs args(steps, gates, gates.float_dtype());
  if (!args.cell || args.cell->norm == Norm::kNone) throw py::value_error("cell: expected one that normalises");
  BackwardArrays arrays(args, gates, saved, no_grads);
  arrays.settle();
  const cuda::DeviceGuard guard(gates.device().id);
  const int64_t P = args.shape.P;
  const Output h = Allocator(gates).empty(args.dtype, args.saved_shape(P));

  cuda::StepsBefore before{args.shape, args.masks, args.packed_offset, args.shape.T, args.saved_map(P), {}};
  for (int n = 0; n < args.D; ++n) before.direction[n] = {args.reverse(n), args.state(n), h.at(n * args.saved_size(P))};
  const std::optional<LayerCell> cell = args.described_cell(arrays.y);
  const int capability = cuda::device_limits(gates.device().id).compute_capability;
  void* const stream = gates.current_stream();
  {
    const GilRelease release;
    cuda::layer_h_before(before, *cell, cuda::arithmetic_of(args.dtype, false, capability), args.D, stream);
  }
  return h.object;
}

py::object cuda_layer_backward(const LayerCall& steps, const Saved& saved, const OutputGrads& grads, Needs needs,
                               bool tf32, const std::string& strategy, py::handle normed, py::handle scales) {
  if (!takes(steps, saved, grads)) return not_implemented();
  Array gates(steps.x, "gates", dlpack::kCuda);
  gates.settle();
  const StepsArgs args(steps, gates, gates.float_dtype());
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t D = args.D;
  BackwardArrays arrays(args, gates, saved, grads);
  arrays.settle();
  const NormArrays norm(args, gates, normed, scales);
  const cuda::DeviceGuard guard(gates.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, cuda::forced_by(strategy), traits_of(args.cell)};
  std::string refused;
  const auto plan = plan_to_launch(args.shape, args.D, true, options, gates.device().id, refused);
  if (!plan) return py::str(refused);

  const Allocator allocator(gates);
  const Output d_gates = allocator.empty(args.dtype, args.saved_shape(4 * H));
  const Output h_prev = allocator.empty(args.dtype, args.saved_shape(P));
  const Output d_h = projected ? allocator.empty(args.dtype, args.saved_shape(P)) : Output{};
  const Output hidden = projected ? allocator.empty(args.dtype, args.saved_shape(H)) : Output{};
  const Output hidden_prev = projected && !args.cell ? allocator.empty(args.dtype, args.saved_shape(H)) : Output{};
  const Output dh0 = has(needs, Needs::kH0) ? allocator.empty(args.dtype, args.state_shape(P)) : Output{};
  const Output dc0 = has(needs, Needs::kC0) ? allocator.empty(args.dtype, args.state_shape(H)) : Output{};
  const bool peephole = args.cell && args.cell->peephole && has(needs, Needs::kWeights);
  const Output c_prev = peephole ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output c_new = peephole ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output d_pre = norm ? allocator.empty(args.compute_dtype, args.saved_shape(4 * H)) : Output{};
  const bool scales_c = norm && has(needs, Needs::kWeights);
  const Output d_seen = scales_c ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output d_gamma_h = scales_c ? allocator.empty(args.compute_dtype, args.saved_shape(H)) : Output{};
  const Output workspace = workspace_of(allocator, plan->workspace_bytes);

  cuda::BackwardPass pass{};
  cuda::BackwardCellArrays cell_arrays{};
  cell_arrays.scales_map = args.saved_map(norm.num_scales);
  pass.d_gates_map = args.saved_map(4 * H);
  pass.h_map = args.saved_map(P);
  pass.hidden_map = args.saved_map(H);
  pass.layer = arrays.describe(args, dh0, dc0);
  const std::optional<LayerCell> cell = args.described_cell(arrays.y);
  if (cell) pass.layer.cell = &*cell;
  for (int n = 0; n < D; ++n) {
    pass.outputs[n] = {d_gates.at(n * args.saved_size(4 * H)), h_prev.at(n * args.saved_size(P)),
                       d_h.at(n * args.saved_size(P)), hidden.at(n * args.saved_size(H)),
                       (projected ? hidden_prev : h_prev).at(n * args.saved_size(H))};
    cell_arrays.cells[n] = {c_prev.at(n * args.saved_size(H)), c_new.at(n * args.saved_size(H))};
    cell_arrays.normed[n] = {const_cast<void*>(norm.normed.at(n)), norm.scales.at(n),
                             d_pre.at(n * args.saved_size(4 * H)), d_seen.at(n * args.saved_size(H)),
                             d_gamma_h.at(n * args.saved_size(H))};
  }
  void* const stream = gates.current_stream();
  {
    const GilRelease release;
    cuda::layer_backward(pass, cell_arrays, *plan, workspace.data, stream);
  }
  return py::make_tuple(d_gates.object, h_prev.object, d_h.object, hidden.object, hidden_prev.object, dh0.object,
                        dc0.object, c_prev.object, c_new.object, d_pre.object, d_seen.object, d_gamma_h.object);
}

py::object cuda_step_forward(const LayerCall& call, bool tf32) {
  if (!takes(call)) return not_implemented();
  const Array x(call.x, "x", dlpack::kCuda);
  if (x.ndim() > 2 || !call.batch_sizes.is_none()) {
    throw std::runtime_error("x: expected no time axis, got shape " + text_of(x.shape()));
  }
  LayerArgs args(call, dlpack::kCuda);
  if (args.shape.projected) throw std::runtime_error("w_hr: expected none in a single step, got one");
  if (args.resets) throw std::runtime_error("resets: expected None in a single step, got an array");
  if (args.cell && args.cell->norm != Norm::kNone)
    throw std::runtime_error("cell: expected one that does not normalise in a single step");
  const cuda::DeviceGuard guard(args.x.device().id);
  const cuda::LayerOptions options{args.dtype, tf32, {cuda::Strategy::kStep}, traits_of(args.cell)};
  std::string refused;
  const auto plan = plan_to_launch(args.shape, 1, false, options, args.x.device().id, refused);
  if (!plan) return py::str(refused);

  const Allocator allocator(args.x);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.shape.P));
  const Output c_n = allocator.empty(args.dtype, args.state_shape(args.shape.H));

  args.read_contents();
  LayerForward layer = describe_forward(args, y, {}, c_n, {}, {});
  layer.x = args.x.data();
  layer.x_map = args.map_of(args.x);
  LayerCell cell;
  if (args.cell) layer.cell = &(cell = args.describe_cell());
  cell.seed = static_cast<const int64_t*>(args.seed.data());
  void* const stream = args.x.current_stream();
  {
    const GilRelease release;
    cuda::layer_forward(layer, {}, *plan, nullptr, stream);
  }
  return py::make_tuple(y.object, py::none(), c_n.object, py::none(), py::none());
}

py::dict cuda_plan(int64_t T, int64_t B, int64_t H, int64_t P, bool projected, const std::string& dtype, bool tf32,
                   int num_directions, bool backward, const std::string& strategy, int device, py::handle cell) {
  introduce(device);
  const cuda::DeviceGuard guard(device);
  const SequenceShape shape{T, B, 0, H, projected ? P : H, projected};
  expect_countable(shape, saturated_product(T, B));
  const cuda::LayerOptions options{dtype_named(dtype), tf32, cuda::forced_by(strategy), traits_of(cell_of(cell))};
  const std::shared_ptr<const cuda::Plan> plan = cuda::plan_layer(shape, num_directions, backward, options, device);
  py::dict result = describe(*plan);
  result["registers"] = cuda::plan_registers(*plan);
  result["kernel"] = cuda::plan_kernel(*plan);
  return result;
}

}  // namespace lstm_ext::ops

#endif
