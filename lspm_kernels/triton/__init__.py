"""Triton kernels and their launchers, one file per op; imported where a call first needs one."""
