"""CUDA kernels, and the PTX of Triton kernels, executed and checked on a CPU."""
