// plan: the three steps of ess_kernels.plan (look up, assign, resolve) in one cooperative launch
// with two grid barriers; one query takes one block and block barriers. Same state, same outputs:
// plan.py says what each step does and why; here is only what differs.
//
// A block takes a query, several if there are more queries than the device holds blocks. Counters
// that all blocks share take one atomic a block. Words that another block may write in the same
// step are read and written past L1 (load_relaxed, store_relaxed).
#include <climits>

#include "block_rank.cuh"
#include "memory.cuh"
#include "ops.h"

#ifndef ESS_PLAN_THREADS
#define ESS_PLAN_THREADS 512
#endif

namespace ess {

constexpr int kPlanThreads = ESS_PLAN_THREADS;  // 4 lookups a thread at top-k 2048

// hot_state.py and plan.py
enum Word { TICK, BUILT, NUM_FREE, VALID, CURSOR, LENGTH, POPS, SPLIT, START, ROWS, EPOCH };
enum Counter { LOOKUPS, MISSES, EVICTIONS, EVICTED_AGE, INSTALLS, SKIPPED, SHORT };
enum Kind { DECODE, INSTALL, WARM };
constexpr int kClaim = INT_MIN;
constexpr int kPending = -2;
constexpr int kNone = -1;
constexpr int kUnwritten = INT_MIN;

template <int kItems>
struct PlanShared {
  BlockRank<kItems, kPlanThreads> rank;
  int gone, counted, used, evictions;
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

// Where in topk a thread's lookup i lies; kNone past the query's end.
__device__ __forceinline__ int place_of(const PlanArguments& a, int query, int i) {
  const int k = i * kPlanThreads + threadIdx.x;
  const int place = query * a.width + k;
  return k < a.width && place < a.total ? place : kNone;
}

__device__ __forceinline__ int slot_at(const void* slots, bool wide, int index) {
  return wide ? static_cast<int>(static_cast<const int64_t*>(slots)[index])
              : static_cast<const int*>(slots)[index];
}

// The slot whose row this query writes in this step; kUnwritten, which no lookup is, if none.
__device__ __forceinline__ int written_by(const PlanArguments& a, int query) {
  return a.written != nullptr ? slot_at(a.written, a.wide_written, query) : kUnwritten;
}

template <int kItems>
__device__ __forceinline__ void read_topk(const PlanArguments& a, int query, Lookups<kItems>& x) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = place_of(a, query, i);
    x.slot[i] = place >= 0 ? slot_at(a.topk, a.wide_slots, place) : kNone;
  }
}

// What the step before left of a query that this block put aside for another.
template <int kItems>
__device__ __forceinline__ void read_again(const PlanArguments& a, int query, Lookups<kItems>& x) {
  read_topk(a, query, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int place = place_of(a, query, i);
    x.row[i] = place >= 0 ? a.rows[place] : kNone;
  }
}

// Flagged rows of a query to the front of its list, in top-k's order.
template <int kItems>
__device__ __forceinline__ void list_rows(PlanShared<kItems>& s, const PlanArguments& a, int query,
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
__device__ __forceinline__ void look_up(PlanShared<kItems>& s, const PlanArguments& a, int query,
                                        Lookups<kItems>& x) {
  const int tick = a.words[TICK], built = a.words[BUILT];
  const bool split = a.words[SPLIT] != 0;
  const int written = a.kind == DECODE ? written_by(a, query) : kUnwritten;
  bool early[kItems];
  int stamp[kItems], gone = 0, counted = 0;
  read_topk(a, query, x);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const bool real = place_of(a, query, i) >= 0 && x.slot[i] >= a.first_slot;
    // Another block's claim may be seen here: negative, so not a hit either.
    const int row = real ? load_relaxed(a.slot_row + x.slot[i]) : kNone;
    x.row[i] = !real ? kNone : row >= 0 ? row : kPending;
    counted += a.kind == DECODE ? real : row >= 0;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    stamp[i] = x.row[i] >= 0 ? load_relaxed(a.row_stamp + x.row[i]) : tick;
    if (x.row[i] == kPending) {
      atomicMin(a.slot_row + x.slot[i], kClaim + place_of(a, query, i));
    }
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    early[i] = split && x.row[i] >= 0 && x.slot[i] != written;
    if (stamp[i] <= built) {
      gone += atomicMax(a.row_stamp + x.row[i], tick) <= built;
    } else if (stamp[i] != tick) {
      store_relaxed(a.row_stamp + x.row[i], tick);
    }
    const int place = place_of(a, query, i);
    if (place >= 0) a.rows[place] = x.row[i];
  }
  add_warp(&s.gone, gone);
  add_warp(&s.counted, counted);
  __syncthreads();
  if (threadIdx.x == 0) {
    const int listed = atomicExch(&s.gone, 0);
    if (listed > 0) atomicAdd(a.words + VALID, -listed);
    const int number = atomicExch(&s.counted, 0);
    if (a.kind != WARM) add(a.counters + (a.kind == DECODE ? LOOKUPS : INSTALLS), number);
    if (query == 0) *a.num_misses = 0;
  }
  if (a.kind == DECODE) list_rows(s, a, query, early, x.row, a.hit_rows, a.hit_lengths);
}

// A row for each slot whose claim is this query's: of the free stack, else of the list.
template <int kItems>
__device__ __forceinline__ void assign(PlanShared<kItems>& s, const PlanArguments& a, int query,
                                       const Lookups<kItems>& x) {
  const int tick = a.words[TICK], built = a.words[BUILT], num_free = a.words[NUM_FREE];
  const int cursor = a.words[CURSOR], length = a.words[LENGTH];
  const int* const free = a.free + a.words[START];
  const int* const order = a.order + a.words[START];
  const int youngest = min(built, tick - a.min_age);
  bool mine[kItems], need[kItems], evicts[kItems];
  int row[kItems], rank[kItems], used = 0, evictions = 0;
  unsigned long long ages = 0;
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int claim = kClaim + place_of(a, query, i);
    mine[i] = x.row[i] == kPending && load_relaxed(a.slot_row + x.slot[i]) == claim;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    need[i] = mine[i];
    evicts[i] = false;
    row[i] = kNone;
  }
  int claimed = -1;
  while (true) {
    const int wanted = rank_in_block(s.rank, need, rank, a.words + POPS);
    if (claimed < 0) claimed = wanted;
    if (wanted == 0) break;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int turn = rank[i], entry = cursor + turn - num_free;
      if (need[i] && turn < num_free) {
        row[i] = free[num_free - 1 - turn];
        need[i] = false;
      } else if (need[i] && entry < length) {
        const int candidate = order[entry];
        const int stamp = load_relaxed(a.row_stamp + candidate);
        // Used since the list was made: the next entry. Too young: give up.
        need[i] = stamp > built;
        used += stamp <= built;
        if (stamp <= youngest) {
          row[i] = candidate;
          evicts[i] = true;
          ages += tick - stamp;
          ++evictions;
        }
      } else {
        need[i] = false;
      }
    }
  }
  bool got[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    got[i] = mine[i] && row[i] >= 0;
    if (evicts[i]) store_relaxed(a.slot_row + a.row_slot[row[i]], kNone);
    if (got[i]) {
      a.row_slot[row[i]] = x.slot[i];
      store_relaxed(a.row_stamp + row[i], tick);
    }
    if (mine[i]) store_relaxed(a.slot_row + x.slot[i], row[i]);  // kNone where it got none
  }
  add_warp(&s.used, used);
  add_warp(&s.evictions, evictions);
  if (ages != 0) atomicAdd(&s.ages, ages);
  const int count = rank_in_block(s.rank, got, rank, a.num_misses);
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (!got[i]) continue;
    a.miss_slots[rank[i]] = x.slot[i];
    a.miss_rows[rank[i]] = row[i];
  }
  if (threadIdx.x == 0) {
    if (a.kind != INSTALL) a.query_misses[query] = count;
    const int spent = atomicExch(&s.used, 0);
    if (spent > 0) atomicAdd(a.words + VALID, -spent);
    add(a.counters + EVICTIONS, atomicExch(&s.evictions, 0));
    add(a.counters + EVICTED_AGE, atomicExch(&s.ages, 0ull));
    if (a.kind != WARM) add(a.counters + (a.kind == DECODE ? MISSES : INSTALLS), count);
    add(a.counters + (a.kind == INSTALL ? SKIPPED : SHORT), claimed - count);
  }
}

// Rows of the lookups that were not hits; query 0 keeps the books.
template <int kItems>
__device__ __forceinline__ void resolve(PlanShared<kItems>& s, const PlanArguments& a, int query,
                                        Lookups<kItems>& x) {
  const bool split = a.words[SPLIT] != 0;
  const int written = a.kind == DECODE ? written_by(a, query) : kUnwritten;
  bool late[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    late[i] = x.row[i] == kPending;
    if (late[i]) x.row[i] = load_relaxed(a.slot_row + x.slot[i]);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if (late[i]) a.rows[place_of(a, query, i)] = x.row[i];
    late[i] = x.row[i] >= 0 && (late[i] || !split || x.slot[i] == written);
  }
  if (a.kind == DECODE) list_rows(s, a, query, late, x.row, a.late_rows, a.late_lengths);
  if (query == 0 && threadIdx.x == 0) {
    const int pops = load_relaxed(a.words + POPS), num_free = a.words[NUM_FREE];
    a.words[CURSOR] = min(a.words[CURSOR] + max(pops - num_free, 0), a.words[LENGTH]);
    a.words[NUM_FREE] = max(num_free - pops, 0);
    a.words[POPS] = 0;
    if (a.advance) a.words[TICK] += 1;
  }
}

template <bool kSingle>
__device__ __forceinline__ void step_barrier() {
  if constexpr (kSingle) {
    __syncthreads();
  } else {
    grid_sync();
  }
}

template <int kItems, bool kSingle>
__global__ void __launch_bounds__(kPlanThreads, kItems <= 4 ? 2 : 1)
    plan_lookups(const PlanArguments a) {
  PlanShared<kItems>& s = block_shared<PlanShared<kItems>>();
  if (threadIdx.x == 0) {
    s.gone = s.counted = s.used = s.evictions = 0;
    s.ages = 0;
  }
  __syncthreads();
  Lookups<kItems> x;
  const int queries = kSingle ? 1 : (a.total + a.width - 1) / a.width;
  const int first = blockIdx.x, blocks = gridDim.x;
  // With a block for every query its lookups stay in registers.
  const bool again = !kSingle && queries > blocks;
  for (int query = first; query < queries; query += blocks) look_up(s, a, query, x);
  step_barrier<kSingle>();
  for (int query = first; query < queries; query += blocks) {
    if (again) read_again(a, query, x);
    assign(s, a, query, x);
  }
  step_barrier<kSingle>();
  for (int query = first; query < queries; query += blocks) {
    if (again) read_again(a, query, x);
    resolve(s, a, query, x);
  }
}

template <int kItems>
const char* start_plan(const PlanArguments& a, void* stream) {
  const int queries = (a.total + a.width - 1) / a.width;
  if (queries == 1) return launch(plan_lookups<kItems, true>, 1, kPlanThreads, false, stream, a);
  const auto kernel = plan_lookups<kItems, false>;
  // Asked once: a process has one kind of device.
  static const int most = resident_blocks(kernel, kPlanThreads);
  if (most == 0) return "the device holds no block of plan";
  return launch(kernel, queries < most ? queries : most, kPlanThreads, true, stream, a);
}

const char* plan(const PlanArguments& a, void* stream) {
  if (a.total == 0) return nullptr;
  if (a.width <= kPlanThreads) return start_plan<1>(a, stream);
  if (a.width <= 4 * kPlanThreads) return start_plan<4>(a, stream);
  if (a.width <= 16 * kPlanThreads) return start_plan<16>(a, stream);
  return "a query has more lookups than a block takes";
}

}  // namespace ess
