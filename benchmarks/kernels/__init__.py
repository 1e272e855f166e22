"""The GPU kernels, one operation a file: `python -m benchmarks.kernels`. See __main__.py."""
