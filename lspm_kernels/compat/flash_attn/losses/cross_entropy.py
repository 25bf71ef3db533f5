"""flash_attn.losses.cross_entropy: the loss of a language model's logits."""

from torch import Tensor, nn

from lspm_kernels.compat.flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from lspm_kernels.compat.logit_losses import reduced

_REDUCTIONS = ("mean", "none", "sum")


class CrossEntropyLoss(nn.Module):
    """cross_entropy_loss of rows, reduced: "mean" divides by the number of rows that are not ignored.

    Args:
        reduction: "mean", "none" or "sum".
        return_z_loss: return (loss, z_loss) instead; z_loss is in the loss, and has no gradient of its own.
        process_group: only None.
        ignore_index, label_smoothing, logit_scale, lse_square_scale, inplace_backward: those of
            lspm_kernels.compat.flash_attn.ops.triton.cross_entropy.cross_entropy_loss.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: object = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        if reduction not in _REDUCTIONS:
            rule = f"be one of {', '.join(_REDUCTIONS)}"
            raise ValueError(f"CrossEntropyLoss: reduction must {rule}, got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of input (N, C), float32."""
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        rows = (target != self.ignore_index).sum()
        loss, z_loss = (reduced(values, rows, self.reduction) for values in losses)
        return (loss, z_loss) if self.return_z_loss else loss
