"""The CUDA engine: plans, parameters, compilation and launch of the kernels in kernels_cu/.

Importing it needs neither CuPy nor a GPU: CuPy is imported where a kernel is compiled or launched.
"""
