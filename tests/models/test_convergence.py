"""Training by our kernels: the losses go where plain PyTorch's go, as far as rounding lets anyone tell."""

from dataclasses import replace

import bench_convergence
import pytest
import torch

import harness

RUN = bench_convergence.tiny(steps=20)


@pytest.fixture(scope="module")
def truth():
    return RUN.losses("float64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_within_rounding_of_float64(dtype, truth):
    """By the oracle's rule: at most twice as far from float64 as plain PyTorch."""
    run = replace(RUN, dtype=dtype)
    assert truth.dtype == torch.float64 and truth[0] - truth[-5:].mean() > 1  # it learns
    plain = run.losses("torch")
    harness.compare("lspm", [run.losses("lspm")], [truth], [plain])
    # The rule sees a learning rate that is off by a thousandth, and in bfloat16 by a twentieth.
    off = replace(run, learning_rate=run.learning_rate * (1.001 if dtype == torch.float32 else 1.05))
    with pytest.raises(harness.WrongError, match=r"^lspm: result 0: error .*, allowed "):
        harness.compare("lspm", [off.losses("lspm")], [truth], [plain])


def test_each_side_is_another(truth):
    ours, plain, other = (RUN.losses(side) for side in ("lspm", "torch", "an ulp away"))
    assert ours.dtype == plain.dtype == other.dtype == torch.float32
    assert not torch.equal(ours, plain) and not torch.equal(plain, other)
    assert torch.equal(RUN.losses("lspm"), ours)  # the same bits each time
