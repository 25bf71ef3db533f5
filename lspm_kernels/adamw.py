"""AdamW in one pass over parameters, gradients and moments, clipping and master weights included."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lspm_kernels import compiled
from lspm_kernels.ops import adamw as ops

_OWN = ("master_weights", "stochastic_rounding")
_REFUSED = ("capturable", "differentiable")
_HALVES = (torch.bfloat16, torch.float16)
_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step is one kernel for all tensors of a group, with or without clipping.

    State has torch's names, and state_dict of either loads into the other: step (on the CPU), exp_avg,
    exp_avg_sq and max_exp_avg_sq. Schedulers, hooks, closures and torch.amp.GradScaler work as with torch's
    fused optimizer, but where a scaler is at work step() waits for its found_inf.

    * clip_norm: the step multiplies gradients by min(1, clip_norm / (grad_norm + 1e-6)), as
      torch.nn.utils.clip_grad_norm_ does, but where it reads them: p.grad itself does not change, nor does it
      where a scaler's scale is divided out. Gradients are read once more for their norm, and not written. A
      norm that is not finite spoils parameters as it does there. `clip_norm` may be changed at any time.
    * `grad_norm` is the norm of the gradients, without a scaler's scale, at the last step that clipped: a
      tensor for which nothing waits, or None. To look at it before the weights change:

          norm = optimizer.measure_grad_norm()
          if norm.isfinite():
              optimizer.step(grad_norm=norm)     # which does not read the gradients for it again

    * bfloat16 and float16 parameters: by default the moments have their dtype, as torch's have, in which
      small steps are lost and, in float16, the squares of small gradients. With master_weights moments are
      in float32, and so is the parameter itself, as master_param of the state; p is its rounded copy, so who
      changes p otherwise deletes master_param. With stochastic_rounding moments are in float32, and bfloat16
      parameters are rounded up or down at random, with the exact value as their mean; seeds are drawn from
      torch's default generator, one a step and list of tensors.

    Everything is computed in float32. The same bits for any number of threads.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize: those of torch.optim.AdamW.
        foreach, fused: of no consequence, as there is one implementation.
        capturable, differentiable: only False.
        clip_norm: the largest 2-norm of all gradients together, above 0; infinity measures and does not clip.
        master_weights, stochastic_rounding: see above; of a group, too, and not both.

    Raises:
        ValueError: an argument has a value it may not have.
        NotImplementedError: capturable or differentiable; at a step, a sparse gradient.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; Pascanu,
    Mikolov and Bengio, "On the difficulty of training recurrent neural networks" (2013), algorithm 1;
    Micikevicius et al., "Mixed Precision Training" (2018), section 3.1.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        clip_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"AdamW: clip_norm must be greater than 0 or None, got {clip_norm!r}")
        self._own = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding}
        self.clip_norm, self.grad_norm = clip_norm, None
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach,
            capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._step_supports_amp_scaling = True

    def add_param_group(self, param_group: dict) -> None:
        """torch's; a group may have its own master_weights and stochastic_rounding."""
        super().add_param_group(param_group)
        self._complete(self.param_groups[-1], self._own)

    @torch._disable_dynamo  # as torch's own optimizers have it: counts of steps would be constants of a trace
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, grad_norm: Tensor | None = None
    ) -> float | None:
        """One step. grad_norm: of these gradients, as measured before; without it they are measured here."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = getattr(self, "grad_scale", None)
        scale = None if scale is None else scale.double().reciprocal().float()
        if grad_norm is None and self.clip_norm is not None:
            grad_norm = self.measure_grad_norm()
            if scale is not None:
                grad_norm = grad_norm * scale.to(grad_norm.device, non_blocking=True)
        if grad_norm is not None:
            self.grad_norm = grad_norm
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.item():
            return loss
        if self.clip_norm is not None:
            clip = (self.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
            scale = clip if scale is None else clip * scale.to(clip.device, non_blocking=True)
        for group in self.param_groups:
            for params in self._alike(group):
                self._update(group, params, scale)
        return loss

    @torch.no_grad()
    def measure_grad_norm(self) -> Tensor:
        """The 2-norm of all gradients as they are now."""
        grads = [p.grad for group in self.param_groups for p in _trained(group)]
        return ops.adamw_norm([torch.view_as_real(g) if g.is_complex() else g for g in grads])

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's, but what is float32 in the state of a bfloat16 or float16 parameter stays so."""
        given = []
        last = self.register_load_state_dict_pre_hook(lambda _, found: given.append(found))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        saved = (i for group in given[0]["param_groups"] for i in group["params"])
        params = (p for group in self.param_groups for p in group["params"])
        for p, number in zip(params, saved, strict=True):
            for name, value in given[0]["state"].get(number, {}).items():
                if name in _STATES and value.dtype == torch.float32:
                    self.state[p][name] = value.to(p.device)

    def __getstate__(self) -> dict:
        kept = ("clip_norm", "grad_norm", "_own", "_step_supports_amp_scaling")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict) -> None:
        before = self.__dict__.get("param_groups", [{}] * len(state["param_groups"]))
        super().__setstate__(state)
        for group, old in zip(self.param_groups, before, strict=True):
            self._complete(group, self._own | {name: old[name] for name in _OWN if name in old})
        for entry in self.state.values():
            if "step" in entry:
                entry["step"] = entry["step"].cpu()  # torch's fused optimizer has it beside the parameter

    def _complete(self, group, defaults):
        for name in _OWN:
            group.setdefault(name, defaults[name])
        if all(group[name] for name in _OWN):
            raise ValueError("AdamW: stochastic_rounding must be False beside master_weights, got True")
        for name in _REFUSED:
            if group[name]:
                raise NotImplementedError(f"AdamW: {name} must be False, got True")

    def _alike(self, group):
        """The parameters of a group that have gradients, in lists of one device and dtype, state included."""
        lists: dict[tuple, list[Tensor]] = {}
        for p in _trained(group):
            state = self._state_of(p, group)
            lists.setdefault((p.device, p.dtype, state["exp_avg"].dtype), []).append(p)
        return lists.values()

    def _state_of(self, p, group):
        """A parameter's state, made where there is none, and as the kernel needs it where it was loaded."""
        state, half = self.state[p], p.dtype in _HALVES
        master = half and group["master_weights"]
        wide = torch.float32 if master or (half and group["stochastic_rounding"]) else None
        if not state or state["step"].dtype != torch.float32:
            state["step"] = torch.tensor(float(state.get("step", 0)), dtype=torch.float32, device="cpu")
        strides = p.stride()
        for name in _names(group, master):
            found = state.get(name)
            if name == "master_param":
                dtype = torch.float32
                found = p if found is None else found
            else:
                dtype = wide or (p.dtype if found is None else found.dtype)
            if found is None:
                state[name] = torch.zeros_like(p, dtype=dtype)
            elif found is p or found.dtype != dtype or found.stride() != strides:
                state[name] = torch.empty_like(p, dtype=dtype).copy_(found)
        return state

    def _update(self, group, params, scale):
        first, states = params[0], [self.state[p] for p in params]
        if first.is_cuda and torch.cuda.is_current_stream_capturing():
            raise NotImplementedError(
                "AdamW: step must not be captured in a CUDA graph, got a capturing stream"
            )
        half = first.dtype in _HALVES
        names = _names(group, half and group["master_weights"])
        lists = [params, [p.grad for p in params]]
        lists += ([state[name] for state in states] if name in names else [] for name in _STATES)
        if first.is_complex():
            lists = [[torch.view_as_real(t) for t in tensors] for tensors in lists]
        counts = torch.empty(len(params), dtype=torch.int64, device="cpu")
        compiled.cpu.adamw_count([state["step"] for state in states], counts)
        numbers = map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"]))
        ops.update_(
            lists,
            None if scale is None else scale.to(first.device, non_blocking=True),
            counts.tolist(),
            (*numbers, group["maximize"]),
            half and group["stochastic_rounding"],
        )


def _names(group, master):
    """Of what lies in a parameter's state beside its step."""
    return _STATES[: 3 if group["amsgrad"] else 2] + _STATES[3:] * master


def _trained(group):
    for p in group["params"]:
        if p.grad is not None:
            if p.grad.layout != torch.strided:
                rule = "be dense, as those that torch.optim.SparseAdam takes need not be"
                raise NotImplementedError(f"AdamW: gradients must {rule}, got {p.grad.layout}")
            yield p
