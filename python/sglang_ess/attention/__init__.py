"""Attention over two tiers: decode from the hot tier, prefill through a staging buffer."""
