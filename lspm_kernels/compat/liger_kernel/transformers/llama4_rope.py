"""liger_kernel.transformers.llama4_rope: rotary position embedding by complex numbers."""

import torch
from torch import Tensor

from lspm_kernels.ops.rotary import rotary


def liger_llama4_text_rotary_pos_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose pairs (2 i, 2 i + 1), as complex numbers, are multiplied by freqs_cis.

    Args:
        xq: (B, T, H, D). xk: (B, T, H_kv, D).
        freqs_cis: (T, D / 2) or (1 or B, T, D / 2), complex64.

    Returns:
        (xq, xk), rotated.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    freqs = freqs_cis[None] if freqs_cis.dim() == 2 else freqs_cis
    # Sequences of other positions lie one behind the other in one table.
    starts = None if len(freqs) == 1 else torch.arange(len(freqs), device=xq.device) * freqs.shape[1]
    freqs = freqs.flatten(0, 1)
    cos, sin = (freqs.real, freqs.imag) if freqs.is_complex() else (freqs, torch.zeros_like(freqs))
    tables = [(t if t.dtype == xq.dtype else t.float()).contiguous() for t in (cos, sin)]
    given = (x.transpose(1, 2) for x in (xq, xk))
    return tuple(rotary(x, *tables, interleaved=True, offsets=starts).transpose(1, 2) for x in given)


def liger_llama4_vision_rotary_pos_emb(query: Tensor, key: Tensor, freqs_ci: Tensor) -> tuple[Tensor, Tensor]:
    """liger_llama4_text_rotary_pos_emb of images.

    Args:
        freqs_ci: (T, D / 2), or with a dimension of 1 beside T, complex64; or real, as a model cast to a real
            dtype has it: it multiplies, as it does there.
    """
    return liger_llama4_text_rotary_pos_emb(query, key, freqs_ci.reshape(-1, freqs_ci.shape[-1]))
