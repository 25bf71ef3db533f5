"""liger_kernel.transformers.rope: rotary position embedding."""

from lspm_kernels.compat.liger_kernel.transformers.functional import liger_rotary_pos_emb

__all__ = ["liger_rotary_pos_emb"]
