// What a layer is asked, as lstm_ext/call.py hands it over: tuples of arrays, and three enums with the numbers that
// they have there.
//
// A layer is one or both directions of one LSTM layer; `weights` is a flat list, for each direction
// w_ih [4H, I], w_hh [4H, P], then b_ih, b_hh [4H] if there is a bias, then w_hr [P, H] if h is projected. Of a cell in
// TensorFlow's layout it is kernel [I + H, 4H], then bias [4H] if there is one. peephole [3, H] comes last.
#pragma once

#include <optional>

#include "../array.h"

namespace lstm_ext::ops {

enum class Directions : int { kForward = 0, kReverse = 1, kBoth = 2 };

// Beside its outputs a forward pass returns neither cells nor gates, the cells, or both.
enum class Save : int { kNothing = 0, kCells = 1, kAll = 2 };

// Bits of what a backward pass is asked for.
enum class Needs : int { kX = 1, kH0 = 2, kC0 = 4, kWeights = 8, kAll = 15 };
constexpr bool has(Needs needs, Needs bit) { return (static_cast<int>(needs) & static_cast<int>(bit)) != 0; }

// The handles of these borrow from the tuple that came.
struct LayerCall {
  py::handle x, h0, c0, weights, lengths, resets, batch_sizes;  // all but x and weights may be None
  Directions directions;
  bool batch_first;
  std::optional<Cell> cell;  // none: the plain LSTM; its seed is not read yet
  py::handle seed;           // [1], may be None
};

struct Saved {
  py::handle cells, gates, y;
};

// From the numbers of a Cell of lstm_ext/cell.py; none from None. Throws ValueError for what no cell may have.
std::optional<Cell> cell_of(py::handle numbers);

struct OutputGrads {
  py::handle dy, dh_n, dc_n, dcells;  // each may be None
};

// Whether all are None or arrays that this module reads itself, of one kind, and the cell is one that its kernels
// compute. If not, an operation returns NotImplemented: its caller has to see what they are.
bool takes(const LayerCall& call);
bool takes(const LayerCall& call, const Saved& saved, const OutputGrads& grads);
py::object not_implemented();

}  // namespace lstm_ext::ops

namespace pybind11::detail {

// An enum from an int, or one of Python's, that is none of its numbers is no match.
template <class Enum, int last>
struct EnumCaster {
  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    const long number = PyLong_AsLong(source.ptr());
    if (number < 0 || number > last) {
      PyErr_Clear();
      return false;
    }
    value = static_cast<Enum>(number);
    return true;
  }
  template <class T>
  using cast_op_type = Enum;
  operator Enum() { return value; }
  Enum value{};
};

template <>
struct type_caster<lstm_ext::ops::Directions> : EnumCaster<lstm_ext::ops::Directions, 2> {
  static constexpr auto name = const_name("Directions");
};
template <>
struct type_caster<lstm_ext::ops::Save> : EnumCaster<lstm_ext::ops::Save, 2> {
  static constexpr auto name = const_name("Save");
};
template <>
struct type_caster<lstm_ext::ops::Needs> : EnumCaster<lstm_ext::ops::Needs, 15> {
  static constexpr auto name = const_name("Needs");
};

// A tuple of exactly so many items.
template <class Value, int count>
struct TupleCaster {
  template <class T>
  using cast_op_type = const Value&;
  operator const Value&() { return value; }
  Value value{};

 protected:
  static bool fits(handle source) { return PyTuple_Check(source.ptr()) && PyTuple_GET_SIZE(source.ptr()) == count; }
  static handle item(handle source, int n) { return PyTuple_GET_ITEM(source.ptr(), n); }
};

template <>
struct type_caster<lstm_ext::ops::LayerCall> : TupleCaster<lstm_ext::ops::LayerCall, 11> {
  static constexpr auto name = const_name("LayerCall");
  bool load(handle source, bool convert) {
    type_caster<lstm_ext::ops::Directions> directions;
    if (!fits(source) || !directions.load(item(source, 7), convert)) return false;
    const auto at = [&](int n) { return item(source, n); };
    const int batch_first = PyObject_IsTrue(at(8).ptr());
    if (batch_first < 0) throw error_already_set();
    value = {at(0), at(1), at(2), at(3), at(4), at(5), at(6), directions, batch_first == 1, {}, at(10)};
    value.cell = lstm_ext::ops::cell_of(at(9));
    return true;
  }
};

template <>
struct type_caster<lstm_ext::ops::Saved> : TupleCaster<lstm_ext::ops::Saved, 3> {
  static constexpr auto name = const_name("Saved");
  bool load(handle source, bool) {
    if (!fits(source)) return false;
    value = {item(source, 0), item(source, 1), item(source, 2)};
    return true;
  }
};

template <>
struct type_caster<lstm_ext::ops::OutputGrads> : TupleCaster<lstm_ext::ops::OutputGrads, 4> {
  static constexpr auto name = const_name("OutputGrads");
  bool load(handle source, bool) {
    if (!fits(source)) return false;
    value = {item(source, 0), item(source, 1), item(source, 2), item(source, 3)};
    return true;
  }
};

}  // namespace pybind11::detail
