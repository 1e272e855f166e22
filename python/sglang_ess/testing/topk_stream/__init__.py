"""A test-only switch, --ess-topk-stream: it replaces decode's top-k by a stream.

Dummy weights select rows at random. With this switch a server misses as a real model does. Its
outputs are wrong, so it needs --ess-unsafe, and every log line says so (announce.py).
table.py makes, saves and loads tables of streams; from_trace.py makes one of a recorded trace;
playback.py holds a table on the device, where kernels/ess_kernels/replay_topk.py plays it.
hooks.py has the bodies of the hooks, which patches/ess_patches/topk_stream.py declares.
"""
