"""An accelerated model under DistributedDataParallel and FSDP2, in two processes, and with other threads."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from acceleration.test_heads import LABELS, TOKENS, Model, flat
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lspm_kernels as lk


def model():
    torch.manual_seed(0)
    return Model(flat).train()


def gradients(m, own):
    m.zero_grad()
    m(TOKENS[own], LABELS[own])[1].backward()
    grads = [p.grad for p in m.parameters()]
    return [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads]


def wrapped(way, m, accelerates):
    if accelerates and way != "accelerated after":
        lk.accelerate(m)
    if way == "sharded":
        fully_shard(m.head)
        return fully_shard(m)
    if way == "sharded as one":  # the head's weight is freed as soon as the model has given its outputs
        return fully_shard(m, reshard_after_forward=True)
    m = DistributedDataParallel(m, find_unused_parameters=way == "some unused")
    if accelerates and way == "accelerated after":
        lk.accelerate(m)
    return m


def rank(number, folder):
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=number, world_size=2)
    own = slice(number, number + 1)
    for way in ("plain", "some unused", "accelerated after", "sharded", "sharded as one"):
        theirs, ours = (wrapped(way, model(), fast) for fast in (False, True))
        for _ in range(2):
            torch.testing.assert_close(gradients(ours, own), gradients(theirs, own))
        if way.startswith("sharded"):
            with pytest.raises(ValueError, match="must have the class that accelerate gave it, got FSDP"):
                lk.restore(ours)
        else:
            lk.restore(ours)
            for mine, other in zip(gradients(ours, own), gradients(theirs, own), strict=True):
                assert torch.equal(mine, other)
    dist.destroy_process_group()


def test_two_processes_have_the_gradients_of_the_plain_model(tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=2)


def test_threads_share_a_model():
    plain = model()
    ours = copy.deepcopy(plain)
    lk.accelerate(ours)
    losses = [None] * 8

    def run(i):
        losses[i] = [ours(TOKENS.roll(i), LABELS.roll(i))[1] for _ in range(5)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(losses))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, found in enumerate(losses):
        expected = plain(TOKENS.roll(i), LABELS.roll(i))[1]
        for loss in found:
            torch.testing.assert_close(loss, expected)


class Normed(torch.utils.data.Dataset):
    """Items that an accelerated module makes, in the process that loads them."""

    def __init__(self):
        self.norm = nn.LayerNorm(64)
        lk.accelerate(self.norm)
        self.norm(torch.randn(300, 64))  # with threads, before the fork

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.norm(torch.full((300, 64), float(index)).cumsum(-1)).detach()


def test_workers_of_a_loader_run_it():
    data = Normed()
    loaded = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    for index, item in enumerate(loaded):
        torch.testing.assert_close(item, data[index])
