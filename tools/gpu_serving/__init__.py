"""The serving benchmark of a GPU host: `python -m tools.gpu_serving`, docs/gpu.md."""
