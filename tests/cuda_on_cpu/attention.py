"""The CUDA kernels of attention, executed on the CPU, as a function like the reference."""

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_uint64, c_void_p

import torch
from cuda_on_cpu import build

SOURCES = [build.ROOT / f"csrc/cuda/{name}.cu" for name in ("attention", "attention_backward")]
SOURCES.append(build.HERE / "entries/attention.cpp")
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


class Device:
    """Tensors in device memory, as the structs that the kernels take."""

    def __init__(self, library, misaligned=()):
        self.library, self.misaligned = library, misaligned

    def heads(self, name, x, *, fill=True, **more):
        """A tensor (B, H, T, D), and its buffer; where not `fill`, an output."""
        odd = name in self.misaligned
        if fill:
            buffer = self.library.copy(flat(x), odd)
        else:
            buffer = self.library.empty(flat(x).shape, x.dtype, odd)
        more = {key: value.pointer if hasattr(value, "pointer") else value for key, value in more.items()}
        return HeadsView(buffer.pointer, *x.stride()[:3], **more), buffer

    def output(self, name, shape, dtype, **more):
        """(B, H, T, D) that lies as (B, T, H, D)."""
        B, H, T, D = shape
        return self.heads(name, torch.empty(B, T, H, D, dtype=dtype).transpose(1, 2), fill=False, **more)

    def scores(self, x):
        if x is None:
            return ScoresView()
        strides = [stride if size > 1 else 0 for size, stride in zip(x.shape, x.stride(), strict=True)]
        return ScoresView(self.library.copy(flat(x)).pointer, *strides, DTYPES[x.dtype])

    def extras(self, bias, mask, slopes, sinks):
        sinks = self.library.copy(sinks)
        return Extras(*map(self.scores, (bias, mask, slopes)), sinks and sinks.pointer)


def result(view, buffer, like):
    """The tensor of an output."""
    return buffer.tensor().as_strided(like.shape, like.stride())


class Attention(torch.autograd.Function):
    """The kernels as a differentiable function of q, k, v and sinks."""

    @staticmethod
    def forward(ctx, device, q, k, v, sinks, bias, mask, slopes, options):
        (B, H, T_q, D), H_kv, T_k, Dv = q.shape, k.shape[1], k.shape[2], v.shape[3]
        ctx.shape = Shape(
            B, H, H_kv, T_q, T_k, D, Dv, DTYPES[q.dtype], options["left"], options["right"],
            options["shift"], options["scale"], options["softcap"], options["dropout_p"], options["seed"],
        )  # fmt: skip
        inputs = [device.heads(*given)[0] for given in (("q", q), ("k", k), ("v", v))]
        extras = device.extras(bias, mask, slopes, sinks)
        out, buffer = device.output("out", (B, H, T_q, Dv), q.dtype)
        lse, statistics = device.library.empty((B, H, T_q)), device.library.empty((2, B, H, T_q))
        refs = [*map(ctypes.byref, (*inputs, extras, out)), lse, statistics, ctypes.byref(ctx.shape)]
        device.library.call("attention_forward", *refs, 0, None)
        ctx.device, ctx.extras, ctx.inputs, ctx.out = device, extras, inputs, out
        statistics = statistics.tensor()
        ctx.save_for_backward(q, k, v, sinks, statistics)
        ctx.set_materialize_grads(False)
        like = q.new_empty(B, T_q, H, Dv).transpose(1, 2)
        return result(out, buffer, like), lse.tensor()

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sinks, statistics = ctx.saved_tensors
        device, (B, H, T_q, _) = ctx.device, q.shape
        if dout is None:
            dout = q.new_zeros(B, H, T_q, v.shape[3])
        dout, _ = device.heads("dout", dout.contiguous())
        dlse = device.library.copy(dlse)
        outputs = [device.output(name, x.shape, x.dtype) for name, x in (("dq", q), ("dk", k), ("dv", v))]
        saved, delta = device.library.copy(statistics), device.library.empty((2, B, H, T_q))
        device.library.call(
            "attention_backward", ctypes.byref(dout), dlse, *map(ctypes.byref, ctx.inputs),
            ctypes.byref(ctx.extras), ctypes.byref(ctx.out), saved,
            *(ctypes.byref(view) for view, _ in outputs), delta, ctypes.byref(ctx.shape), 0, None,
        )  # fmt: skip
        likes = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v)]
        grads = [result(*output, like) for output, like in zip(outputs, likes, strict=True)]
        dsinks = None
        if sinks is not None:
            delta = delta.tensor()[0]
            dsinks = -(sinks[:, None] - statistics[0]).exp() * statistics[1] * delta
            dsinks = dsinks.sum((0, 2), dtype=torch.float64).float()
        return None, *grads, dsinks, None, None, None, None


def on(library, misaligned=()):
    """Attention on the emulator, with the arguments of the reference."""

    def attention(
        q, k, v, *, causal=False, window=None, top_left=False, bias=None, mask=None, alibi_slopes=None,
        softcap=0.0, dropout_p=0.0, seed=0, scale=None, sinks=None, return_lse=False,
    ):  # fmt: skip
        left, right = window or (None, None)
        options = {
            "left": -1 if left is None else left,
            "right": 0 if causal else -1 if right is None else right,
            "shift": 0 if top_left else k.shape[2] - q.shape[2],
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "softcap": softcap, "dropout_p": dropout_p, "seed": seed,
        }  # fmt: skip
        if alibi_slopes is not None:
            alibi_slopes = alibi_slopes.float().expand(q.shape[:2])[..., None, None]
        device = Device(library, misaligned)
        out, lse = Attention.apply(device, q, k, v, sinks, bias, mask, alibi_slopes, options)
        return (out, lse) if return_lse else out

    return attention
