// Streams and events: their life, and what a wait joins to a capture or an order.
#include <time.h>

#include "runtime.h"

static double now_ms() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e3 + t.tv_nsec * 1e-6;
}

API cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned flags, int priority) {
  Lock l(big);
  Stream* made = new Stream{flags, priority, nullptr, {}, serial++};
  streams.insert(made);
  *s = (cudaStream_t)made;
  return cudaSuccess;
}

API cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) {
  return cudaStreamCreateWithPriority(s, f, 0);
}

API cudaError_t cudaStreamCreate(cudaStream_t* s) { return cudaStreamCreateWithPriority(s, 0, 0); }

API cudaError_t cudaStreamDestroy(cudaStream_t s) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  streams.erase(st);
  return cudaSuccess;
}

API cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  *p = st->priority;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetFlags(cudaStream_t s, unsigned* f) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  *f = st->flags;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetId(cudaStream_t s, unsigned long long* f) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  *f = st->id;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetDevice(cudaStream_t, int* d) {
  *d = 0;
  return cudaSuccess;
}

API cudaError_t cudaStreamSynchronize(cudaStream_t s) {
  Lock l(big);
  auto e = sync_stream("cudaStreamSynchronize", s);
  if (!e) order_host_waited(as_stream(s)->clock);
  return e;
}

API cudaError_t cudaStreamQuery(cudaStream_t s) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  if (st->capture)
    return illegal("cudaStreamQuery", cudaErrorStreamCaptureUnsupported, st->capture);
  return unsafe("cudaStreamQuery");
}

API cudaError_t cudaDeviceSynchronize(void) {
  Lock l(big);
  order_device_waited();
  return sync_all("cudaDeviceSynchronize");
}

API cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) {
  Lock l(big);
  Event* made = new Event{f, nullptr, {}, false, 0};
  events.insert(made);
  *e = (cudaEvent_t)made;
  return cudaSuccess;
}

API cudaError_t cudaEventCreate(cudaEvent_t* e) { return cudaEventCreateWithFlags(e, 0); }

API cudaError_t cudaEventDestroy(cudaEvent_t e) {
  Lock l(big);
  Event* ev = as_event(e);
  if (!ev) return fail(cudaErrorInvalidResourceHandle);
  events.erase(ev);
  return cudaSuccess;
}

API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned flags) {
  Lock l(big);
  Event* ev = as_event(e);
  Stream* st = as_stream(s);
  if (!ev || !st) return fail(cudaErrorInvalidResourceHandle);
  if (st->capture && st->capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (st->capture && (flags & cudaEventRecordExternal)) return enqueue(s, "eventRecordExternal");
  if (!st->capture)
    if (auto er = enqueue(s, "eventRecord", "", false)) return er;
  ev->capture = st->capture;
  ev->deps = st->capture ? st->deps : std::vector<Node*>{};
  ev->clock = st->clock;
  ev->recorded = true;
  ev->ms = now_ms();
  return cudaSuccess;
}

API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
  return cudaEventRecordWithFlags(e, s, 0);
}

static cudaError_t ask_event(const char* call, cudaEvent_t e) {
  Event* ev = as_event(e);
  if (!ev) return fail(cudaErrorInvalidResourceHandle);
  if (ev->capture)
    return illegal(call, cudaErrorCapturedEvent, ev->capture->ended ? nullptr : ev->capture);
  return unsafe(call);
}

API cudaError_t cudaEventQuery(cudaEvent_t e) {
  Lock l(big);
  return ask_event("cudaEventQuery", e);
}

API cudaError_t cudaEventSynchronize(cudaEvent_t e) {
  Lock l(big);
  auto er = ask_event("cudaEventSynchronize", e);
  if (!er) order_host_waited(as_event(e)->clock);
  return er;
}

API cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) {
  Lock l(big);
  Event *x = as_event(a), *y = as_event(b);
  if (!x || !y || !x->recorded || !y->recorded) return fail(cudaErrorInvalidResourceHandle);
  if (x->capture || y->capture)
    return illegal("cudaEventElapsedTime", cudaErrorCapturedEvent, nullptr);
  *ms = (float)(y->ms - x->ms) + 0.01f;
  return cudaSuccess;
}

API cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) {
  Lock l(big);
  Stream* st = as_stream(s);
  Event* ev = as_event(e);
  if (!st || !ev) return fail(cudaErrorInvalidResourceHandle);
  if (!ev->recorded) return cudaSuccess;
  Capture *c = ev->capture, *own = st->capture;
  if (own && own->invalid) return fail(cudaErrorStreamCaptureInvalidated);
  if (own && (flags & cudaEventWaitExternal)) return enqueue(s, "eventWaitExternal");
  if (c && c->ended)
    return illegal("cudaStreamWaitEvent of an ended capture's event", cudaErrorCapturedEvent, own);
  if (!c && own)
    return illegal("cudaStreamWaitEvent of an event from outside the capture",
                   cudaErrorStreamCaptureIsolation, own);
  if (!c) {
    order_wait(st, ev);
    return enqueue(s, "waitEvent", "", false);
  }
  if (own && own != c) {
    own->invalid = true;
    return illegal("cudaStreamWaitEvent of another capture", cudaErrorStreamCaptureMerge, c);
  }
  if (st == &legacy_stream)
    return illegal("cudaStreamWaitEvent on the legacy stream", cudaErrorStreamCaptureImplicit, c);
  if (!own) {
    st->capture = c;
    st->deps.clear();
    c->streams.insert(st);
  }
  for (Node* n : ev->deps) {
    bool has = false;
    for (Node* m : st->deps) has |= m == n;
    if (!has) st->deps.push_back(n);
  }
  return cudaSuccess;
}

API cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t f, void* data) {
  Lock l(big);
  if (auto e = enqueue(s, "hostFunc")) return e;
  if (!as_stream(s)->capture) f(data);
  return cudaSuccess;
}

API cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t f, void* data,
                                      unsigned) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (st && st->capture)
    return illegal("cudaStreamAddCallback", cudaErrorStreamCaptureUnsupported, st->capture);
  f(s, cudaSuccess, data);
  return cudaSuccess;
}
