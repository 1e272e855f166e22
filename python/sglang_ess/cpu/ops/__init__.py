"""The CPU platform's operations: torch tensors in and out, without SGLang.

One operation a file, next to its reference in plain torch. The tests check every GPU kernel of
this project against them.
"""
