"""The CPU platform's operations: torch tensors in and out, no sglang.

One operation a file, its plain-torch reference beside it. They are what every GPU
kernel of this project is checked against.
"""
