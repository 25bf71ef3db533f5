"""A table of embeddings that its own backward trains."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lspm_kernels import checks
from lspm_kernels.ops import embedding_bag_update as updates
from lspm_kernels.ops.embedding_bag import embedding_bag

_OP = "FusedEmbeddingBag"
# What torch.compile leaves alone, once there is a module: to import what does that takes a second.
_untraced: list[Callable] = []
_STATES = {"sgd": (), "adagrad": ("state_sum",), "adam": ("exp_avg", "exp_avg_sq")}


class _Fused(torch.autograd.Function):
    """The bags, whose backward changes the table; anchor is what makes autograd call it."""

    @staticmethod
    def forward(ctx, anchor, module, indices, offsets, per_sample_weights):
        ctx.module = module
        ctx.save_for_backward(indices, offsets, per_sample_weights)
        if not ctx.needs_input_grad[4]:
            return module.bags(indices, offsets, per_sample_weights)
        with torch.enable_grad():
            ctx.leaf = per_sample_weights.detach().requires_grad_()
            ctx.out = module.bags(indices, offsets, ctx.leaf)
        return ctx.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        dweights = None
        if ctx.needs_input_grad[4]:  # first, as it reads the table; raises if that has changed since
            (dweights,) = torch.autograd.grad(ctx.out, ctx.leaf, dout, retain_graph=True)
        ctx.module.update(dout, *ctx.saved_tensors)
        return None, None, None, None, dweights


def _forward(module, indices, offsets, per_sample_weights):
    if not (module.training and torch.is_grad_enabled()):
        return module.bags(indices, offsets, per_sample_weights)
    anchor = torch.empty(0, requires_grad=True)
    return _Fused.apply(anchor, module, indices, offsets, per_sample_weights)


def _leave_untraced():
    if not _untraced:
        _untraced.append(torch.compiler.disable(_forward))


class FusedEmbeddingBag(torch.nn.EmbeddingBag):
    """torch.nn.EmbeddingBag whose backward takes the optimizer's step at once, with no gradient in memory.

    While training, the backward of each call is a step: the rows that stand in its bags change, each once, by
    embedding_bag_sgd_, embedding_bag_adagrad_ (row-wise) or embedding_bag_adam_. So

    * weight has no gradient and belongs into no optimizer; clipping and torch.amp's scaling of the loss do
      not reach it, and gradients are not exchanged between processes.
    * Gradients do not accumulate: a backward for each of k micro-batches is k steps, and so are two calls of
      a module within one forward, or a graph that is walked twice. For one step, put the bags into one call.
    * lr and the other settings may be changed at any time, as by a scheduler; the backward reads them.
    * In evaluation, and under torch.no_grad, nothing changes. per_sample_weights have a gradient always, that
      at the table as the forward read it; where the table changed in between, the backward raises.
    * A second derivative is an error; torch.compile leaves the module's forward to eager mode.

    Args:
        num_embeddings, embedding_dim, mode, _weight, include_last_offset, padding_idx, device, dtype: those
            of torch.nn.EmbeddingBag; mode is "sum" or "mean".
        max_norm, norm_type, scale_grad_by_freq: there is neither of them; None and False alone are taken.
        sparse: of no consequence, as there is no gradient.
        optimizer: "sgd", "adagrad" or "adam". Its state is of float32, whatever weight's dtype is, and part
            of state_dict: state_sum (N,); or exp_avg and exp_avg_sq (N, D) and the number of steps.
        lr, eps, betas, weight_decay, stochastic_rounding: those of the three functions.

    Raises:
        ValueError: an argument has a value it may not have; at a call: as embedding_bag.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        optimizer: str = "adagrad",
        lr: float = 0.01,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        stochastic_rounding: bool = False,
    ):
        if max_norm is not None:
            raise ValueError(f"{_OP}: max_norm must be None, got {max_norm!r}")
        if scale_grad_by_freq:
            raise ValueError(f"{_OP}: scale_grad_by_freq must be False, got {scale_grad_by_freq!r}")
        checks.one_of(_OP, "mode", mode, ("sum", "mean"))
        checks.one_of(_OP, "optimizer", optimizer, _STATES)
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            checks.number(_OP, name, value, 0, float("inf"))
        checks.betas(_OP, betas)
        super().__init__(
            num_embeddings, embedding_dim, None, norm_type, False, mode, sparse, _weight, include_last_offset,
            padding_idx, device, dtype,
        )  # fmt: skip
        self.weight.requires_grad_(False)
        self.optimizer, self.lr, self.eps, self.betas = optimizer, lr, eps, betas
        self.weight_decay, self.stochastic_rounding = weight_decay, stochastic_rounding
        for name in _STATES[optimizer]:
            like = self.weight[:, 0] if name == "state_sum" else self.weight
            self.register_buffer(name, torch.zeros(like.shape, dtype=self._wide(), device=like.device))
        if optimizer == "adam":
            self.register_buffer("step", torch.zeros((), dtype=torch.int64, device="cpu"))
        _leave_untraced()

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, freeze: bool = True, *args, **options
    ) -> "FusedEmbeddingBag":
        """As torch.nn.EmbeddingBag's, of rows that are trained on: freeze must be False."""
        if freeze:
            rule = "be False, as the backward trains the table while the module is in training"
            raise ValueError(f"{_OP}: freeze must {rule}, got {freeze!r}")
        module = super().from_pretrained(embeddings, freeze, *args, **options)
        module.weight.requires_grad_(False)
        return module

    def __setstate__(self, state):
        super().__setstate__(state)
        _leave_untraced()

    def forward(
        self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """embedding_bag of input (B, L), or (n,) with offsets."""
        return _untraced[0](self, input, offsets, per_sample_weights)

    def bags(self, indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None) -> Tensor:
        """The output, without what trains the table."""
        return embedding_bag(self.weight.detach(), indices, offsets, **self._options(per_sample_weights))

    @torch.no_grad()
    def update(
        self, dout: Tensor, indices: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
    ) -> None:
        """One step of the optimizer with the gradient dout of the output for these bags."""
        settings = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer != "sgd":
            settings["eps"] = self.eps
        if self.optimizer == "adam":
            settings |= {"betas": self.betas, "step": int(self.step) + 1}
        states = (getattr(self, name) for name in _STATES[self.optimizer])
        function = getattr(updates, f"embedding_bag_{self.optimizer}_")
        options = self._options(per_sample_weights) | {"stochastic_rounding": self.stochastic_rounding}
        function(self.weight, *states, dout, indices, offsets, **settings, **options)
        if self.optimizer == "adam":
            self.step += 1

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, optimizer={self.optimizer}, lr={self.lr}"

    def _options(self, per_sample_weights):
        return {
            "mode": self.mode,
            "per_sample_weights": per_sample_weights,
            "padding_idx": self.padding_idx,
            "include_last_offset": self.include_last_offset,
        }

    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    def _apply(self, fn: Callable, recurse: bool = True):
        """The state goes where weight goes, but never loses precision; the number of steps stays here."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, state in before.items():
            if name == "step":
                self._buffers[name] = state
            elif self._buffers[name].dtype != self._wide():
                self._buffers[name] = state.to(self._buffers[name].device, self._wide())
        return self
