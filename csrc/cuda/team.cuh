// A team of blocks works on the same sequences, each block on its own units. Each step every rank needs what all ranks
// computed in the step before (h forward, the gates' gradients backward): the operand of its next product. Here 3 ranks
// at one exchange; `put` fills the outbox, `send` brings it to all, and `receive` waits for what the others sent:
//
//   rank 0   outbox [a]   ->   operand [a | b | c]   ->   product with the own rows of the weights
//   rank 1   outbox [b]   ->   operand [a | b | c]
//   rank 2   outbox [c]   ->   operand [a | b | c]
//
// The ways to exchange it, by what protects the operand against early reads and late writes:
//   kBlock    one buffer, and no outbox. __syncthreads after the writes, and after the reads of the product.
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

template <class Tile, int kBatchTiles>
class Team {
 public:
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;
  static constexpr int kSequences = kBatchTiles * kBatchColumns;

  __device__ explicit Team(const Layout& layout)
      : layout_(layout),
        shared_(dynamic_shared()),
        rank_(static_cast<int>(blockIdx.x) % layout.ranks),
        team_(static_cast<int>(blockIdx.x) / layout.ranks) {
    for (int n = 0; n < layout.num_products; ++n) {
      clear_words(layout.product[n].operand_offset, (clustered() ? 2 : 1) * layout.product[n].operand_bytes / 4);
    }
    clear_words(layout.outbox_offset, outbox_words());
    if (clustered()) {
      if (threadIdx.x < 4)
        mbarrier_init(barrier(static_cast<Product>(static_cast<int>(threadIdx.x) / 2), threadIdx.x % 2), arrivals());
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
  __device__ Sum* partial() const { return reinterpret_cast<Sum*>(shared_ + layout_.partial_offset); }
  __device__ Sum* state() const { return reinterpret_cast<Sum*>(shared_ + layout_.state_offset); }

  // What the next product reads: element k of the vector for sequence n is at operand_index(k, n).
  __device__ OnChip* operand(Product which) const {
    const int buffer = clustered() ? exchanges_[number_of(which)] % 2 : 0;
    return reinterpret_cast<OnChip*>(shared_ + layout_[which].operand_offset + buffer * layout_[which].operand_bytes);
  }

  // Fills the operand of a product from `value(k, n)`, in this block alone: the start of a walk. Past `rows` sequences
  // it is zero.
  template <class Value>
  __device__ void fill(Product which, int rows, const Value& value) {
    OnChip* to = operand(which);
    const int columns = layout_[which].k_tiles * Tile::kK;
    for (int n = threadIdx.x / 32; n < kSequences; n += kWarps)
      for (int k = threadIdx.x % 32; k < columns; k += 32)
        to[operand_index<Tile, kBatchTiles>(k, n)] = n < rows ? value(k, n) : OnChip(Tile::on_chip(0));
  }

  // Hands over element j of this rank's part of a product's next operand, for sequence n.
  __device__ __forceinline__ void put(Product which, int n, int j, Sum value) {
    const ProductLayout& product = layout_[which];
    if (layout_.exchange == Exchange::kBlock) {
      operand(which)[operand_index<Tile, kBatchTiles>(j, n)] = Tile::on_chip(value);
    } else {
      reinterpret_cast<OnChip*>(shared_ + layout_.outbox_offset + n * product.row_words * 4)[j] = Tile::on_chip(value);
    }
  }

  // After all of `put`, by all threads: sends it.
  __device__ void send(Product which, int rows) {
    if (layout_.exchange == Exchange::kBlock) return;  // the __syncthreads of `receive` does it
    const ProductLayout& product = layout_[which];
    const int next = ++exchanges_[number_of(which)];
    __syncthreads();  // the outbox is full
    const uint32_t* outbox = reinterpret_cast<const uint32_t*>(shared_ + layout_.outbox_offset);
    for (int index = threadIdx.x; index < rows * product.row_words; index += kThreads) {
      const int n = index / product.row_words, word = index % product.row_words;
      const uint32_t data = outbox[index];
      if (clustered()) {
        uint32_t* address = operand_word(which, rank_, n, word);
        for (int to = 0; to < layout_.ranks; ++to) st_cluster(address, to, data);
      } else {
        st_relaxed_gpu(mail(which, next, n, rank_) + word, uint64_t{static_cast<uint32_t>(next)} << 32 | data);
      }
    }
    if (clustered()) {
      __syncwarp();  // a lane arrives for the stores of its whole warp
      const int lane = threadIdx.x % 32;
      if (lane < layout_.ranks) mbarrier_arrive(barrier(which, next % 2), lane);
    }
  }

  // Waits until the operand of a product holds what all ranks have sent last, if they have sent.
  __device__ void receive(Product which, int rows, bool sent) {
    if (sent && layout_.exchange == Exchange::kCluster)
      mbarrier_wait(barrier(which, exchanges_[number_of(which)] % 2), (exchanges_[number_of(which)] - 1) / 2 % 2);
    if (sent && layout_.exchange == Exchange::kGrid) read_mail(which, rows);
    __syncthreads();  // all that this block itself wrote to the operand is there; and the partial sums are free again
  }

 private:
  static constexpr int kInFlight = 4;  // loads that a thread waits for at a time

  __device__ bool clustered() const { return layout_.exchange == Exchange::kCluster; }
  // At a barrier, for one exchange: one of each warp of each rank.
  __device__ int arrivals() const { return layout_.ranks * kWarps; }

  __device__ uint64_t* barrier(Product which, int parity) const {
    return reinterpret_cast<uint64_t*>(shared_ + layout_.barriers_offset) + number_of(which) * 2 + parity;
  }

  __device__ int outbox_words() const {
    int words = 0;
    for (int n = 0; n < layout_.num_products; ++n) words = max(words, kSequences * layout_.product[n].row_words);
    return layout_.exchange == Exchange::kBlock ? 0 : words;
  }

  __device__ void clear_words(int offset, int words) {
    for (int n = threadIdx.x; n < words; n += kThreads) reinterpret_cast<uint32_t*>(shared_ + offset)[n] = 0;
  }

  // Where word `word` of a rank's part for sequence n belongs in the operand. A word of two numbers has the two of an
  // even column and the next, which lie together there too.
  __device__ __forceinline__ uint32_t* operand_word(Product which, int rank, int n, int word) const {
    constexpr int kPerWord = sizeof(OnChip) < 4 ? 4 / sizeof(OnChip) : 1;
    constexpr int kWordsEach = sizeof(OnChip) > 4 ? sizeof(OnChip) / 4 : 1;
    const int k = rank * layout_[which].columns.per_rank() + word / kWordsEach * kPerWord;
    return reinterpret_cast<uint32_t*>(operand(which) + operand_index<Tile, kBatchTiles>(k, n)) + word % kWordsEach;
  }

  // The words of a rank for sequence n, in exchange e: [direction, team][product][e % 2, sequence, rank, word].
  __device__ uint64_t* mail(Product which, int e, int n, int rank) const {
    const ProductLayout& product = layout_[which];
    const int64_t team = static_cast<int64_t>(blockIdx.y) * layout_.teams + team_;
    const int64_t row = (static_cast<int64_t>(e % 2) * layout_.team_batch + n) * layout_.ranks + rank;
    return layout_.words + team * layout_.exchange_words + product.words_offset + row * product.row_words;
  }

  // Copies the words of all ranks to the operand, each as soon as it bears the number of this exchange.
  __device__ void read_mail(Product which, int rows) {
    const ProductLayout& product = layout_[which];
    const uint32_t e = exchanges_[number_of(which)];
    const int per_row = layout_.ranks * product.row_words, count = rows * per_row;
    const uint64_t* from = mail(which, e, 0, 0);
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
        *operand_word(which, rest / product.row_words, index / per_row, rest % product.row_words) =
            static_cast<uint32_t>(words[n]);
      }
    }
  }

  const Layout& layout_;
  char* shared_;
  int rank_, team_;
  int exchanges_[2] = {0, 0};  // so many have been sent, of each product
};

}  // namespace lstm_ext::cuda
