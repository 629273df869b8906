#include "layer_args.h"

#include <stdexcept>
#include <utility>

namespace lstm_ext::ops {

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
  }
  throw std::logic_error("bytes_of: no such dtype");
}

LayerWeights DirectionArrays::pointers() const {
  return {w_ih.matrix(), w_hh.matrix(), b_ih.data(), b_hh.data(), w_hr.matrix()};
}

// ---- Arguments of every pass -------------------------------------------------------------------

LayerLayout::LayerLayout(Dtype dtype_, int directions_, bool batch_first_, bool packed_)
    : dtype(dtype_),
      compute_dtype(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
      directions(static_cast<Directions>(directions_)),
      batch_first(batch_first_),
      packed(packed_),
      D(directions == Directions::kBoth ? 2 : 1) {
  if (directions_ < 0 || directions_ > 2) {
    throw py::value_error("directions: expected 0 (forward), 1 (reverse) or 2 (both), got " +
                          std::to_string(directions_));
  }
}

void LayerLayout::read_weights(const Array& like, py::sequence weights, bool with_w_ih) {
  weights_ = py::tuple(weights);
  const size_t first = with_w_ih ? 1 : 0;
  const size_t each = weights_.size() / static_cast<size_t>(D);
  if (each < first + 1 || each > first + 4 || each * static_cast<size_t>(D) != weights_.size()) {
    throw std::runtime_error("weights: expected " + std::to_string(first + 1) + " to " + std::to_string(first + 4) +
                             " arrays for each direction, got " + std::to_string(weights_.size()) + " for " +
                             std::to_string(D));
  }
  shape.projected = (each - first) % 2 == 0;
  for (size_t n = 0; n < static_cast<size_t>(D); ++n) {
    const auto get = [&](size_t index, const char* name) {
      Array array(weights_[n * each + index], name, like.device().type);
      if (!array) throw py::type_error(std::string(name) + ": expected an array, got None");
      array.expect_kind_of(like);
      array.expect_dtype(dtype);
      return array;
    };
    DirectionArrays& to = direction[n];
    if (with_w_ih) to.w_ih = get(0, "w_ih");
    to.w_hh = get(first, "w_hh");
    if (with_w_ih) to.w_ih.expect_dims(2);
    to.w_hh.expect_dims(2);
    if (n == 0) {
      if (with_w_ih) shape.H = to.w_ih.size(0) / 4;
      shape.P = to.w_hh.size(1);
    }
    if (with_w_ih) to.w_ih.expect_shape({4 * shape.H, shape.I});
    to.w_hh.expect_shape({4 * shape.H, shape.projected ? shape.P : shape.H});
    if (each >= first + 3) {
      to.b_ih = get(first + 1, "b_ih");
      to.b_hh = get(first + 2, "b_hh");
      to.b_ih.expect_shape({4 * shape.H});
      to.b_hh.expect_shape({4 * shape.H});
    }
    if (shape.projected) {
      to.w_hr = get(each - 1, "w_hr");
      to.w_hr.expect_shape({shape.P, shape.H});
    }
  }
}

void LayerLayout::check_state() const {
  if (h0) {
    h0.expect_dtype(dtype);
    h0.expect_shape({D, shape.B, shape.P});
  }
  if (c0) {
    c0.expect_dtype(dtype);
    c0.expect_shape({D, shape.B, shape.H});
  }
}

void LayerLayout::read_resets() {
  if (!resets) return;
  resets.expect_bool();
  resets.expect_shape(batch_first ? Shape{shape.B, shape.T} : Shape{shape.T, shape.B});
  masks.resets = static_cast<const uint8_t*>(resets.data());
  masks.reset_t_stride = resets.stride(batch_first ? 1 : 0);
  masks.reset_b_stride = resets.stride(batch_first ? 0 : 1);
}

InitialState LayerLayout::state(int n) const { return {matrix_at(h0, n, dtype), matrix_at(c0, n, dtype)}; }

Shape LayerLayout::sequence_shape(int64_t width) const {
  if (packed) return {rows, width};
  return batch_first ? Shape{shape.B, shape.T, width} : Shape{shape.T, shape.B, width};
}

Shape LayerLayout::saved_shape(int64_t width) const {
  return packed ? Shape{D, rows, width} : Shape{D, shape.T, shape.B, width};
}

RowMap LayerLayout::map_of(const Array& sequence) const {
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

// ---- Arguments of a pass on the CPU ------------------------------------------------------------

namespace {

Dtype dtype_of(const Array& x) {
  if (!x) throw py::type_error("x: expected an array, got None");
  return x.float_dtype();
}

}  // namespace

LayerArgs::LayerArgs(py::handle x_, py::handle h0_, py::handle c0_, py::sequence weights, py::handle lengths_,
                     py::handle resets_, py::handle batch_sizes_, int directions_, bool batch_first_)
    : LayerArgs(Array(x_, "x"), h0_, c0_, weights, lengths_, resets_, batch_sizes_, directions_, batch_first_) {}

LayerArgs::LayerArgs(Array x_, py::handle h0_, py::handle c0_, py::sequence weights, py::handle lengths_,
                     py::handle resets_, py::handle batch_sizes_, int directions_, bool batch_first_)
    : LayerLayout(dtype_of(x_), directions_, batch_first_, !batch_sizes_.is_none()),
      x(std::move(x_)),
      lengths(lengths_, "lengths"),
      batch_sizes(batch_sizes_, "batch_sizes") {
  h0 = Array(h0_, "h0");
  c0 = Array(c0_, "c0");
  resets = Array(resets_, "resets");
  for (const Array* array : {&h0, &c0, &lengths, &resets, &batch_sizes}) array->expect_kind_of(x);
  x.expect_dims(packed ? 2 : 3);
  shape.I = x.size(x.ndim() - 1);
  read_weights(x, weights, true);
  if (packed) {
    read_packing();
  } else {
    shape.T = x.size(batch_first ? 1 : 0);
    shape.B = x.size(batch_first ? 0 : 1);
    rows = shape.T * shape.B;
    read_lengths();
    read_resets();
  }
  if (shape.T == 0) throw std::runtime_error("x: expected at least one time step, got shape " + text_of(x.shape()));
  check_state();
}

void LayerArgs::read_lengths() {
  if (!lengths) return;
  lengths.expect_int64();
  lengths.expect_shape({shape.B});
  // A copy, since these are used as indices, and the caller's may change once the GIL is released.
  const int64_t* given = static_cast<const int64_t*>(lengths.data());
  lengths_.assign(given, given + shape.B);
  masks.lengths = lengths_.data();
  for (int64_t b = 0; b < shape.B; ++b) {
    if (masks.lengths[b] < 0 || masks.lengths[b] > shape.T) {
      throw py::value_error("lengths: expected values from 0 to " + std::to_string(shape.T) + ", got " +
                            std::to_string(masks.lengths[b]) + " at " + std::to_string(b));
    }
  }
}

// Rows of a packed sequence are sorted by falling length; batch_sizes [T] says how many run at each time.
void LayerArgs::read_packing() {
  if (batch_first) throw py::value_error("batch_first: expected False with batch_sizes, got True");
  if (lengths || resets) throw py::value_error("lengths, resets: expected None with batch_sizes, got an array");
  batch_sizes.expect_dims(1);
  batch_sizes.expect_int64();
  const int64_t* sizes = static_cast<const int64_t*>(batch_sizes.data());
  shape.T = batch_sizes.size(0);
  shape.B = shape.T > 0 ? sizes[0] : 0;
  rows = x.size(0);
  int64_t total = 0;
  for (int64_t t = 0; t < shape.T; ++t) {
    if (sizes[t] <= 0 || (t > 0 && sizes[t] > sizes[t - 1]) || sizes[t] > rows - total) {
      throw py::value_error("batch_sizes: expected positive, not rising values with the sum " + std::to_string(rows) +
                            ", got " + std::to_string(sizes[t]) + " at " + std::to_string(t));
    }
    packed_offset_.push_back(total);
    total += sizes[t];
  }
  if (total != rows) {
    throw py::value_error("batch_sizes: expected the sum " + std::to_string(rows) + ", got " + std::to_string(total));
  }
  lengths_.resize(static_cast<size_t>(shape.B));
  for (int64_t t = 0; t < shape.T; ++t) {
    for (int64_t b = t + 1 < shape.T ? sizes[t + 1] : 0; b < sizes[t]; ++b) lengths_[static_cast<size_t>(b)] = t + 1;
  }
  masks.lengths = lengths_.data();
  packed_offset = packed_offset_.data();
}

// ---- What a kernel is told ---------------------------------------------------------------------

namespace {

// Absent, or exactly of this dtype and shape.
Array expect_like(const Array& like, py::handle object, const char* name, Dtype dtype, const Shape& shape) {
  Array array(object, name, like.device().type);
  if (!array) return array;
  array.expect_kind_of(like);
  array.expect_dtype(dtype);
  array.expect_shape(shape);
  return array;
}

}  // namespace

LayerForward describe_forward(const LayerLayout& args, const Output& y, const Output& h_n, const Output& c_n,
                              const Output& cells, const Output& gates) {
  const auto [T, B, I, H, P, projected] = args.shape;
  LayerForward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  layer.y_map = args.contiguous_map(args.D * P);
  layer.cells_map = args.saved_map(H);
  layer.gates_map = args.saved_map(4 * H);
  layer.num_directions = args.D;
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
  return layer;
}

BackwardArrays::BackwardArrays(const LayerLayout& args, const Array& like, py::handle dy_, py::handle dh_n_,
                               py::handle dc_n_, py::handle dcells_, py::handle y_, py::handle cells_,
                               py::handle gates_) {
  const auto [T, B, I, H, P, projected] = args.shape;
  dy = expect_like(like, dy_, "dy", args.dtype, args.sequence_shape(args.D * P));
  dh_n = expect_like(like, dh_n_, "dh_n", args.dtype, {args.D, B, P});
  dc_n = expect_like(like, dc_n_, "dc_n", args.dtype, {args.D, B, H});
  dcells = expect_like(like, dcells_, "dcells", args.compute_dtype, args.saved_shape(H));
  y = expect_like(like, y_, "y", args.dtype, args.sequence_shape(args.D * P));
  cells = expect_like(like, cells_, "cells", args.compute_dtype, args.saved_shape(H));
  gates = expect_like(like, gates_, "gates", args.dtype, args.saved_shape(4 * H));
  if (!y || !cells || !gates)
    throw py::type_error("y, cells, gates: expected what layer_forward left with save=2, got None");
}

LayerBackward BackwardArrays::describe(const LayerLayout& args, const Output& dh0, const Output& dc0) const {
  const auto [T, B, I, H, P, projected] = args.shape;
  LayerBackward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
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
    to.y = column_of(y, n * P, args.dtype);
    to.cells = at(cells, n, args.compute_dtype);
    to.gates = at(gates, n, args.dtype);
    to.dy = column_of(dy, n * P, args.dtype);
    to.d_cells = at(dcells, n, args.compute_dtype);
    to.dh_n = matrix_at(dh_n, n, args.dtype);
    to.dc_n = matrix_at(dc_n, n, args.dtype);
    to.dh0 = offset_by(dh0, n * B * P, args.dtype);
    to.dc0 = offset_by(dc0, n * B * H, args.dtype);
  }
  return layer;
}

const void* column_of(const Array& array, int64_t n, Dtype dtype) {
  return array ? static_cast<const char*>(array.data()) + n * bytes_of(dtype) : nullptr;
}

const void* at(const Array& array, int64_t n, Dtype dtype) {
  return array ? static_cast<const char*>(array.data()) + n * array.stride(0) * bytes_of(dtype) : nullptr;
}

Matrix matrix_at(const Array& array, int64_t n, Dtype dtype) {
  return {at(array, n, dtype), array.matrix().row_stride};
}

void* offset_by(const Output& output, int64_t offset, Dtype dtype) {
  return output.data ? static_cast<char*>(output.data) + offset * bytes_of(dtype) : nullptr;
}

}  // namespace lstm_ext::ops
