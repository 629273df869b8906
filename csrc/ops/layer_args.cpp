#include "layer_args.h"

#include <algorithm>
#include <limits>
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

std::optional<Cell> cell_of(py::handle numbers) {
  constexpr Py_ssize_t kNumbers = 19;
  if (numbers.is_none()) return {};
  if (!PyTuple_Check(numbers.ptr()) || PyTuple_GET_SIZE(numbers.ptr()) != kNumbers) {
    throw py::type_error("cell: expected a tuple of " + std::to_string(kNumbers) + " numbers or None");
  }
  Py_ssize_t next = 0;
  const auto number = [&] {
    const double value = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.ptr(), next++));
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
  };
  const auto within = [&](double least, double most) {
    const double value = number();
    if (value >= least && value <= most) return value;
    throw py::value_error("cell: expected number " + std::to_string(next - 1) + " from " + std::to_string(least) +
                          " to " + std::to_string(most) + ", got " + std::to_string(value));
  };
  const auto activation = [&] {
    const auto kind = static_cast<Activation>(static_cast<uint8_t>(within(0, 8)));
    const double alpha = number();
    return ActivationSpec{kind, alpha, number()};
  };
  constexpr double kAny = std::numeric_limits<double>::infinity();
  Cell cell{};
  cell.activation = activation();
  cell.recurrent_activation = activation();
  cell.forget_bias = number();
  cell.coupled = number() != 0;
  cell.cell_clip = within(0, kAny);
  cell.proj_clip = within(0, kAny);
  cell.peephole = number() != 0;
  cell.norm = static_cast<Norm>(static_cast<uint8_t>(within(0, 2)));
  cell.norm_epsilon = number();
  cell.zoneout_h = within(0, 1);
  cell.zoneout_c = within(0, 1);
  cell.recurrent_dropout = within(0, 1);
  cell.candidate_dropout = within(0, 1);
  cell.training = number() != 0;
  cell.tensorflow = number() != 0;
  return cell;
}

namespace {

bool draws(const Cell& cell) {
  return cell.training && cell.zoneout_h + cell.zoneout_c + cell.recurrent_dropout + cell.candidate_dropout > 0;
}

// Where h is mixed it does not tell whether it was cut before.
bool has_kernel(const Cell& cell) { return cell.training || cell.zoneout_h == 0 || cell.proj_clip == 0; }

size_t extra_weights(const Cell& cell) {
  const size_t of_norm = cell.norm == Norm::kRows ? 3 : cell.norm == Norm::kGates ? 4 : 0;
  return of_norm + (cell.peephole ? 1 : 0);
}

}  // namespace

bool takes(const LayerCall& call) {
  const Kind kind = kind_of(call.x);
  if (call.cell && (!has_kernel(*call.cell) || !all_of_kind(kind, {call.seed}))) return false;
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
  return takes(call) && all_of_kind(kind_of(call.x), {saved.cells, saved.gates, saved.y, grads.dy, grads.dh_n,
                                                      grads.dc_n, grads.dcells});
}

py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

// ---- Arguments of every pass -------------------------------------------------------------------

LayerLayout::LayerLayout(const LayerCall& call, Dtype dtype_)
    : dtype(dtype_),
      compute_dtype(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
      directions(call.directions),
      batch_first(call.batch_first),
      packed(!call.batch_sizes.is_none()),
      D(directions == Directions::kBoth ? 2 : 1),
      cell(call.cell) {}

void LayerLayout::read_weights(const Array& like, py::handle weights, bool with_w_ih) {
  const auto count = static_cast<size_t>(PySequence_Fast_GET_SIZE(weights.ptr()));
  const bool tensorflow = cell && cell->tensorflow;
  const size_t first = with_w_ih && !tensorflow ? 1 : 0;
  const size_t more = cell ? extra_weights(*cell) : 0;  // after those of every layer
  const size_t least = first + 1 + more, most = tensorflow ? least + 1 : least + 3;
  const size_t given = count / static_cast<size_t>(D), each = given - more;
  if (given < least || given > most || given * static_cast<size_t>(D) != count) {
    throw std::runtime_error("weights: expected " + std::to_string(least) + " to " + std::to_string(most) +
                             " arrays for each direction, got " + std::to_string(count) + " for " + std::to_string(D));
  }
  shape.projected = !tensorflow && (each - first) % 2 == 0;
  for (size_t n = 0; n < static_cast<size_t>(D); ++n) {
    const auto get = [&](size_t index, const char* const(&names)[2], Storage stored = Storage::kPlain) {
      Array array(PySequence_Fast_GET_ITEM(weights.ptr(), n * given + index), names[n], like);
      const bool fits = stored == Storage::kPlain      ? array.has_dtype(dtype)
                        : stored == Storage::kBFloat16 ? array.has_dtype(Dtype::kBFloat16)
                                                       : array.has_int8();
      if (!fits) refuse_dtype(array, like, weights);
      return array;
    };
    DirectionArrays& to = direction[n];
    if (tensorflow) {
      to.w_ih = get(0, {"kernel", "kernel_reverse"});
      check_kernel(to.w_ih);
      if (each > 1) to.b_ih = get(1, {"bias", "bias_reverse"});
      if (each > 1) to.b_ih.expect_shape({4 * shape.H}, "4*H");
    } else {
      if (with_w_ih) to.w_ih = get(0, {"w_ih", "w_ih_reverse"}, storage);
      to.w_hh = get(first, {"w_hh", "w_hh_reverse"}, storage);
      if (with_w_ih) to.w_ih.expect_dims(2);
      to.w_hh.expect_dims(2);
      if (n == 0) {
        if (with_w_ih) check_first(like, to);
        if (with_w_ih) shape.H = to.w_hh.size(0) / 4;
        shape.P = to.w_hh.size(1);
      }
      const int64_t H = shape.H;
      if (with_w_ih) to.w_ih.expect_shape({4 * H, shape.I}, "4*H, I");
      to.w_hh.expect_shape({4 * H, shape.projected ? shape.P : H}, shape.projected ? "4*H, P" : "4*H, H");
      if (each >= first + 3) {
        to.b_ih = get(first + 1, {"b_ih", "b_ih_reverse"});
        to.b_hh = get(first + 2, {"b_hh", "b_hh_reverse"});
        to.b_ih.expect_shape({4 * H}, "4*H");
        to.b_hh.expect_shape({4 * H}, "4*H");
      }
      if (shape.projected) {
        to.w_hr = get(each - 1, {"w_hr", "w_hr_reverse"}, storage);
        to.w_hr.expect_shape({shape.P, H}, "P, H");
      }
    }
    size_t next = each;
    const auto get_next = [&](Array& array, const char* const(&names)[2], const Shape& expected, const char* dims) {
      array = get(next++, names);
      array.expect_shape(expected, dims);
    };
    const int64_t H = shape.H;
    if (cell && cell->peephole) get_next(to.peephole, {"peephole", "peephole_reverse"}, {3, H}, "3, H");
    if (cell && cell->norm == Norm::kRows) {
      get_next(to.gamma, {"gamma", "gamma_reverse"}, {2, 4 * H}, "2, 4*H");
    } else if (cell && cell->norm == Norm::kGates) {
      get_next(to.gamma, {"gamma", "gamma_reverse"}, {4 * H}, "4*H");
      get_next(to.beta, {"beta", "beta_reverse"}, {4 * H}, "4*H");
    }
    if (cell && cell->norm != Norm::kNone) {
      get_next(to.gamma_h, {"gamma_h", "gamma_h_reverse"}, {H}, "H");
      get_next(to.beta_h, {"beta_h", "beta_h_reverse"}, {H}, "H");
    }
  }
  const bool any = (step || shape.H > 0) && (!shape.projected || shape.P > 0);
  if (!any) {
    throw std::runtime_error(std::string(tensorflow ? "kernel" : "w_hh") +
                             ": expected at least one hidden unit, got shape " +
                             text_of((tensorflow ? direction[0].w_ih : direction[0].w_hh).shape()));
  }
}

// H is read from that of the first direction.
void LayerLayout::check_kernel(const Array& kernel) {
  kernel.expect_dims(2);
  if (shape.H == 0) shape.H = shape.P = kernel.size(1) / 4;
  const int64_t rows = shape.I < INT64_MAX - shape.H ? shape.I + shape.H : INT64_MAX;
  kernel.expect_shape({rows, 4 * shape.H}, "I + H, 4*H");
}

void LayerLayout::check_seed(const Array& seed) const {
  if (!draws(*cell)) return;
  if (!seed) throw py::type_error("seed: expected an array of one number, as the cell draws in training, got None");
  seed.expect_int64();
  seed.expect_shape({1});
}

void expect_countable(const SequenceShape& shape, int64_t rows) {
  if (are_countable(shape, rows)) return;
  throw std::runtime_error("x, weights: expected at most 2**52 numbers in an array of the layer, got " +
                           std::to_string(rows) + " rows, I = " + std::to_string(shape.I) +
                           ", H = " + std::to_string(shape.H) + ", P = " + std::to_string(shape.P));
}

// The weights of the first direction, from which H and P are read: which of w_ih, w_hh and x is the wrong one. Where
// w_ih agrees with w_hh it is x.
void LayerLayout::check_first(const Array& x, const DirectionArrays& weights) const {
  const Array &w_ih = weights.w_ih, &w_hh = weights.w_hh;
  const int64_t rows = w_hh.size(0), columns = w_hh.size(1);
  if (!shape.projected && rows != saturated_product(4, columns)) {
    const int64_t H = columns == saturated_product(4, rows) ? rows : w_ih.size(0) / 4;
    w_hh.expect_shape({saturated_product(4, H), H}, "4*H, H");
  }
  if (shape.projected && rows != w_ih.size(0) && columns == w_ih.size(0)) w_hh.expect_shape({columns, rows}, "4*H, P");
  if (rows % 4 == 0 && w_ih.size(0) == rows && w_ih.size(1) != shape.I) {
    Shape expected = x.shape();
    expected.begin()[expected.size() - 1] = w_ih.size(1);
    x.refuse_shape(expected, x_dims(), ": w_ih is " + text_of(w_ih.shape()));
  }
}

const char* LayerLayout::x_dims() const {
  return packed ? "N, I" : step ? (batched ? "B, I" : "I") : batch_first ? "B, T, I" : "T, B, I";
}

// A weight of another dtype than x. Where all weights have that one, x is the wrong one.
void LayerLayout::refuse_dtype(const Array& weight, const Array& x, py::handle weights) const {
  bool agree = false;
  for (const Dtype known : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    agree = agree || weight.has_dtype(known);
  }
  for (Py_ssize_t n = 0; n < PySequence_Fast_GET_SIZE(weights.ptr()); ++n) {
    agree = agree && weight.has_dtype_of(Array(PySequence_Fast_GET_ITEM(weights.ptr(), n), "weights", x));
  }
  if (!agree) weight.expect_dtype(dtype, kLike);
  throw std::runtime_error("x: expected dtype " + weight.dtype_text() + " as the weights have, got " + x.dtype_text());
}

void LayerLayout::expect_steps(const Array& x) const {
  if (shape.T > 0) return;
  throw std::runtime_error("x: expected at least one time step, got T = 0: shape " + text_of(x.shape()));
}

void LayerLayout::check_lengths(const Array& lengths) const {
  if (lengths.shape() == Shape{shape.B}) return;
  lengths.refuse_shape({shape.B}, "B", layout_hint(lengths.shape() == Shape{shape.T}));
}

// Where sizes would fit if time and batch of x changed places.
std::string LayerLayout::layout_hint(bool as_if_swapped) const {
  if (!as_if_swapped || packed || shape.T == shape.B) return "";
  return batch_first ? ": x is taken as [B, T, I] (batch_first); is it [T, B, I]?"
                     : ": x is taken as [T, B, I]; is it [B, T, I] (batch_first)?";
}

void LayerLayout::check_state() const {
  for (const Array* array : {&h0, &c0}) {
    if (step && *array && (array->ndim() == 0 || array->ndim() > 2)) array->refuse_dims();
  }
  check_state(h0, "P", shape.P, c0, shape.H);
  check_state(c0, "H", shape.H, h0, shape.P);
}

// One of the pair; of a single direction it is told without that axis, as `lstm` takes it.
void LayerLayout::check_state(const Array& state, const char* letter, int64_t width, const Array& other,
                              int64_t other_width) const {
  if (!state) return;
  state.expect_dtype(dtype, kLike);
  const Shape expected = state_shape(width), got = state.shape();
  if (got == expected) return;
  const bool swapped = other && got == state_shape(other_width) && other.shape() == expected;
  const bool one = !step && D == 1 && layers == 0 && got.size() > 0 && got.begin()[0] == 1;
  std::string hint = swapped ? ": the pair is (h, c); swapped?" : "";
  if (one && got.size() == 4 && Shape(got.begin() + 1, 3) == expected)
    hint = ": lstm() takes [B, P] and [B, H], no axis of layers";
  if (!step && got == Shape{D, shape.T, width}) hint = layout_hint(true);
  const std::string dims = step ? (batched ? "B, " : "") : one ? "B, " : layers ? "L*D, B, " : "D, B, ";
  state.refuse_shape(expected, (dims + letter).c_str(), hint, one ? 1 : 0);
}

void LayerLayout::check_resets() const {
  if (!resets) return;
  resets.expect_bool();
  if (step) {
    resets.expect_shape(batched ? Shape{shape.B} : Shape{}, batched ? "B" : "");
    return;
  }
  const Shape expected = batch_first ? Shape{shape.B, shape.T} : Shape{shape.T, shape.B};
  if (resets.shape() == expected) return;
  const bool swapped = resets.shape() == (batch_first ? Shape{shape.T, shape.B} : Shape{shape.B, shape.T});
  resets.refuse_shape(expected, batch_first ? "B, T" : "T, B", layout_hint(swapped));
}

void LayerLayout::settle() {
  h0.settle();
  c0.settle();
  for (int n = 0; n < D; ++n) {
    DirectionArrays& of = direction[n];
    for (Array* array : {&of.w_ih, &of.w_hh, &of.b_ih, &of.b_hh, &of.w_hr}) array->settle();
    if (!cell) continue;
    for (Array* array : {&of.peephole, &of.gamma, &of.beta, &of.gamma_h, &of.beta_h}) array->settle();
  }
  if (!resets) return;
  resets.settle();
  masks.resets = static_cast<const uint8_t*>(resets.data());
  if (step) {
    masks.reset_b_stride = batched ? resets.stride(0) : 0;
    return;
  }
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
  if (!step) return {layers ? layers * D : D, shape.B, width};
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

LayerArgs::LayerArgs(const LayerCall& call, const LayerLayout& first, int64_t num_layers)
    : LayerArgs(call, Array(call.x, "x", dlpack::kCpu), &first) {
  layers = num_layers;
  check_state();
}

LayerArgs::LayerArgs(const LayerCall& call, Array x_, const LayerLayout* frozen)
    : LayerLayout(call, x_.float_dtype()),
      x(std::move(x_)),
      lengths(call.lengths, "lengths", x),
      batch_sizes(call.batch_sizes, "batch_sizes", x) {
  h0 = Array(call.h0, "h0", x);
  c0 = Array(call.c0, "c0", x);
  resets = Array(call.resets, "resets", x);
  read_axes();
  frozen ? take_sizes(*frozen) : read_weights(x, call.weights, true);
  expect_steps(x);
  const int64_t steps_of_one = batch_first ? shape.T : 0;  // strides are made of T even without sequences
  expect_countable(shape, std::max(rows, steps_of_one));
  if (packed) read_batch_size();
  if (lengths) {
    lengths.expect_integers();
    check_lengths(lengths);
  }
  check_resets();
  if (!frozen) check_state();
  if (!cell) return;
  seed = Array(call.seed, "seed", x);
  check_seed(seed);
}

void LayerArgs::take_sizes(const LayerLayout& frozen) {
  x.expect_dtype(frozen.dtype, " as the frozen weights have");
  const int64_t I = shape.I;
  shape.I = frozen.shape.I;
  shape.H = frozen.shape.H;
  shape.P = frozen.shape.P;
  shape.projected = frozen.shape.projected;
  if (I == shape.I) return;
  Shape expected = x.shape();
  expected.begin()[expected.size() - 1] = shape.I;
  x.refuse_shape(expected, x_dims(), ": the frozen weights take that width");
}

void LayerArgs::read_contents() {
  x.settle();
  settle();
  if (cell && draws(*cell)) {
    seed.settle();
    if (x.device().type == dlpack::kCpu) cell->seed = static_cast<uint64_t>(seed.integer(0));
  }
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
    if (directions == Directions::kBoth || lengths) {
      throw py::value_error("directions, lengths: expected one direction and no lengths without a time axis");
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
                          std::to_string(*least) + (*least < *most ? " to " + std::to_string(*most) : ""));
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

LayerWeights LayerLayout::pointers(int n) const {
  const DirectionArrays& of = direction[n];
  const Matrix w_ih = of.w_ih.matrix();
  if (!cell || !cell->tensorflow) return {w_ih, of.w_hh.matrix(), of.b_ih.data(), of.b_hh.data(), of.w_hr.matrix()};
  return {w_ih, {of.w_ih.at(shape.I), w_ih.row_stride}, of.b_ih.data(), nullptr, {}};
}

LayerCell LayerLayout::describe_cell(const Array& y) const {
  LayerCell described{*cell, {}, y ? map_of(y) : RowMap{}, nullptr};
  for (int n = 0; n < D; ++n) {
    const DirectionArrays& of = direction[n];
    auto& to = described.direction[n];
    to.peephole = of.peephole.matrix();
    to.gamma = of.gamma.matrix();
    to.beta = of.beta.data();
    to.gamma_h = of.gamma_h.data();
    to.beta_h = of.beta_h.data();
    to.y = y.column(n * shape.P);
  }
  return described;
}

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
                          args.pointers(n),
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
  cells = get(saved.cells, "cells", args.compute_dtype, args.saved_shape(H));
  gates = get(saved.gates, "gates", args.dtype, args.saved_shape(4 * H));
  if (!cells || !gates) throw py::type_error("cells, gates: expected what layer_forward left with Save.ALL, got None");
  if (!args.cell) return;
  y = get(saved.y, "y", args.dtype, args.sequence_shape(args.D * P));
  if (!y) throw py::type_error("y: expected what layer_forward returned, got None");
}

void BackwardArrays::settle() {
  for (Array* array : {&dy, &dh_n, &dc_n, &dcells, &cells, &gates, &y}) array->settle();
}

LayerBackward BackwardArrays::describe(const LayerLayout& args, const Output& dh0, const Output& dc0) const {
  const auto [T, B, I, H, P, projected] = args.shape;
  LayerBackward layer{};
  layer.dtype = args.dtype;
  layer.shape = args.shape;
  layer.masks = args.masks;
  if (B == 0) layer.shape.T = 1;  // nothing to walk, however many steps there are
  layer.dy_map = args.map_of(dy);
  layer.cells_map = args.saved_map_of(cells);
  layer.d_cells_map = args.saved_map_of(dcells);
  layer.gates_map = args.saved_map_of(gates);
  layer.num_directions = args.D;
  for (int n = 0; n < args.D; ++n) {
    BackwardDirection& to = layer.direction[n];
    to.reverse = args.reverse(n);
    to.weights = args.pointers(n);
    to.state = args.state(n);
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
