// The operations of csrc/ as C functions over host memory, for ctypes. Each returns nullptr or an
// error; arguments in the order of ops.h.
#include "cuda_shim.h"

#include "fetch.cu"
#include "plan.cu"
#include "save.cu"

// What the shim itself must show: a race loses updates, a lane that stays away hangs its warp.
static void add_one(int* sum, bool atomically) {
  if (atomically) {
    atomicAdd(sum, 1);
  } else {
    ess::store_relaxed(sum, ess::load_relaxed(sum) + 1);
  }
}

static void one_lane_stays_away(int* sum) {
  if (threadIdx.x != 5) *sum = __shfl_sync(0xffffffffu, *sum, 0);
}

extern "C" {

void ess_host_configure(uint64_t seed, int fault, int number) {
  ess_host::configure(seed, static_cast<ess_host::Fault>(fault), number);
}

const char* ess_host_fetch(const ess::FetchArguments* arguments) {
  return ess::fetch(*arguments, nullptr);
}

const char* ess_host_save(const ess::SaveArguments* arguments) {
  return ess::save(*arguments, nullptr);
}

const char* ess_host_plan(const ess::PlanArguments* arguments) {
  return ess::plan(*arguments, nullptr);
}

const char* ess_host_add_one(int* sum, bool atomically, int blocks, int threads) {
  return ess::launch(add_one, blocks, threads, false, nullptr, sum, atomically);
}

const char* ess_host_one_lane_stays_away(int* sum) {
  return ess::launch(one_lane_stays_away, 1, 32, false, nullptr, sum);
}

}  // extern "C"
