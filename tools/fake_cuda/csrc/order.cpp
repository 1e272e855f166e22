// Clocks of streams (order.h).
#include "order.h"

#include "runtime.h"

static void merge(Clock& clock, const Clock& other) {
  for (auto& [stream, n] : other)
    if (clock[stream] < n) clock[stream] = n;
}

void order_work(Stream* stream, const char* what, const char* name, bool touches_memory) {
  stream->clock[stream]++;
  if (!touches_memory) return;
  for (auto& [other, least] : stream->after)
    if (stream->clock[other] < least)
      say(true, "UNORDERED", "%s %s on stream %llu is not behind the graph launched on stream %llu",
          what, name, stream->id, other->id);
  stream->after.clear();
}

void order_wait(Stream* stream, const Event* event) { merge(stream->clock, event->clock); }

void order_host_waited(const Clock& done) {
  for (Stream* stream : streams) merge(stream->clock, done);
}

void order_device_waited() {
  Clock now;
  for (Stream* stream : streams) now[stream] = stream->clock[stream];
  order_host_waited(now);
}

void order_before_graph(const Graph* graph, Stream* stream) {
  for (Stream* part : graph->streams)
    if (part != stream && stream->clock[part] < part->clock[part])
      say(true, "UNORDERED",
          "a graph launched on stream %llu is not behind the work on stream %llu, which is part "
          "of it",
          stream->id, part->id);
}

void order_after_graph(const Graph* graph, Stream* stream) {
  for (Stream* part : graph->streams)
    if (part != stream) part->after[stream] = stream->clock[stream];
}
