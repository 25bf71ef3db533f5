"""FlashAttention-2's package under another name: put lspm_kernels.compat. before the import of flash_attn.

from flash_attn.ops.triton.layer_norm import rms_norm_fn becomes
from lspm_kernels.compat.flash_attn.ops.triton.layer_norm import rms_norm_fn, and nothing else changes. An
option that our kernels do not carry is refused by an error that names it.
"""

from lspm_kernels.compat.flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
