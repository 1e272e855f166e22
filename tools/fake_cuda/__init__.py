"""Run SGLang's CUDA path without a GPU, over CUDA libraries whose kernels do nothing.

csrc/ holds the libraries' source. preloaded/ holds what Python loads before torch is imported.
"""
