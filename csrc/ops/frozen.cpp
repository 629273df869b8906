#include "frozen.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>
#include <stdexcept>

#include "../cpu/levels.h"
#include "../cpu/team.h"
#include "cpu_plan.h"
#include "gil.h"

namespace lstm_ext::ops {
namespace {

constexpr size_t kAlignment = 64;

Memory allocate(int64_t bytes) {
  const auto wanted = static_cast<size_t>(bytes > 0 ? bytes : 1);
  Memory memory(std::aligned_alloc(kAlignment, (wanted + kAlignment - 1) / kAlignment * kAlignment));
  if (!memory) throw std::bad_alloc();
  return memory;
}

Storage storage_named(const std::string& name, Dtype dtype) {
  if (name == "plain") return Storage::kPlain;
  if (name != "bfloat16" && name != "int8") {
    throw py::value_error("storage: expected plain, bfloat16 or int8, got '" + name + "'");
  }
  if (dtype != Dtype::kFloat32) throw py::value_error("storage: expected plain for another dtype than float32");
  return name == "int8" ? Storage::kInt8 : Storage::kBFloat16;
}

LayerCall call_of(const py::handle& x, const py::handle& lengths, const py::handle& resets, bool batch_first) {
  const py::handle none = Py_None;
  return {x, none, none, none, lengths, resets, none, Directions::kForward, batch_first, {}, none};
}

}  // namespace

void FreeMemory::operator()(void* memory) const { std::free(memory); }

// ---- a layer ----------------------------------------------------------------------------------------------

namespace {

LayerCall of_weights(const py::list& weights, std::optional<Cell> cell, Directions directions) {
  LayerCall call = call_of(Py_None, Py_None, Py_None, false);
  call.weights = weights;
  call.directions = directions;
  call.cell = cell;
  return call;
}

}  // namespace

FrozenLayer::FrozenLayer(const py::list& weights, const py::list& scales, std::optional<Cell> cell_,
                         Directions directions_, Dtype dtype_, Storage storage_)
    : LayerLayout(of_weights(weights, cell_, directions_), dtype_) {
  storage = storage_;
  if (weights.empty()) throw py::value_error("weights: expected some, got none");
  if (cell && (cell->tensorflow || cell->training)) {
    throw py::value_error("cell: expected torch's layout of weights, and no training");
  }
  const Array first(weights[0], "w_ih", dlpack::kCpu);
  first.expect_dims(2);
  shape.I = first.size(1);
  shape.T = 1;
  read_weights(first, weights, true);
  expect_countable(shape, 0);
  settle();
  if (storage == Storage::kInt8) read_scales(scales, first);
  description_.dtype = dtype;
  description_.shape = shape;
  description_.num_directions = D;
  description_.num_threads = 1;
  description_.storage = storage;
  if (cell) description_.cell = &(own_cell_ = describe_cell());
  for (int n = 0; n < D; ++n) {
    LayerWeights& own = description_.direction[n].weights = pointers(n);
    description_.direction[n].reverse = reverse(n);
    const auto data = [&](int m) { return static_cast<const float*>(scales_[n][m].data()); };
    own.scales = {data(0), data(1), data(2)};
    if (storage != Storage::kInt8 || !shape.projected) continue;
    float bound = 0;  // of a row of w_hr times numbers up to 1
    for (int64_t row = 0; row < shape.P; ++row) {
      const auto* numbers = static_cast<const int8_t*>(own.w_hr.data) + row * own.w_hr.row_stride;
      int64_t sum = 0;
      for (int64_t k = 0; k < shape.H; ++k) sum += std::abs(numbers[k]);
      bound = std::max(bound, static_cast<float>(sum) * own.scales.w_hr[row]);
    }
    description_.direction[n].h_bound = bound;
  }
  pack();
}

void FrozenLayer::read_scales(const py::list& scales, const Array& like) {
  const size_t each = shape.projected ? 3 : 2;
  if (scales.size() != each * static_cast<size_t>(D)) {
    throw py::value_error("scales: expected " + std::to_string(each) + " arrays for each direction");
  }
  for (size_t n = 0; n < scales.size(); ++n) {
    Array& scale = scales_[n / each][n % each];
    scale = Array(scales[n], "scales", like);
    scale.expect_dtype(Dtype::kFloat32);
    scale.expect_shape({n % each == 2 ? shape.P : 4 * shape.H});
    scale.settle();
  }
}

void FrozenLayer::pack() {
  const cpu::LevelShape& level = cpu::kernels().shape;
  const cpu::EngineShape engine = cpu::engine_shape(level, cpu::EngineKind::kVectors, dtype, false, storage);
  packed_bytes_ = cpu::packed_bytes(engine, shape);
  packed_ = allocate(packed_bytes_ * D);
  for (int n = 0; n < D; ++n) description_.direction[n].packed = static_cast<char*>(packed_.get()) + n * packed_bytes_;
  cpu::Plan plan{};
  plan.engine = cpu::EngineKind::kVectors;
  plan.chunk_steps = 1;
  plan.threads = 1;
  const GilRelease release;
  cpu::kernels().pack(description_, plan);
}

// ---- the stack --------------------------------------------------------------------------------------------

Frozen::Frozen(const py::list& layers, Directions directions, const std::string& dtype_name,
               const std::string& storage_name) {
  const Dtype dtype = dtype_named(dtype_name);
  const Storage storage = storage_named(storage_name, dtype);
  for (const py::handle layer : layers) {
    const auto parts = py::cast<py::tuple>(layer);
    if (parts.size() != 3) throw py::value_error("layers: expected (weights, scales, cell) of each");
    std::optional<Cell> cell;
    if (!parts[2].is_none()) cell = cell_of(parts[2]);
    layers_.push_back(std::make_unique<FrozenLayer>(py::cast<py::list>(parts[0]), py::cast<py::list>(parts[1]), cell,
                                                    directions, dtype, storage));
    const FrozenLayer &own = last(), &first = *layers_[0];
    const bool fits = layers_.size() == 1 || (own.shape.I == first.D * first.shape.P && own.shape.H == first.shape.H &&
                                              own.shape.P == first.shape.P);
    if (!fits) throw py::value_error("layers: expected each to take what the one before gives");
  }
  if (layers_.empty()) throw py::value_error("layers: expected at least one, got none");
}

// Where the arrays of a pass lie. States are [L * D, B, width], contiguous; h_n may be null.
struct Frozen::Io {
  const void* x;
  RowMap x_map;
  void* y;
  RowMap y_map;
  void *h_n, *c_n;
  const LayerArgs* state_of;  // whose state it begins with, if no pointers are given
  InitialState first;
  int num_threads;
};

LayerForward Frozen::describe(const LayerArgs& args, const Io& io, size_t n) const {
  LayerForward layer = layers_[n]->description();
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t bytes = bytes_of(args.dtype);
  layer.shape.T = B == 0 ? 1 : T;  // nothing to walk, however many steps there are
  layer.shape.B = B;
  layer.masks = args.masks;
  layer.x_map = io.x_map;
  layer.y_map = io.y_map;
  layer.x = io.x;
  layer.num_threads = io.num_threads;
  const auto at = [&](void* array, int64_t element) {
    return array ? static_cast<void*>(static_cast<char*>(array) + element * bytes) : nullptr;
  };
  for (int d = 0; d < args.D; ++d) {
    ForwardDirection& direction = layer.direction[d];
    const int64_t state = static_cast<int64_t>(n) * args.D + d;
    direction.state = io.state_of ? io.state_of->state(static_cast<int>(state))
                                  : InitialState{{at(const_cast<void*>(io.first.h0.data), state * B * P), P},
                                                 {at(const_cast<void*>(io.first.c0.data), state * B * H), H}};
    direction.y = at(io.y, d * P);
    direction.h_n = at(io.h_n, state * B * P);
    direction.c_n = at(io.c_n, state * B * H);
  }
  return layer;
}

void* Frozen::scratch(Memory& memory, size_t& bytes, int64_t wanted_bytes) {
  const auto wanted = static_cast<size_t>(wanted_bytes);
  if (wanted > bytes) {
    memory.reset();
    bytes = 0;
    memory = allocate(wanted_bytes);
    bytes = wanted;
  }
  return memory.get();
}

// Layer n with its arrays: what it gives to the next one goes to one of two halves in turn.
LayerForward Frozen::in_stack(const LayerArgs& args, const Io& io, size_t n, char* between, int64_t half) const {
  const RowMap map = args.contiguous_map(args.D * args.shape.P);
  const auto half_of = [&](size_t layer) { return between + (layer % 2 ? half : 0); };
  Io own = io;
  if (n > 0) {
    own.x = half_of(n - 1);
    own.x_map = map;
  }
  if (n + 1 < layers_.size()) {
    own.y = half_of(n);
    own.y_map = map;
  }
  return describe(args, own, n);
}

// Each layer does its own block of steps: in round w layer n does block w - n, whose inputs the layer before has made
// in the round before.
//
//     round        0  1  2  3  4
//     layer 0      0  1  2  3
//     layer 1         0  1  2  3
//
// Where a block's state comes from and goes to: the last one's goes to h_n and c_n, that of each before it to there or
// to `states`, in turn.
struct Frozen::Rounds {
  const Frozen& frozen;
  const LayerArgs& args;
  const Io& io;
  char* between;
  int64_t half, steps;
  char* states;  // of each layer h [B, P] and c [B, H]
  cpu::Barrier barrier = {};
  std::atomic<bool> has_failed = false;
  std::exception_ptr failure = {};

  int64_t layers() const { return static_cast<int64_t>(frozen.layers_.size()); }
  int64_t blocks() const { return cpu::ceil_div(args.shape.T, steps); }

  void run() {
    const int members = static_cast<int>(std::min<int64_t>(io.num_threads, layers()));
    cpu::run_team(io.num_threads, members, body, this, false);
    if (failure) std::rethrow_exception(failure);
  }

  static void body(void* context, int rank, int size) {
    auto& rounds = *static_cast<Rounds*>(context);
    const cpu::Team team{rank, size, &rounds.barrier};
    for (int64_t round = 0; round < rounds.blocks() + rounds.layers() - 1; ++round) {
      for (int64_t n = rank; n < rounds.layers(); n += size) {
        const int64_t block = round - n;
        if (block >= 0 && block < rounds.blocks()) rounds.try_block(n, block);
      }
      team.sync();
    }
  }

  // No exception may leave a member, whom the others wait for.
  void try_block(int64_t n, int64_t block) noexcept {
    if (has_failed.load(std::memory_order_relaxed)) return;
    try {
      run_block(n, block);
    } catch (...) {
      if (!has_failed.exchange(true)) failure = std::current_exception();
    }
  }

  void run_block(int64_t n, int64_t block) const {
    const int64_t bytes = bytes_of(args.dtype), first = block * steps;
    LayerForward layer = frozen.in_stack(args, io, static_cast<size_t>(n), between, half);
    ForwardDirection& direction = layer.direction[0];
    layer.num_threads = 1;
    layer.shape.T = std::min(steps, args.shape.T - first);
    layer.x = static_cast<const char*>(layer.x) + layer.x_map.at(first, 0) * bytes;
    direction.y = static_cast<char*>(direction.y) + layer.y_map.at(first, 0) * bytes;
    if (layer.masks.resets) layer.masks.resets += first * layer.masks.reset_t_stride;
    const FinalState final = {direction.h_n, direction.c_n};
    if (block > 0) {
      const FinalState before = state_after(n, block - 1, final);
      direction.state = {{before.h, args.shape.P}, {before.c, args.shape.H}};
    }
    const FinalState after = state_after(n, block, final);
    direction.h_n = after.h;
    direction.c_n = after.c;
    cpu::Plan plan = cpu::plan_forward(layer);
    plan.threads = 1;  // whatever is forced by now
    cpu::kernels().layer_forward(layer, plan);
  }

  struct FinalState {
    void *h, *c;
  };
  FinalState state_after(int64_t n, int64_t block, const FinalState& final) const {
    if ((blocks() - 1 - block) % 2 == 0) return final;
    const auto [T, B, I, H, P, projected] = args.shape;
    const int64_t bytes = bytes_of(args.dtype);
    char* const h = states + n * B * (P + H) * bytes;
    return {h, h + B * P * bytes};
  }
};

void Frozen::forward(const LayerArgs& args, const Io& io, Memory& memory, size_t& memory_bytes) const {
  const size_t count = layers_.size();
  const auto [T, B, I, H, P, projected] = args.shape;
  const int64_t bytes = bytes_of(args.dtype), half = args.rows * args.D * P * bytes;
  const int64_t halves = (count > 2 ? 2 : 1) * half, states = static_cast<int64_t>(count) * B * (P + H) * bytes;
  const int64_t steps = cpu::steps_of_round(describe(args, io, 0), static_cast<int>(count));
  auto* const between =
      static_cast<char*>(count > 1 ? scratch(memory, memory_bytes, halves + (steps ? states : 0)) : nullptr);
  if (steps) {
    Rounds rounds{*this, args, io, between, half, steps, between + halves};
    return rounds.run();
  }
  for (size_t n = 0; n < count; ++n) {
    const LayerForward layer = in_stack(args, io, n, between, half);
    cpu::kernels().layer_forward(layer, cpu::plan_forward(layer));
  }
}

LayerArgs Frozen::arguments(const LayerCall& call) const {
  LayerCall own = call;
  own.directions = layers_[0]->directions;
  return LayerArgs(own, *layers_[0], static_cast<int64_t>(layers_.size()));
}

namespace {

// Of a pass through all layers. None of them is let go on meanwhile if all take some microseconds.
struct Effort {
  bool brief;
  int num_threads;

  Effort(const LayerArgs& args, size_t layers, int asked) {
    SequenceShape whole = args.shape;
    whole.T = saturated_product(whole.T, static_cast<int64_t>(layers));
    whole.I = std::max(whole.I, args.D * whole.P);
    brief = cpu::is_brief(whole);
    num_threads = brief && asked <= 0 ? 1 : threads_for(args, asked);
  }
};

}  // namespace

py::object Frozen::run(const LayerCall& call, int num_threads) const {
  if (!takes(call)) return not_implemented();
  LayerArgs args = arguments(call);
  const Allocator allocator(args.x);
  const Output y = allocator.empty(args.dtype, args.sequence_shape(args.D * args.shape.P));
  const Output h_n = args.step ? Output{} : allocator.empty(args.dtype, args.state_shape(args.shape.P));
  const Output c_n = allocator.empty(args.dtype, args.state_shape(args.shape.H));

  args.read_contents();
  const Effort effort(args, layers_.size(), num_threads);
  const Io io{args.x.data(),
              args.map_of(args.x),
              y.data,
              args.contiguous_map(args.D * args.shape.P),
              h_n.data,
              c_n.data,
              &args,
              {},
              effort.num_threads};
  {
    const GilRelease release(!effort.brief);
    Memory between;
    size_t bytes = 0;
    forward(args, io, between, bytes);
  }
  return py::make_tuple(y.object, h_n.object, c_n.object);
}

py::list Frozen::plans(int64_t T, int64_t B, int num_threads) const {
  const auto described = [&](const FrozenLayer& own, int64_t steps, int threads) {
    cpu::Problem problem{own.dtype, own.shape, own.D, false, threads};
    problem.shape.T = steps;
    problem.shape.B = B;
    problem.normed = own.cell && own.cell->norm != Norm::kNone;
    problem.packed = true;
    problem.simple = !own.cell && !own.shape.projected;
    problem.storage = own.storage;
    return described_plan(problem);
  };
  const int threads = num_threads ? num_threads : cpu::default_threads();
  py::list plans;
  for (const auto& own : layers_) plans.append(described(*own, T, threads));
  LayerForward first = layers_[0]->description();  // of sizes that have been found to be possible
  first.shape.T = T;
  first.shape.B = B;
  first.num_threads = threads;
  const int64_t steps = cpu::steps_of_round(first, static_cast<int>(layers_.size()));
  if (!steps) return plans;
  for (size_t n = 0; n < layers_.size(); ++n) {
    const py::dict plan = described(*layers_[n], steps, 1);
    plan["why"]["threads"] = "one, of its own: it does " + std::to_string(steps) + " steps beside other layers";
    plans[n] = plan;
  }
  return plans;
}

int64_t Frozen::bytes() const {
  int64_t bytes = 0;
  for (const auto& layer : layers_) bytes += layer->bytes();
  return bytes;
}

// ---- a stream ---------------------------------------------------------------------------------------------

Stream::Stream(std::shared_ptr<const Frozen> frozen, const py::tuple& states) : frozen_(std::move(frozen)) {
  const FrozenLayer& first = *frozen_->layers_[0];
  if (first.D != 1) throw py::value_error("stream: expected layers of one direction");
  if (states.size() != 4) throw py::value_error("states: expected h, c and two more of the same shapes");
  const auto layers = static_cast<int64_t>(frozen_->layers_.size());
  for (size_t n = 0; n < 4; ++n) {
    Array state(states[n], n % 2 ? "c" : "h", dlpack::kCpu);
    state.expect_dtype(first.dtype);
    state.expect_dims(3);
    if (n == 0) batch_size_ = state.size(1);
    state.expect_shape({layers, batch_size_, n % 2 ? first.shape.H : first.shape.P}, n % 2 ? "L, B, H" : "L, B, P");
    if (!state.contiguous()) throw py::value_error("states: expected contiguous arrays");
    state.expect_writable();
    Array* const of = n % 2 ? c_ : h_;
    of[n / 2] = state;
  }
}

void Stream::hold() {
  if (busy_.exchange(true, std::memory_order_acquire)) {
    throw std::runtime_error("stream: another thread is using it; each needs a stream of its own");
  }
}

struct Stream::Held {
  Stream& stream;
  explicit Held(Stream& held) : stream(held) { held.hold(); }
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() { stream.release(); }
};

py::object Stream::step(const py::object& x, bool batch_first, const py::object& out, const py::object& lengths,
                        const py::object& resets, int num_threads) {
  const Held held(*this);
  LayerCall call = call_of(x, lengths, resets, batch_first);
  const Kind kind = kind_of(x);
  for (const py::handle each : {py::handle(lengths), py::handle(resets), py::handle(out)}) {
    if (!each.is_none() && kind_of(each) != kind) return not_implemented();
  }
  if (kind != Kind::kTensor && kind != Kind::kNdarray) return not_implemented();
  LayerArgs args = frozen_->arguments(call);
  const auto [T, B, I, H, P, projected] = args.shape;
  if (B != batch_size_) {
    throw std::runtime_error("x: expected a batch of " + std::to_string(batch_size_) + " as the stream has, got " +
                             std::to_string(B));
  }
  Output y;
  Array given;
  RowMap y_map = args.contiguous_map(P);
  if (out.is_none()) {
    y = Allocator(args.x).empty(args.dtype, args.sequence_shape(P));
  } else {
    given = Array(out, "out", args.x);
    given.expect_dtype(args.dtype, " as x has");
    given.expect_shape(args.sequence_shape(P));
    given.expect_writable();
    if (given.overlaps(args.x)) throw py::value_error("out: expected memory apart from that of x");
    y = {out, const_cast<void*>(given.data()), args.dtype};
    y_map = args.map_of(given);
  }

  args.read_contents();
  const Effort effort(args, frozen_->layers_.size(), num_threads);
  const int next = 1 - current_;
  const Frozen::Io io{args.x.data(),
                      args.map_of(args.x),
                      y.data,
                      y_map,
                      const_cast<void*>(h_[next].data()),
                      const_cast<void*>(c_[next].data()),
                      nullptr,
                      {h_[current_].matrix(), c_[current_].matrix()},
                      effort.num_threads};
  {
    const GilRelease release(!effort.brief);
    frozen_->forward(args, io, between_, between_bytes_);
  }
  current_ = next;
  return y.object;
}

}  // namespace lstm_ext::ops
