#include "layer_args.h"

#include <stdexcept>

namespace lstm_ext::ops {
namespace {

int64_t bytes_of(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat64: return 8;
    case Dtype::kFloat32: return 4;
    case Dtype::kBFloat16:
    case Dtype::kFloat16: return 2;
  }
  throw std::logic_error("bytes_of: no such dtype");
}

}  // namespace

LayerWeights DirectionArrays::pointers() const {
  return {w_ih.matrix(), w_hh.matrix(), b_ih.data(), b_hh.data(), w_hr.matrix()};
}

LayerArgs::LayerArgs(py::handle x_, py::handle h0_, py::handle c0_, py::sequence weights, py::handle lengths_,
                     py::handle resets_, py::handle batch_sizes_, int directions_, bool batch_first_)
    : x(x_, "x"),
      h0(h0_, "h0"),
      c0(c0_, "c0"),
      lengths(lengths_, "lengths"),
      resets(resets_, "resets"),
      batch_sizes(batch_sizes_, "batch_sizes"),
      directions(static_cast<Directions>(directions_)),
      batch_first(batch_first_) {
  if (directions_ < 0 || directions_ > 2) {
    throw py::value_error("directions: expected 0 (forward), 1 (reverse) or 2 (both), got " +
                          std::to_string(directions_));
  }
  if (!x) throw py::type_error("x: expected an array, got None");
  D = directions == Directions::kBoth ? 2 : 1;
  for (const Array* array : {&h0, &c0, &lengths, &resets, &batch_sizes}) array->expect_kind_of(x);
  dtype = x.float_dtype();
  compute_dtype = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  x.expect_dims(packed() ? 2 : 3);
  shape.I = x.size(x.ndim() - 1);
  weights_ = py::tuple(weights);
  read_weights();
  if (packed()) {
    read_packing();
  } else {
    shape.T = x.size(batch_first ? 1 : 0);
    shape.B = x.size(batch_first ? 0 : 1);
    rows = shape.T * shape.B;
    read_masks();
  }
  if (shape.T == 0) throw std::runtime_error("x: expected at least one time step, got shape " + text_of(x.shape()));
  check_state();
}

void LayerArgs::read_weights() {
  const size_t each = weights_.size() / static_cast<size_t>(D);
  if (each < 2 || each > 5 || each * static_cast<size_t>(D) != weights_.size()) {
    throw std::runtime_error("weights: expected 2 to 5 arrays for each direction, got " +
                             std::to_string(weights_.size()) + " for " + std::to_string(D));
  }
  shape.projected = each % 2 == 1;
  for (size_t n = 0; n < static_cast<size_t>(D); ++n) {
    const auto get = [&](size_t index, const char* name) {
      Array array(weights_[n * each + index], name);
      if (!array) throw py::type_error(std::string(name) + ": expected an array, got None");
      array.expect_kind_of(x);
      array.expect_dtype(dtype);
      return array;
    };
    DirectionArrays& to = direction[n];
    to.w_ih = get(0, "w_ih");
    to.w_hh = get(1, "w_hh");
    to.w_ih.expect_dims(2);
    to.w_hh.expect_dims(2);
    if (n == 0) {
      shape.H = to.w_ih.size(0) / 4;
      shape.P = to.w_hh.size(1);
    }
    to.w_ih.expect_shape({4 * shape.H, shape.I});
    to.w_hh.expect_shape({4 * shape.H, shape.projected ? shape.P : shape.H});
    if (each >= 4) {
      to.b_ih = get(2, "b_ih");
      to.b_hh = get(3, "b_hh");
      to.b_ih.expect_shape({4 * shape.H});
      to.b_hh.expect_shape({4 * shape.H});
    }
    if (shape.projected) {
      to.w_hr = get(each - 1, "w_hr");
      to.w_hr.expect_shape({shape.P, shape.H});
    }
  }
}

void LayerArgs::check_state() {
  if (h0) {
    h0.expect_dtype(dtype);
    h0.expect_shape({D, shape.B, shape.P});
  }
  if (c0) {
    c0.expect_dtype(dtype);
    c0.expect_shape({D, shape.B, shape.H});
  }
}

void LayerArgs::read_masks() {
  masks = {};
  if (lengths) {
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
  if (resets) {
    resets.expect_bool();
    if (batch_first) {
      resets.expect_shape({shape.B, shape.T});
    } else {
      resets.expect_shape({shape.T, shape.B});
    }
    masks.resets = static_cast<const uint8_t*>(resets.data());
    masks.reset_t_stride = resets.stride(batch_first ? 1 : 0);
    masks.reset_b_stride = resets.stride(batch_first ? 0 : 1);
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
  masks = {lengths_.data(), nullptr, 0, 0};
}

InitialState LayerArgs::state(int n) const { return {matrix_at(h0, n, dtype), matrix_at(c0, n, dtype)}; }

Shape LayerArgs::sequence_shape(int64_t width) const {
  if (packed()) return {rows, width};
  return batch_first ? Shape{shape.B, shape.T, width} : Shape{shape.T, shape.B, width};
}

Shape LayerArgs::saved_shape(int64_t width) const {
  return packed() ? Shape{D, rows, width} : Shape{D, shape.T, shape.B, width};
}

RowMap LayerArgs::map_of(const Array& sequence) const {
  if (packed()) return {0, sequence.stride(0), packed_offset_.data()};
  return {sequence.stride(batch_first ? 1 : 0), sequence.stride(batch_first ? 0 : 1), nullptr};
}

RowMap LayerArgs::contiguous_map(int64_t width) const {
  if (packed()) return {0, width, packed_offset_.data()};
  return batch_first ? RowMap{width, shape.T * width, nullptr} : RowMap{shape.B * width, width, nullptr};
}

RowMap LayerArgs::saved_map(int64_t width) const {
  if (packed()) return {0, width, packed_offset_.data()};
  return {shape.B * width, width, nullptr};
}

RowMap LayerArgs::saved_map_of(const Array& saved) const {
  if (packed()) return {0, saved.stride(1), packed_offset_.data()};
  return {saved.stride(1), saved.stride(2), nullptr};
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
