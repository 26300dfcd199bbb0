"""The ``cpu`` backend: kernels in C that read the stored coefficients, compiled on first use."""
