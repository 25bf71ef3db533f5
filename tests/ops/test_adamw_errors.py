"""What adamw_ and adamw_norm refuse, in their words."""

import math

import pytest
import torch

import lspm_kernels as lk
from lspm_kernels import compiled

GOOD = {name: [torch.ones(2, 3)] * 2 for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")} | {"step": 1}
HALF = {"params": [torch.ones(2, 3).bfloat16()] * 2, "grads": [torch.ones(2, 3).bfloat16()] * 2}
ONES = torch.ones(2, 3)
BAD = {
    "params[0] must be a floating-point tensor, got (2, 3) torch.int64": {"params": [ONES.long()] * 2},
    "params[0] must be a floating-point tensor, got int": {"params": [3]},
    "params[1] must be a floating-point tensor, got int": {"params": [ONES, 3]},
    "params must be a tensor or a list of them, got NoneType": {"params": None},
    "grads must be a tensor or a list of them, got int": {"grads": 3},
    "max_exp_avg_sqs must be a tensor or a list of them, got bool": {"max_exp_avg_sqs": True},
    "params[1] must be a tensor of shape (3, 2) and dtype torch.float32, got (3, 2) torch.bfloat16": None,
    "grads must be 2, as params are, got 1": {"grads": ONES},
    "grads[1] must be a tensor of shape (2, 3) and dtype torch.float32, got (3,) torch.float32": {
        "grads": [ONES, torch.ones(3)]
    },
    "grads[0] must be on device cpu, got meta": {"grads": [torch.ones(2, 3, device="meta")] * 2},
    "exp_avgs[0] must have params' dtype torch.float32 or torch.float32, got torch.float64": {
        "exp_avgs": [ONES.double()] * 2
    },
    "exp_avg_sqs[0] must be a tensor of shape (2, 3) and dtype torch.float32, got NoneType": {
        "exp_avg_sqs": [None, None]
    },
    "exp_avgs[1] must have its parameter's strides (3, 1), got (1, 2)": {
        "exp_avgs": [ONES, torch.ones(3, 2).t()]
    },
    "max_exp_avg_sqs must be 2, as params are, got 1": {"max_exp_avg_sqs": ONES},
    "master_params must be there beside bfloat16 or float16 params with float32 exp_avgs alone, got"
    " torch.float32 with torch.float32": {"master_params": [ONES] * 2},
    "stochastic_rounding must be False beside master_params, got True": {
        "master_params": [ONES] * 2, "stochastic_rounding": True, **HALF
    },
    "step must be an integer from 1 to 2 ** 63 - 1, got 0": {"step": 0},
    "step must be an integer from 1 to 2 ** 63 - 1, got 1.5": {"step": 1.5},
    f"step must be an integer from 1 to 2 ** 63 - 1, got {2**63}": {"step": [1, 2**63]},
    "step must be one or 2, as params are, got 3": {"step": [1, 2, 3]},
    "scale must be one torch.float32, got (2,) torch.float32": {"scale": torch.ones(2)},
    "scale must be on device cpu, got meta": {"scale": torch.ones((), device="meta")},
    "lr must be finite and at least 0, got nan": {"lr": math.nan},
    "eps must be finite and at least 0, got -1": {"eps": -1},
    "weight_decay must be finite and at least 0, got inf": {"weight_decay": math.inf},
    "betas must be two numbers, got 0.9": {"betas": 0.9},
    "betas must be at least 0 and below 1, got 1": {"betas": (0.9, 1)},
    "seed must be an integer from 0 to 2 ** 63 - 1, got -1": {
        "stochastic_rounding": True, "seed": -1, **HALF
    },
    "what it changes must not require a gradient while gradients are recorded: call it under"
    " torch.no_grad()": {"params": [torch.ones(2, 3, requires_grad=True)] * 2},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message):
    wrong = BAD[message] or {"params": [torch.ones(3, 2), torch.ones(3, 2).bfloat16()]}
    given = {k: [t.clone() for t in v] if isinstance(v, list) else v for k, v in GOOD.items()} | wrong
    with pytest.raises(ValueError) as error:
        lk.adamw_(**given)
    assert str(error.value).replace("adamw_: ", "", 1) == message
    assert all((t == 1).all() for t in given["exp_avgs"] if t.dtype == torch.float32)  # nothing has changed


def test_what_norms_and_rows_refuse():
    with pytest.raises(
        ValueError, match=r"^adamw_norm: grads\[1\] must be a floating-point tensor, got int$"
    ):
        lk.adamw_norm([ONES, 3])
    with pytest.raises(ValueError, match=r"^adamw_norm: grads must be a tensor or a list of them, got None"):
        lk.adamw_norm(None)
    stochastic = GOOD | {"stochastic_rounding": True}
    with pytest.raises(NotImplementedError, match="cpu needs bfloat16 for stochastic rounding, got float32"):
        lk.adamw_(**stochastic, backend="cpu")
    with pytest.raises(NotImplementedError, match="reference needs stochastic_rounding=False, got True"):
        lk.adamw_(**stochastic, backend="reference")


def test_the_binding_refuses_what_would_touch_other_memory():
    one = [torch.ones(2, 3)]
    good = [one, one, one, one, [], [], None, [1], (0.1,) * 5, False, None, 1]
    rules = {
        "grads, exp_avgs and exp_avg_sqs must be as many as params": {1: []},
        "grads must have the sizes and strides of params": {1: [torch.ones(3, 2)]},
        "exp_avg_sqs must have the sizes and strides of params": {3: [torch.ones(3, 2).t()]},
        "exp_avgs must be of params' dtype or float32": {2: [torch.ones(2, 3).half()]},
        "max_exp_avg_sqs must be as many as params": {4: one * 2},
        "master_params must be there beside half params": {5: one},
        "params must have no gaps": {0: [torch.ones(2, 6)[:, ::2]]},
        "scale must have another number of elements": {6: torch.ones(2)},
        "steps must be as many as params": {7: [1, 1]},
        "params must be bfloat16 without master_params where there is a seed": {10: 1},
    }
    for message, wrong in rules.items():
        with pytest.raises(ValueError, match=message):
            compiled.cpu.adamw_update(*[wrong.get(i, a) for i, a in enumerate(good)])
    with pytest.raises(ValueError, match="grads must have no gaps"):
        compiled.cpu.adamw_norm([torch.ones(2, 6)[:, ::2]], torch.empty(()), 1)
