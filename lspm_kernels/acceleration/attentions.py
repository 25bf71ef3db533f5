"""torch's scaled_dot_product_attention where a module's own forward calls it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.sdpa import scaled_dot_product_attention
from lspm_kernels.nn import calls
from lspm_kernels.ops.attention import MAX_DIM

# Products of numbers of queries by those of keys. 1x12x48x48x64 in float32 with the backward: 0.9 times as
# fast as torch's; 1x12x64x64x64: 1.13; 1x4x32x32x64: 0.6.
_LEAST = 3 * 2**20
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
    if not _pays(query, key):  # asked first, since of few a call is soon done
        return False
    if not (calls.plain(query, key, value) and query.is_cpu and calls.alike(query, key, value)):
        return False
    return (
        0 <= dropout_p < 1
        and _fit(query, key, value, enable_gqa)
        and (attn_mask is None or (not is_causal and _is_mask(attn_mask, query, key)))
        and not (checks.autocasts(query.device) and query.dtype != torch.get_autocast_dtype("cpu"))
        and torch.backends.cuda.flash_sdp_enabled()  # else what torch may use was chosen by hand
    )


def _pays(query, key) -> bool:
    tensors = type(query) is Tensor and type(key) is Tensor
    return tensors and query.dim() == key.dim() == 4 and query.numel() * key.shape[2] >= _LEAST


def _fit(query, key, value, enable_gqa) -> bool:
    """Whether the shapes are plainly right."""
    if value.dim() != key.dim():
        return False
    B, H, _, D = query.shape
    heads, Dv = key.shape[1], value.shape[-1]
    if key.shape[:-1] != value.shape[:-1] or (key.shape[0], key.shape[-1]) != (B, D):
        return False
    if not value.numel() or max(D, Dv) > MAX_DIM:
        return False
    return heads == H or (enable_gqa and H % heads == 0)


def _is_mask(mask, query, key) -> bool:
    return (
        calls.plain(query, mask)
        and mask.is_cpu
        and mask.dtype in (torch.bool, query.dtype)
        and checks.broadcasts(mask, (*query.shape[:3], key.shape[2]))
    )
