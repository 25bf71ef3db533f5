"""torch's scaled_dot_product_attention where a module's own forward calls it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.sdpa import scaled_dot_product_attention
from lspm_kernels.nn import calls
from lspm_kernels.ops.attention import MAX_DIM

TORCHS = F.scaled_dot_product_attention


def attend(function, *args, **kwargs) -> Tensor:
    """function(*args, **kwargs): by our kernel where that is torch's attention and the kernel takes it."""
    if function is TORCHS and _takes(*args, **kwargs):
        return scaled_dot_product_attention(*args, **kwargs)
    return function(*args, **kwargs)


def _takes(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> bool:
    """Whether our kernel computes this on a CPU, as torch does; on a GPU torch's is the faster one."""
    if not (calls.plain(query, key, value) and query.is_cpu and calls.alike(query, key, value)):
        return False
    if not query.dim() == key.dim() == value.dim() == 4 or not 0 <= dropout_p < 1:
        return False
    B, H, T, D = query.shape
    heads, Dv = key.shape[1], value.shape[-1]
    if key.shape[:-1] != value.shape[:-1] or key.shape[0] != B or key.shape[-1] != D or max(D, Dv) > MAX_DIM:
        return False
    if not (query.numel() and value.numel()) or (heads != H and not (enable_gqa and H % heads == 0)):
        return False
    if checks.autocasts(query.device) and query.dtype != torch.get_autocast_dtype("cpu"):
        return False
    if not torch.backends.cuda.flash_sdp_enabled():  # what torch may use was chosen by hand
        return False
    if attn_mask is None:
        return True
    kinds = torch.bool, query.dtype
    return (
        not is_causal
        and calls.plain(query, attn_mask)
        and attn_mask.is_cpu
        and attn_mask.dtype in kinds
        and checks.broadcasts(attn_mask, (B, H, T, key.shape[2]))
    )
