"""Attention over two tiers: decode reads the hot tier, prefill reads staging buffers."""
