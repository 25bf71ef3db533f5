"""Losses of classes: torch.nn's classes over cross_entropy and linear_cross_entropy."""

import torch
from torch import Tensor, nn

from lspm_kernels import checks, products
from lspm_kernels.nn import calls
from lspm_kernels.ops.cross_entropy import cross_entropy
from lspm_kernels.ops.linear_cross_entropy import linear_cross_entropy

_F32 = torch.float32
# cross_entropy/forward/float32/256x1000: 1.34 times as fast as torch's, of 4x10 0.26; on an H200 the smallest
# row is 4096x128256, 2.4.
_LEAST, _LEAST_ON_GPU = 2**17, 2**20
# linear_cross_entropy of 256x256x1000 in float32, where our products are the faster ones: 1.9; of 64x64x10
# 0.2. In bfloat16, and by torch's products, of 1024x768x50257 1.0, and of 256x768x8000 0.8.
_LEAST_CLASSES, _LEAST_CLASSES_OF_OTHERS = 1000, 2**15


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss: of logits (N, C), by lspm_kernels.cross_entropy."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        weight = self.weight
        # Of (N, C, d1, ...), contiguous, the classes do not lie together: 8x21x64x64 is 0.2 times as fast.
        if (
            type(input) is Tensor
            and input.dim() == 2
            and input.numel() >= (_LEAST if input.is_cpu else _LEAST_ON_GPU)
            and (input.is_cpu or input.is_cuda)
            and calls.plain(input, target, weight)
            and target.device == input.device
            and not calls.records(target, weight)
            and _are_targets(target, input, self.ignore_index)
            and (weight is None or (calls.alike(input, weight) and weight.shape == input.shape[1:]))
        ):
            try:
                return cross_entropy(
                    input,
                    target,
                    weight,
                    ignore_index=self.ignore_index,
                    reduction=self.reduction,
                    label_smoothing=self.label_smoothing,
                )
            except ValueError:  # of targets, which only the kernel reads, or of an option
                return super().forward(input, target)
        return super().forward(input, target)


class LinearCrossEntropyLoss(nn.LinearCrossEntropyLoss):
    """torch.nn.LinearCrossEntropyLoss: of many classes on a CPU, by lspm_kernels.linear_cross_entropy.

    There is no matrix of logits, so `options`, which say how torch cuts it, are not needed.
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        linear = self.linear
        weight, bias, class_weight = linear.weight, linear.bias, self.weight
        if (
            self.num_classes >= _LEAST_CLASSES
            and not self.out_features
            and calls.plain(input, target, weight, bias, class_weight)
            and input.is_cpu
            and input.dim() in (1, 2)
            and input.shape[-1:] == weight.shape[1:]
            and target.dtype is torch.int64
            and target.is_cpu
            and target.shape == input.shape[:-1]
            and calls.alike(input, weight, bias, class_weight)
            and not calls.records(class_weight)
        ):
            autocasts = checks.autocasts(input.device)
            ours = products.faster and input.dtype is _F32 and not autocasts
            if self.num_classes >= (_LEAST_CLASSES if ours else _LEAST_CLASSES_OF_OTHERS):
                try:
                    loss = linear_cross_entropy(
                        input,
                        weight,
                        target,
                        bias=bias,
                        class_weight=class_weight,
                        ignore_index=-100 if self.ignore_index is None else self.ignore_index,
                        label_smoothing=self.label_smoothing,
                        reduction=self.reduction,
                    )
                except ValueError:  # as of CrossEntropyLoss
                    return super().forward(input, target)
                return loss if autocasts else loss.to(input.dtype)
        return super().forward(input, target)


def _are_targets(target, logits, ignore_index) -> bool:
    if target.dim() == 1:
        return target.dtype is torch.int64 and len(target) == len(logits)
    return target.dtype is logits.dtype and target.shape == logits.shape and ignore_index < 0
