"""apex.optimizers: FusedAdam, over lspm_kernels.AdamW."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lspm_kernels.adamw import AdamW
from lspm_kernels.compat.refusals import refuse

_OP = "FusedAdam"


class FusedAdam(AdamW):
    """AdamW's step in one pass; moments are in float32 whatever the parameters are, as apex' are.

    torch.amp.GradScaler divides its scale out of gradients before the step, or with master_weights in it.

    Args:
        params, lr, betas, eps, weight_decay: those of torch.optim.AdamW; weight_decay is 0 if not given.
        bias_correction: only True.
        adam_w_mode: decoupled decay. False, L2 regularization, is refused where there is a weight_decay;
            without one they are the same.
        amsgrad: carried, where apex refuses it.
        set_grad_none: zero_grad makes gradients None, else 0.
        capturable: only False.
        master_weights: bfloat16 and float16 parameters are copies, rounded, of float32 ones in the state.

    Raises:
        ValueError: an argument has a value that it may not have.
        NotImplementedError: an option is asked for that is not carried.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ):
        refuse(_OP, "bias_correction", bias_correction, True, "moments are corrected for their start at 0")
        refuse(_OP, "capturable", capturable, False, "steps are counted on the CPU")
        self.adam_w_mode, self.set_grad_none = adam_w_mode, set_grad_none
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, master_weights=bool(master_weights)
        )  # fmt: skip
        self._step_supports_amp_scaling = bool(master_weights)  # else a scaler unscales p.grad itself

    def add_param_group(self, param_group: dict) -> None:
        """torch's."""
        super().add_param_group(param_group)
        self._check_decay()

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """torch's; set_to_none is set_grad_none where it is None."""
        super().zero_grad(self.set_grad_none if set_to_none is None else set_to_none)

    def step(
        self,
        closure: Callable[[], float] | None = None,
        grads: object = None,
        output_params: object = None,
        scale: object = None,
        grad_norms: object = None,
    ) -> float | None:
        """One step. All but closure are of older versions of apex: only None."""
        given = {"grads": grads, "output_params": output_params, "scale": scale, "grad_norms": grad_norms}
        for name, value in given.items():
            refuse(f"{_OP}.step", name, value, None, "gradients are those of the parameters")
        self._check_decay()
        return super().step(closure)

    def __getstate__(self) -> dict:
        kept = ("adam_w_mode", "set_grad_none")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}

    def _check_decay(self):
        for group in self.param_groups:
            if group["weight_decay"] and not self.adam_w_mode:
                rule = "be True beside a weight_decay, as decay is decoupled (torch.optim.Adam has the other)"
                got = f"False with {group['weight_decay']}"
                raise NotImplementedError(f"{_OP}: adam_w_mode must {rule}, got {got}")

    def _state_of(self, p, group):
        state = self.state[p]
        if not state and p.dtype in (torch.bfloat16, torch.float16):
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                state[name] = torch.zeros_like(p, dtype=torch.float32)
            state["step"] = torch.tensor(0.0, device="cpu")
        return super()._state_of(p, group)
