// What the passes over a layer have in common on every device: reading and checking their arguments, and describing
// them to a kernel.
#pragma once

#include <optional>
#include <vector>

#include "call.h"

namespace lstm_ext::ops {

struct DirectionArrays {
  Array w_ih, w_hh, b_ih, b_hh, w_hr;            // TensorFlow's kernel is w_ih, its bias b_ih
  Array peephole, gamma, beta, gamma_h, beta_h;  // of a cell
};

// The arguments that every pass has, and where the rows of its sequences lie.
struct LayerLayout {
  LayerLayout(const LayerCall& call, Dtype dtype);

  bool reverse(int n) const { return directions == Directions::kReverse || n == 1; }
  LayerWeights pointers(int n) const;
  InitialState state(int n) const;

  // Of a step, a call without a time axis, all of these but what is saved lack their first axis, or first two.
  Shape sequence_shape(int64_t width) const;  // in the order of x: [T, B, width], [B, T, width] or packed [N, width]
  Shape state_shape(int64_t width) const;     // [D, B, width], of a stack [layers * D, B, width]
  Shape saved_shape(int64_t width) const;     // [D, T, B, width] or packed [D, N, width]
  int64_t saved_size(int64_t width) const { return rows * width; }

  RowMap map_of(const Array& sequence) const;     // an input in the order of x
  RowMap contiguous_map(int64_t width) const;     // an output of sequence_shape(width)
  RowMap saved_map(int64_t width) const;          // one direction of saved_shape(width)
  RowMap saved_map_of(const Array& saved) const;  // the same, of an input

  Dtype dtype, compute_dtype;
  Directions directions;
  bool batch_first, packed;
  bool step = false, batched = true;  // without a time axis, and there with a batch or without
  int D;
  int64_t layers = 0;  // of a frozen stack, whose states are those of all layers; 0: one layer by itself
  Storage storage = Storage::kPlain;
  Array h0, c0, resets;
  DirectionArrays direction[2];
  SequenceShape shape{};
  Masks masks{};
  int64_t rows = 0;                        // T * B, or the number of packed rows
  const int64_t* packed_offset = nullptr;  // [T], null: padded
  std::optional<Cell> cell;                // none: the plain LSTM

  // For a kernel, of a layer that has a cell. `y` is that of a backward pass, or not there.
  LayerCell describe_cell(const Array& y = {}) const;

 protected:
  // The flat list, without the w_ih if `with_w_ih` is false: then shape.H is known before.
  void read_weights(const Array& like, py::handle weights, bool with_w_ih);
  void check_kernel(const Array& kernel);
  void check_state() const;
  void check_state(const Array& state, const char* letter, int64_t width, const Array& other,
                   int64_t other_width) const;
  void expect_steps(const Array& x) const;
  void check_lengths(const Array& lengths) const;
  void check_resets() const;
  void check_seed(const Array& seed) const;
  void check_first(const Array& x, const DirectionArrays& weights) const;
  const char* x_dims() const;
  [[noreturn]] void refuse_dtype(const Array& weight, const Array& x, py::handle weights) const;
  std::string layout_hint(bool as_if_swapped) const;
  void settle();  // as Array does, what is here
};

// Throws RuntimeError where sizes are so large that products of them would overflow.
void expect_countable(const SequenceShape& shape, int64_t rows);

// Those of a pass that reads x itself. A refused call costs no more than its check: what is as large as the call, be it
// claimed or real, is looked at only once the outputs are allocated.
struct LayerArgs : LayerLayout {
  // Throws TypeError (dtype of a mask), RuntimeError (dtype, device, rank, shape), ValueError (of options).
  explicit LayerArgs(const LayerCall& call, dlpack::DeviceType device = dlpack::kCpu)
      : LayerArgs(call, Array(call.x, "x", device), nullptr) {}
  // Of a frozen stack with so many layers, of which the first one is given: the call has no weights.
  LayerArgs(const LayerCall& call, const LayerLayout& first, int64_t num_layers);

  // Makes the arrays readable and reads the masks. Throws ValueError (range) and RuntimeError (no packed sequence).
  void read_contents();

  Array x, lengths, batch_sizes, seed;

 private:
  LayerArgs(const LayerCall& call, Array x, const LayerLayout* frozen);
  void take_sizes(const LayerLayout& frozen);
  void read_axes();
  void read_batch_size();
  void read_packing();
  void read_lengths();
  [[noreturn]] void refuse_packing() const;

  std::vector<int64_t> lengths_, packed_offset_;
};

// What a backward pass is given besides: the gradients of the outputs, each of which may be absent, and what the
// forward pass left.
struct BackwardArrays {
  // `like` shows framework and device. Throws TypeError (nothing saved) and RuntimeError (dtype, shape).
  BackwardArrays(const LayerLayout& args, const Array& like, const Saved& saved, const OutputGrads& grads);

  void settle();

  // All of the layer but x, dx and the gradients of the weights.
  LayerBackward describe(const LayerLayout& args, const Output& dh0, const Output& dc0) const;

  Array dy, dh_n, dc_n, dcells, cells, gates, y;
};

// All of a forward pass but x; outputs that are not allocated are not wanted.
LayerForward describe_forward(const LayerLayout& args, const Output& y, const Output& h_n, const Output& c_n,
                              const Output& cells, const Output& gates);

}  // namespace lstm_ext::ops
