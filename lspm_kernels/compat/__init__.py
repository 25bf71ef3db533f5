"""Names that other libraries' users know, over lspm_kernels' ops."""
