"""Triton kernels, installed as ``diffmask_fast.kernels``."""
