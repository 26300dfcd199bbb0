"""Measuring speed: single layers, whole models, and the thresholds between kernels."""
