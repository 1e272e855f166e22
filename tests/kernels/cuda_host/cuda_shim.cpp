#include "cuda_shim.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <set>

namespace ess_host {

Place place;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kMaxSteps = 50'000'000;  // far above any test; a loop that never ends stops here

struct Fiber {
  ucontext_t context;
  Place place;
  int number, block;
  uint64_t priority;
  int block_barriers = 0, grid_barriers = 0;
  bool done = false;
};

// One warp operation under way; a lane reads the results before it can give its next value.
struct Exchange {
  uint64_t given[32] = {}, results[2][32] = {};
  unsigned arrived = 0, round = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  int alive = 0;
  std::vector<Fiber*> at_barrier;
  std::map<std::pair<int, unsigned>, Exchange> exchanges;  // by warp and mask
  std::map<const std::type_info*, std::unique_ptr<char[]>> shared;
};

struct Grid {
  std::function<void()> kernel;
  bool cooperative = false;
  int alive = 0;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::set<std::pair<uint64_t, int>> ready;  // by priority and number
  std::vector<Fiber*> at_grid_barrier;
  std::string error;
};

std::mt19937_64 random_source(0);
uint64_t change_per_million = 0;  // chance that a fiber draws a new priority when it gives way
bool by_priority = false;         // the greatest goes on, else any
enum { kEachAlone, kBlocksTogether, kWarpsTogether } company = kEachAlone;  // near priorities
Fault fault = kNoFault;
int fault_number = 0;

ucontext_t scheduler;
Grid* grid = nullptr;
Fiber* running = nullptr;
std::string last_error;
std::vector<void*> stacks;  // kept from run to run

std::vector<uint64_t> block_priorities, warp_priorities;  // warps by number of their first fiber

uint64_t draw(int number, int threads) {
  if (company == kEachAlone) return random_source();
  const int block = number / threads;
  const int warp = (number - number % threads + number % threads / 32 * 32);
  return (company == kBlocksTogether ? block_priorities[block] : warp_priorities[warp]) +
         (random_source() >> 32);
}

void entry() {
  grid->kernel();
  running->done = true;
  swapcontext(&running->context, &scheduler);
}

void wake(Fiber* fiber) { grid->ready.insert({fiber->priority, fiber->number}); }

// Back to the scheduler, which does not return before someone wakes this fiber.
void sleep() {
  Fiber* self = running;
  swapcontext(&self->context, &scheduler);
}

void release(std::vector<Fiber*>& waiting) {
  for (Fiber* fiber : waiting) wake(fiber);
  waiting.clear();
}

void fail(const std::string& what) {
  if (grid->error.empty()) grid->error = what;
  sleep();  // for good: the scheduler stops at the error
}

void finish(Fiber* fiber) {
  Block& block = grid->blocks[fiber->block];
  --grid->alive;
  // A barrier counts the threads that have not left.
  if (--block.alive > 0 && static_cast<int>(block.at_barrier.size()) == block.alive) {
    release(block.at_barrier);
  }
}

bool add_fiber(int number, int blocks, int threads) {
  if (static_cast<int>(stacks.size()) == number) {
    void* stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) return false;
    stacks.push_back(stack);
  }
  auto fiber = std::make_unique<Fiber>();
  fiber->number = number;
  fiber->block = number / threads;
  fiber->place.thread.x = number % threads;
  fiber->place.block.x = fiber->block;
  fiber->place.block_size = {static_cast<unsigned>(threads), 1, 1};
  fiber->place.grid_size = {static_cast<unsigned>(blocks), 1, 1};
  fiber->priority = draw(number, threads);
  grid->blocks[fiber->block].alive++;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stacks[number];
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, entry, 0);
  wake(fiber.get());
  grid->fibers.push_back(std::move(fiber));
  return true;
}

}  // namespace

void configure(uint64_t seed, Fault new_fault, int number) {
  random_source.seed(seed);
  fault = new_fault;
  fault_number = number;
  constexpr uint64_t chances[] = {1'000'000, 200'000, 20'000};
  change_per_million = chances[seed % 3];
  constexpr decltype(company) companies[] = {kEachAlone, kWarpsTogether, kBlocksTogether};
  company = companies[seed / 3 % 3];
  by_priority = seed % 3 != 0;
}

void yield() {
  if (random_source() % 1'000'000 >= change_per_million) return;
  running->priority = draw(running->number, static_cast<int>(place.block_size.x));
  wake(running);
  sleep();
}

void block_barrier() {
  if (fault == kSkipBlockBarrier && running->block_barriers++ == fault_number) return;
  Block& block = grid->blocks[running->block];
  block.at_barrier.push_back(running);
  if (static_cast<int>(block.at_barrier.size()) == block.alive) release(block.at_barrier);
  sleep();
}

void grid_barrier() {
  if (!grid->cooperative) fail("a grid barrier in a launch that is not cooperative");
  if (fault == kSkipGridBarrier && running->grid_barriers++ == fault_number) return;
  grid->at_grid_barrier.push_back(running);
  if (grid->at_grid_barrier.size() == grid->fibers.size()) release(grid->at_grid_barrier);
  sleep();
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  const int own = lane();
  if ((mask >> own & 1u) == 0) fail("a warp operation by a lane that its mask leaves out");
  const int warp = static_cast<int>(place.thread.x / 32);
  Exchange& state = grid->blocks[running->block].exchanges[{warp, mask}];
  const unsigned round = state.round;
  state.given[own] = value;
  state.arrived |= 1u << own;
  state.waiting.push_back(running);
  if (state.arrived == mask) {
    std::copy(state.given, state.given + 32, state.results[round % 2]);
    state.arrived = 0;
    ++state.round;
    release(state.waiting);
  }
  sleep();
  return state.results[round % 2];
}

void* shared_storage(const std::type_info& type, size_t bytes) {
  auto& storage = grid->blocks[running->block].shared[&type];
  if (!storage) {
    storage = std::make_unique_for_overwrite<char[]>(bytes + 16);
    for (size_t i = 0; i < bytes + 16; ++i) storage[i] = static_cast<char>(random_source());
  }
  const auto address = reinterpret_cast<uintptr_t>(storage.get());
  return reinterpret_cast<void*>((address + 15) / 16 * 16);
}

const char* run(std::function<void()> kernel, int blocks, int threads, bool cooperative) {
  Grid state;
  state.kernel = std::move(kernel);
  state.cooperative = cooperative;
  state.alive = blocks * threads;
  state.blocks.resize(blocks);
  grid = &state;
  block_priorities.clear();
  warp_priorities.clear();
  for (int b = 0; b < blocks; ++b) block_priorities.push_back(random_source() >> 1);
  for (int i = 0; i < blocks * threads; ++i) warp_priorities.push_back(random_source() >> 1);
  for (int i = 0; i < blocks * threads; ++i) {
    if (!add_fiber(i, blocks, threads)) return "no memory for the fibers' stacks";
  }
  int steps = 0;
  while (!state.ready.empty() && state.error.empty() && ++steps < kMaxSteps) {
    auto next = std::prev(state.ready.end());
    if (!by_priority) {
      const auto found = state.ready.lower_bound({random_source(), 0});
      if (found != state.ready.end()) next = found;
    }
    running = state.fibers[next->second].get();
    state.ready.erase(next);
    place = running->place;
    swapcontext(&scheduler, &running->context);
    if (running->done) finish(running);
  }
  grid = nullptr;
  running = nullptr;
  if (state.error.empty() && steps >= kMaxSteps) state.error = "the kernel does not end";
  if (state.error.empty() && state.alive > 0) {
    state.error = "deadlock: " + std::to_string(state.alive) + " threads wait for others";
  }
  last_error = state.error;
  return last_error.empty() ? nullptr : last_error.c_str();
}

}  // namespace ess_host
