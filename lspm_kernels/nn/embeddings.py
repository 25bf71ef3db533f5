"""Tables of embeddings: torch.nn's classes over embedding and embedding_bag, where a CPU trains them.

The rows on a GPU leave these to torch: embedding_bag/forward+backward/float32/100000x64-B16384 on an H200 is
0.8 and 0.94 times as fast as torch's, and embedding has none.
"""

import torch
from torch import Tensor, nn

from lspm_kernels.nn import calls
from lspm_kernels.ops.embedding import embedding
from lspm_kernels.ops.embedding_bag import embedding_bag

_INTEGERS = frozenset({torch.int64, torch.int32})
# A lookup in 50257x768 by 1024 ids: 0.84 times as fast as torch's, with the gradient 5.5, which is written
# once, and torch's is filled with zeros first. In 32768x32 by 512 ids 0.94; bags of these 4.7.
_LEAST, _LEAST_OF_BAGS = 2**22, 2**20


class Embedding(nn.Embedding):
    """torch.nn.Embedding: with a dense gradient of a large table, by lspm_kernels.embedding."""

    def forward(self, input: Tensor) -> Tensor:
        if calls.parametrized(self):
            return super().forward(input)
        weight = self.weight
        if (
            weight.numel() >= _LEAST
            and type(input) is Tensor
            and input.dtype in _INTEGERS
            and input.is_cpu
            and input.dim() > 0
            and _trains(self, weight)
        ):
            try:
                return embedding(input, weight, self.padding_idx)
            except ValueError:  # of ids, which only the kernel reads
                return super().forward(input)
        return super().forward(input)


class EmbeddingBag(nn.EmbeddingBag):
    """torch.nn.EmbeddingBag: sums and means with a dense gradient, by lspm_kernels.embedding_bag."""

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        if calls.parametrized(self):
            return super().forward(input, offsets, per_sample_weights)
        weight, mode = self.weight, self.mode
        # embedding_bag/forward/float32/1000000x64-B16384-zipf: 0.76, forward+backward of 100000x64 3.2.
        if (
            weight.numel() >= _LEAST_OF_BAGS
            and type(input) is Tensor
            and input.dtype in _INTEGERS
            and input.is_cpu
            and (mode == "sum" or (mode == "mean" and per_sample_weights is None))
            and _trains(self, weight)
            and _are_bags(weight, input, offsets, per_sample_weights)
        ):
            try:
                return embedding_bag(
                    weight,
                    input,
                    offsets,
                    mode=mode,
                    per_sample_weights=per_sample_weights,
                    padding_idx=self.padding_idx,
                    include_last_offset=self.include_last_offset,
                )
            except ValueError:  # of ids or of offsets; torch's may end before the ids do
                return super().forward(input, offsets, per_sample_weights)
        return super().forward(input, offsets, per_sample_weights)


def _trains(module, weight) -> bool:
    """Whether a dense gradient of the table is wanted, and a kernel gives it."""
    return (
        module.max_norm is None
        and not module.sparse
        and not module.scale_grad_by_freq
        and calls.plain(weight)
        and weight.is_cpu
        and calls.records(weight)
    )


def _are_bags(weight, ids, offsets, per_sample_weights) -> bool:
    if offsets is not None and not (
        type(offsets) is Tensor and offsets.dtype is ids.dtype and offsets.dim() == 1 and offsets.is_cpu
    ):
        return False
    if per_sample_weights is not None and not (
        calls.plain(per_sample_weights)
        and per_sample_weights.dtype is weight.dtype
        and per_sample_weights.shape == ids.shape
        and per_sample_weights.is_cpu
    ):
        return False
    return ids.dim() == (2 if offsets is None else 1)
