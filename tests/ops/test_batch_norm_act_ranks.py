"""batch_norm_act over the batches of two processes, against one process that has them all."""

import warnings

import pytest
import torch
import torch.distributed as dist
from ops.test_batch_norm_act import tensors

import lspm_kernels as lk

ROWS = (3, 5)  # images of each rank
OPTIONS = {"activation": "relu", "training": True, "momentum": 0.3}


def joined():
    """The whole batch, the gradient of its output, and running statistics."""
    torch.manual_seed(0)
    inputs = tensors((sum(ROWS), 20, 6, 7))
    inputs[0][:3] += 5  # the ranks' means differ
    return inputs, torch.randn_like(inputs[0]), list(torch.rand(2, 20).unbind())


def results(f, inputs, dy, running):
    x, residual, weight, bias = (t.detach().requires_grad_() for t in inputs)
    y = f(x, weight, bias, *running, residual=residual, **OPTIONS)
    return [y.detach(), *torch.autograd.grad(y, (x, residual, weight, bias), dy), *running]


def rank(number, folder, mode):
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=number, world_size=2)
    own = slice(0, ROWS[0]) if number == 0 else slice(ROWS[0], None)
    inputs, dy, running = joined()
    inputs = [t[own] if t.dim() == 4 else t for t in inputs]
    group = dist.group.WORLD

    def f(*args, **options):
        return lk.batch_norm_act(*args, process_group=group, **options)

    if mode != "eager":
        f = torch.compile(f, fullgraph=True, backend=mode)
    torch.save(results(f, inputs, dy[own], running), f"{folder}/{number}")
    if number == 1:  # a rank with nothing of its own takes part
        inputs = [t[:0] if t.dim() == 4 else t for t in inputs]
    y = f(inputs[0], *running, training=True) if mode == "eager" else inputs[0]
    if number == 0 and mode == "eager":
        alone = lk.batch_norm_act(inputs[0], *running, training=True)
        torch.testing.assert_close(y, alone)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("mode", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_two_ranks_have_the_statistics_of_both(mode, tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path), mode), nprocs=2)
    ranks = [torch.load(tmp_path / str(number)) for number in range(2)]
    whole = results(lk.batch_norm_act, *joined())
    for name, *parts, one in zip(("y", "dx", "dresidual"), *ranks, whole, strict=False):
        torch.testing.assert_close(torch.cat(parts), one, msg=lambda m, name=name: f"{name}: {m}")
    for name, *parts, one in zip(("dweight", "dbias"), *(r[3:5] for r in (*ranks, whole)), strict=True):
        torch.testing.assert_close(sum(parts), one, rtol=1e-5, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for name, *parts, one in zip(("mean", "var"), *(r[5:] for r in (*ranks, whole)), strict=True):
        assert torch.equal(*parts), name
        torch.testing.assert_close(parts[0], one, msg=lambda m, n=name: f"running {n}: {m}")


def test_a_group_of_one_is_none(tmp_path):
    dist.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        x = torch.randn(4, 5)
        y = lk.batch_norm_act(x, training=True, process_group=dist.group.WORLD)
        assert torch.equal(y, lk.batch_norm_act(x, training=True))
        with pytest.raises(ValueError, match="x must have more than one value per channel"):
            lk.batch_norm_act(x[:1], training=True, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
