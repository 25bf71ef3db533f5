"""A convolution for inference: its weight laid out once as kernels read it, its batch norm folded."""

import torch
from torch import Tensor

from lspm_kernels import batch_norm, checks, compiled, conv2d_checks, dispatch
from lspm_kernels.conv2d_checks import FLOATS, grouped
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.ops.conv2d import conv2d
from lspm_kernels.ops.conv2d_batch_norm import conv2d_batch_norm, folded

_OP = "PackedConv2d"


def _kernel(x, weight, packed, *rest):
    compiled.cpu.conv2d_forward(x, weight, *rest, torch.get_num_threads(), packed)


def _no_gradient(*args):
    raise NotImplementedError(f"{_OP}: has no gradient")


BACKENDS = (Backend("cpu", "cpu", FLOATS, _kernel, _no_gradient, compiled.nothing_missing),)


def _forward(row, x, weight, packed, scale, shift, residual, size, geometry, activation, saves=True):
    out = conv2d_checks.empty_image(x, weight.shape[0], size)
    if row is not None and out.numel():
        residual = None if residual is None else checks.pixels(residual)
        views = checks.pixels(x), weight, packed, scale, shift, residual, checks.pixels(out), None
        row.forward(*views, grouped(geometry), activation)
    return out


_convolve = Operator(
    "packed_conv2d(Tensor x, Tensor weight, Tensor packed, Tensor? scale, Tensor? shift, Tensor? residual,"
    " SymInt[] size, SymInt[] geometry, int activation) -> Tensor",
    BACKENDS,
    _forward,
)


class PackedConv2d:
    """conv2d_batch_norm in evaluation, as a function of x and a residual:

        y = activation((conv(x, weight) + bias - mean) / sqrt(variance + eps) * norm_weight + norm_bias
                       + residual)

    On a CPU the weight is copied, at the first call, into the layout that the kernel reads (of 3x3 windows
    the transform of Winograd), and the batch norm is folded. Where a tensor has changed since then, as its
    version counter tells, that is done again. Calls on other devices, under autocast or a trace, and those
    with tensors that lack such a counter, as they were made in torch.inference_mode, go by conv2d_batch_norm.

    Args:
        weight, norm_weight, norm_bias, running_mean, running_var, stride, padding, dilation, groups, bias,
            activation, eps: as in conv2d_batch_norm; they are kept, not copied. Without running_mean and
            running_var there is no batch norm.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value; at a call: x or residual has.
    """

    def __init__(
        self,
        weight: Tensor,
        norm_weight: Tensor | None = None,
        norm_bias: Tensor | None = None,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        *,
        bias: Tensor | None = None,
        activation: str | None = None,
        eps: float = 1e-5,
    ):
        if not isinstance(weight, Tensor) or weight.dim() != 4 or weight.dtype not in FLOATS:
            rule = "be a tensor (K, C / groups, R, S) of float32, bfloat16 or float16"
            raise ValueError(f"{_OP}: weight must {rule}, got {checks.shape(weight)}")
        if running_mean is None and (norm_weight is not None or norm_bias is not None):
            raise ValueError(f"{_OP}: running_mean must be there where norm_weight or norm_bias is, got None")
        batch_norm.statistics_and_eps(_OP, running_mean, running_var, eps)
        conv2d_checks.vectors(
            _OP, weight, weight.shape[0], bias=bias, norm_weight=norm_weight, norm_bias=norm_bias,
            running_mean=running_mean, running_var=running_var,
        )  # fmt: skip
        self.tensors = (weight, bias, norm_weight, norm_bias, running_mean, running_var)
        self.window = (stride, padding, dilation, groups)
        self.activation, self.eps = activation, eps
        self._code = conv2d_checks.activation(_OP, activation)
        self._versions = self._packed = self._epilogue = self._last = self._sizes = None

    def __getstate__(self) -> dict:
        # Another machine's kernels may read another layout.
        return self.__dict__ | dict.fromkeys(("_versions", "_packed", "_epilogue", "_last"))

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """y (N, K, H', W'), channels last in memory, of x (N, C, H, W) and a residual of y's shape."""
        conv2d_checks.image(_OP, x)
        if x.dim() != 4:
            raise ValueError(f"{_OP}: x must have four dimensions, (N, C, H, W), got {tuple(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(f"{_OP}: x must need no gradient, got one that does: use conv2d_batch_norm")
        weight, tensors = self.tensors[0], [t for t in self.tensors if t is not None]
        if (
            not (x.is_cpu and checks.plain(x, residual, *tensors))
            or torch.is_autocast_enabled("cpu")
            or any(map(Tensor.is_inference, tensors))
        ):
            return self._unpacked(x, residual)
        versions = [(id(t), t._version, t.data_ptr(), t.dtype) for t in tensors]
        stale = versions != self._versions
        if stale or (x.shape, x.dtype) != self._last:
            self._sizes = conv2d_checks.geometry(_OP, x, weight, *self.window)
            self._last = x.shape, x.dtype
        size, geometry = self._sizes
        if residual is not None:
            conv2d_checks.residual(_OP, residual, x, (x.shape[0], weight.shape[0], *size))
        if stale:
            self._pack(geometry)
            self._versions = versions
        row = dispatch.pick(_OP, BACKENDS, None, x)
        if row is None:
            return self._unpacked(x, residual)
        with torch.no_grad():
            return _convolve(
                row, x, weight, self._packed, *self._epilogue, residual, size, geometry, self._code
            )

    def _pack(self, geometry) -> None:
        weight, bias, *norm = self.tensors
        with torch.no_grad():
            bias = None if bias is None else bias.float().contiguous()
            self._epilogue = (None, bias)
            if norm[2] is not None:
                batch_norm.running_statistics(_OP, *norm[2:])
                self._epilogue = folded(*norm, bias, self.eps)
            size = compiled.cpu.conv2d_packed_bytes(weight, grouped(geometry))
            self._packed = torch.empty(size, dtype=torch.uint8)
            compiled.cpu.conv2d_pack(weight, self._packed, grouped(geometry), torch.get_num_threads())

    def _unpacked(self, x, residual):
        weight, bias, *norm = self.tensors
        options = {"activation": self.activation, "residual": residual}
        with torch.no_grad():
            if norm[2] is None:
                return conv2d(x, weight, bias, *self.window, **options)
            return conv2d_batch_norm(x, weight, *norm, *self.window, bias=bias, eps=self.eps, **options)
