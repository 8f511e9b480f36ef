"""Triton kernels, one operation per file; installed as modeconn.kernels."""
