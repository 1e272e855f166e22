"""ESS on a CUDA device: the pool, prefill's staging and the attention backend.

Written against SGLang 0.5.23; what of it has run on a GPU, and where, is in docs/gpu.md.
"""
