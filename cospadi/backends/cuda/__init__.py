"""Fused kernels for NVIDIA GPUs that read S as a bit mask and values and never write its zeros."""
