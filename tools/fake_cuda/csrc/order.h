// The order of work between streams and graphs: what a replay may run beside.
//
// A graph captured from streams A, B touches what both touch, but its replay on A knows nothing of
// work that waits on B, nor does B of the replay. So (1) when a graph is launched, the launching
// stream must be behind all work on the other streams that the graph was captured from; (2) those
// streams' next work must be behind the graph. Each stream has a clock: how many operations of
// each stream its next operation comes after; events carry clocks. A breach is an UNORDERED line.
#pragma once
#include <map>

struct Stream;
struct Event;
struct Graph;
using Clock = std::map<Stream*, unsigned long long>;

// touches_memory: checked against the graphs before it; events may stand anywhere.
void order_work(Stream* stream, const char* what, const char* name, bool touches_memory);
void order_wait(Stream* stream, const Event* event);
void order_host_waited(const Clock& done);
void order_device_waited();
void order_before_graph(const Graph* graph, Stream* stream);
void order_after_graph(const Graph* graph, Stream* stream);
