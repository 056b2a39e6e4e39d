"""CUDA kernels on a machine without a GPU: see device.py."""
