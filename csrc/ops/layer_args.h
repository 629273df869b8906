// What the passes over a layer have in common on every device: reading and checking their arguments, and describing
// them to a kernel.
//
// A layer is one or both directions of one LSTM layer; `weights` is a flat list, for each direction
// w_ih [4H, I], w_hh [4H, P], then b_ih, b_hh [4H] if there is a bias, then w_hr [P, H] if h is projected.
#pragma once

#include <vector>

#include "../array.h"

namespace lstm_ext::ops {

enum class Directions : int { kForward = 0, kReverse = 1, kBoth = 2 };

struct DirectionArrays {
  Array w_ih, w_hh, b_ih, b_hh, w_hr;
  LayerWeights pointers() const;
};

// The arguments that every pass has, and where the rows of its sequences lie.
struct LayerLayout {
  LayerLayout(Dtype dtype, int directions, bool batch_first, bool packed);

  bool reverse(int n) const { return directions == Directions::kReverse || n == 1; }
  InitialState state(int n) const;

  // [.., width] in the order of x: [T, B, width], [B, T, width] or packed [N, width]
  Shape sequence_shape(int64_t width) const;
  // [D, T, B, width] or packed [D, N, width]
  Shape saved_shape(int64_t width) const;
  int64_t saved_size(int64_t width) const { return rows * width; }

  RowMap map_of(const Array& sequence) const;     // an input in the order of x
  RowMap contiguous_map(int64_t width) const;     // an output of sequence_shape(width)
  RowMap saved_map(int64_t width) const;          // one direction of saved_shape(width)
  RowMap saved_map_of(const Array& saved) const;  // the same, of an input

  Dtype dtype, compute_dtype;
  Directions directions;
  bool batch_first, packed;
  int D;
  Array h0, c0, resets;
  DirectionArrays direction[2];
  SequenceShape shape{};
  Masks masks{};
  int64_t rows = 0;                        // T * B, or the number of packed rows
  const int64_t* packed_offset = nullptr;  // [T], null: padded

 protected:
  // The flat list, without the w_ih if `with_w_ih` is false: then shape.H is known before.
  void read_weights(const Array& like, py::sequence weights, bool with_w_ih);
  void check_state() const;
  void read_resets();

 private:
  py::tuple weights_;  // kept alive: an Array borrows
};

// Those of a pass on the CPU.
struct LayerArgs : LayerLayout {
  // Throws TypeError (dtype, not an array), RuntimeError (rank, shape), ValueError (range).
  LayerArgs(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths, py::handle resets,
            py::handle batch_sizes, int directions, bool batch_first);

  Array x, lengths, batch_sizes;

 private:
  LayerArgs(Array x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths, py::handle resets,
            py::handle batch_sizes, int directions, bool batch_first);
  void read_packing();
  void read_lengths();

  std::vector<int64_t> lengths_, packed_offset_;
};

// Bits of what a backward pass is asked for.
inline constexpr int kNeedX = 1, kNeedH0 = 2, kNeedC0 = 4, kNeedWeights = 8;

// What a backward pass is given besides: the gradients of the outputs, each of which may be absent, and what the
// forward pass left.
struct BackwardArrays {
  // `like` shows framework and device. Throws TypeError (dtype, not an array) and RuntimeError (shape).
  BackwardArrays(const LayerLayout& args, const Array& like, py::handle dy, py::handle dh_n, py::handle dc_n,
                 py::handle dcells, py::handle y, py::handle cells, py::handle gates);

  // All of the layer but x, dx and the gradients of the weights.
  LayerBackward describe(const LayerLayout& args, const Output& dh0, const Output& dc0) const;

  Array dy, dh_n, dc_n, dcells, y, cells, gates;
};

// All of a forward pass but x; outputs that are not allocated are not wanted.
LayerForward describe_forward(const LayerLayout& args, const Output& y, const Output& h_n, const Output& c_n,
                              const Output& cells, const Output& gates);

int64_t bytes_of(Dtype dtype);

// Element n of the first dimension of a [D, B, width] array; its data is null if the array is not there.
Matrix matrix_at(const Array& array, int64_t n, Dtype dtype);

// The address of element n of the first dimension of an input, null if it is not there.
const void* at(const Array& array, int64_t n, Dtype dtype);

// The address of element n of the last dimension of an input, null if it is not there.
const void* column_of(const Array& array, int64_t n, Dtype dtype);

// The address of element `offset` of an output, counted from its start; null if it was not allocated.
void* offset_by(const Output& output, int64_t offset, Dtype dtype);

}  // namespace lstm_ext::ops
