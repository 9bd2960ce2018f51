"""Triton kernels for GPUs other than attention; torch does the same work where Triton is missing."""
