"""Prefill-decode disaggregation: the warm-up ids that a prefill node sends besides the rows."""
