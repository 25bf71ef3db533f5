"""Liger-Kernel's package under another name: put lspm_kernels.compat. before the import of liger_kernel."""
