// The rules that all entries share: who may call while a stream is captured, and enqueuing.
#include "runtime.h"

std::recursive_mutex big;
Stream legacy_stream{0, 0, nullptr, {}, 1};
std::unordered_set<Stream*> streams;
std::unordered_set<Event*> events;
std::set<Capture*> active;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
unsigned long long serial = 100;

cudaError_t fail(cudaError_t e) {
  last_error = e;
  return e;
}

Stream* as_stream(cudaStream_t s) {
  if (s == nullptr || s == cudaStreamLegacy || s == cudaStreamPerThread) return &legacy_stream;
  Stream* found = (Stream*)s;
  if (!streams.count(found)) {
    say(true, "ERROR", "use of a stream that is no more: %p", s);
    return nullptr;
  }
  return found;
}

Event* as_event(cudaEvent_t e) {
  Event* found = (Event*)e;
  if (!events.count(found)) {
    say(true, "ERROR", "use of an event that is no more: %p", e);
    return nullptr;
  }
  return found;
}

cudaError_t illegal(const char* call, cudaError_t e, Capture* c) {
  if (c) c->invalid = true;
  say(true, "ERROR", "%s -> %d during capture %llu", call, (int)e, c ? c->id : 0);
  return fail(e);
}

cudaError_t unsafe(const char* call) {
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (Capture* c : active) {
    bool mine = pthread_equal(c->thread, pthread_self());
    bool forbids =
        mine ? c->mode != cudaStreamCaptureModeRelaxed
             : thread_mode == cudaStreamCaptureModeGlobal && c->mode == cudaStreamCaptureModeGlobal;
    if (forbids) return illegal(call, cudaErrorStreamCaptureUnsupported, c);
  }
  return cudaSuccess;
}

cudaError_t sync_all(const char* call) {
  for (Capture* c : active) return illegal(call, cudaErrorStreamCaptureUnsupported, c);
  return cudaSuccess;
}

cudaError_t sync_stream(const char* call, cudaStream_t s) {
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  if (st->capture) return illegal(call, cudaErrorStreamCaptureUnsupported, st->capture);
  return unsafe(call);
}

cudaError_t enqueue(cudaStream_t s, const char* what, const std::string& name,
                    bool touches_memory) {
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  if (Capture* c = st->capture) {
    if (c->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    Node* n = new Node{what, name, st->deps, st->id};
    c->graph->nodes.push_back(n);
    st->deps = {n};
    return cudaSuccess;
  }
  order_work(st, what, name.c_str(), touches_memory);
  for (Capture* c : active) {
    if (st == &legacy_stream)
      for (Stream* m : c->streams)
        if (!(m->flags & cudaStreamNonBlocking))
          return illegal(what, cudaErrorStreamCaptureImplicit, c);
    if (pthread_equal(c->thread, pthread_self()))
      say(true, "ESCAPED", "%s %s on stream %llu is not in the capture that this thread makes",
          what, name.c_str(), st->id);
  }
  return cudaSuccess;
}
