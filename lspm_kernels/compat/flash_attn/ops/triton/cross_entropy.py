"""flash_attn.ops.triton.cross_entropy: losses of rows, with z-loss, in float32."""

from torch import Tensor

from lspm_kernels.compat.logit_losses import logit_losses
from lspm_kernels.compat.refusals import refuse


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group: object = None,
) -> tuple[Tensor, Tensor]:
    """loss = cross_entropy(logit_scale * logits, labels) + z_loss, where z_loss = lse_square_scale * lse^2.

    Args:
        logits: (N, C), float32, bfloat16 or float16.
        labels: (N,), int64 or int32. One that is no class is an error, where FlashAttention takes it for 0.
        precomputed_lse: taken and not needed: lse comes from the pass that reads the logits for the loss.
        label_smoothing: from 0 to 1.
        logit_scale: above 0; other than 1, it costs a scaled copy of the logits in float32.
        ignore_index: the label of rows that have neither loss nor gradient.
        inplace_backward: the gradient takes the memory of the logits; a second backward is an error then.
        process_group: only None.

    Returns:
        losses, z_losses: (N,), float32; z_losses without a gradient of their own, as they are in losses.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: a process_group is given.

    Source: Dao, the package flash_attn; Chowdhery et al., "PaLM" (2022), for the z-loss.
    """
    op = "cross_entropy_loss"
    refuse(op, "process_group", process_group, None, "logits are not divided among processes")
    if not logit_scale > 0:
        raise ValueError(f"{op}: logit_scale must be above 0, got {logit_scale!r}")
    scaled = logits if logit_scale == 1 or not isinstance(logits, Tensor) else logits.float() * logit_scale
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "in_place": inplace_backward}
    losses, lse = logit_losses(op, scaled, labels, **options)
    if not lse_square_scale:
        return losses, losses.detach().new_zeros(losses.shape)
    z_losses = lse_square_scale * lse.square()
    return losses + z_losses, z_losses.detach()
