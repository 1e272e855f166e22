// Stream capture and graphs. A replay does nothing but take its place in the order.
#include <utility>

#include "runtime.h"

using Counts = std::map<std::string, int>;

static std::string json(const Counts& counts) {
  std::string text;
  for (auto& [name, n] : counts)
    text += (text.empty() ? "\"" : ", \"") + name + "\": " + std::to_string(n);
  return "{" + text + "}";
}

// A line of JSON: its id, number of streams, how often it holds each kernel; what each stream does
// (kernels by name, else the operation); and the edges between streams: "from to": how many.
static void report(const Capture* c, size_t forked) {
  Counts kernels, edges;
  std::map<unsigned long long, Counts> nodes;
  for (Node* n : c->graph->nodes) {
    if (!n->name.empty()) kernels[n->name]++;
    nodes[n->stream][n->name.empty() ? n->what : n->name]++;
    for (Node* d : n->deps)
      if (d->stream != n->stream)
        edges[std::to_string(d->stream) + " " + std::to_string(n->stream)]++;
  }
  std::string text;
  for (auto& [stream, counts] : nodes)
    text += (text.empty() ? "\"" : ", \"") + std::to_string(stream) + "\": " + json(counts);
  say(false, "GRAPH",
      "{\"id\": %llu, \"streams\": %zu, \"kernels\": %s, \"nodes\": {%s}, \"edges\": %s}",
      c->graph->id, forked, json(kernels).c_str(), text.c_str(), json(edges).c_str());
}

API cudaError_t cudaStreamBeginCaptureToGraph(cudaStream_t s, cudaGraph_t g, const cudaGraphNode_t*,
                                              const cudaGraphEdgeData*, size_t,
                                              cudaStreamCaptureMode mode) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  if (st == &legacy_stream)
    return illegal("capture of the legacy stream", cudaErrorStreamCaptureUnsupported, nullptr);
  if (st->capture)
    return illegal("cudaStreamBeginCapture of a capturing stream", cudaErrorIllegalState,
                   st->capture);
  Capture* c = new Capture{serial++, mode, pthread_self(), st, (Graph*)g};
  c->streams.insert(st);
  st->capture = c;
  st->deps.clear();
  active.insert(c);
  return cudaSuccess;
}

API cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode) {
  return cudaStreamBeginCaptureToGraph(s, (cudaGraph_t) new Graph{serial++}, nullptr, nullptr, 0,
                                       mode);
}

API cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* out) {
  Lock l(big);
  *out = nullptr;
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  Capture* c = st->capture;
  if (!c)
    return illegal("cudaStreamEndCapture of a stream that does not capture", cudaErrorIllegalState,
                   nullptr);
  if (c->origin != st)
    return illegal("cudaStreamEndCapture on a forked stream", cudaErrorStreamCaptureUnmatched, c);
  if (c->mode != cudaStreamCaptureModeRelaxed && !pthread_equal(c->thread, pthread_self()))
    return illegal("cudaStreamEndCapture", cudaErrorStreamCaptureWrongThread, c);
  std::unordered_set<Node*> reached;
  std::vector<Node*> todo = st->deps;
  while (!todo.empty()) {
    Node* n = todo.back();
    todo.pop_back();
    if (reached.insert(n).second)
      for (Node* d : n->deps) todo.push_back(d);
  }
  size_t lost = 0;
  std::string example;
  for (Node* n : c->graph->nodes)
    if (!reached.count(n)) {
      lost++;
      example = n->what + (" " + n->name);
    }
  size_t forked = c->streams.size();
  c->graph->streams = c->streams;
  for (Stream* m : c->streams) {
    m->capture = nullptr;
    m->deps.clear();
  }
  c->ended = true;
  active.erase(c);
  if (c->invalid)
    return illegal("cudaStreamEndCapture: the capture was invalidated before",
                   cudaErrorStreamCaptureInvalidated, c);
  if (lost) {
    say(true, "ERROR", "capture %llu: %zu operations not joined, the last: %s", c->id, lost,
        example.c_str());
    return fail(cudaErrorStreamCaptureUnjoined);
  }
  report(c, forked);
  *out = (cudaGraph_t)c->graph;
  return cudaSuccess;
}

API cudaError_t cudaStreamIsCapturing(cudaStream_t s, cudaStreamCaptureStatus* status) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  if (st == &legacy_stream)
    for (Capture* c : active)
      for (Stream* m : c->streams)
        if (!(m->flags & cudaStreamNonBlocking))
          return illegal("cudaStreamIsCapturing(legacy)", cudaErrorStreamCaptureImplicit, c);
  *status = !st->capture           ? cudaStreamCaptureStatusNone
            : st->capture->invalid ? cudaStreamCaptureStatusInvalidated
                                   : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, cudaStreamCaptureStatus* status,
                                         unsigned long long* id, cudaGraph_t* g,
                                         const cudaGraphNode_t** deps,
                                         const cudaGraphEdgeData** edges, size_t* n) {
  Lock l(big);
  if (auto e = cudaStreamIsCapturing(s, status)) return e;
  Stream* st = as_stream(s);
  if (!st->capture) return cudaSuccess;
  if (id) *id = st->capture->id;
  if (g) *g = (cudaGraph_t)st->capture->graph;
  if (deps) *deps = (const cudaGraphNode_t*)st->deps.data();
  if (edges) *edges = nullptr;
  if (n) *n = st->deps.size();
  return cudaSuccess;
}

API cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t s, cudaGraphNode_t* deps,
                                                    const cudaGraphEdgeData*, size_t n,
                                                    unsigned flags) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st || !st->capture) return fail(cudaErrorIllegalState);
  if (flags & cudaStreamSetCaptureDependencies) st->deps.clear();
  for (size_t i = 0; i < n; i++) st->deps.push_back((Node*)deps[i]);
  return cudaSuccess;
}

API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* m) {
  std::swap(*m, thread_mode);
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* x, cudaGraph_t g,
                                              unsigned long long) {
  Lock l(big);
  if (auto e = unsafe("cudaGraphInstantiate")) return e;
  *x = (cudaGraphExec_t) new Graph(*(Graph*)g);
  return cudaSuccess;
}

API cudaError_t cudaGraphInstantiate(cudaGraphExec_t* x, cudaGraph_t g, unsigned long long f) {
  return cudaGraphInstantiateWithFlags(x, g, f);
}

API cudaError_t cudaGraphLaunch(cudaGraphExec_t x, cudaStream_t s) {
  Lock l(big);
  Stream* st = as_stream(s);
  if (!st) return fail(cudaErrorInvalidResourceHandle);
  say(false, "LAUNCH", "%llu", ((Graph*)x)->id);
  order_before_graph((Graph*)x, st);
  auto e = enqueue(s, "graphLaunch");
  order_after_graph((Graph*)x, st);
  return e;
}

API cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t s) {
  Lock l(big);
  return enqueue(s, "graphUpload");
}

API cudaError_t cudaGraphCreate(cudaGraph_t* g, unsigned) {
  *g = (cudaGraph_t) new Graph{serial++};
  return cudaSuccess;
}
NOTHING(cudaGraphDestroy, cudaGraph_t)

API cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) {
  Lock l(big);
  return unsafe("cudaGraphExecDestroy");
}

API cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t* nodes, size_t* n) {
  auto& all = ((Graph*)g)->nodes;
  if (nodes)
    for (size_t i = 0; i < *n && i < all.size(); i++) nodes[i] = (cudaGraphNode_t)all[i];
  *n = all.size();
  return cudaSuccess;
}
NOTHING(cudaGraphRetainUserObject, cudaGraph_t, cudaUserObject_t, unsigned, unsigned)

API cudaError_t cudaUserObjectCreate(cudaUserObject_t* o, void* p, cudaHostFn_t, unsigned,
                                     unsigned) {
  *o = (cudaUserObject_t)p;
  return cudaSuccess;
}
