"""AdamW's step and the norm of gradients, over all tensors of a list in one launch each.

The tensors' addresses lie in a table. A program owns a chunk of one of them, 16 * 1024 elements, tile by tile
in registers: 28 bytes an element of float32 for a step, 4 for the norm, and 4 for each chunk's place.
"""

import torch
import triton
import triton.language as tl

from lspm_kernels.triton.hashing import rounded_at_random

_CHUNK, _TILE = 16 * 1024, 1024
_ELEMENTS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _pointer(table, row: tl.constexpr, tensor, count, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """The address that stands in a row of the table."""
    address = tl.load(table + row * count + tensor).to(tl.pointer_type(ELEMENT))
    return tl.multiple_of(address, 16) if ALIGNED else address


@triton.jit
def _load(pointer, at, size, WHOLE: tl.constexpr):
    """Elements in float32; a mask would keep a WHOLE tile from loads of 16 bytes."""
    if WHOLE:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=at < size, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, at, x, size, WHOLE: tl.constexpr):
    x = x.to(pointer.dtype.element_ty)
    if WHOLE:
        tl.store(pointer + at, x)
    else:
        tl.store(pointer + at, x, mask=at < size)


@triton.jit
def _change(
    param, grad, first_state, second_state, most_state, master, tensor, begin, size,
    step_size, root, decay, grow1, keep2, grow2, eps, factor, seed, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The step of a tile of a tensor's elements, from `begin` on."""
    at = begin + tl.arange(0, TILE)
    g = _load(grad, at, size, WHOLE) * factor
    mean, square = _load(first_state, at, size, WHOLE), _load(second_state, at, size, WHOLE)
    mean += grow1 * (g - mean)
    square = keep2 * square + grow2 * (g * g)
    most = square
    if most_state is not None:
        most = tl.maximum(_load(most_state, at, size, WHOLE), square, propagate_nan=tl.PropagateNan.ALL)
    x = _load(param if master is None else master, at, size, WHOLE)
    x -= decay * x + step_size * mean / (tl.sqrt_rn(most) * root + eps)
    if seed is not None:
        x = rounded_at_random(x, seed, tensor, begin, TILE)
    tl.debug_barrier()  # several threads may read an element, and one of them writes it
    _store(first_state, at, mean, size, WHOLE)
    _store(second_state, at, square, size, WHOLE)
    if most_state is not None:
        _store(most_state, at, most, size, WHOLE)
    if master is not None:
        _store(master, at, x, size, WHOLE)
    _store(param, at, x, size, WHOLE)


@triton.jit
def _place(places, sizes, CHUNK: tl.constexpr):
    """A program's tensor, the first element of its chunk, and how many the tensor has."""
    place = tl.load(places + tl.program_id(0))
    tensor = place >> 40
    return tensor, (place & 0xFFFFFFFFFF) * CHUNK, tl.load(sizes + tensor)


@triton.jit(do_not_specialize=["count", "seed"])
def _update_kernel(
    table, places, sizes, scale, numbers, count, decay, grow1, keep2, grow2, eps, sign, seed,
    ELEMENT: tl.constexpr, STATE: tl.constexpr, AMSGRAD: tl.constexpr, MASTER: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tensor, begin, size = _place(places, sizes, CHUNK)
    param = _pointer(table, 0, tensor, count, ELEMENT, ALIGNED)
    grad = _pointer(table, 1, tensor, count, ELEMENT, ALIGNED)
    first_state = _pointer(table, 2, tensor, count, STATE, ALIGNED)
    second_state = _pointer(table, 3, tensor, count, STATE, ALIGNED)
    most_state = _pointer(table, 4, tensor, count, STATE, ALIGNED) if AMSGRAD else None
    master = _pointer(table, 5, tensor, count, tl.float32, ALIGNED) if MASTER else None
    step_size, root = tl.load(numbers + tensor), tl.load(numbers + count + tensor)
    factor = sign if scale is None else sign * tl.load(scale)
    for start in range(begin, tl.minimum(begin + CHUNK, size), TILE):
        if start + TILE <= size:
            _change(
                param, grad, first_state, second_state, most_state, master, tensor, start, size,
                step_size, root, decay, grow1, keep2, grow2, eps, factor, seed, TILE, True,
            )  # fmt: skip
        else:
            _change(
                param, grad, first_state, second_state, most_state, master, tensor, start, size,
                step_size, root, decay, grow1, keep2, grow2, eps, factor, seed, TILE, False,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def _norm_kernel(
    table, places, sizes, parts, count,
    ELEMENT: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    tensor, begin, size = _place(places, sizes, CHUNK)
    grad = _pointer(table, 0, tensor, count, ELEMENT, ALIGNED)
    sums = tl.zeros((TILE,), tl.float64)
    for start in range(begin, tl.minimum(begin + CHUNK, size), TILE):
        at = start + tl.arange(0, TILE)
        if start + TILE <= size:
            g = _load(grad, at, size, True)
        else:
            g = _load(grad, at, size, False)
        g = g.to(tl.float64)
        sums += g * g
    tl.store(parts + tl.program_id(0), tl.sum(sums, 0))


def table_of(lists: list[list[torch.Tensor]]) -> torch.Tensor:
    """The addresses of the tensors, a row for each list; of one without tensors, zeros."""
    count = len(lists[0])
    rows = [[t.data_ptr() for t in tensors] or [0] * count for tensors in lists]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _laid_out(lists):
    """On the device: the table, each chunk's tensor and number in it, each tensor's size; and whether all
    addresses suit loads of 16 bytes."""
    table, device = table_of(lists), lists[0][0].device
    sizes = torch.tensor([t.numel() for t in lists[0]], dtype=torch.int64, device="cpu")
    chunks = (sizes + _CHUNK - 1) // _CHUNK
    tensors = torch.arange(len(sizes), device="cpu").repeat_interleave(chunks)
    numbers = torch.arange(len(tensors), device="cpu") - (chunks.cumsum(0) - chunks)[tensors]
    aligned = bool((table % 16 == 0).all())
    on_device = (t.to(device, non_blocking=True) for t in (table, tensors << 40 | numbers, sizes))
    return *on_device, aligned


def update(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params, scale, steps, numbers, maximize,
    seed,
):  # fmt: skip
    """One step of every tensor; the contract is that of csrc/adamw.h."""
    lists = [params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, master_params]
    table, places, sizes, aligned = _laid_out(lists)
    if not len(places):
        return
    lr, beta1, beta2, eps, weight_decay = numbers
    by_tensor = [lr / (1 - beta1**step) for step in steps], [(1 - beta2**step) ** -0.5 for step in steps]
    by_tensor = torch.tensor(by_tensor, dtype=torch.float32, device="cpu")
    by_tensor = by_tensor.to(places.device, non_blocking=True)
    with torch.cuda.device_of(params[0]):
        _update_kernel[(len(places),)](
            table, places, sizes, scale, by_tensor, len(params),
            lr * weight_decay, 1 - beta1, beta2, 1 - beta2, eps, -1.0 if maximize else 1.0, seed,
            ELEMENT=_ELEMENTS[params[0].dtype], STATE=_ELEMENTS[exp_avgs[0].dtype],
            AMSGRAD=bool(max_exp_avg_sqs), MASTER=bool(master_params), ALIGNED=aligned,
            CHUNK=_CHUNK, TILE=_TILE,
        )  # fmt: skip


def norm(grads, norm):
    """The root of the sum of all squares."""
    table, places, sizes, aligned = _laid_out([grads])
    parts = torch.empty(len(places), dtype=torch.float64, device=norm.device)
    if len(places):
        element = _ELEMENTS[grads[0].dtype]
        with torch.cuda.device_of(norm):
            _norm_kernel[(len(places),)](
                table, places, sizes, parts, len(grads),
                ELEMENT=element, ALIGNED=aligned, CHUNK=_CHUNK, TILE=_TILE,
            )  # fmt: skip
    norm.copy_(parts.sum().sqrt())
