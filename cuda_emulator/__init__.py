"""Runs CUDA kernels on the CPU and reports their errors; see README.md."""
