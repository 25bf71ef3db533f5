"""apex' fused norms and optimizer: put lspm_kernels.compat. before the import of apex."""
