#include "layer_args.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "../sizes.h"

namespace lstm_ext::ops {

namespace {

constexpr const char* kLike = " as x has";
constexpr int64_t kMostNamed = 100;  // numbers in a message

bool all_of_kind(Kind kind, std::initializer_list<py::handle> objects) {
  return std::all_of(objects.begin(), objects.end(), [&](py::handle object) {
    const Kind own = kind_of(object);
    return own == Kind::kNone || own == kind;
  });
}

}  // namespace

bool takes(const LayerCall& call) {
  const Kind kind = kind_of(call.x);
  if (kind != Kind::kTensor && kind != Kind::kNdarray) return false;
  if (!all_of_kind(kind, {call.h0, call.c0, call.lengths, call.resets, call.batch_sizes})) return false;
  PyObject* const weights = call.weights.ptr();
  if (!PyList_Check(weights) && !PyTuple_Check(weights)) return false;
  for (Py_ssize_t n = 0; n < PySequence_Fast_GET_SIZE(weights); ++n) {
    if (kind_of(PySequence_Fast_GET_ITEM(weights, n)) != kind) return false;
  }
  return true;
}

bool takes(const LayerCall& call, const Saved& saved, const OutputGrads& grads) {
  return takes(call) && all_of_kind(kind_of(call.x), {saved.y, saved.cells, saved.gates, grads.dy, grads.dh_n,
                                                      grads.dc_n, grads.dcells});
}

py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

LayerWeights DirectionArrays::pointers() const {
  return {w_ih.matrix(), w_hh.matrix(), b_ih.data(), b_hh.data(), w_hr.matrix()};
}

// ---- Arguments of every pass -------------------------------------------------------------------

LayerLayout::LayerLayout(const LayerCall& call, Dtype dtype_)
    : dtype(dtype_),
      compute_dtype(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
      directions(call.directions),
      batch_first(call.batch_first),
      packed(!call.batch_sizes.is_none()),
      D(directions == Directions::kBoth ? 2 : 1) {}

void LayerLayout::read_weights(const Array& like, py::handle weights, bool with_w_ih) {
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(weights.ptr()));
  const size_t first = with_w_ih ? 1 : 0;
  const size_t each = count / static_cast<size_t>(D);
  if (each < first + 1 || each > first + 4 || each * static_cast<size_t>(D) != count) {
    throw std::runtime_error("weights: expected " + std::to_string(first + 1) + " to " + std::to_string(first + 4) +
                             " arrays for each direction, got " + std::to_string(count) + " for " + std::to_string(D));
  }
  shape.projected = (each - first) % 2 == 0;
  for (size_t n = 0; n < static_cast<size_t>(D); ++n) {
    const auto get = [&](size_t index, const char* const(&names)[2]) {
      Array array(PySequence_Fast_GET_ITEM(weights.ptr(), n * each + index), names[n], like);
      array.expect_dtype(dtype, kLike);
      return array;
    };
    DirectionArrays& to = direction[n];
    if (with_w_ih) to.w_ih = get(0, {"w_ih", "w_ih_reverse"});
    to.w_hh = get(first, {"w_hh", "w_hh_reverse"});
    if (with_w_ih) to.w_ih.expect_dims(2);
    to.w_hh.expect_dims(2);
    if (n == 0) {
      if (with_w_ih) shape.H = to.w_hh.size(0) / 4;
      shape.P = to.w_hh.size(1);
    }
    const int64_t H = shape.H;
    if (with_w_ih) to.w_ih.expect_shape({4 * H, shape.I}, "4*H, I");
    to.w_hh.expect_shape({4 * H, shape.projected ? shape.P : H}, "4*H, P");
    if (each >= first + 3) {
      to.b_ih = get(first + 1, {"b_ih", "b_ih_reverse"});
      to.b_hh = get(first + 2, {"b_hh", "b_hh_reverse"});
      to.b_ih.expect_shape({4 * H}, "4*H");
      to.b_hh.expect_shape({4 * H}, "4*H");
    }
    if (shape.projected) {
      to.w_hr = get(each - 1, {"w_hr", "w_hr_reverse"});
      to.w_hr.expect_shape({shape.P, H}, "P, H");
    }
  }
  const bool any = (step || shape.H > 0) && (!shape.projected || shape.P > 0);
  if (!any) {
    throw std::runtime_error("w_hh: expected at least one hidden unit, got shape " +
                             text_of(direction[0].w_hh.shape()));
  }
}

void expect_countable(const SequenceShape& shape, int64_t rows) {
  if (are_countable(shape, rows)) return;
  throw std::runtime_error("x, weights: expected at most 2**52 numbers in an array of the layer, got " +
                           std::to_string(rows) + " rows, I = " + std::to_string(shape.I) +
                           ", H = " + std::to_string(shape.H) + ", P = " + std::to_string(shape.P));
}

void LayerLayout::check_state() const {
  for (const Array* array : {&h0, &c0}) {
    if (step && *array && (array->ndim() == 0 || array->ndim() > 2)) array->refuse_dims();
  }
  if (h0) {
    h0.expect_dtype(dtype, kLike);
    h0.expect_shape(state_shape(shape.P), !step ? "D, B, P" : batched ? "B, P" : "P");
  }
  if (c0) {
    c0.expect_dtype(dtype, kLike);
    c0.expect_shape(state_shape(shape.H), !step ? "D, B, H" : batched ? "B, H" : "H");
  }
}

void LayerLayout::check_resets() const {
  if (!resets) return;
  resets.expect_bool();
  if (batch_first) {
    resets.expect_shape({shape.B, shape.T}, "B, T");
  } else {
    resets.expect_shape({shape.T, shape.B}, "T, B");
  }
}

void LayerLayout::settle() {
  h0.settle();
  c0.settle();
  for (int n = 0; n < D; ++n) {
    DirectionArrays& of = direction[n];
    for (Array* array : {&of.w_ih, &of.w_hh, &of.b_ih, &of.b_hh, &of.w_hr}) array->settle();
  }
  if (!resets) return;
  resets.settle();
  masks.resets = static_cast<const uint8_t*>(resets.data());
  masks.reset_t_stride = resets.stride(batch_first ? 1 : 0);
  masks.reset_b_stride = resets.stride(batch_first ? 0 : 1);
}

InitialState LayerLayout::state(int n) const {
  return step ? InitialState{h0.matrix(), c0.matrix()} : InitialState{h0.matrix_at(n), c0.matrix_at(n)};
}

Shape LayerLayout::sequence_shape(int64_t width) const {
  if (step) return state_shape(width);
  if (packed) return {rows, width};
  return batch_first ? Shape{shape.B, shape.T, width} : Shape{shape.T, shape.B, width};
}

Shape LayerLayout::state_shape(int64_t width) const {
  if (!step) return {D, shape.B, width};
  return batched ? Shape{shape.B, width} : Shape{width};
}

Shape LayerLayout::saved_shape(int64_t width) const {
  return packed ? Shape{D, rows, width} : Shape{D, shape.T, shape.B, width};
}

RowMap LayerLayout::map_of(const Array& sequence) const {
  if (step) return {0, sequence.matrix().row_stride, nullptr};
  if (packed) return {0, sequence.stride(0), packed_offset};
  return {sequence.stride(batch_first ? 1 : 0), sequence.stride(batch_first ? 0 : 1), nullptr};
}

RowMap LayerLayout::contiguous_map(int64_t width) const {
  if (packed) return {0, width, packed_offset};
  return batch_first ? RowMap{width, shape.T * width, nullptr} : RowMap{shape.B * width, width, nullptr};
}

RowMap LayerLayout::saved_map(int64_t width) const {
  if (packed) return {0, width, packed_offset};
  return {shape.B * width, width, nullptr};
}

RowMap LayerLayout::saved_map_of(const Array& saved) const {
  if (packed) return {0, saved.stride(1), packed_offset};
  return {saved.stride(1), saved.stride(2), nullptr};
}

// ---- Arguments of a pass that reads x ----------------------------------------------------------

LayerArgs::LayerArgs(const LayerCall& call, Array x_)
    : LayerLayout(call, x_.float_dtype()),
      x(std::move(x_)),
      lengths(call.lengths, "lengths", x),
      batch_sizes(call.batch_sizes, "batch_sizes", x) {
  h0 = Array(call.h0, "h0", x);
  c0 = Array(call.c0, "c0", x);
  resets = Array(call.resets, "resets", x);
  read_axes();
  read_weights(x, call.weights, true);
  if (shape.T == 0) {
    throw std::runtime_error("x: expected at least one time step, got T = 0: shape " + text_of(x.shape()));
  }
  const int64_t steps_of_one = batch_first ? shape.T : 0;  // strides are made of T even without sequences
  expect_countable(shape, std::max(rows, steps_of_one));
  if (packed) read_batch_size();
  if (lengths) {
    lengths.expect_integers();
    lengths.expect_shape({shape.B}, "B");
  }
  check_resets();
  check_state();
}

void LayerArgs::read_contents() {
  x.settle();
  settle();
  lengths.settle();
  batch_sizes.settle();
  packed ? read_packing() : read_lengths();
}

void LayerArgs::read_axes() {
  step = !packed && x.ndim() < 3;
  batched = !step || x.ndim() == 2;
  if (step ? x.ndim() == 0 : x.ndim() != (packed ? 2 : 3)) x.expect_dims(packed ? 2 : 3);
  shape.I = x.size(x.ndim() - 1);
  if (packed) {
    batch_sizes.expect_integers();
    batch_sizes.expect_dims(1);
    shape.T = batch_sizes.size(0);
    rows = x.size(0);
    return;
  }
  if (step) {
    if (directions == Directions::kBoth || lengths || resets) {
      throw py::value_error("directions, lengths, resets: expected one direction and no masks without a time axis");
    }
    shape.T = 1;
    shape.B = batched ? x.size(0) : 1;
  } else {
    shape.T = x.size(batch_first ? 1 : 0);
    shape.B = x.size(batch_first ? 0 : 1);
  }
  rows = saturated_product(shape.T, shape.B);
}

void LayerArgs::read_lengths() {
  if (!lengths) return;
  // A copy, since these are used as indices, and the caller's may change once the GIL is released.
  lengths_.reserve(static_cast<size_t>(shape.B));
  for (int64_t b = 0; b < shape.B; ++b) lengths_.push_back(lengths.integer(b));
  masks.lengths = lengths_.data();
  if (lengths_.empty()) return;
  const auto [least, most] = std::minmax_element(lengths_.begin(), lengths_.end());
  if (*least < 0 || *most > shape.T) {
    throw py::value_error("lengths: expected values from 0 to T = " + std::to_string(shape.T) + ", got " +
                          std::to_string(*least) + " to " + std::to_string(*most));
  }
}

// Rows of a packed sequence are sorted by falling length; batch_sizes [T] says how many run at each time.
void LayerArgs::read_batch_size() {
  if (batch_first) throw py::value_error("batch_first: expected False with batch_sizes, got True");
  if (lengths || resets) throw py::value_error("lengths, resets: expected None with batch_sizes, got an array");
  if (shape.T > rows) refuse_packing();
  shape.B = py::cast<int64_t>(py::int_(batch_sizes.object()[py::int_(0)]));
  if (shape.B < 1 || shape.B > rows) refuse_packing();
}

void LayerArgs::refuse_packing() const {
  const std::string values = shape.T <= kMostNamed ? std::string(py::str(batch_sizes.object().attr("tolist")()))
                                                   : std::to_string(shape.T) + " of them";
  throw std::runtime_error("batch_sizes: expected positive, descending values with sum N = " + std::to_string(rows) +
                           ", got " + values);
}

void LayerArgs::read_packing() {
  std::vector<int64_t> sizes;
  sizes.reserve(static_cast<size_t>(shape.T));
  packed_offset_.reserve(static_cast<size_t>(shape.T));
  int64_t total = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    const int64_t size = batch_sizes.integer(t), before = t > 0 ? sizes.back() : shape.B;
    if (size < 1 || size > before || (t == 0 && size < before) || size > rows - total) refuse_packing();
    sizes.push_back(size);
    packed_offset_.push_back(total);
    total += size;
  }
  if (total != rows) refuse_packing();
  lengths_.resize(static_cast<size_t>(shape.B));
  for (size_t t = 0; t < sizes.size(); ++t) {
    const int64_t go_on = t + 1 < sizes.size() ? sizes[t + 1] : 0;
    for (int64_t b = go_on; b < sizes[t]; ++b) lengths_[static_cast<size_t>(b)] = static_cast<int64_t>(t) + 1;
  }
  masks.lengths = lengths_.data();
  packed_offset = packed_offset_.data();
}

// ---- What a kernel is told ---------------------------------------------------------------------

LayerForward describe_forward(const LayerLayout& args, const Output& y, const Output& h_n, const Output& c_n,
                              const Output& cells, const Output& gates) {
  const auto [T, B, I, H, P, projected] = args.shape;
  LayerForward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  if (H == 0) layer.shape.B = 0;              // all outputs are empty
  if (layer.shape.B == 0) layer.shape.T = 1;  // nothing to walk, however many steps there are
  layer.y_map = args.contiguous_map(args.D * P);
  layer.cells_map = args.saved_map(H);
  layer.gates_map = args.saved_map(4 * H);
  layer.num_directions = args.D;
  for (int n = 0; n < args.D; ++n) {
    layer.direction[n] = {args.reverse(n),
                          args.direction[n].pointers(),
                          args.state(n),
                          y.at(n * P),
                          h_n.at(n * B * P),
                          c_n.at(n * B * H),
                          cells.at(n * args.saved_size(H)),
                          gates.at(n * args.saved_size(4 * H))};
  }
  return layer;
}

BackwardArrays::BackwardArrays(const LayerLayout& args, const Array& like, const Saved& saved,
                               const OutputGrads& grads) {
  const auto [T, B, I, H, P, projected] = args.shape;
  const auto get = [&](py::handle object, const char* name, Dtype dtype, const Shape& shape) {
    Array array(object, name, like);
    if (array) array.expect_dtype(dtype);
    if (array) array.expect_shape(shape);
    return array;
  };
  dy = get(grads.dy, "dy", args.dtype, args.sequence_shape(args.D * P));
  dh_n = get(grads.dh_n, "dh_n", args.dtype, args.state_shape(P));
  dc_n = get(grads.dc_n, "dc_n", args.dtype, args.state_shape(H));
  dcells = get(grads.dcells, "dcells", args.compute_dtype, args.saved_shape(H));
  y = get(saved.y, "y", args.dtype, args.sequence_shape(args.D * P));
  cells = get(saved.cells, "cells", args.compute_dtype, args.saved_shape(H));
  gates = get(saved.gates, "gates", args.dtype, args.saved_shape(4 * H));
  if (!y || !cells || !gates)
    throw py::type_error("y, cells, gates: expected what layer_forward left with Save.ALL, got None");
}

void BackwardArrays::settle() {
  for (Array* array : {&dy, &dh_n, &dc_n, &dcells, &y, &cells, &gates}) array->settle();
}

LayerBackward BackwardArrays::describe(const LayerLayout& args, const Output& dh0, const Output& dc0) const {
  const auto [T, B, I, H, P, projected] = args.shape;
  LayerBackward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  if (B == 0) layer.shape.T = 1;  // nothing to walk, however many steps there are
  layer.y_map = args.map_of(y);
  layer.dy_map = args.map_of(dy);
  layer.cells_map = args.saved_map_of(cells);
  layer.d_cells_map = args.saved_map_of(dcells);
  layer.gates_map = args.saved_map_of(gates);
  layer.num_directions = args.D;
  for (int n = 0; n < args.D; ++n) {
    BackwardDirection& to = layer.direction[n];
    to.reverse = args.reverse(n);
    to.weights = args.direction[n].pointers();
    to.state = args.state(n);
    to.y = y.column(n * P);
    to.cells = cells.at(n);
    to.gates = gates.at(n);
    to.dy = dy.column(n * P);
    to.d_cells = dcells.at(n);
    to.dh_n = args.step ? dh_n.matrix() : dh_n.matrix_at(n);
    to.dc_n = args.step ? dc_n.matrix() : dc_n.matrix_at(n);
    to.dh0 = dh0.at(n * B * P);
    to.dc0 = dc0.at(n * B * H);
  }
  return layer;
}

}  // namespace lstm_ext::ops
