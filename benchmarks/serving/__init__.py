"""Benchmarks that run servers or engines: on the CPU platform, and on a GPU."""
