// plan_fetch: give every slot of a decode batch's top-k a hot row and copy the rows that are
// missing, in one cooperative launch. hot_state.py says what the state means and which row a miss
// takes; plan_fetch.py says what goes in and out.
//
//   look up   stamp the hits; the first lookup of a slot that is not hot claims the slot
//   -- grid barrier: no row may be evicted before every hit of the batch is stamped --
//   assign    give each claimed slot a row that the clock hand finds, and list it as a miss
//   -- grid barrier: the list is complete, and every claimed slot has its row --
//   copy      the listed rows, by some of the blocks
//   resolve   read the rows of the lookups that were no hits
//
// A block takes one query, or several if there are more queries than the device holds blocks. One
// query takes one block, an ordinary launch and block barriers. Words that another block may write
// in the same phase are read and written past L1 (load_relaxed, store_relaxed); a barrier orders
// what one phase writes and the next one reads.
//
// Bytes moved per lookup: 4 read, 4 gathered from the map, 4 of its row's stamp written, 4 written;
// per miss: 4 of the stamps that the hand reads for each row, 24 of state and list, and the row.
#include <climits>

#include "block_rank.cuh"
#include "copy_rows.cuh"

#ifndef ESS_PLAN_THREADS
#define ESS_PLAN_THREADS 512
#endif

namespace ess {

constexpr int kThreads = ESS_PLAN_THREADS;  // 4 lookups a thread at top-k 2048

// hot_state.py
enum Word { TICK, HAND, AGE_LIMIT, SCANNED, SEEN, CUT, OCCUPIED, SPLIT };
enum Counter {
  LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT, STEPS, STALL_NS, SCANS
};
enum Time { MAIN_READY, FETCHED, TIMES };
constexpr int kFree = -1;           // the stamp of a free row
constexpr int kTickMask = INT_MAX;  // ticks and ages are numbers of 31 bits
constexpr int kNone = -1;
constexpr int kPending = -2;
constexpr int kClaim = INT_MIN;  // + the lookup's place: below kNone, and the first lookup wins

// The hand: hot_state.py says why.
constexpr int kDensity = 16;        // one row in so many should be eligible
constexpr int kGrowth = 8;          // the age limit grows by an eighth at the end of a step
constexpr int kCut = 8;             // and falls by as much where a block finds next to nothing
constexpr int kBarren = 64;         // that is, less than one row in so many
constexpr int kMaxAgeLimit = 1 << 12;
constexpr int kChunkRows = 4;       // rows of a chunk that one thread looks at, at most
constexpr int kLeastBlocks = 6;     // of a launch of several queries
constexpr int kMaxLaps = 1024;      // far above any need: a damaged state must not hang the device

template <int kItems>
struct Shared {
  BlockRank<kItems, kThreads> rank;
  int victims[kItems * kThreads];
  int position, limit, tickets, got;
  int counted, evictions, taken_free, seen, scanned;
  unsigned long long ages;
};

// A thread's lookups of the query at hand.
template <int kItems>
struct Lookups {
  int slot[kItems];
  int row[kItems];  // of a hit, kPending, or kNone
};

__device__ __forceinline__ void add(int64_t* counter, unsigned long long value) {
  if (value != 0) atomicAdd(reinterpret_cast<unsigned long long*>(counter), value);
}

// Adds the warp's sum to a counter of the block.
__device__ __forceinline__ void add_warp(int* counter, int value) {
  const int sum = __reduce_add_sync(0xffffffffu, value);
  if (threadIdx.x % 32 == 0 && sum != 0) atomicAdd(counter, sum);
}

// Numbers the flagged threads of the block in any order, from *counter on.
__device__ __forceinline__ int take_ticket(int* counter, bool flag) {
  const unsigned votes = __ballot_sync(0xffffffffu, flag);
  const int lane = threadIdx.x % 32;
  int base = 0;
  if (lane == 0 && votes != 0) base = atomicAdd(counter, __popc(votes));
  return __shfl_sync(0xffffffffu, base, 0) + __popc(votes & ((1u << lane) - 1));
}

template <int kItems>
__device__ __forceinline__ void clear(Shared<kItems>& s) {
  if (threadIdx.x == 0) {
    s.counted = s.evictions = s.taken_free = s.seen = s.scanned = 0;
    s.ages = 0;
  }
  __syncthreads();
}

// Which rows a launch may take, and how it stamps them.
struct Hand {
  int tick;
  int stamp;      // of the rows that are used
  int min_age;    // of a row that is taken; above the age of those that this launch stamps
  int limit;      // as words[AGE_LIMIT], of a launch that does not insist
  bool insists;   // it finds a row for everyone, and lowers words[AGE_LIMIT] for that
  int step_ticks; // ages are counted in steps of so many ticks
};

__device__ __forceinline__ int age_of(const Hand& hand, int stamp) {
  return stamp == kFree ? INT_MAX : (hand.tick - stamp) & kTickMask;
}

// Stamps a hot row. A warm-up does not make a row older.
__device__ __forceinline__ void use_row(const GroupState& g, const Hand& hand, int row) {
  const int stamp = load_relaxed(g.row_stamp + row);
  if (age_of(hand, stamp) > age_of(hand, hand.stamp)) {
    store_relaxed(g.row_stamp + row, hand.stamp);
  }
}

// Takes `wanted` rows from their slots, or as many as it finds; s.victims[0, result) lists them.
// The block takes chunks of the rows from the hand on, and of each chunk the eligible rows that it
// needs. Every thread calls.
template <int kItems>
__device__ __forceinline__ int take_rows(Shared<kItems>& s, const GroupState& g, const Hand& hand,
                                         int wanted) {
  const int64_t start = g.words[HAND];
  int evictions = 0, taken_free = 0, got = 0;
  unsigned long long ages = 0;
  // Where it need not find rows, it looks at as many at the lowest limit as should do, and some.
  int own_limit = hand.limit, patience = 2 * kDensity * wanted + kChunkRows * kThreads;
  if (threadIdx.x == 0) s.got = 0;
  while (got < wanted && patience > 0) {
    const int64_t hoped = static_cast<int64_t>(kDensity) * (wanted - got);
    const int each = static_cast<int>(
        min(static_cast<int64_t>(kChunkRows), (hoped + kThreads - 1) / kThreads));
    // Not more than its share, or the blocks of a large batch would lap a small tier at each turn.
    const int share = max(32, g.num_rows / static_cast<int>(gridDim.x));
    const int chunk = min(each * kThreads, min(share, g.num_rows));
    if (!hand.insists && own_limit < hand.min_age) patience -= chunk;
    __syncthreads();
    if (threadIdx.x == 0) {
      s.position = atomicAdd(g.words + SCANNED, chunk);
      s.limit = load_relaxed(g.words + AGE_LIMIT);
      s.tickets = got;
      s.scanned += chunk;
    }
    const int seen_before = s.seen;
    __syncthreads();
    const int64_t position = s.position;
    if (position < 0 || position / g.num_rows >= kMaxLaps) break;
    const int limit = g.roomy ? INT_MAX - 1 : hand.insists ? s.limit : own_limit;
    const int oldest_kept = max(limit, hand.min_age - 1);
    int row[kChunkRows], stamp[kChunkRows], seen = 0;
#pragma unroll
    for (int i = 0; i < kChunkRows; ++i) {
      const int place = i * kThreads + threadIdx.x;
      row[i] = place < chunk ? static_cast<int>((start + position + place) % g.num_rows) : kNone;
      stamp[i] = row[i] >= 0 ? load_relaxed(g.row_stamp + row[i]) : hand.tick;
    }
#pragma unroll
    for (int i = 0; i < kChunkRows; ++i) {
      const int age = age_of(hand, stamp[i]);
      const bool eligible = row[i] >= 0 && age > oldest_kept;
      seen += eligible;
      const int ticket = take_ticket(&s.tickets, eligible);
      // Another block may have come to the same row, a lap later.
      if (eligible && ticket < wanted &&
          atomicCAS(g.row_stamp + row[i], stamp[i], hand.stamp) == stamp[i]) {
        s.victims[atomicAdd(&s.got, 1)] = row[i];
        if (stamp[i] == kFree) {
          ++taken_free;
        } else {
          store_relaxed(g.slot_row + g.row_slot[row[i]], kNone);
          ages += age / hand.step_ticks;
          ++evictions;
        }
      }
    }
    add_warp(&s.seen, seen);
    __syncthreads();
    got = s.got;
    if (got < wanted && (s.seen - seen_before) * kBarren < chunk) {
      own_limit /= 2;
      if (hand.insists && threadIdx.x == 0 && s.limit > 0 && !g.roomy) {
        atomicMin(g.words + AGE_LIMIT, s.limit - max(1, s.limit / kCut));
        store_relaxed(g.words + CUT, 1);
      }
    }
  }
  __syncthreads();  // who left by the laps has read s.position
  add_warp(&s.evictions, evictions);
  add_warp(&s.taken_free, taken_free);
  if (ages != 0) atomicAdd(&s.ages, ages);
  return got;
}

// Adds what the block has counted to the group's figures. Every thread calls.
template <int kItems>
__device__ __forceinline__ void add_figures(Shared<kItems>& s, const GroupState& g) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  add(g.counters + EVICTIONS, s.evictions);
  add(g.counters + EVICTED_AGE, s.ages);
  add(g.counters + SCANS, s.scanned);
  if (s.taken_free > 0) atomicAdd(g.words + OCCUPIED, s.taken_free);
  if (s.seen > 0) atomicAdd(g.words + SEEN, s.seen);
}

// Ends a launch's scan: the hand moves on. If `grows`, the age limit does where more rows than
// needed were eligible. One thread calls, when nobody scans any more.
__device__ __forceinline__ void end_scan(const GroupState& g, bool grows) {
  const int scanned = load_relaxed(g.words + SCANNED), limit = load_relaxed(g.words + AGE_LIMIT);
  const int64_t seen = load_relaxed(g.words + SEEN);
  g.words[HAND] = static_cast<int>((static_cast<int64_t>(g.words[HAND]) + scanned) % g.num_rows);
  if (grows && load_relaxed(g.words + CUT) == 0 && seen * kDensity > scanned) {
    g.words[AGE_LIMIT] = min(limit + max(2, limit / kGrowth), kMaxAgeLimit);
  }
  g.words[SCANNED] = g.words[SEEN] = g.words[CUT] = 0;
}

// --- plan -----------------------------------------------------------------------------------

// Where in topk a thread's lookup i lies; kNone past the query's end.
__device__ __forceinline__ int place_of(const PlanArguments& a, int query, int i) {
  const int k = i * kThreads + threadIdx.x;
  return k < a.width ? query * a.width + k : kNone;
}

template <int kItems>
__device__ __forceinline__ void read_topk(const PlanArguments& a, int query, Lookups<kItems>& x) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = place_of(a, query, i);
    x.slot[i] = place >= 0 ? a.topk[place] : kNone;
  }
}

// What the phase before left of a query that this block put aside for another.
template <int kItems>
__device__ __forceinline__ void read_again(const PlanArguments& a, int query, Lookups<kItems>& x) {
  read_topk(a, query, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = place_of(a, query, i);
    x.row[i] = place >= 0 ? a.rows[place] : kNone;
  }
}

// Flagged rows of a query to the front of its list, in the order of its top-k.
template <int kItems>
__device__ __forceinline__ void list_rows(Shared<kItems>& s, const PlanArguments& a, int query,
                                          const bool (&flag)[kItems], const int (&row)[kItems],
                                          int* rows, int* lengths) {
  int rank[kItems];
  const int length = rank_in_block(s.rank, flag, rank, nullptr);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (flag[i]) rows[query * a.width + rank[i]] = row[i];
  }
  if (threadIdx.x == 0) lengths[query] = length;
}

template <int kItems>
__device__ __forceinline__ void look_up(Shared<kItems>& s, const PlanArguments& a,
                                        const Hand& hand, int query, Lookups<kItems>& x) {
  const GroupState& g = a.state;
  int real = 0;
  read_topk(a, query, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    // Another block's claim may be seen here: negative, so not a hit either.
    const int row = x.slot[i] >= 0 ? load_relaxed(g.slot_row + x.slot[i]) : kNone;
    x.row[i] = x.slot[i] < 0 ? kNone : row >= 0 ? row : kPending;
    real += x.slot[i] >= 0;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = place_of(a, query, i);
    if (x.row[i] >= 0) use_row(g, hand, x.row[i]);
    if (x.row[i] == kPending) atomicMin(g.slot_row + x.slot[i], kClaim + place);
    if (place >= 0) a.rows[place] = x.row[i];
  }
  add_warp(&s.counted, real);
  if (a.hit_rows != nullptr) {
    const bool split = g.words[SPLIT] != 0;
    bool early[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) early[i] = split && x.row[i] >= 0;
    list_rows(s, a, query, early, x.row, a.hit_rows, a.hit_lengths);
  }
}

// A row for each slot whose claim is this query's.
template <int kItems>
__device__ __forceinline__ void assign(Shared<kItems>& s, const PlanArguments& a, const Hand& hand,
                                       int query, const Lookups<kItems>& x) {
  const GroupState& g = a.state;
  bool mine[kItems];
  int rank[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int claim = kClaim + place_of(a, query, i);
    mine[i] = x.row[i] == kPending && load_relaxed(g.slot_row + x.slot[i]) == claim;
  }
  const int wanted = rank_in_block(s.rank, mine, rank, nullptr);
  if (wanted == 0) return;
  const int got = take_rows(s, g, hand, wanted);
  if (threadIdx.x == 0) {
    s.position = atomicAdd(a.num_misses, got);
    if (!a.warm) add(g.counters + MISSES, got);
    add(g.counters + (a.warm ? SKIPPED : SHORT), wanted - got);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!mine[i]) continue;
    const int row = rank[i] < got ? s.victims[rank[i]] : kNone;
    if (row >= 0) {
      g.row_slot[row] = x.slot[i];
      a.miss_slots[s.position + rank[i]] = x.slot[i];
      a.miss_rows[s.position + rank[i]] = row;
    }
    store_relaxed(g.slot_row + x.slot[i], row);
  }
  __syncthreads();  // the next query writes s.victims
}

// Rows of the lookups that were no hits.
template <int kItems>
__device__ __forceinline__ void resolve(Shared<kItems>& s, const PlanArguments& a, int query,
                                        Lookups<kItems>& x) {
  const GroupState& g = a.state;
  bool late[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    late[i] = x.row[i] == kPending;
    if (late[i]) {
      x.row[i] = load_relaxed(g.slot_row + x.slot[i]);
      a.rows[place_of(a, query, i)] = x.row[i];
    }
  }
  if (a.hit_rows != nullptr) {
    const bool split = g.words[SPLIT] != 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) late[i] = (late[i] || !split) && x.row[i] >= 0;
    list_rows(s, a, query, late, x.row, a.late_rows, a.late_lengths);
  }
}

template <bool kSingle>
__device__ __forceinline__ void phase_barrier() {
  if constexpr (kSingle) {
    __syncthreads();
  } else {
    grid_sync();
  }
}

template <int kItems, bool kSingle>
__global__ void __launch_bounds__(kThreads, !kSingle && kItems <= 4 ? 2 : 1)
    plan_fetch_kernel(const PlanArguments a) {
  Shared<kItems>& s = block_shared<Shared<kItems>>();
  const GroupState& g = a.state;
  const int tick = g.words[TICK], use_age = a.warm ? 1 : 0;
  const Hand hand{tick, (tick - use_age) & kTickMask, use_age + 1, g.words[AGE_LIMIT], !a.warm,
                  a.passes};
  clear(s);
  if (blockIdx.x == 0 && threadIdx.x == 0) *a.num_misses = 0;
  Lookups<kItems> x;
  const int first = blockIdx.x, blocks = gridDim.x;
  // With a block for every query its lookups stay in registers.
  const bool again = a.queries > blocks;
  for (int query = first; query < a.queries; query += blocks) look_up(s, a, hand, query, x);
  phase_barrier<kSingle>();
  for (int query = first; query < a.queries; query += blocks) {
    if (again) read_again(a, query, x);
    assign(s, a, hand, query, x);
  }
  add_figures(s, g);
  if (threadIdx.x == 0 && !a.warm) add(g.counters + LOOKUPS, s.counted);
  phase_barrier<kSingle>();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    end_scan(g, !a.warm);
    if (a.advance) {
      g.words[TICK] = (tick + 1) & kTickMask;
      g.counters[STEPS] += a.pass == a.passes - 1;
    }
  }
  const int copying = min(blocks, a.copy.blocks);
  if (a.copy.host_rows != nullptr && first < copying) {
    copy_any(a.copy, first, copying);
    note_end(a.copy.done);
  }
  for (int query = first; query < a.queries; query += blocks) {
    read_again(a, query, x);  // registers that the copies can use
    resolve(s, a, query, x);
  }
}

int plan_threads() { return kThreads; }

template <int kItems>
const char* start_plan(const PlanArguments& a, void* stream) {
  if (a.queries == 1) {
    return launch(plan_fetch_kernel<kItems, true>, 1, kThreads, false, stream, a);
  }
  const auto kernel = plan_fetch_kernel<kItems, false>;
  // Asked once: a process has one kind of device.
  static const int most = resident_blocks(kernel, kThreads);
  if (most == 0) return "the device holds no block of plan_fetch";
  // A small batch takes some blocks more, which only copy: two are too few to fill the link.
  const int wanted = max(a.queries, min(kLeastBlocks, a.copy.blocks));
  return launch(kernel, wanted < most ? wanted : most, kThreads, true, stream, a);
}

const char* plan_fetch(const PlanArguments& a, void* stream) {
  if (a.queries == 0) return nullptr;
  if (a.width <= kThreads) return start_plan<1>(a, stream);
  if (a.width <= 4 * kThreads) return start_plan<4>(a, stream);
  if (a.width <= kPlanMaxItems * kThreads) return start_plan<kPlanMaxItems>(a, stream);
  return "a query has more lookups than a block takes";
}

// --- fetch ----------------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads) fetch_kernel(const CopyArguments c) {
  copy_any(c, blockIdx.x, gridDim.x);
  note_end(c.done);
}

const char* fetch(const CopyArguments& c, int capacity, void* stream) {
  if (capacity == 0) return nullptr;
  const int warps = kThreads / 32, most = (capacity + warps - 1) / warps;
  return launch(fetch_kernel, most < c.blocks ? most : c.blocks, kThreads, false, stream, c);
}

// --- install --------------------------------------------------------------------------------

__device__ __forceinline__ GroupState group_state(const InstallArguments& a, int64_t group) {
  GroupState g = a.first;
  g.slot_row += group * a.slot_stride;
  g.row_slot += group * a.row_stride;
  g.row_stamp += group * a.row_stride;
  g.words += group * a.word_stride;
  g.counters += group * a.counter_stride;
  g.times += group * a.time_stride;
  return g;
}

__device__ __forceinline__ int slot_at(const InstallArguments& a, int index) {
  return a.wide ? static_cast<int>(static_cast<const int64_t*>(a.slots)[index])
                : static_cast<const int*>(a.slots)[index];
}

// Adds the time that the main stream waited for the group's last fetch: from the end of its work
// before attention to the end of the copies.
__device__ __forceinline__ void add_stall(const GroupState& g) {
  for (int layer = 0; layer < g.num_layers; ++layer) {
    int64_t* const times = g.times + layer * TIMES;
    if (times[MAIN_READY] > 0 && times[FETCHED] > times[MAIN_READY]) {
      g.counters[STALL_NS] += times[FETCHED] - times[MAIN_READY];
    }
    times[MAIN_READY] = times[FETCHED] = 0;
  }
}

// A block for each group: hot rows for slots whose rows the pass will write.
template <int kItems>
__global__ void __launch_bounds__(kThreads, 2) install_kernel(const InstallArguments a) {
  Shared<kItems>& s = block_shared<Shared<kItems>>();
  const GroupState g = group_state(a, blockIdx.x);
  const int tick = g.words[TICK], use_age = a.reserve ? 0 : 2;
  const int min_age = max(use_age + 1, a.min_age);
  const Hand hand{tick, (tick - use_age) & kTickMask, min_age, min_age - 1, a.reserve, 1};
  clear(s);
  if (a.reserve && threadIdx.x == 0) add_stall(g);
  for (int base = 0; base < a.count; base += kItems * kThreads) {
    int slot[kItems], rank[kItems], hot = 0;
    bool mine[kItems], pending[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int place = base + i * kThreads + threadIdx.x;
      slot[i] = place < a.count ? slot_at(a, place) : kNone;
      if (slot[i] < a.first_slot) slot[i] = kNone;
      const int row = slot[i] >= 0 ? load_relaxed(g.slot_row + slot[i]) : 0;
      pending[i] = row < 0;
      if (pending[i]) atomicMin(g.slot_row + slot[i], kClaim + place);
      if (slot[i] >= 0 && row >= 0) {
        use_row(g, hand, row);
        ++hot;
      }
    }
    add_warp(&s.counted, hot);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int claim = kClaim + base + i * kThreads + static_cast<int>(threadIdx.x);
      mine[i] = pending[i] && load_relaxed(g.slot_row + slot[i]) == claim;
    }
    const int wanted = rank_in_block(s.rank, mine, rank, nullptr);
    const int got = wanted > 0 ? take_rows(s, g, hand, wanted) : 0;
    if (threadIdx.x == 0) {
      add(g.counters + INSTALLS, got);
      add(g.counters + (a.reserve ? SHORT : SKIPPED), wanted - got);
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (!mine[i]) continue;
      const int row = rank[i] < got ? s.victims[rank[i]] : kNone;
      if (row >= 0) g.row_slot[row] = slot[i];
      store_relaxed(g.slot_row + slot[i], row);
    }
    __syncthreads();
  }
  add_figures(s, g);
  if (threadIdx.x == 0) {
    add(g.counters + INSTALLS, s.counted);
    end_scan(g, false);
  }
}

const char* install(const InstallArguments& a, void* stream) {
  if (a.count == 0 || a.groups == 0) return nullptr;
  if (a.count <= kThreads) {
    return launch(install_kernel<1>, a.groups, kThreads, false, stream, a);
  }
  return launch(install_kernel<4>, a.groups, kThreads, false, stream, a);
}

}  // namespace ess
