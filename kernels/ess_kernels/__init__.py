"""Triton kernels of the two tiers: one operation a file, its reference in torch beside it."""
