"""Linear: of many rows a product with its gradients; of few, by weights that may be 8-bit integers, too."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, products, triton
from lspm_kernels.dispatch import Backend, Limit
from lspm_kernels.operator import Operator
from lspm_kernels.reference import linear as reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# As many rows as the kernels read weights for at the rate of memory, or nearly: from here on products bound a
# call, and torch's (oneDNN, MKL, cuBLAS) block them better than kernels that were made to read.
MOST_ROWS = 8
# On a CPU, beside a weight of another dtype: to write it out for torch's products takes as long as some
# hundred rows of ours, which are about as fast there as those of MKL.
MOST_ROWS_OF_OTHERS = 512
_LEAST_GROUP = 32  # columns: two vectors of the widest instruction set

_FEW = Limit(
    f"at most {MOST_ROWS} rows, on a CPU {MOST_ROWS_OF_OTHERS} where weight's dtype is not x's",
    lambda x, weight, bias: _rows(x) <= _most_rows(x, weight),
    lambda x, weight, bias: _rows(x),
)
_CONSTANTS = Limit(
    "tensors without a gradient",
    lambda x, weight, bias: not _differentiates(x, weight, bias),
    lambda x, weight, bias: "requires_grad=True",
)
# There is no CUDA C++: a product of few rows is bound by reading the weight, which Triton's loads of 16 bytes
# do as well as any; compiled and emulated, not timed.
BACKENDS = tuple(
    Backend(name, device, FLOATS, kernel("linear_forward"), None, missing, (_FEW, _CONSTANTS))
    for name, device, kernel, missing in (
        ("cpu", "cpu", compiled.cpu_kernel, compiled.nothing_missing),
        ("triton", "cuda", triton.kernel, triton.missing),
    )
)


def _rows(x):
    return x.shape[:-1].numel()


def reads(x: Tensor, *others: Tensor | None) -> bool:
    """Whether products of x on a CPU take as long as it does to read weights, and need no gradient.

    Not where calls are traced or transformed: a graph has one op for any number of rows.
    """
    return x.is_cpu and checks.plain(x) and _rows(x) <= MOST_ROWS and not _differentiates(x, *others)


def _most_rows(x, weight):
    return MOST_ROWS_OF_OTHERS if weight.dtype != x.dtype and not x.is_cuda else MOST_ROWS


def _differentiates(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _forward(row, x, weight, bias, scales, saves=True):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    if row is not None and y.numel():
        bias = None if bias is None else bias.contiguous()
        scales = None if scales is None else scales.contiguous()
        row.forward(x.contiguous(), checks.rows(weight), bias, scales, y)
    return y


_linear = Operator(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? scales) -> Tensor", BACKENDS, _forward
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x @ weight.T + bias: torch.nn.functional.linear, also by weights of fewer bits.

    y[..., n] = bias[n] + sum over k of x[..., k] * weight[n, k] * scales[n, k // (K / G)]

    Of up to 8 rows without a gradient a kernel reads the weight once, as it is stored, and adds up in
    float32; on a CPU of up to 512 where the weight has another dtype than x. With more rows, or gradients,
    such a weight is written out in x's dtype first; products are then ours on CPUs where those are faster
    than torch's, see lspm_kernels/products.py. Ours have the same bits for any number of threads; torch's
    may differ.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: (N, K), x's dtype, or for few rows any of these, or int8, which takes scales. A last dimension
            that is contiguous is read where it lies.
        bias: (N,), x's dtype or float32, or None.
        scales: (N, G), float32: of each row's G groups of K / G columns, a multiple of 32 where G is not 1.
            quantize_int8 makes them.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        y: (..., N), x's dtype.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device.
        NotImplementedError: the backend asked for does not take this call.

    Source: Dettmers et al., "LLM.int8()" (2022), for integers with a scale to a row.
    """
    return product(_check(x, weight, bias, scales), weight, bias, scales, backend)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor | None, backend: str | None = None
) -> Tensor:
    """linear of arguments that were checked, as by a module that keeps them; x in linear's dtype."""
    if backend is None and (_rows(x) > _most_rows(x, weight) or _differentiates(x, weight, bias)):
        weight = reference.dequantized(weight, scales, x.dtype)
        bias = None if bias is None else bias.to(x.dtype)
        if dispatch.forced() == dispatch.REFERENCE:
            return torch.nn.functional.linear(x, weight, bias)
        y = products.linear(products.flat(x), weight, bias)
        return y.view(*x.shape[:-1], len(weight))
    row = dispatch.pick("linear", BACKENDS, backend, x, weight, bias)
    if row is None:
        return reference.linear(x, weight, bias, scales)
    return _linear(row, x, weight, bias, scales)


def quantize_int8(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor]:
    """A weight in 8-bit integers and the scales that linear takes with it.

    scales[n, g] = max |weight[n, columns of g]| / 127, and integers = round(weight / scales)

    Args:
        weight: (N, K), floating point and finite.
        group_size: columns to a scale, a multiple of 32 that divides K; None gives each row one.

    Returns:
        integers: (N, K), int8, from -127 to 127.
        scales: (N, K / group_size), float32; 1 where a group is 0.

    Raises:
        ValueError: an argument breaks a rule above.
    """
    op = "quantize_int8"
    checks.matrix(op, "weight", weight)
    N, K = weight.shape
    if group_size is not None and (
        type(group_size) is not int or group_size < 1 or group_size % _LEAST_GROUP or K % group_size
    ):
        rule = f"be a multiple of {_LEAST_GROUP} that divides weight's {K} columns"
        raise ValueError(f"{op}: group_size must {rule}, got {group_size!r}")
    if checks.readable(weight) and not weight.isfinite().all():
        raise ValueError(f"{op}: weight must be finite, got {weight[~weight.isfinite()][0].item()}")
    size = min(group_size or K, K)
    groups = weight.detach().float().view(N, K // size if K else 1, size)
    largest = groups.abs().amax(2, keepdim=True) if K else groups.new_zeros(N, 1, 1)
    scales = torch.where(largest > 0, largest / 127, 1.0)
    integers = (groups / scales).round_().clamp_(-127, 127).to(torch.int8)
    return integers.view(N, K), scales[:, :, 0]


def _check(x, weight, bias, scales):
    """Checks everything; gives x in the dtype in which autocast, where it is on, has linear."""
    op = "linear"
    checks.floating(op, "x", x)
    (x,) = checks.autocast(x)
    K = x.shape[-1]
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[1] != K:
        raise ValueError(f"{op}: weight must be of shape (N, {K}), got {checks.shape(weight)}")
    if weight.dtype not in (*FLOATS, torch.int8, x.dtype):
        rule = f"one of {', '.join(map(str, (*FLOATS, torch.int8)))}"
        raise ValueError(f"{op}: weight must have dtype {rule}, got {weight.dtype}")
    if bias is not None:
        checks.parameter(op, "bias", bias, len(weight), x.device, (x.dtype, torch.float32))
    if (scales is not None) != (weight.dtype == torch.int8):
        got = f"{weight.dtype} and {'none' if scales is None else checks.shape(scales)}"
        raise ValueError(f"{op}: scales must be there exactly where weight is int8, got {got}")
    if scales is not None:
        _check_scales(op, scales, len(weight), K)
    checks.beside(op, "x", x.device, weight=weight, scales=scales)
    return x


def _check_scales(op, scales, N, K):
    if not isinstance(scales, Tensor) or scales.dim() != 2 or len(scales) != N or not scales.shape[1]:
        raise ValueError(f"{op}: scales must be of shape ({N}, G), got {checks.shape(scales)}")
    if scales.dtype != torch.float32:
        raise ValueError(f"{op}: scales must have dtype torch.float32, got {scales.dtype}")
    G = scales.shape[1]
    if G > 1 and (not K or K % (G * _LEAST_GROUP)):
        rule = f"groups of a multiple of {_LEAST_GROUP} of the {K} columns"
        raise ValueError(f"{op}: scales must be of {rule}, got {G} groups")
