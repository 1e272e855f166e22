// g++ -fsanitize=thread calls a function before every access to memory. Here are those functions,
// instead of ThreadSanitizer's own: they know barriers of a grid, a block and a warp. A race is a
// word that two threads touch, one of them writing and one of them not by an atomic operation, with
// no barrier between. It is found in every schedule, not only where it does harm.
#include "races.h"

#include <cstdint>
#include <cstdio>
#include <unordered_map>
#include <vector>

namespace ess_host {
namespace {

struct Access {
  Moment moment;
  bool atomic;
  const void* code;
};

struct Word {
  bool written = false;
  Access write{};
  std::vector<Access> reads;  // since that write, the last of each thread
};

constexpr uintptr_t kWordBytes = 4;
std::unordered_map<uintptr_t, Word> words;
std::string found;

bool ordered(const Moment& a, const Moment& b) {
  if (a.thread == b.thread || a.grid_barriers < b.grid_barriers) return true;
  if (a.block != b.block) return false;
  return a.block_barriers < b.block_barriers ||
         (a.warp == b.warp && a.warp_barriers < b.warp_barriers);
}

void check(const Access& before, const Access& now, const char* what) {
  if (!found.empty() || (before.atomic && now.atomic) || ordered(before.moment, now.moment)) return;
  char text[160];
  snprintf(text, sizeof text, "race: a %s, by thread %d at %p and by thread %d at %p", what,
           before.moment.thread, before.code, now.moment.thread, now.code);
  found = text;
}

void read(Word& word, const Access& now) {
  if (word.written) check(word.write, now, "read after a write");
  for (Access& earlier : word.reads) {
    if (earlier.moment.thread != now.moment.thread) continue;
    earlier = now;
    return;
  }
  word.reads.push_back(now);
}

void write(Word& word, const Access& now) {
  if (word.written) check(word.write, now, "write after a write");
  for (const Access& earlier : word.reads) check(earlier, now, "write after a read");
  word.reads.clear();
  word.written = true;
  word.write = now;
}

void touch(const void* address, uintptr_t bytes, bool writes, const void* code) {
  if (!is_shared(address)) return;
  const Access now{moment(), in_atomic(), code};
  const auto first = reinterpret_cast<uintptr_t>(address);
  for (uintptr_t i = first / kWordBytes; i <= (first + bytes - 1) / kWordBytes; ++i) {
    (writes ? write : read)(words[i], now);
  }
}

}  // namespace

void forget_accesses() {
  words.clear();
  found.clear();
}

const std::string& race() { return found; }

}  // namespace ess_host

#define ESS_TOUCH(name, bytes, writes)                                      \
  void __tsan_##name(void* address) {                                       \
    ess_host::touch(address, bytes, writes, __builtin_return_address(0));   \
  }
#define ESS_TOUCHES(bytes)                        \
  ESS_TOUCH(read##bytes, bytes, false)            \
  ESS_TOUCH(write##bytes, bytes, true)            \
  ESS_TOUCH(unaligned_read##bytes, bytes, false)  \
  ESS_TOUCH(unaligned_write##bytes, bytes, true)

extern "C" {
ESS_TOUCHES(1)
ESS_TOUCHES(2)
ESS_TOUCHES(4)
ESS_TOUCHES(8)
ESS_TOUCHES(16)
void __tsan_read_range(void* address, unsigned long bytes) {
  ess_host::touch(address, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, unsigned long bytes) {
  ess_host::touch(address, bytes, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
