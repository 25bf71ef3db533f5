"""The products of linear_cross_entropy, and its kernels between them, on blocks of the logits.

The products are those of lspm_kernels/products.py; all blocks lie in the same memory, one after the other.
There are two ways to cut them:

By rows three products suffice, as the softmax of a row is in its block. The weight's gradient is a sum over
blocks in float32: where it is float32 itself, its own memory serves.

By classes a part of the weight's gradient is one product, rounded once; hidden's, which is small, is
the sum. But a block waits for the sums of its rows over all classes: the backward makes it again, a fourth.

By rows, half types would need another matrix in float32 for the weight's gradient, read and written for
each block: in a prototype on a Zen 5, from 768 features to 50257 classes, that took 1.06 times as long as by
classes for 1024 rows, and 0.94 times for 4096. So half types go by classes, which needs less memory. Where
all logits are small they are kept, which saves the fourth product.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import checks, products
from lspm_kernels.dispatch import Backend

F32 = torch.float32
_MOST = 256 << 20  # bytes of a block
_BY_ROWS, _BY_CLASSES = 9, 16  # a block is at most such a part of the logits
# Each block of rows reads the weight and writes its gradient: on a Zen 4 256 rows of 768 features to 50257
# classes take 2.7 times as long by 16 rows as by 128. By bytes and FLOPs a fourth product costs less where a
# block has fewer than these; that was not timed.
_LEAST_ROWS = 64
_WHOLE = 13 << 20  # bytes of logits that are one block: 64 rows of GPT-2's
_KEPT = 25 << 20  # bytes of logits in bfloat16 that are kept for the gradients: 256 rows of GPT-2's
_RUN = 4096  # losses of a sum, which one thread adds up
_UNIT = 16  # of rows or classes a block has a multiple: what products take at once


def losses(
    row: Backend,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    options: tuple,
    made: list[tuple[slice, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The losses (N,) and the statistics (3, N) of rows; made takes the blocks of logits, for gradients."""
    dtype = product_dtype(hidden)
    hidden = hidden.to(dtype)
    kept = hidden.new_empty(5, len(hidden), dtype=F32)
    found = hidden.new_empty(len(hidden), dtype=F32)
    for part, memory in _blocks(len(weight), len(hidden), hidden, _BY_CLASSES):
        logits = memory.view(len(hidden), -1)
        if made is not None:
            made.append((part, logits := torch.empty_like(logits)))
        products.put(logits, hidden, weight[part].to(dtype).t(), _part(bias, part))
        given = logits, target, class_weight, kept, found
        row.forward(*given, part.start, len(weight), *options)
    return found, kept[:3]


def gradients(
    row: Backend,
    dloss: Tensor,
    dlse: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    statistics: Tensor,
    wanted: list[bool],
    options: tuple,
    made: list[tuple[slice, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden and bias in float32, and of weight; (0,) of what is not wanted.

    made: the blocks of logits that losses has made, which are written over.
    """
    dtype = product_dtype(hidden)
    hidden = hidden.to(dtype)
    dhidden = hidden.new_zeros(hidden.shape if wanted[0] else 0, dtype=F32)
    dweight = (weight.new_empty if len(hidden) else weight.new_zeros)(weight.shape if wanted[1] else 0)
    dbias = hidden.new_zeros(len(weight) if wanted[2] else 0, dtype=F32)
    for part, memory in made or _blocks(len(weight), len(hidden), hidden, _BY_CLASSES):
        logits, classes = memory.view(len(hidden), -1), weight[part].to(dtype)
        if not made:
            products.put(logits, hidden, classes.t(), _part(bias, part))
        given = dloss, dlse, logits, target, class_weight, statistics
        row.backward(*given, dbias[part] if wanted[2] else None, part.start, len(weight), *options)
        if wanted[0]:
            products.add(dhidden, logits, classes)
        if wanted[1]:
            products.put(dweight[part], logits.t(), hidden)
    return dhidden, dweight, dbias


def by_rows(
    row: Backend,
    hidden: Tensor,
    places: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    dloss: Tensor,
    wanted: list[bool],
    options: tuple,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses of the rows of hidden at `places`, or of all, and in the same pass gradients, in float32."""
    rows = len(target)
    found = hidden.new_empty(rows, dtype=F32)
    whole = places is None
    dhidden = (hidden.new_empty if whole else hidden.new_zeros)(hidden.shape if wanted[0] else 0)
    dweight = (weight.new_empty if rows else weight.new_zeros)(weight.shape if wanted[1] else 0)
    dbias = hidden.new_zeros(len(weight) if wanted[2] else 0)
    for part, memory in _blocks(rows, len(weight), hidden, _BY_ROWS):
        logits = memory.view(-1, len(weight))
        inputs = hidden[part] if whole else hidden.index_select(0, places[part])
        products.put(logits, inputs, weight.t(), bias)
        kept = hidden.new_empty(5, len(inputs))
        given = logits, target[part], class_weight
        row.forward(*given, kept, found[part], 0, len(weight), *options)
        row.backward(
            dloss[part], None, *given, kept[:3], dbias if wanted[2] else None, 0, len(weight), *options
        )
        if wanted[0] and whole:
            products.put(dhidden[part], logits, weight)
        elif wanted[0]:
            products.put(made := torch.empty_like(inputs), logits, weight)
            dhidden.index_copy_(0, places[part], made)
        if wanted[1] and part.start == 0:
            products.put(dweight, logits.t(), inputs)
        elif wanted[1]:
            products.add(dweight, logits.t(), inputs)
    return found, dhidden, dweight, dbias


def by_classes(row, hidden, places, weight, bias, target, class_weight, dloss, wanted, options):
    """What by_rows gives, by losses and gradients, where all logits are kept between them."""
    given, logits = (taken(hidden, places), weight, bias, target, class_weight), []
    found, statistics = losses(row, *given, options, logits)
    made = gradients(row, dloss, None, *given, statistics, wanted, options, logits)
    return found, *like_inputs(made, hidden, places, bias, wanted)


def like_inputs(made, hidden, places, bias, wanted):
    """The gradients of rows at `places` as those of hidden, weight and bias."""
    dhidden, dweight, dbias = made
    dhidden = dhidden.to(hidden.dtype)
    if places is not None and wanted[0]:
        dhidden = torch.zeros_like(hidden).index_copy_(0, places, dhidden)
    return dhidden, dweight, dbias.to(hidden.dtype if bias is None else bias.dtype)


def places(row, target, counts, classes, ignore_index):
    """The rows that count, where some do not; None on a GPU, for which nothing waits."""
    if row.name != "cpu":
        return None
    checks.classes("linear_cross_entropy", target, classes, ignore_index)
    places = counts.nonzero().squeeze(1)
    return None if len(places) == len(target) else places


def taken(t, places):
    return t if places is None or t is None else t.index_select(0, places)


def put(values, places, rows):
    """values (..., kept) as (..., rows), with zeros in the others' places."""
    if places is None:
        return values
    return values.new_zeros(*values.shape[:-1], rows).index_copy_(-1, places, values)


def total(values):
    """The sum of a vector, with the same bits for any number of threads."""
    runs = F.pad(values.to(torch.float64), (0, -len(values) % _RUN)).view(-1, _RUN)
    return runs.sum(1).sum().to(F32)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """hidden's dtype; float32 on a CPU without instructions for that, where products in it are far slower."""
    supported = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if hidden.device.type != "cpu" or hidden.dtype not in supported:
        return hidden.dtype
    here = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, supported[hidden.dtype])()
    return hidden.dtype if here else F32


def in_one_pass(rows: int, classes: int, dtype: torch.dtype) -> bool:
    """Whether three products serve: blocks of rows are large enough, or all logits in bfloat16 are small."""
    if dtype != F32:
        return dtype == torch.bfloat16 and rows * classes * dtype.itemsize <= _KEPT
    return rows // _BY_ROWS >= _LEAST_ROWS or rows * classes * F32.itemsize <= _WHOLE


def _blocks(count, others, hidden, part):
    """Slices of [0, count), and memory for the products of each with all `others`, in hidden's dtype."""
    each = max(others, 1) * hidden.dtype.itemsize
    most = min(count * each // part, _MOST)
    size = max(count, 1) if count * each <= _WHOLE else max(most // each // _UNIT, 1) * _UNIT
    memory = hidden.new_empty(min(size, count) * others)
    for begin in range(0, count if others else 0, size):
        end = min(begin + size, count)
        yield slice(begin, end), memory[: (end - begin) * others]


def _part(t, part):
    return None if t is None else t[part]
