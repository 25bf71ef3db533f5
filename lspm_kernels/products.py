"""The products of matrices that ops are made of: torch's, or ours where those are faster.

torch's products in float32 are MKL's, which gives processors of other makers than Intel its code for AVX2: on
a Zen 5 that takes twice as long as ours, for AVX-512 (benchmarks/bench_linear_many_rows.py). On Intel's own
they are near the peak: there ours would bring nothing. In bfloat16 torch's are oneDNN's: on AMX ours are
0.98 to 1.73 times as fast (the same benchmark), most where a side is not laid out as they like it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lspm_kernels import compiled
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator

_F32 = torch.float32
LEAST = 32  # of each size: packing would take longer than a thinner product
faster = compiled.cpu.isa.startswith(("avx512", "amx")) and compiled.cpu_maker() != "GenuineIntel"
_DTYPES = _F32, torch.bfloat16
_ROW = Backend("cpu", "cpu", _DTYPES, compiled.cpu_kernel("matmul"), None, compiled.nothing_missing)


def is_ours(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b of matrices is better done by our kernel."""
    wanted = faster if a.dtype == _F32 else a.dtype == torch.bfloat16 and compiled.cpu.isa == "amx"
    if not wanted or b.dtype != a.dtype or a.device.type != "cpu":
        return False
    if b.layout is not torch.strided:
        return False
    return min(*a.shape, b.shape[1]) >= LEAST


def _product(row, x, weight, bias, saves=True):
    y = x.new_empty(x.shape[0], weight.shape[0])
    if row is not None:
        put(y, x, weight.t(), bias)
    return y


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _gradient(ctx, dy):
    x, weight = ctx.saved_tensors
    wants_dx, wants_dweight, wants_dbias = ctx.needs_input_grad[:3]
    dx = matmul(dy, weight) if wants_dx else None
    dweight = matmul(dy.t(), x) if wants_dweight else None
    return dx, dweight, dy.sum(0) if wants_dbias else None


_operator = Operator(
    "linear_product(Tensor x, Tensor weight, Tensor? bias) -> Tensor", (_ROW,), _product, _save, _gradient
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of matrices (M, K) and (N, K), of one dtype."""
    return _operator(_ROW, x, weight, bias) if is_ours(x, weight.t()) else F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices (M, K) and (K, N), of one dtype."""
    return _operator(_ROW, a, b.t(), None) if is_ours(a, b) else torch.mm(a, b)


def addmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """c + a @ b."""
    return c + matmul(a, b) if is_ours(a, b) else torch.addmm(c, a, b)


def flat(x: Tensor) -> Tensor:
    """x (..., K) as a matrix of rows."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def put(c: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """c = a @ b + bias, rounded to c's dtype; with out=, so that autocast lets dtypes alone."""
    if _is_ours_into(c, a, b):
        bias = None if bias is None else bias.to(_F32).contiguous()
        _ROW.forward(_dense(a), _dense(b), bias, c, False)
    elif c.dtype != a.dtype:
        put(made := a.new_empty(c.shape), a, b, bias)
        c.copy_(made)
    elif bias is None:
        torch.mm(a, b, out=c)
    else:
        torch.addmm(bias.to(c.dtype), a, b, out=c)


def add(c: Tensor, a: Tensor, b: Tensor) -> None:
    """c += a @ b; in place, so that autocast lets dtypes alone."""
    if _is_ours_into(c, a, b):
        _ROW.forward(_dense(a), _dense(b), None, c, True)
    elif c.dtype != a.dtype:
        put(made := a.new_empty(c.shape), a, b)
        c.add_(made)
    else:
        c.addmm_(a, b)


def _is_ours_into(c, a, b):
    return c.dtype in (a.dtype, _F32) and is_ours(a, b)


def _dense(t):
    """t with a dimension that is contiguous."""
    return t if 1 in t.stride() else t.contiguous()
