"""apex' fused norms and optimizer: put lspm_kernels.compat. before the import of apex."""

from lspm_kernels.compat.apex import normalization, optimizers

__all__ = ["normalization", "optimizers"]
