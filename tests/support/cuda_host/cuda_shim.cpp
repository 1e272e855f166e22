#include "cuda_shim.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "races.h"

namespace ess_host {

const Place* place;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kPageBytes = 4096;
constexpr size_t kColours = 61, kColourBytes = 448;
constexpr uint64_t kMaxSteps = 200'000'000;  // far above any test; a loop that never ends stops
constexpr int kSpins = 64;                   // relaxed accesses that a fast fiber makes in a row

using Context = void*[5];

struct Fiber {
  Context here;
  bool started = false;  // stands at the start of entry(), or where it gave way
  Place place;
  int number, block;
  uint64_t priority;
  int block_barriers, grid_barriers, spins;
  int passed_grid, passed_block, passed_warp;  // barriers
  bool done;
};

// A warp operation under way for one mask. A lane reads what was given before it gives again, so
// two rounds are enough.
struct Exchange {
  unsigned mask = 0, arrived = 0, round = 0;
  Collective kind = kSync;
  Given given[2] = {};
  std::vector<Fiber*> waiting;
};

struct Warp {
  Exchange whole;                // of all lanes
  std::deque<Exchange> partial;  // of other masks
};

struct Storage {
  const std::type_info* type;
  std::vector<uint64_t> words;
};

struct Block {
  int alive = 0;
  std::vector<Fiber*> at_barrier;
  std::vector<Warp> warps;
  std::deque<Storage> shared;
};

struct Grid {
  const std::function<void()>* kernel = nullptr;
  bool cooperative = false;
  int alive = 0, fibers = 0;
  uint64_t steps = 0;
  std::deque<Block> blocks;
  std::vector<Fiber*> ready;  // fast: a queue from `head`; seeded: a heap by priority, or a bag
  size_t head = 0;
  std::vector<Fiber*> at_grid_barrier;
  std::string error;
};

std::mutex one_at_a_time;
Settings settings;
std::mt19937_64 random_source(0);
uint64_t change_per_million = 0;  // chance that a fiber draws a new priority when it gives way
bool by_priority = false;         // the greatest goes on, else any
enum { kEachAlone, kBlocksTogether, kWarpsTogether } company = kEachAlone;  // near priorities

Grid grid;
Context outside;  // run()
ucontext_t creator;
Fiber* running = nullptr;
bool atomically = false;
std::string last_error;
std::deque<Fiber> fibers;   // these and their stacks are kept from run to run
std::vector<void*> stacks;

std::vector<uint64_t> block_priorities, warp_priorities;  // warps by number of their first fiber

[[gnu::noinline, noreturn]] void jump(Context& to) { __builtin_longjmp(to, 1); }

// GCC's own setjmp and longjmp, between stacks: swapcontext makes two system calls a switch.
[[gnu::noinline]] void change(Context& from, Context& to) {
  if (__builtin_setjmp(from) == 0) jump(to);
}

bool less_urgent(const Fiber* a, const Fiber* b) {
  return a->priority != b->priority ? a->priority < b->priority : a->number < b->number;
}

void wake(Fiber* fiber) {
  grid.ready.push_back(fiber);
  if (!settings.fast && by_priority) {
    std::push_heap(grid.ready.begin(), grid.ready.end(), less_urgent);
  }
}

void release(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) wake(fiber);
  waiting.clear();
}

// The fiber that goes on; nullptr if none can.
Fiber* next_fiber() {
  auto& ready = grid.ready;
  if (grid.head == ready.size() || !grid.error.empty()) return nullptr;
  if (++grid.steps > kMaxSteps) {
    grid.error = "the kernel does not end";
    return nullptr;
  }
  Fiber* next;
  if (settings.fast) {
    next = ready[grid.head++];
    if (grid.head == ready.size() || grid.head > 2 * static_cast<size_t>(grid.fibers)) {
      ready.erase(ready.begin(), ready.begin() + static_cast<std::ptrdiff_t>(grid.head));
      grid.head = 0;
    }
    return next;
  }
  if (by_priority) {
    std::pop_heap(ready.begin(), ready.end(), less_urgent);
  } else {
    std::swap(ready[random_source() % ready.size()], ready.back());
  }
  next = ready.back();
  ready.pop_back();
  return next;
}

// Goes on with another fiber; returns when someone has woken this one and its turn has come.
void sleep() {
  Fiber* const self = running;
  Fiber* const next = next_fiber();
  if (next == self) return;
  running = next;
  if (next != nullptr) place = &next->place;
  change(self->here, next != nullptr ? next->here : outside);
}

void fail(const std::string& what) {
  if (grid.error.empty()) grid.error = what;
  sleep();  // for good: nobody goes on after an error
}

void finish(Fiber* fiber) {
  Block& block = grid.blocks[static_cast<size_t>(fiber->block)];
  fiber->done = true;
  --grid.alive;
  // A barrier counts the threads that have not left.
  if (--block.alive > 0 && static_cast<int>(block.at_barrier.size()) == block.alive) {
    release(block.at_barrier);
  }
}

// Body of every fiber: a thread of one grid after the other.
void entry() {
  if (__builtin_setjmp(running->here) == 0) setcontext(&creator);
  while (true) {
    (*grid.kernel)();
    finish(running);
    sleep();
  }
}

bool add_stack() {
  void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) return false;
  mprotect(stack, kPageBytes, PROT_NONE);  // a stack that is too small is a fault
  stacks.push_back(stack);
  fibers.emplace_back();
  return true;
}

[[gnu::noinline]] void start(Fiber* fiber, void* stack) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  // Tops at equal places of their pages would share a few sets of the cache.
  context.uc_stack.ss_size = kStackBytes - stacks.size() % kColours * kColourBytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
  running = fiber;
  swapcontext(&creator, &context);
  fiber->started = true;
}

uint64_t draw(int number, int threads) {
  if (settings.fast) return 0;
  if (company == kEachAlone) return random_source();
  const int first_of_warp = number - number % threads % 32;
  return (company == kBlocksTogether ? block_priorities[static_cast<size_t>(number / threads)]
                                     : warp_priorities[static_cast<size_t>(first_of_warp)]) +
         (random_source() >> 32);
}

bool add_fiber(int number, int blocks, int threads) {
  if (static_cast<int>(stacks.size()) == number && !add_stack()) return false;
  Fiber& fiber = fibers[static_cast<size_t>(number)];
  if (!fiber.started) start(&fiber, stacks[static_cast<size_t>(number)]);
  fiber.number = number;
  fiber.block = number / threads;
  fiber.place.thread.x = static_cast<unsigned>(number % threads);
  fiber.place.block.x = static_cast<unsigned>(fiber.block);
  fiber.place.block_size = {static_cast<unsigned>(threads), 1, 1};
  fiber.place.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  fiber.priority = draw(number, threads);
  fiber.block_barriers = fiber.grid_barriers = fiber.spins = 0;
  fiber.passed_grid = fiber.passed_block = fiber.passed_warp = 0;
  fiber.done = false;
  wake(&fiber);
  return true;
}

void begin(Exchange& exchange, unsigned mask) {
  exchange.mask = mask;
  exchange.arrived = exchange.round = 0;
  exchange.waiting.clear();
}

void prepare(Block& block, int threads) {
  block.alive = threads;
  block.at_barrier.clear();
  block.warps.resize(static_cast<size_t>((threads + 31) / 32));
  for (Warp& warp : block.warps) {
    begin(warp.whole, kAllLanes);
    warp.partial.clear();
  }
  for (Storage& storage : block.shared) storage.type = nullptr;
}

const char* refused(int blocks, int threads, bool cooperative) {
  if (blocks < 1 || threads < 1 || threads > kBlockThreads) return "invalid configuration argument";
  if (cooperative && blocks > kResidentBlocks) {
    return "too many blocks in cooperative launch";
  }
  return nullptr;
}

Exchange& exchange_of(unsigned mask) {
  Block& block = grid.blocks[static_cast<size_t>(running->block)];
  Warp& warp = block.warps[place->thread.x / 32];
  if (mask == kAllLanes) return warp.whole;
  for (Exchange& exchange : warp.partial) {
    if (exchange.mask == mask) return exchange;
  }
  warp.partial.emplace_back();
  begin(warp.partial.back(), mask);
  return warp.partial.back();
}

}  // namespace

void configure(const Settings& wanted) {
  const std::lock_guard lock(one_at_a_time);
  settings = wanted;
  const uint64_t seed = wanted.seed;
  random_source.seed(seed);
  constexpr uint64_t chances[] = {1'000'000, 200'000, 20'000};
  change_per_million = chances[seed % 3];
  constexpr decltype(company) companies[] = {kEachAlone, kWarpsTogether, kBlocksTogether};
  company = companies[seed / 3 % 3];
  by_priority = seed % 3 != 0;
}

void begin_atomic() { atomically = true; }
void end_atomic() { atomically = false; }
bool in_atomic() { return atomically; }

Moment moment() {
  const Fiber& f = *running;
  return {f.number, f.block, static_cast<int>(f.place.thread.x / 32),
          f.passed_grid, f.passed_block, f.passed_warp};
}

bool is_shared(const void* address) {
  if (running == nullptr) return false;  // the host's part of a launch
  const auto own = static_cast<const char*>(stacks[static_cast<size_t>(running->number)]);
  const auto at = static_cast<const char*>(address);
  return at < own || at >= own + kStackBytes;
}

void yield() {
  if (settings.fast) {
    if (++running->spins % kSpins != 0) return;  // who waits for a word lets others write it
  } else {
    if (random_source() % 1'000'000 >= change_per_million) return;
    running->priority = draw(running->number, static_cast<int>(place->block_size.x));
  }
  wake(running);
  sleep();
}

void block_barrier() {
  if (settings.fault == kSkipBlockBarrier && running->block_barriers++ == settings.fault_number) {
    return;
  }
  Block& block = grid.blocks[static_cast<size_t>(running->block)];
  block.at_barrier.push_back(running);
  if (static_cast<int>(block.at_barrier.size()) == block.alive) release(block.at_barrier);
  Fiber* const self = running;
  sleep();
  ++self->passed_block;
}

void grid_barrier() {
  if (!grid.cooperative) fail("a grid barrier in a launch that is not cooperative");
  if (settings.fault == kSkipGridBarrier && running->grid_barriers++ == settings.fault_number) {
    return;
  }
  grid.at_grid_barrier.push_back(running);
  if (static_cast<int>(grid.at_grid_barrier.size()) == grid.fibers) release(grid.at_grid_barrier);
  Fiber* const self = running;
  sleep();
  ++self->passed_grid;
}

const Given& exchange(Collective kind, unsigned mask, uint64_t value) {
  const int own = lane();
  if ((mask >> own & 1u) == 0) fail("a warp operation by a lane that its mask leaves out");
  Exchange& state = exchange_of(mask);
  Given& given = state.given[state.round % 2];
  if (state.arrived == 0) {
    state.kind = kind;
    given.votes = 0;
    given.sum = 0;
  } else if (state.kind != kind) {
    fail("the lanes of a warp are in different warp operations");
  }
  given.value[own] = value;
  given.votes |= (value != 0 ? 1u : 0u) << own;
  given.sum += value;
  state.arrived |= 1u << own;
  if (state.arrived == mask) {
    state.arrived = 0;
    ++state.round;
    release(state.waiting);
    running->passed_warp += mask == kAllLanes;
    if (settings.fast) return given;
    wake(running);
    sleep();
    return given;
  }
  state.waiting.push_back(running);
  Fiber* const self = running;
  sleep();
  self->passed_warp += mask == kAllLanes;
  return given;
}

uint64_t value_of(const Given& given, unsigned mask, int from) {
  if ((mask >> from & 1u) == 0) fail("a shuffle from a lane that its mask leaves out");
  return given.value[from];
}

void* shared_storage(const std::type_info& type, size_t bytes) {
  auto& all = grid.blocks[static_cast<size_t>(running->block)].shared;
  Storage* unused = nullptr;
  for (Storage& storage : all) {
    if (storage.type == &type) return storage.words.data();
    if (storage.type == nullptr) unused = &storage;
  }
  if (unused == nullptr) unused = &all.emplace_back();
  unused->type = &type;
  unused->words.resize((bytes + 7) / 8);  // 16-byte aligned by operator new
  for (uint64_t& word : unused->words) word = random_source();
  return unused->words.data();
}

const char* run(const std::function<void()>& kernel, int blocks, int threads, bool cooperative) {
  const std::lock_guard lock(one_at_a_time);
  if (const char* error = refused(blocks, threads, cooperative)) return error;
  grid.kernel = &kernel;
  grid.cooperative = cooperative;
  grid.alive = grid.fibers = blocks * threads;
  grid.steps = 0;
  grid.error.clear();
  grid.ready.clear();
  grid.head = 0;
  grid.at_grid_barrier.clear();
  while (static_cast<int>(grid.blocks.size()) < blocks) grid.blocks.emplace_back();
  for (int b = 0; b < blocks; ++b) prepare(grid.blocks[static_cast<size_t>(b)], threads);
  if (!settings.fast) {
    block_priorities.clear();
    warp_priorities.clear();
    for (int b = 0; b < blocks; ++b) block_priorities.push_back(random_source() >> 1);
    for (int i = 0; i < grid.fibers; ++i) warp_priorities.push_back(random_source() >> 1);
  }
  for (int i = 0; i < grid.fibers; ++i) {
    if (!add_fiber(i, blocks, threads)) return "no memory for the fibers' stacks";
  }
  forget_accesses();
  running = next_fiber();
  place = &running->place;
  change(outside, running->here);
  running = nullptr;
  place = nullptr;
  if (grid.error.empty() && grid.alive > 0) {
    grid.error = "deadlock: " + std::to_string(grid.alive) + " threads wait for others";
  }
  if (!grid.error.empty()) {  // fibers in the middle of a kernel start again
    for (int i = 0; i < grid.fibers; ++i) {
      Fiber& fiber = fibers[static_cast<size_t>(i)];
      fiber.started = fiber.started && fiber.done;
    }
  }
  if (grid.error.empty()) grid.error = race();
  last_error = grid.error;
  return last_error.empty() ? nullptr : last_error.c_str();
}

}  // namespace ess_host

uint4 ess::load_host(const uint4* address) { return *address; }
