// Races between the threads of a grid, found in kernels that g++ compiles with -fsanitize=thread.
#pragma once

#include <string>

namespace ess_host {

// Where in its barriers a thread was when it touched memory. A barrier of a warp is any operation
// of all its lanes.
struct Moment {
  int thread, block, warp;
  int grid_barriers, block_barriers, warp_barriers;
};

Moment moment();                        // of the running thread
bool is_shared(const void* address);    // by threads: not on the running thread's own stack
bool in_atomic();                       // whether it touches memory by an atomic operation now
void forget_accesses();                 // before a grid starts
const std::string& race();              // the first one of this grid, in words; empty if none

}  // namespace ess_host
