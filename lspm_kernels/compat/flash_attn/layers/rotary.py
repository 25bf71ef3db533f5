"""flash_attn.layers.rotary: rotary position embedding of (B, T, H, D), over lspm_kernels.rotary."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks
from lspm_kernels.compat.refusals import refuse
from lspm_kernels.ops.rotary import rotary


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """lspm_kernels.rotary, whose docstring has the formula.

    Args:
        x: (B, T, H, D), or (rows, H, D) with cu_seqlens.
        cos, sin: (S, R / 2); the first R of D dimensions are rotated.
        interleaved: pair i is dimensions 2 i and 2 i + 1; else i and R / 2 + i.
        inplace: write the result into x and return that.
        seqlen_offsets: the position of row 0, an int, or (B,) of each sequence.
        cu_seqlens: (B + 1,), the places where packed sequences begin, and their end.
        max_seqlen: taken and not needed.

    Returns:
        out: x's shape and dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.

    Source: Su et al., "RoFormer" (2021), equation 34; Dao, the package flash_attn.
    """
    op, dims = "apply_rotary_emb", 4 if cu_seqlens is None else 3
    if not isinstance(x, Tensor) or x.dim() != dims:
        wanted = "(B, T, H, D)" if cu_seqlens is None else "(rows, H, D) beside cu_seqlens"
        raise ValueError(f"{op}: x must be a tensor {wanted}, got {checks.shape(x)}")
    offsets = seqlen_offsets.to(torch.int64) if isinstance(seqlen_offsets, Tensor) else seqlen_offsets
    if cu_seqlens is None:
        out = rotary(x.transpose(1, 2), cos, sin, interleaved=interleaved, offsets=offsets).transpose(1, 2)
    else:
        places = _places(op, x, cu_seqlens, offsets)  # every row is a sequence of one, at its own place
        out = rotary(x[:, :, None], cos, sin, interleaved=interleaved, offsets=places)[:, :, 0]
    return x.copy_(out) if inplace else out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates q and k of qkv (B, T, 3, H, D), or (B, T, H_q + 2 H_kv, D) with num_heads_q, in place.

    cos_k and sin_k are those of k where they differ; the rest is as in apply_rotary_emb.
    """
    op = "apply_rotary_emb_qkv_"
    if not isinstance(qkv, Tensor) or qkv.dim() not in (4, 5) or (qkv.dim() == 5 and qkv.shape[2] != 3):
        rule = "(B, T, 3, H, D) or (B, T, H_q + 2 H_kv, D)"
        raise ValueError(f"{op}: qkv must be a tensor {rule}, got {checks.shape(qkv)}")
    if qkv.dim() == 5:
        q, k = qkv[:, :, 0], qkv[:, :, 1]
    else:
        heads = qkv.shape[2]
        if num_heads_q is None or not 0 < num_heads_q < heads or (heads - num_heads_q) % 2:
            rule = f"leave an even number of {heads} heads for k and v"
            raise ValueError(f"{op}: num_heads_q must {rule}, got {num_heads_q}")
        q, k, _ = qkv.split([num_heads_q, *[(heads - num_heads_q) // 2] * 2], 2)
    tables = (cos, sin), (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
    turned = [
        apply_rotary_emb(t, *pair, interleaved, False, seqlen_offsets)
        for t, pair in zip((q, k), tables, strict=True)
    ]
    out = torch.stack(turned, 2) if qkv.dim() == 5 else torch.cat(turned, 2)
    qkv[:, :, : out.shape[2]] = out
    return qkv


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: int | Tensor = 0
) -> Tensor:
    """Rotates k of kv (B, T, 2, H_kv, D) in place; the rest is as in apply_rotary_emb."""
    if not isinstance(kv, Tensor) or kv.dim() != 5 or kv.shape[2] != 2:
        rule = "a tensor (B, T, 2, H_kv, D)"
        raise ValueError(f"apply_rotary_emb_kv_: kv must be {rule}, got {checks.shape(kv)}")
    kv[:, :, 0] = apply_rotary_emb(kv[:, :, 0], cos, sin, interleaved, False, seqlen_offsets)
    return kv


class RotaryEmbedding(nn.Module):
    """Rotates q and k in place, by tables that grow with the sequences.

    Args:
        dim: R, the rotated dimensions of a head.
        base: the angle of pair i at position t is t / base ** (2 i / R).
        interleaved: as in apply_rotary_emb.
        scale_base: only None.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        refuse("RotaryEmbedding", "scale_base", scale_base, None, "xPos is not carried")
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", None, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None

    def _compute_inv_freq(self, device=None):
        steps = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return 1.0 / (self.base ** (steps / self.dim))

    def _update_cos_sin_cache(self, seqlen, device=None, dtype=None):
        known = self._cos_cached
        if (
            known is not None
            and seqlen <= self._seq_len_cached
            and (known.device, known.dtype) == (device, dtype)
        ):
            if not (self.training and known.is_inference()):
                return
        # A model moved to half types has moved inv_freq too; the angles need it in float32.
        exact = self.inv_freq.dtype == torch.float32 and self.inv_freq.device == device
        inv_freq = self.inv_freq if exact else self._compute_inv_freq(device)
        angles = torch.outer(torch.arange(seqlen, device=device, dtype=torch.float32), inv_freq)
        self._seq_len_cached = seqlen
        self._cos_cached, self._sin_cached = angles.cos().to(dtype), angles.sin().to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Of qkv as in apply_rotary_emb_qkv_; or beside kv (B, T, 2, H_kv, D), q (B, T, H, D), as (q, kv).

        A tensor of offsets needs max_seqlen, the length for which the tables must suffice.
        """
        if max_seqlen is None and isinstance(seqlen_offset, Tensor) and self._cos_cached is None:
            raise ValueError("RotaryEmbedding: max_seqlen must be given beside a tensor of offsets, got None")
        if max_seqlen is not None or not isinstance(seqlen_offset, Tensor):
            last = qkv.shape[1] + seqlen_offset if max_seqlen is None else max_seqlen
            self._update_cos_sin_cache(last, device=qkv.device, dtype=qkv.dtype)
        given = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        tables = self._cos_cached, self._sin_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, *tables, **given, num_heads_q=num_heads_q)
        return apply_rotary_emb(qkv, *tables, inplace=True, **given), apply_rotary_emb_kv_(
            kv, *tables, **given
        )


def _places(op, x, cu_seqlens, offsets):
    """The position of every row of packed sequences."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"{op}: cu_seqlens must be a tensor (B + 1,), got {checks.shape(cu_seqlens)}")
    starts = cu_seqlens.to(torch.int64)
    if checks.readable(starts) and starts[-1] != len(x):
        raise ValueError(f"{op}: cu_seqlens must end with the {len(x)} rows of x, got {starts[-1].item()}")
    first = starts[:-1] - offsets
    rows = torch.arange(len(x), device=x.device)
    return rows - first.repeat_interleave(starts.diff(), output_size=len(x))
