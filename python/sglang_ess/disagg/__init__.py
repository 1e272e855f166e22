"""Prefill-decode disaggregation: what the two nodes tell each other besides the rows."""
