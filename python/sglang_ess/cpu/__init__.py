"""The out-of-tree CPU platform: DeepSeek sparse attention with no accelerator."""

import os


def set_thread_defaults() -> None:
    """Set environment variables for this process and its children. Call before importing torch.

    Torch and numba each have a pool of OpenMP threads, and libgomp lets idle threads spin before
    they sleep. If they spin too long, the pools take the cores from each other and from other
    processes. If they spin too briefly, every operator waits for a wake-up. Milliseconds of a
    decode step (tiny v32, batch 16 x 1K context, 2 cores, machine idle / one core busy):
    libgomp's default of 300,000 spins 25 / 100; 20,000: 20 / 160; 4,000: 25 / 62; 1,000: 35 / 36.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")
