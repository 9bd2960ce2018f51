"""Kernels for CPUs in C++, built where they run; torch does the same work where they cannot be built."""
