"""SGLang's CUDA path without a GPU: over CUDA libraries whose kernels do nothing.

csrc/ holds the libraries, preloaded/ what Python puts in place before torch is imported.
"""
