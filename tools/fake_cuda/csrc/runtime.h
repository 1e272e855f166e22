// A CUDA runtime and driver whose device memory is host memory and whose kernels do nothing.
// Kept: what is legal while a stream is captured (CUDA programming guide, "Stream Capture"), the
// life of streams and events, and the order of work between streams and graphs (order.h).
#pragma once
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pthread.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "order.h"

#define API extern "C" __attribute__((visibility("default")))
// An entry that has nothing to do: its name, then the types of its arguments.
#define NOTHING(name, ...) \
  API cudaError_t name(__VA_ARGS__) { return cudaSuccess; }
#define NOTHING_CU(name, ...) \
  API CUresult name(__VA_ARGS__) { return CUDA_SUCCESS; }

// report.cpp: a line "PID KIND: text" in the file FAKE_CUDA_LOG names. With trace, the signal
// FAKE_CUDA_SIGNAL is raised, so that faulthandler adds this thread's Python stack.
void say(bool trace, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

struct Node {
  const char* what;
  std::string name;  // of the kernel
  std::vector<Node*> deps;
  unsigned long long stream;  // that it was captured from
};
struct Graph {
  unsigned long long id;
  std::vector<Node*> nodes;
  std::set<Stream*> streams;  // that it was captured from
};
struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  pthread_t thread;
  Stream* origin;
  Graph* graph;
  bool invalid = false, ended = false;
  std::set<Stream*> streams = {};
};
struct Stream {
  unsigned flags;
  int priority;
  Capture* capture;         // that it takes part in
  std::vector<Node*> deps;  // of the capture's next node
  unsigned long long id;
  Clock clock = {}, after = {};
};
struct Event {
  unsigned flags;
  Capture* capture;
  std::vector<Node*> deps;
  bool recorded;
  double ms;
  Clock clock = {};
};

// state.cpp. Every entry that reads or changes any of this holds `big`.
extern std::recursive_mutex big;
using Lock = std::lock_guard<std::recursive_mutex>;
extern Stream legacy_stream;
extern std::unordered_set<Stream*> streams;
extern std::unordered_set<Event*> events;
extern std::set<Capture*> active;
extern unsigned long long serial;
extern thread_local cudaStreamCaptureMode thread_mode;
extern thread_local cudaError_t last_error;

cudaError_t fail(cudaError_t e);
Stream* as_stream(cudaStream_t s);  // null, and reported, if it is no more
Event* as_event(cudaEvent_t e);
// Reports a call that a capture forbids and invalidates the capture.
cudaError_t illegal(const char* call, cudaError_t e, Capture* c);
// The rule of cudaThreadExchangeStreamCaptureMode for calls that may be unsafe in a capture.
cudaError_t unsafe(const char* call);
cudaError_t sync_all(const char* call);
cudaError_t sync_stream(const char* call, cudaStream_t s);
// Everything that is put on a stream: a node where it is captured, else work in the order.
// touches_memory: an event only counts.
cudaError_t enqueue(cudaStream_t s, const char* what, const std::string& name = "",
                    bool touches_memory = true);

// memory.cpp
constexpr size_t TOTAL = 81559ull << 20, RESERVED = 500ull << 20;  // bytes, of an H100 80GB
extern std::map<char*, size_t> device_blocks, host_blocks;         // start -> bytes
extern size_t device_used;
void* take(size_t bytes);  // zeros; pages that are not written take no memory
bool in_blocks(const std::map<char*, size_t>& blocks, const void* p);
cudaError_t copy(void* d, const void* s, size_t n, cudaStream_t st, const char* what);

// launches.cpp
cudaError_t launch(const void* f, cudaStream_t s, dim3 g, dim3 b);
void* named(const char* name);           // a kernel's handle
int resident(int block, size_t shared);  // blocks of a multiprocessor
constexpr int MOST_SHARED = 232448;      // bytes a block of sm_90 may take

// device.cpp
int attribute(int a);
constexpr const char* DEVICE_NAME = "NVIDIA H100 80GB HBM3";
constexpr int CUDA_VERSION_ANSWERED = 13000;
