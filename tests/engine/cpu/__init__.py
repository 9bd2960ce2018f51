"""The C++ kernels of CPUs against torch, and what happens where they cannot be built."""
