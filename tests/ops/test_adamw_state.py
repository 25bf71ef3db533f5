"""AdamW's state: what is in it, where it goes, and what else stands around a step."""

import copy
import pickle

import pytest
import torch
from ops.test_adamw_optimizer import BF16, F32, gradients, model, parameters, trained
from torch import nn

import lspm_kernels as lk


def test_state_goes_from_either_to_the_other():
    for ours, theirs in ((lk.AdamW, torch.optim.AdamW), (torch.optim.AdamW, lk.AdamW)):
        for options in ({}, {"amsgrad": True}, {"fused": True}):
            net, optimizer = trained(ours, **options)
            other = copy.deepcopy(net)
            loaded = theirs(other.parameters(), lr=7.0)
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            assert loaded.param_groups[0]["lr"] == 0.02
            for o, n in ((optimizer, net), (loaded, other)):
                gradients(n, 9)
                o.step()
            names = {"step", "exp_avg", "exp_avg_sq"} | (
                {"max_exp_avg_sq"} if "amsgrad" in options else set()
            )
            for p, q in zip(net.parameters(), other.parameters(), strict=True):
                torch.testing.assert_close(p, q)
                assert set(optimizer.state[p]) == set(loaded.state[q]) == names
                assert loaded.state[q]["step"] == 6 and loaded.state[q]["step"].dtype == F32


def test_wide_state_stays_wide_when_it_is_loaded_and_is_made_where_there_is_none():
    net, optimizer = trained(lk.AdamW, dtype=BF16, master_weights=True)
    other = copy.deepcopy(net)
    loaded = lk.AdamW(other.parameters(), master_weights=True)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, loaded.state[q][name]) and value.dtype == loaded.state[q][name].dtype
    for o, n in ((optimizer, net), (loaded, other)):
        gradients(n, 9)
        o.step()
    assert all(map(torch.equal, parameters(net), parameters(other)))
    net, optimizer = trained(torch.optim.AdamW, dtype=BF16)
    loaded = lk.AdamW(net.parameters(), master_weights=True)
    loaded.load_state_dict(optimizer.state_dict())
    loaded.step()
    assert loaded.param_groups[0]["master_weights"]  # which torch's groups do not say
    for p in net.parameters():
        assert loaded.state[p]["exp_avg"].dtype == F32
        assert torch.equal(p, loaded.state[p]["master_param"].bfloat16())


def test_state_that_lies_otherwise_is_laid_out_anew():
    """As that of a checkpoint, which is contiguous, of a channels_last model."""
    found = []
    for dense in (False, True):
        torch.manual_seed(0)
        net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        optimizer = lk.AdamW(net.parameters())
        for _ in range(2):
            for p in net.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            for state in optimizer.state.values():
                if dense:
                    state["exp_avg"] = state["exp_avg"].contiguous()
        found.append(parameters(net))
    assert all(map(torch.equal, *found))


def test_schedulers_closures_and_hooks():
    net = model()
    optimizer, seen = lk.AdamW(net.parameters(), lr=1.0), []
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    optimizer.register_step_post_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))

    def closure():
        optimizer.zero_grad()
        loss = net(torch.ones(2, 33)).square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    scheduler.step()
    optimizer.step(closure)
    assert seen == pytest.approx([1.0, 0.1])
    for twin in (
        copy.deepcopy(optimizer),
        pickle.loads(pickle.dumps(lk.AdamW(net.parameters(), clip_norm=2.0))),
    ):
        assert twin.clip_norm == (2.0 if not twin.state else None)
        assert twin._step_supports_amp_scaling
        twin.step()
