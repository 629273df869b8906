// A team of blocks works on the same sequences, each block on its own units. What a step needs of the others travels
// forward by `Gather` and backward by `Scatter`, here 3 ranks at one exchange:
//
//   Gather    rank 0 makes [a]      ->   operand [a | b | c]     each rank needs all of h for its rows of the weights
//             rank 1 makes [b]      ->   operand [a | b | c]
//             rank 2 makes [c]      ->   operand [a | b | c]
//
//   Scatter   rank 0 makes [p q r]  ->   p + p' + p"             each rank has a part of every dh, of its columns of
//             rank 1 makes [p' q' r']    q + q' + q"             the weights; who owns it adds the parts up, in order
//             rank 2 makes [p" q" r"]    r + r' + r"
//
// A cell that normalises needs a few numbers of each rank besides, such as sums over its part of a row: a warp of each
// rank has the row of a sequence, and sends those numbers to that warp of all ranks, which takes them as `receive_row`
// says. The warps of a block need not meet for that.
//
// Their ways, by what protects a buffer against early reads and late writes; e is the number of the exchange:
//   kBlock    shared memory of the one block, and __syncthreads.
//   kCluster  16 bytes at a time go to other ranks' shared memory by st.async, which counts them at barrier e % 2 of
//             the rank that gets them; that one has announced how many come. Two buffers, by e % 2. Who sends exchange
//             e has all of e - 1, whose senders had read e - 2: nobody reads the buffer any more, and no byte of e is
//             counted in the phase of e - 2.
//   kGrid     mail through L2, two buffers by e % 2. Each number has the mark of e, and is read until it has: it is its
//             own flag. It is overwritten by e only after its writer has read all of e - 1, whose numbers depend on all
//             of e - 2: the order is that of data, and needs no fence. Of rows it is that of a warp: a lane has its
//             numbers of e - 2, and has added them to those of the others, before the warp sends e - 1.
// Every rank takes part in every exchange, also with units that are none, which are zero: or the order would not hold.
#pragma once

#include "pointwise.cuh"
#include "product.cuh"

namespace lstm_ext::cuda {

// Ends a launch whose exchange never comes, with word for the host of which it was. Not inlined: it is rare.
inline __device__ __noinline__ void give_up(const Layout& layout, int rank, int exchange) {
  Timeout& timeout = *layout.timeout;
  timeout.block = static_cast<int>(blockIdx.x);
  timeout.rank = rank;
  timeout.exchange = exchange;
  __threadfence_system();
  timeout.kernel = layout.kernel;  // says that the rest is there
  trap();
}

// Counts polls that fail, and looks at the clock now and then.
class Patience {
 public:
  __device__ Patience(const Layout& layout, int rank, int exchange)
      : layout_(layout), rank_(rank), exchange_(exchange) {}

  __device__ __forceinline__ void poll_failed() {
    if (++polls_ % kPollsPerLook != 0) return;
    const uint64_t now = nanoseconds();
    if (since_ == 0) since_ = now;
    if (now - since_ > kMostNanoseconds) give_up(layout_, rank_, exchange_);
  }

 private:
  const Layout& layout_;
  int rank_, exchange_;
  uint32_t polls_ = 0;
  uint64_t since_ = 0;
};

// ---- How a number of the mail tells of which exchange it is ---------------------------------------------------------

// Forward: 32 bits of numbers, and 32 of e. All ranks read them at once, and do so sooner where they are spread.
struct Numbered {
  static constexpr int kWholeBytes = 8;  // read and written whole
  uint32_t e;

  __device__ explicit Numbered(int exchange) : e(static_cast<uint32_t>(exchange)) {}

  __device__ __forceinline__ bool is_on(const uint4& mail) const { return mail.y == e && mail.w == e; }
  __device__ __forceinline__ uint4 nothing() const { return {0, e, 0, e}; }
};

// Backward, where there is more of it, and one reader: the last bit of a sum, which is lost. It is set in exchanges 1
// and 2, not in 3 and 4, and so on: a place, which starts with zeros and is written at every second exchange, bears the
// bit of e or that of e - 2.
template <class Sum>
struct LastBit {
  static constexpr int kWholeBytes = int{sizeof(Sum)};
  uint32_t bit;

  __device__ explicit LastBit(int exchange) : bit(static_cast<uint32_t>(exchange + 1) >> 1 & 1) {}

  // Of 16 bytes words 1 and 3 have one too, unless a sum has two words.
  static __device__ __forceinline__ uint4 each(uint32_t bit) {
    const uint32_t odd = sizeof(Sum) == 4 ? bit : 0;
    return {bit, odd, bit, odd};
  }
  static __device__ __forceinline__ uint4 without(const uint4& words) {
    const uint4 bits = each(1);
    return {words.x & ~bits.x, words.y & ~bits.y, words.z & ~bits.z, words.w & ~bits.w};
  }

  __device__ __forceinline__ bool is_on(const uint4& mail) const {
    const uint4 bits = each(1), set = each(bit);
    return (((mail.x ^ set.x) & bits.x) | ((mail.y ^ set.y) & bits.y) | ((mail.z ^ set.z) & bits.z) |
            ((mail.w ^ set.w) & bits.w)) == 0;
  }
  __device__ __forceinline__ uint4 nothing() const { return each(bit); }
  __device__ __forceinline__ uint4 put_on(const uint4& words) const {
    const uint4 rest = without(words), set = each(bit);
    return {rest.x | set.x, rest.y | set.y, rest.z | set.z, rest.w | set.w};
  }
};

// ---- What both have -------------------------------------------------------------------------------------------------

template <class Tile, int kBatchTiles, Exchange kExchange>
class Team {
 public:
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;
  static constexpr int kSequences = kBatchTiles * kBatchColumns;
  // Units of a thread's items: what 4 bytes hold, or more.
  static constexpr int kItem = sizeof(OnChip) == 2 ? 2 : 1;

  __device__ explicit Team(const Layout& layout)
      : layout_(layout),
        shared_(dynamic_shared()),
        rank_(alone() ? 0 : static_cast<int>(blockIdx.x) % layout.ranks),
        team_(alone() ? static_cast<int>(blockIdx.x) : static_cast<int>(blockIdx.x) / layout.ranks) {}

  // How this team exchanges, or may: known as the kernel is compiled, but for kAny.
  template <Exchange kWay>
  static constexpr bool kMayBe = kExchange == kWay || kExchange == Exchange::kAny;
  __device__ __forceinline__ bool exchanges_by(Exchange way) const {
    if constexpr (kExchange == Exchange::kAny) return layout_.exchange == way;
    return kExchange == way;
  }
  __device__ __forceinline__ bool alone() const { return exchanges_by(Exchange::kBlock); }
  __device__ __forceinline__ bool clustered() const { return exchanges_by(Exchange::kCluster); }
  __device__ __forceinline__ bool by_mail() const { return exchanges_by(Exchange::kGrid); }

  __device__ int rank() const { return rank_; }
  __device__ int team() const { return team_; }
  __device__ char* shared() const { return shared_; }
  __device__ Sum* partial() const { return reinterpret_cast<Sum*>(shared_ + layout_.partial_offset); }

  // No block of a cluster leaves while another may still store into it.
  __device__ void leave() const {
    if constexpr (kMayBe<Exchange::kCluster>) {
      if (clustered()) cluster_meet();
    }
  }

  // To all ranks, numbers of the row of sequence n, the same in all lanes of the warp that has it. `rows` have some.
  using RowNumbers = Units<Sum, kRowNumbers>;
  __device__ __forceinline__ void send_row(int n, int rows, const RowNumbers& numbers) {
    const int e = ++exchanges_[kRows], lane = static_cast<int>(threadIdx.x) % 32;
    const auto pieces = bits_as<RowPieces>(numbers);
    if (clustered()) {
      const char* own = row_inbox(e, rank_, n);
      for (int to = lane; to < layout_.ranks; to += 32) {
        const uint32_t there = shared_address_of_rank(own, to), at = shared_address_of_rank(barrier(kRows, e % 2), to);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) st_async(there + piece * 16, pieces.at[piece], at);
      }
      if (threadIdx.x == 0) mbarrier_expect(barrier(kRows, e % 2), layout_.ranks * rows * int{sizeof(numbers)});
    }
    if (by_mail() && lane == 0) {
      const RowMark mark(e);
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece)
        st_relaxed_gpu<RowMark::kWholeBytes>(row_mail(e, rank_, n) + piece, mark.put_on(pieces.at[piece]));
    }
  }

  // Calls body(rank, numbers) for what each rank has sent last of the row of sequence n: a lane has every 32nd rank.
  template <class Body>
  __device__ __forceinline__ void receive_row(int n, const Body& body) const {
    const int e = exchanges_[kRows], lane = static_cast<int>(threadIdx.x) % 32;
    if (clustered()) {
      wait_for_bytes(kRows);
#pragma unroll 1
      for (int rank = lane; rank < layout_.ranks; rank += 32) {
        const RowPieces pieces = *reinterpret_cast<const RowPieces*>(row_inbox(e, rank, n));  // not by reference
        body(rank, bits_as<RowNumbers>(pieces));
      }
    }
    if (by_mail()) {
      const RowMark mark(e);
#pragma unroll 1
      for (int rank = lane; rank < layout_.ranks; rank += 32) {
        RowPieces mail;
        const uint4* from = row_mail(e, rank, n);
        read_marked(mail.at, mark, [&](int piece) { return from + piece; }, [](int) { return true; }, kRows);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece) mail.at[piece] = RowMark::without(mail.at[piece]);
        body(rank, bits_as<RowNumbers>(mail));
      }
    }
  }

  // The product's rows from j on for sequence n.
  template <class Numbers = Piece<Sum>>
  __device__ __forceinline__ Numbers product(Product which, int n, int j) const {
    const ProductLayout& layout = layout_[which];
    return total<Numbers>(partial() + n * layout.partial_stride + j, kWarps >> layout.log_warps_m,
                          kSequences * layout.partial_stride);
  }
  // Where the first of those that are added up there stand: once they are, a thread may keep something else there.
  template <class Numbers>
  __device__ __forceinline__ Numbers& kept(Product which, int n, int j) const {
    return *reinterpret_cast<Numbers*>(partial() + n * layout_[which].partial_stride + j);
  }

 protected:
  // By what exchanges are counted, and have barriers: number_of each product, and those of rows.
  static constexpr int kRows = 2, kExchanges = 3;

  // After everything in shared memory that others send to is cleared.
  __device__ void begin() {
    if constexpr (kMayBe<Exchange::kCluster>) {
      if (clustered()) {
        if (threadIdx.x < 2 * kExchanges) mbarrier_init(barrier(threadIdx.x / 2, threadIdx.x % 2), 1);
        cluster_sync();  // nobody stores into a block that still clears, or counts at a barrier that is not there yet
      }
    }
    __syncthreads();
  }

  __device__ void clear(int offset, int bytes) const {
    for (int n = threadIdx.x; n < bytes / 16; n += kThreads) reinterpret_cast<uint4*>(shared_ + offset)[n] = {};
  }

  __device__ uint64_t* barrier(int which, int parity) const {
    return reinterpret_cast<uint64_t*>(shared_ + layout_.barriers_offset) + which * 2 + parity;
  }

  // kCluster: until all bytes of the last exchange are there.
  __device__ __forceinline__ void wait_for_bytes(int which) const {
    const int e = exchanges_[which];
    Patience patience(layout_, rank_, e);
    while (!mbarrier_try_wait(barrier(which, e % 2), (e - 1) / 2 % 2)) patience.poll_failed();
  }

  // The mail for this team, or that of a product: [direction, team, exchange_bytes].
  __device__ char* mail() const {
    const int64_t team = static_cast<int64_t>(blockIdx.y) * layout_.teams + team_;
    return layout_.mail + team * layout_.exchange_bytes;
  }
  __device__ char* mail(Product which) const { return mail() + layout_[which].mail_offset; }

  // kGrid: reads up to kCount times 16 bytes, each as often as it takes until they have the mark. `at(n)` is the
  // address of number n, and `there(n)` whether it counts.
  template <int kCount, class Mark, class At, class There>
  __device__ __forceinline__ void read_marked(uint4 (&mail)[kCount], const Mark& mark, const At& at, const There& there,
                                              int which) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) mail[n] = there(n) ? ld_relaxed_gpu<Mark::kWholeBytes>(at(n)) : mark.nothing();
    Patience patience(layout_, rank_, exchanges_[which]);
    while (true) {
      uint32_t missing = 0;
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        if (!mark.is_on(mail[n])) missing |= 1u << n;
      if (missing == 0) return;
      patience.poll_failed();
#pragma unroll
      for (int n = 0; n < kCount; ++n)  // all that are missing are asked for together: each takes a way to L2 and back
        if (missing >> n & 1) mail[n] = ld_relaxed_gpu<Mark::kWholeBytes>(at(n));
    }
  }

  const Layout& layout_;
  char* shared_;
  int rank_, team_;
  int exchanges_[kExchanges] = {};  // so many have been sent
  // A warp without a sequence counts none of rows: it will not have one either in later batches, which are no larger.

 private:
  static constexpr int kPieces = int{sizeof(RowNumbers)} / 16;
  struct RowPieces {
    uint4 at[kPieces];
  };
  using RowMark = LastBit<Sum>;

  // What a rank has sent of a row at exchange e: [e % 2][rank][sequence].
  __device__ int row_place(int e, int rank, int n) const {
    return ((e % 2 * layout_.ranks + rank) * layout_.team_batch + n) * int{sizeof(RowNumbers)};
  }
  __device__ char* row_inbox(int e, int rank, int n) const {
    return shared_ + layout_.row_inbox_offset + row_place(e, rank, n);
  }
  __device__ uint4* row_mail(int e, int rank, int n) const {
    return reinterpret_cast<uint4*>(mail() + layout_.row_mail_offset + row_place(e, rank, n));
  }
};

// ---- Forward --------------------------------------------------------------------------------------------------------

// Loads of 16 bytes that a thread waits for at a time: as many as there are registers for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kMostInFlight = 6;
#else
inline constexpr int kMostInFlight = 8;
#endif

// All ranks' parts of a vector are put together in the operand of each. In memory it is [k tile][sequence][number]:
// what one rank has of a k tile for all sequences lies together.
template <class Tile, int kBatchTiles, Exchange kExchange>
class Gather : public Team<Tile, kBatchTiles, kExchange> {
  using Base = Team<Tile, kBatchTiles, kExchange>;
  using Base::exchanges_, Base::layout_, Base::rank_, Base::shared_;
  using Base::kSequences;
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;

 public:
  using Base::alone, Base::by_mail, Base::clustered;
  using Base::kItem;

  __device__ explicit Gather(const Layout& layout) : Base(layout) {
    for (int n = 0; n < layout.num_products; ++n)
      this->clear(layout.product[n].operand_offset, (clustered() ? 2 : 1) * layout.product[n].operand_bytes);
    this->begin();
  }

  // What the next product reads.
  __device__ OnChip* operand(Product which) const { return buffer(which, exchanges_[number_of(which)]); }

  // Fills the operand of a product from `value(k, n)`, in this block alone: the start of a walk. Past `rows` sequences
  // it is zero.
  template <class Value>
  __device__ void fill(Product which, int rows, const Value& value) {
    OnChip* to = operand(which);
    const int columns = layout_[which].k_tiles * Tile::kK;
    for (int n = threadIdx.x / 32; n < kSequences; n += kWarps)
      for (int k = threadIdx.x % 32; k < columns; k += 32)
        to[operand_place<Tile, kBatchTiles>(k, n)] = n < rows ? value(k, n) : OnChip(Tile::on_chip(0));
  }

  // Hands over units j and following of this rank, for sequence n.
  __device__ __forceinline__ void put(Product which, int n, int j, const Units<Sum, kItem>& values) const {
    const int k = rank_ * layout_[which].columns.width + j, next = exchanges_[number_of(which)] + 1;
    Units<OnChip, kItem> item;
#pragma unroll
    for (int i = 0; i < kItem; ++i) item.at[i] = Tile::on_chip(values.at[i]);
    if constexpr (Base::template kMayBe<Exchange::kGrid>) {
      if (by_mail()) {
        constexpr int kWords = int{sizeof(item)} / 4;
        struct Words {
          uint32_t at[kWords];
        };
        const Words words = bits_as<Words>(item);
        const int row = (k / Tile::kK << layout_.log_rows) + n;
        uint64_t* to = mailbox(which, next) + row * kRowWords + k % Tile::kK * int{sizeof(OnChip)} / 4;
#pragma unroll
        for (int word = 0; word < kWords; ++word)
          st_relaxed_gpu(to + word, uint64_t{Numbered(next).e} << 32 | words.at[word]);
        return;
      }
    }
    if constexpr (kExchange != Exchange::kGrid)
      *reinterpret_cast<Units<OnChip, kItem>*>(buffer(which, next) + operand_place<Tile, kBatchTiles>(k, n)) = item;
  }

  // After all of `put`, by all threads.
  __device__ __forceinline__ void send(Product which, int rows) {
    const int next = ++exchanges_[number_of(which)];
    if constexpr (Base::template kMayBe<Exchange::kCluster>) {
      if (clustered()) {
        __syncthreads();  // this rank's part of the operand is there
        send_to_cluster(which, rows, next);
      }
    }
  }

  // Waits until the operand of a product holds what all ranks have sent last, if they have sent. `late`: only the
  // last warps read the mail, where its rows can be divided evenly among them.
  __device__ __forceinline__ void receive(Product which, int rows, bool sent, bool late) {
    if constexpr (Base::template kMayBe<Exchange::kCluster>) {
      if (clustered() && sent) return this->wait_for_bytes(number_of(which));
    }
    if constexpr (Base::template kMayBe<Exchange::kGrid>) {
      if (by_mail() && sent) {
        if (kExchange == Exchange::kGrid && late && layout_.log_rows <= kLateRowsLog2) {
          read_mail<kLateReaders>(which, rows);
        } else {
          read_mail<kThreads>(which, rows);
        }
      }
    }
    __syncthreads();  // all that this block itself wrote to the operand is there; and the partial sums are free again
  }

 private:
  static constexpr int kRowBytes = Tile::kK * int{sizeof(OnChip)};  // of a sequence in a k tile
  static constexpr int kRowWords = kRowBytes / 4;
  static constexpr int kLateReaders = kThreads - kEarlyThreads, kLateRowsLog2 = 4;
  static_assert(kLateReaders % (kRowWords / 2 << kLateRowsLog2) == 0);

  __device__ OnChip* buffer(Product which, int e) const {
    const ProductLayout& product = layout_[which];
    return reinterpret_cast<OnChip*>(shared_ + product.operand_offset +
                                     (clustered() ? e % 2 * product.operand_bytes : 0));
  }

  // The k tiles of this rank, from its own operand to that of each other rank; a warp for each of these.
  __device__ __forceinline__ void send_to_cluster(Product which, int rows, int e) const {
    constexpr int kPieces = kRowBytes / 16;
    const ProductLayout& product = layout_[which];
    const int tiles = product.columns.width / Tile::kK, pieces = tiles * rows * kPieces;
    char* own = reinterpret_cast<char*>(buffer(which, e)) + rank_ * tiles * kSequences * kRowBytes;
    for (int to = threadIdx.x / 32; to < layout_.ranks; to += kWarps) {
      if (to == rank_) continue;
      const uint32_t there = shared_address_of_rank(own, to),
                     at = shared_address_of_rank(this->barrier(number_of(which), e % 2), to);
      for (int n = threadIdx.x % 32; n < tiles * kSequences * kPieces; n += 32) {
        if (n / kPieces % kSequences >= rows) continue;
        st_async(there + n * 16, reinterpret_cast<const uint4*>(own)[n], at);
      }
    }
    if (threadIdx.x == 0) mbarrier_expect(this->barrier(number_of(which), e % 2), (layout_.ranks - 1) * pieces * 16);
  }

  // What ranks send at exchange e: [k tile][sequence][word of the row], as in the operand.
  __device__ uint64_t* mailbox(Product which, int e) const {
    const ProductLayout& product = layout_[which];
    return reinterpret_cast<uint64_t*>(this->mail(which)) + e % 2 * ((product.k_tiles << layout_.log_rows) * kRowWords);
  }

  // Copies the words of all ranks to the operand, each as soon as it bears the number of this exchange. A thread has
  // the same pair of words of every so many k tiles.
  template <int kReaders>
  __device__ __forceinline__ void read_mail(Product which, int rows) {
    constexpr int kInFlight = kExchange == Exchange::kGrid && sizeof(OnChip) == 2 ? kMostInFlight : 4;
    constexpr int kPairs = kRowWords / 2;                // of words, in a row
    constexpr int kPairUnits = 8 / int{sizeof(OnChip)};  // 2 words, all of one rank
    static_assert(kPairs * kSequences <= kThreads);
    const ProductLayout& product = layout_[which];
    const int e = exchanges_[number_of(which)], thread = static_cast<int>(threadIdx.x) - (kThreads - kReaders);
    if (thread < 0) return;
    const int sequence = thread / kPairs & ((1 << layout_.log_rows) - 1), pair = thread % kPairs;
    const int pairs = layout_.ranks * product.columns.width / kPairUnits;  // of one sequence
    const int tiles = sequence < rows ? (pairs - pair + kPairs - 1) / kPairs : 0;
    const int tiles_apart = kReaders / kPairs >> layout_.log_rows;
    const auto* from = reinterpret_cast<const uint4*>(mailbox(which, e)) + thread;
    int tile = thread / kPairs >> layout_.log_rows;
    char* to = reinterpret_cast<char*>(operand(which)) + sequence * kRowBytes + pair * 8;
    for (; tile < tiles; tile += kInFlight * tiles_apart, from += kInFlight * kReaders) {
      uint4 mail[kInFlight];
      const auto there = [&](int n) { return tile + n * tiles_apart < tiles; };
      this->read_marked(mail, Numbered(e), [&](int n) { return from + n * kReaders; }, there, number_of(which));
#pragma unroll
      for (int n = 0; n < kInFlight; ++n)
        if (there(n))
          *reinterpret_cast<uint2*>(to + (tile + n * tiles_apart) * (kSequences * kRowBytes)) = {mail[n].x, mail[n].z};
    }
  }
};

// ---- Backward -------------------------------------------------------------------------------------------------------

// The operand is this rank's own; the product of each rank is a part of every rank's units.
template <class Tile, int kBatchTiles, Exchange kExchange>
class Scatter : public Team<Tile, kBatchTiles, kExchange> {
  using Base = Team<Tile, kBatchTiles, kExchange>;
  using Base::exchanges_, Base::layout_, Base::rank_, Base::shared_;
  using Base::kSequences;
  using OnChip = typename Tile::OnChip;
  using Sum = typename Tile::Sum;

 public:
  using Base::alone, Base::by_mail, Base::clustered;
  using Base::kItem;

  __device__ explicit Scatter(const Layout& layout) : Base(layout) {
    for (int n = 0; n < layout.num_products; ++n)
      this->clear(layout.product[n].operand_offset, layout.product[n].operand_bytes);
    this->begin();
  }

  // Hands over number k of this rank's own columns and the N - 1 after it, for sequence n.
  template <int N>
  __device__ __forceinline__ void put(Product which, int n, int k, const Units<Sum, N>& values) const {
    constexpr int kTogether = N < Tile::kK ? N : Tile::kK;  // of one k tile
#pragma unroll
    for (int first = 0; first < N; first += kTogether) {
      Units<OnChip, kTogether> numbers;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) numbers.at[i] = Tile::on_chip(values.at[first + i]);
      *reinterpret_cast<Units<OnChip, kTogether>*>(operand(which) + operand_place<Tile, kBatchTiles>(k + first, n)) =
          numbers;
    }
  }

  __device__ OnChip* operand(Product which) const {
    return reinterpret_cast<OnChip*>(shared_ + layout_[which].operand_offset);
  }

  // After the sums of all warps are there, by all threads: each rank gets its part.
  __device__ __forceinline__ void send(Product which, int rows) {
    const int next = ++exchanges_[number_of(which)];
    if constexpr (Base::template kMayBe<Exchange::kCluster>) {
      if (clustered()) send_to_cluster(which, rows, next);
    }
    if constexpr (Base::template kMayBe<Exchange::kGrid>) {
      if (by_mail()) send_mail(which, rows, next);
    }
  }

  // Before any `sum` of what was sent last, by all threads.
  __device__ __forceinline__ void receive(Product which, int rows) const {
    if constexpr (Base::template kMayBe<Exchange::kCluster>) {
      if (clustered()) this->wait_for_bytes(number_of(which));
    }
    if constexpr (Base::template kMayBe<Exchange::kGrid>) {
      if (by_mail()) {
        read_mail(which, rows);
        __syncthreads();  // the sums of all groups are there
      }
    }
  }

  // The product's rows j and following of this rank, for sequence n: the sums of what all ranks have sent last.
  __device__ __forceinline__ Units<Sum, kItem> sum(Product which, int n, int j) const {
    if (alone()) return this->template product<Units<Sum, kItem>>(which, n, j);
    const ProductLayout& product = layout_[which];
    const int of_part = layout_.team_batch * product.rows.width;
    const Sum* from =
        (by_mail() ? group_sums(which) : inbox(which, exchanges_[number_of(which)])) + n * product.rows.width + j;
    const int parts = by_mail() ? product.mail_groups : layout_.ranks;
    Units<Sum, kItem> sums{};
#pragma unroll 4
    for (int part = 0; part < parts; ++part, from += of_part) {
      const Units<Sum, kItem> more = *reinterpret_cast<const Units<Sum, kItem>*>(from);
#pragma unroll
      for (int i = 0; i < kItem; ++i) sums.at[i] += more.at[i];
    }
    return sums;
  }

 private:
  static constexpr int kInFlight = kMailInFlight;
  using Mark = LastBit<Sum>;

  // [rank that sent][sequence][unit]
  __device__ Sum* inbox(Product which, int e) const {
    const ProductLayout& product = layout_[which];
    return reinterpret_cast<Sum*>(shared_ + product.inbox_offset + e % 2 * product.inbox_bytes);
  }

  // A warp for each rank, which gets the sums of its units, 16 bytes at a time.
  __device__ __forceinline__ void send_to_cluster(Product which, int rows, int e) const {
    const ProductLayout& product = layout_[which];
    const int width = product.rows.width, pieces = product.rows.pieces.value;  // of a sequence
    const Sum* own = inbox(which, e) + rank_ * layout_.team_batch * width;
    for (int to = threadIdx.x / 32; to < layout_.ranks; to += kWarps) {
      const uint32_t there = shared_address_of_rank(own, to),
                     at = shared_address_of_rank(this->barrier(number_of(which), e % 2), to);
      for (int index = threadIdx.x % 32; index < rows * pieces; index += 32) {
        const int n = product.rows.pieces.quotient(index), piece = index - n * pieces;
        const Piece<Sum> sums = this->product(which, n, to * width + piece * Piece<Sum>::kCount);
        st_async(there + index * 16, bits_as<uint4>(sums), at);
      }
    }
    if (threadIdx.x == 0) mbarrier_expect(this->barrier(number_of(which), e % 2), layout_.ranks * rows * pieces * 16);
  }

  // kGrid: [group of ranks][sequence][unit], of what each group has sent.
  __device__ Sum* group_sums(Product which) const {
    return reinterpret_cast<Sum*>(shared_ + layout_[which].inbox_offset);
  }

  // What a rank gets at exchange e: [rank that sent][sequence][unit].
  __device__ Sum* mailbox(Product which, int e, int rank) const {
    const int64_t numbers = int64_t{layout_.ranks} * layout_.team_batch * layout_[which].rows.width;
    return reinterpret_cast<Sum*>(this->mail(which)) + (int64_t{e % 2} * layout_.ranks + rank) * numbers;
  }

  __device__ __forceinline__ void send_mail(Product which, int rows, int e) const {
    const ProductLayout& product = layout_[which];
    const int width = product.rows.width, pieces = product.rows.pieces.value;
    const Mark mark(e);
    for (int n = 0; n < rows; ++n) {
      for (int index = threadIdx.x; index < layout_.ranks * pieces; index += kThreads) {
        const int rank = product.rows.pieces.quotient(index), j = (index - rank * pieces) * Piece<Sum>::kCount;
        Sum* to = mailbox(which, e, rank) + (rank_ * layout_.team_batch + n) * width + j;
        st_relaxed_gpu<Mark::kWholeBytes>(reinterpret_cast<uint4*>(to),
                                          mark.put_on(bits_as<uint4>(this->product(which, n, rank * width + j))));
      }
    }
  }

  // Adds up what each group of ranks has sent: a thread has 16 bytes of every so manyth rank, in their order.
  __device__ __forceinline__ void read_mail(Product which, int rows) const {
    const ProductLayout& product = layout_[which];
    const int e = exchanges_[number_of(which)], pieces = product.mail_pieces.value, groups = product.mail_groups;
    const int there = rows * product.rows.pieces.value;
    const auto* mailbox = reinterpret_cast<const uint4*>(this->mailbox(which, e, rank_));
    const Mark mark(e);
    // The last warps come first, as items are with the first.
    for (int index = kThreads - 1 - threadIdx.x; index < groups * pieces; index += kThreads) {
      const int group = product.mail_pieces.quotient(index), piece = index - group * pieces;
      if (piece >= there) continue;
      Piece<Sum> sums{};
      for (int rank = group; rank < layout_.ranks; rank += kInFlight * groups) {
        uint4 mail[kInFlight];
        const int first = rank * pieces + piece, apart = groups * pieces;
        const auto at = [&](int n) { return mailbox + (first + n * apart); };
        this->read_marked(mail, mark, at, [&](int n) { return rank + n * groups < layout_.ranks; }, number_of(which));
#pragma unroll
        for (int n = 0; n < kInFlight; ++n) {  // those that are not there are zero
          const auto more = bits_as<Piece<Sum>>(Mark::without(mail[n]));
#pragma unroll
          for (int i = 0; i < Piece<Sum>::kCount; ++i) sums.at[i] += more.at[i];
        }
      }
      reinterpret_cast<Piece<Sum>*>(group_sums(which))[index] = sums;
    }
  }
};

}  // namespace lstm_ext::cuda
