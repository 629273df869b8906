// A team of blocks works on the same sequences, each block on its own units. Each step every rank needs what all
// ranks computed in the step before (h forward, the gates' gradients backward): the operand of a stage's product.
//
// The ways to exchange it, by what protects the operand against early reads and late writes:
//   kBlock    one buffer. __syncthreads after the writes, and after the reads of the product.
//   kCluster  two buffers, by the number e of the exchange: ranks store into buffer e % 2 of all others, then arrive at
//             barrier e % 2 of each. Who writes exchange e has seen all of e - 1, whose senders had left the reads of
//             e - 2 behind them: nobody reads the buffer any more. Two barriers, as an arrival for e + 1 may overtake
//             another rank's for e.
//   kGrid     two buffers in global memory, and words of 32 bits of data and 32 of e: a word is its own flag, read
//             until it bears e. A word is overwritten by e only after its writer has read all of e - 1, whose words
//             were computed from all of e - 2: the dependence runs through data, and needs no fence. Each rank copies
//             the words into its one operand buffer, which is free as soon as its own product is done.
#pragma once

#include "product.cuh"

namespace lstm_ext::cuda {

template <class Tile, int kTiles>
class Team {
 public:
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;
  static constexpr int kBatchTile = kTiles * kColumns;

  __device__ explicit Team(const Spread& spread)
      : spread_(spread),
        shared_(dynamic_shared()),
        rank_(static_cast<int>(blockIdx.x) % spread.ranks),
        team_(static_cast<int>(blockIdx.x) / spread.ranks) {
    for (int n = 0; n < spread.num_stages; ++n) {
      clear_words(spread.stage[n].operand_offset, (clustered() ? 2 : 1) * spread.stage[n].operand_bytes / 4);
    }
    clear_words(spread.outbox_offset, outbox_words());
    if (clustered()) {
      if (threadIdx.x < 4) mbarrier_init(barrier(static_cast<int>(threadIdx.x) / 2, threadIdx.x % 2), arrivals());
      cluster_sync();  // nobody stores into a block that still clears, or arrives at a barrier that is not there yet
    }
    __syncthreads();
  }

  // No block of a cluster leaves while another may still store into it.
  __device__ void leave() const {
    if (clustered()) cluster_sync();
  }

  __device__ int rank() const { return rank_; }
  __device__ int team() const { return team_; }
  __device__ char* shared() const { return shared_; }
  __device__ Sum* partial() const { return reinterpret_cast<Sum*>(shared_ + spread_.partial_offset); }
  __device__ Sum* state() const { return reinterpret_cast<Sum*>(shared_ + spread_.state_offset); }

  // The operand that the next product of a stage reads.
  __device__ OnChip* operand(int stage) const {
    const int buffer = clustered() ? exchanges_[stage] % 2 : 0;
    return reinterpret_cast<OnChip*>(shared_ + spread_.stage[stage].operand_offset +
                                     buffer * spread_.stage[stage].operand_bytes);
  }

  // Fills the operand of a stage from `value(k, n)`, in this block alone: the start of a walk.
  template <class Value>
  __device__ void fill(int stage, int rows, const Value& value) {
    OnChip* to = operand(stage);
    const int columns = spread_.stage[stage].column_tiles * Tile::kK;
    for (int n = threadIdx.x / 32; n < kBatchTile; n += kWarps)
      for (int k = threadIdx.x % 32; k < columns; k += 32)
        to[operand_index<Tile, kTiles>(k, n)] = n < rows ? value(k, n) : OnChip(Tile::on_chip(0));
  }

  // Hands number j of this rank's share of a stage's next operand over, for sequence n.
  __device__ __forceinline__ void put(int stage, int n, int j, Sum value) {
    const Stage& of = spread_.stage[stage];
    if (spread_.exchange == Exchange::kBlock) {
      operand(stage)[operand_index<Tile, kTiles>(j, n)] = Tile::on_chip(value);
    } else {
      reinterpret_cast<OnChip*>(shared_ + spread_.outbox_offset + n * of.row_words * 4)[j] = Tile::on_chip(value);
    }
  }

  // After all of `put`, by all threads: sends it.
  __device__ void send(int stage, int rows) {
    if (spread_.exchange == Exchange::kBlock) return;  // the __syncthreads of `receive` does it
    const Stage& of = spread_.stage[stage];
    const int next = ++exchanges_[stage];
    __syncthreads();  // the outbox is full
    const uint32_t* outbox = reinterpret_cast<const uint32_t*>(shared_ + spread_.outbox_offset);
    for (int index = threadIdx.x; index < rows * of.row_words; index += kThreads) {
      const int n = index / of.row_words, word = index % of.row_words;
      const uint32_t data = outbox[index];
      if (clustered()) {
        uint32_t* place = operand_word(stage, rank_, n, word);
        for (int to = 0; to < spread_.ranks; ++to) st_cluster(place, to, data);
      } else {
        st_relaxed_gpu(mail(stage, next, n, rank_) + word, uint64_t{static_cast<uint32_t>(next)} << 32 | data);
      }
    }
    if (clustered()) {
      __syncwarp();  // a lane arrives for the stores of its whole warp
      const int lane = threadIdx.x % 32;
      if (lane < spread_.ranks) mbarrier_arrive(barrier(stage, next % 2), lane);
    }
  }

  // Waits until the operand of a stage holds what all ranks have sent last, if they have sent.
  __device__ void receive(int stage, int rows, bool sent) {
    if (sent && spread_.exchange == Exchange::kCluster)
      mbarrier_wait(barrier(stage, exchanges_[stage] % 2), (exchanges_[stage] - 1) / 2 % 2);
    if (sent && spread_.exchange == Exchange::kGrid) read_mail(stage, rows);
    __syncthreads();  // all that this block itself wrote to the operand is there; and the partial sums are free again
  }

 private:
  static constexpr int kInFlight = 4;

  __device__ bool clustered() const { return spread_.exchange == Exchange::kCluster; }
  __device__ int arrivals() const { return spread_.ranks * kWarps; }

  __device__ uint64_t* barrier(int stage, int parity) const {
    return reinterpret_cast<uint64_t*>(shared_ + spread_.barriers_offset) + stage * 2 + parity;
  }

  __device__ int outbox_words() const {
    int words = 0;
    for (int n = 0; n < spread_.num_stages; ++n) words = max(words, kBatchTile * spread_.stage[n].row_words);
    return spread_.exchange == Exchange::kBlock ? 0 : words;
  }

  __device__ void clear_words(int offset, int words) {
    for (int n = threadIdx.x; n < words; n += kThreads) reinterpret_cast<uint32_t*>(shared_ + offset)[n] = 0;
  }

  // Where word `word` of a rank's share for sequence n belongs in the operand. A word of two numbers has the two of an
  // even column and the next, which lie together there too.
  __device__ __forceinline__ uint32_t* operand_word(int stage, int rank, int n, int word) const {
    constexpr int kPerWord = sizeof(OnChip) < 4 ? 4 / sizeof(OnChip) : 1;
    constexpr int kWordsEach = sizeof(OnChip) > 4 ? sizeof(OnChip) / 4 : 1;
    const int k = rank * spread_.stage[stage].columns.each() + word / kWordsEach * kPerWord;
    return reinterpret_cast<uint32_t*>(operand(stage) + operand_index<Tile, kTiles>(k, n)) + word % kWordsEach;
  }

  // The words of a rank for sequence n, in exchange e.
  __device__ uint64_t* mail(int stage, int e, int n, int rank) const {
    const Stage& of = spread_.stage[stage];
    const int64_t team = static_cast<int64_t>(blockIdx.y) * spread_.teams + team_;
    const int64_t row = (static_cast<int64_t>(e % 2) * spread_.batch_tile + n) * spread_.ranks + rank;
    return spread_.words + team * spread_.exchange_words + of.words_offset + row * of.row_words;
  }

  __device__ void read_mail(int stage, int rows) {
    const Stage& of = spread_.stage[stage];
    const uint32_t e = exchanges_[stage];
    const int per_row = spread_.ranks * of.row_words, count = rows * per_row;
    const uint64_t* from = mail(stage, e, 0, 0);
    for (int start = threadIdx.x; start < count; start += kThreads * kInFlight) {
      uint64_t words[kInFlight];  // asked for together, as each takes a way to L2 and back
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int index = start + n * kThreads;
        words[n] = index < count ? ld_relaxed_gpu(from + index) : 0;
      }
#pragma unroll
      for (int n = 0; n < kInFlight; ++n) {
        const int index = start + n * kThreads;
        if (index >= count) break;
        while (static_cast<uint32_t>(words[n] >> 32) != e) words[n] = ld_relaxed_gpu(from + index);
        const int rest = index % per_row;
        *operand_word(stage, rest / of.row_words, index / per_row, rest % of.row_words) =
            static_cast<uint32_t>(words[n]);
      }
    }
  }

  const Spread& spread_;
  char* shared_;
  int rank_, team_;
  int exchanges_[2] = {0, 0};
};

}  // namespace lstm_ext::cuda
