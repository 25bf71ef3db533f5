"""liger_kernel.transformers.functional: norms, gated linear units and rotary embedding; cross entropies."""

from torch import Tensor

from lspm_kernels import checks
from lspm_kernels.compat.liger_kernel.transformers.losses import (
    CrossEntropyOutput,
    liger_cross_entropy,
    liger_fused_linear_cross_entropy,
)
from lspm_kernels.compat.rotary_pos_emb import rotary_pos_emb
from lspm_kernels.ops import layer_norm as norms
from lspm_kernels.ops.swiglu import geglu, swiglu

__all__ = [
    "CrossEntropyOutput",
    "liger_cross_entropy",
    "liger_fused_add_rms_norm",
    "liger_fused_linear_cross_entropy",
    "liger_geglu",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
    "liger_rotary_pos_emb",
    "liger_swiglu",
]

_CASTING_MODES = ("llama", "gemma", "none")


def liger_rms_norm(
    X: Tensor,
    W: Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> Tensor:
    """y = X / sqrt(mean(X ** 2) + eps) * (offset + W), lspm_kernels.rms_norm.

    Args:
        casting_mode: "llama", "gemma" or "none": one here, in float32 and rounded once, which is what "gemma"
            means; the others round more often, so in half types they differ by that.
        in_place: taken and not needed.
    """
    check_casting_mode("liger_rms_norm", casting_mode)
    return norms.rms_norm(X, _weight(W, X, offset), eps)


def liger_fused_add_rms_norm(
    X: Tensor,
    R: Tensor,
    W: Tensor,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[Tensor, Tensor]:
    """(y, sum): sum = X + R and y = liger_rms_norm(sum, ...), in one pass."""
    check_casting_mode("liger_fused_add_rms_norm", casting_mode)
    return norms.add_rms_norm(X, R, _weight(W, X, offset), eps)


def liger_layer_norm(X: Tensor, W: Tensor, B: Tensor, eps: float) -> Tensor:
    """lspm_kernels.layer_norm."""
    return norms.layer_norm(X, W, B, eps)


def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b."""
    return swiglu(a, b)


def liger_geglu(a: Tensor, b: Tensor) -> Tensor:
    """gelu(a) * b, with GELU by tanh."""
    return geglu(a, b, approximate="tanh")


def liger_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys in half style, lspm_kernels.rotary.

    Args:
        q: (B, H, T, D). k: (B, H_kv, T, D).
        cos, sin: (1 or B, T, R) or (T, R), of the angles of pairs, twice; or once, with rotary_dim = R. The
            first R of D dimensions are rotated. A fourth dimension of 1 may stand at unsqueeze_dim.
        position_ids: taken and not needed: row t of cos is position t's.

    Returns:
        (q, k), rotated.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
    """
    tables = [_table(name, t, q, unsqueeze_dim) for name, t in (("cos", cos), ("sin", sin))]
    return rotary_pos_emb(q, k, *tables, (rotary_dim or tables[0].shape[-1]) // 2)


liger_rotary_pos_emb = liger_rope


def check_casting_mode(op: str, casting_mode: str) -> None:
    """Raises ValueError unless casting_mode is known."""
    if casting_mode not in _CASTING_MODES:
        rule = f"one of {', '.join(_CASTING_MODES)}"
        raise ValueError(f"{op}: casting_mode must be {rule}, got {casting_mode!r}")


def _weight(W, X, offset):
    """offset + W, in a dtype that the norms take beside X."""
    if W is None:
        return None
    if offset:
        return W.float() + offset
    return W if W.dtype == X.dtype else W.float()


def _table(name, t, q, unsqueeze_dim):
    """(1 or B, T, R)."""
    if isinstance(t, Tensor) and t.dim() == 4 and t.shape[unsqueeze_dim] == 1:
        t = t.squeeze(unsqueeze_dim)
    if isinstance(t, Tensor) and t.dim() == 2:
        t = t[None]
    if not isinstance(t, Tensor) or t.dim() != 3 or len(t) not in (1, len(q)):
        rule = f"be a tensor (1 or {len(q)}, T, R)"
        raise ValueError(f"liger_rotary_pos_emb: {name} must {rule}, got {checks.shape(t)}")
    return t
