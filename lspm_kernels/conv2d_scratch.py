"""The CUDA kernels of conv2d with their scratch: the weight as they read it, and sums over runs of pixels.

Statistics of y are taken by the kernel of batch_norm_act, which reads y again.
"""

import torch

from lspm_kernels import compiled

# A block sums for so many elements of the weight's gradient (csrc/cuda/conv2d_backward.cu).
_FILTERS, _TERMS = 64, 128
_BLOCKS = 256  # wanted: two to each multiprocessor of the GPUs of today
_FEWEST_PIXELS = 512  # in a run, so that adding its sums up costs little beside taking them
_MOST_RUNS, _PIXELS_A_RUN = 1024, 64  # of statistics


def partials(filters: int, terms: int, groups: int, pixels: int) -> int:
    """Into how many runs pixels are divided, for sums of a group's filters times terms."""
    blocks = -(-filters // _FILTERS) * -(-terms // _TERMS) * groups
    return max(1, min(_BLOCKS // blocks, pixels // _FEWEST_PIXELS))


def packed(outputs: int, terms: int) -> int:
    """Elements of a weight in which each of `outputs` has its terms side by side, in whole vectors."""
    return outputs * -(-terms // 8) * 8


def conv2d_forward(x, weight, scale, shift, residual, y, statistics, geometry, activation):
    """The CUDA kernel conv2d_forward; arguments as the binding's."""
    scratch = x.new_empty(packed(weight.shape[0], weight[0].numel()))
    compiled.cuda.conv2d_forward(x, weight, scale, shift, residual, y, None, geometry, activation, 0, scratch)
    if statistics is not None:
        runs = min(_MOST_RUNS, -(-y.shape[:3].numel() // _PIXELS_A_RUN))
        sums = statistics.new_empty(runs, 3, y.shape[3])
        compiled.cuda.batch_norm_act_statistics(y, sums, *statistics, 0)


def conv2d_backward(dz, x, weight, dx, dweight, geometry):
    """The CUDA kernel conv2d_backward; arguments as the binding's."""
    scratch = sums = None
    filters, groups = weight.shape[0] // geometry[3], geometry[3]
    if dx is not None:
        scratch = x.new_empty(packed(x.shape[3], filters * weight.shape[2] * weight.shape[3]))
    if dweight is not None:
        runs = partials(filters, weight[0].numel(), groups, dz.shape[:3].numel())
        sums = x.new_empty(runs, weight.numel(), dtype=torch.float32)
    compiled.cuda.conv2d_backward(dz, x, weight, dx, dweight, geometry, 0, scratch, sums)
