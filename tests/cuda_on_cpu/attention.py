"""The CUDA kernels of attention, executed on the CPU, as a function like the reference."""

import ctypes
import functools
import os
import shutil
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from typing import NamedTuple

import pytest
import torch

from cuda_on_cpu import build
from cuda_on_cpu.library import Library

FILES = ("attention", "attention_decode", "attention_backward")
SOURCES = [*(build.ROOT / f"csrc/cuda/{name}.cu" for name in FILES), build.HERE / "entries/attention.cpp"]
FLAVOURS = os.environ.get("LSPM_CUDA_ON_CPU", "check ptxcheck").split()
# Of nvcc's PTX, whose translation takes its time: those of 64 dims, with extras for one type.
PTX_KERNELS = r"13__nv_bfloat16.*Li64E|6__half.*Li64ELb0|(dots|combine)_kernel"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 4}


def structure(name, **fields):
    """A struct of csrc/, with the same members in the same order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


HeadsView = structure(
    "HeadsView", data=c_void_p, batch_stride=c_int64, head_stride=c_int64, row_stride=c_int64,
    starts=c_void_p, pages=c_void_p, page_rows=c_int64, page_columns=c_int64,
)  # fmt: skip
ScoresView = structure(
    "ScoresView", data=c_void_p, batch_stride=c_int64, head_stride=c_int64, row_stride=c_int64,
    key_stride=c_int64, dtype=c_int,
)  # fmt: skip
Extras = structure("AttentionExtras", bias=ScoresView, mask=ScoresView, slopes=ScoresView, sinks=c_void_p)
Shape = structure(
    "AttentionShape", **dict.fromkeys(
        ("batch", "heads", "kv_heads", "queries", "keys", "head_dim", "value_dim"), c_int64
    ), dtype=c_int, left=c_int64, right=c_int64, shift=c_int64, scale=c_float, softcap=c_float,
    dropout=c_double, seed=c_uint64, query_starts=c_void_p, key_starts=c_void_p, key_counts=c_void_p,
    packed=c_int64,
)  # fmt: skip


def flat(x):
    """The memory that x covers, gaps included."""
    reach = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((reach if x.numel() else 0,), (1,))


@functools.cache
def load(flavour, kernels=PTX_KERNELS):
    return Library(build.kernels(SOURCES, flavour, kernels))


def loaded(flavour, *kernels):
    if flavour == "ptxcheck" and not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    library = load(flavour, *kernels)
    library.flavour = flavour
    yield library
    library.configure()
    library.free()


class Layout(NamedTuple):
    """Sequences of unequal lengths: int32 tensors, and the longest of queries and keys."""

    queries: int
    keys: int
    query_starts: torch.Tensor | None = None
    key_starts: torch.Tensor | None = None
    key_counts: torch.Tensor | None = None
    pages: torch.Tensor | None = None


class Device:
    """Tensors in device memory, as the structs that the kernels take."""

    def __init__(self, library, misaligned=(), splits=0, where=(0, None)):
        self.library, self.misaligned, self.splits, self.where = library, misaligned, splits, where

    def pointer(self, tensor):
        return None if tensor is None else self.library.copy(tensor).pointer

    def heads(self, name, x, starts=None, pages=None, fill=True):
        """A tensor (B, H, T, D), and its buffer; where not `fill`, an output."""
        odd = name in self.misaligned
        buffer = self.library.copy(flat(x), odd) if fill else self.library.empty(flat(x).shape, x.dtype, odd)
        batch, head, row = x.stride()[:3]
        paged = (x.shape[2], pages.shape[1]) if pages is not None else (0, 0)
        batch = batch if starts is None or pages is not None else 0
        places = self.pointer(starts), self.pointer(pages), *paged
        return HeadsView(buffer.pointer, batch, head, row, *places), buffer

    def output(self, name, like, starts=None):
        """Of like's shape (B, H, T, D), but (B, T, H, D) in memory; and a function that reads it."""
        empty = torch.empty_like(like.transpose(1, 2).contiguous()).transpose(1, 2)
        view, buffer = self.heads(name, empty, starts, fill=False)
        return view, lambda: buffer.tensor().as_strided(empty.shape, empty.stride())

    def scores(self, x):
        if x is None:
            return ScoresView()
        strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
        return ScoresView(self.library.copy(flat(x)).pointer, *strides, DTYPES[x.dtype])

    def call(self, name, *arguments):
        of_structs = (ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments)
        self.library.call(name, *of_structs, *self.where)


class Attention(torch.autograd.Function):
    """The kernels as a differentiable function of q, k, v and sinks."""

    @staticmethod
    def forward(ctx, device, q, k, v, sinks, bias, mask, slopes, layout, *options):
        packed = layout.query_starts is not None
        B = len(layout.query_starts) - 1 if packed else q.shape[0]
        sizes = B, q.shape[1], k.shape[1], layout.queries, layout.keys, q.shape[3], v.shape[3]
        starts = [device.pointer(x) for x in (layout.query_starts, layout.key_starts, layout.key_counts)]
        ctx.shape = Shape(*sizes, DTYPES[q.dtype], *options, *starts, q.shape[2] if packed else 0)
        ctx.inputs = [
            device.heads("q", q, layout.query_starts)[0],
            *(device.heads(name, x, layout.key_starts, layout.pages)[0] for name, x in (("k", k), ("v", v))),
        ]
        extras = map(device.scores, (bias, mask, slopes))
        ctx.extras = Extras(*extras, device.pointer(sinks))
        ctx.out, read = device.output("out", q.new_empty(*q.shape[:3], v.shape[3]), layout.query_starts)
        lse, statistics = device.library.empty(q.shape[:3]), device.library.empty((2, *q.shape[:3]))
        parts = (device.splits, *q.shape[:3], v.shape[3] + 2)
        scratch = device.library.empty(parts) if device.splits else None
        outputs = lse, statistics, scratch, max(1, device.splits)
        device.call("attention_forward", *ctx.inputs, ctx.extras, ctx.out, *outputs, ctx.shape)
        ctx.device, ctx.layout = device, layout
        ctx.save_for_backward(q, k, v, sinks, statistics.tensor())
        ctx.set_materialize_grads(False)
        return read(), lse.tensor()

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sinks, statistics = ctx.saved_tensors
        device, layout = ctx.device, ctx.layout
        if dout is None:
            dout = q.new_zeros(*q.shape[:3], v.shape[3])
        starts = layout.query_starts, layout.key_starts, layout.key_starts
        dout, _ = device.heads("dout", dout.contiguous(), layout.query_starts)
        dlse = device.library.copy(dlse)
        outputs = [device.output(*given) for given in zip(("dq", "dk", "dv"), (q, k, v), starts, strict=True)]
        saved, delta = device.library.copy(statistics), device.library.empty((2, *q.shape[:3]))
        device.call(
            "attention_backward", dout, dlse, *ctx.inputs, ctx.extras, ctx.out, saved,
            *(view for view, _ in outputs), delta, ctx.shape,
        )  # fmt: skip
        dsinks = None
        if sinks is not None:
            dsinks = -(sinks[:, None] - statistics[0]).exp() * statistics[1] * delta.tensor()[0]
            dsinks = dsinks.sum((0, 2), dtype=torch.float64).float()
        return None, *(read() for _, read in outputs), dsinks, *[None] * 12


def on(library, **how):
    """Attention on the emulator, with the arguments of the reference and a Layout."""

    def attention(
        q, k, v, *, causal=False, window=None, top_left=False, bias=None, mask=None, alibi_slopes=None,
        softcap=0.0, dropout_p=0.0, seed=0, scale=None, sinks=None, return_lse=False, layout=None,
    ):  # fmt: skip
        left, right = window or (None, None)
        layout = layout or Layout(q.shape[2], k.shape[2])
        options = (
            -1 if left is None else left, 0 if causal else -1 if right is None else right,
            0 if top_left else layout.keys - layout.queries, q.shape[-1] ** -0.5 if scale is None else scale,
            softcap, dropout_p, seed,
        )  # fmt: skip
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.float().expand(q.shape[:2])[..., None, None]
        added = bias, mask, alibi_slopes
        out, lse = Attention.apply(Device(library, **how), q, k, v, sinks, *added, layout, *options)
        return (out, lse) if return_lse else out

    return attention
