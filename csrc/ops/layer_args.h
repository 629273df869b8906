// What layer_forward and layer_backward have in common: reading and checking the arguments of a layer.
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

struct LayerArgs {
  // Throws TypeError (dtype, not an array), RuntimeError (rank, shape), ValueError (range).
  LayerArgs(py::handle x, py::handle h0, py::handle c0, py::sequence weights, py::handle lengths, py::handle resets,
            py::handle batch_sizes, int directions, bool batch_first);

  bool reverse(int n) const { return directions == Directions::kReverse || n == 1; }
  bool packed() const { return static_cast<bool>(batch_sizes); }
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

  Array x, h0, c0, lengths, resets, batch_sizes;
  Dtype dtype, compute_dtype;
  Directions directions;
  bool batch_first;
  int D;
  DirectionArrays direction[2];
  SequenceShape shape;
  Masks masks;
  int64_t rows;  // T * B, or the number of packed rows

 private:
  void read_weights();
  void check_state();
  void read_packing();
  void read_masks();

  py::tuple weights_;  // kept alive: an Array borrows
  std::vector<int64_t> lengths_, packed_offset_;
};

// Element n of the first dimension of a [D, B, width] array; its data is null if the array is not there.
Matrix matrix_at(const Array& array, int64_t n, Dtype dtype);

// The address of element n of the first dimension of an input, null if it is not there.
const void* at(const Array& array, int64_t n, Dtype dtype);

// The address of element n of the last dimension of an input, null if it is not there.
const void* column_of(const Array& array, int64_t n, Dtype dtype);

// The address of element `offset` of an output, counted from its start; null if it was not allocated.
void* offset_by(const Output& output, int64_t offset, Dtype dtype);

}  // namespace lstm_ext::ops
