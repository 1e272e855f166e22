"""A test-only switch: decode's top-k replaced by a generated or recorded stream.

Dummy weights select rows at random; with this a server misses as a real model does. Outputs are
wrong, so it needs --ess-unsafe, and every log line of the server says it (announce.py).
table.py makes, saves and loads the table of streams, recorded.py makes one of a trace,
playback.py has it on the device, kernels/ess_kernels/replay_topk.py plays it.
"""
