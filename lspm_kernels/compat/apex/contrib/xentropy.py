"""apex.contrib.xentropy: the cross entropy of logits with classes, row by row."""

import torch
from torch import Tensor

from lspm_kernels.compat.logit_losses import logit_losses


class SoftmaxCrossEntropyLoss:
    """apex' autograd function: only apply is ever called."""

    @staticmethod
    def apply(
        logits: Tensor,
        labels: Tensor,
        smoothing: float = 0.0,
        padding_idx: int = 0,
        half_to_float: bool = False,
    ) -> Tensor:
        """The cross entropy of each row, with label smoothing as torch's.

        Args:
            logits: (N, C), float32, bfloat16 or float16.
            labels: (N,), int64 or int32. One that is no class is an error, where apex reads beyond the row.
            smoothing: from 0 to 1.
            padding_idx: the label of rows that have neither loss nor gradient; it is 0 where it is not given.
            half_to_float: losses are float32, else of logits' dtype.

        Returns:
            losses: (N,).

        Raises:
            ValueError: an argument has the wrong shape, dtype, device or value.

        Source: Szegedy et al., "Rethinking the Inception Architecture" (2016), section 7, for the smoothing.
        """
        op, options = "SoftmaxCrossEntropyLoss", {"ignore_index": padding_idx, "label_smoothing": smoothing}
        losses, _ = logit_losses(op, logits, labels, **options)
        return losses.to(torch.float32 if half_to_float else logits.dtype)
