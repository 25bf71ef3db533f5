"""Models, data and training on lspm_kernels: data -> features -> task -> output."""
