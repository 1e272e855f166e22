"""Triton kernels of the two tiers. Each file holds one operation and its reference in torch."""
