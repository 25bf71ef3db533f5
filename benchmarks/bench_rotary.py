"""Rotary position embedding, against its formula in PyTorch and as Hugging Face's transformers has it."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch

import lspm_kernels
from harness import FORWARD, RECORDED, TRAINING, Case
from lspm_kernels.ops import rotary as table

LARGE = ((4, 1024, 12, 64), (1, 4096, 32, 128))  # B, T, H, D: as a projection leaves them
GPU_LARGE, SMALL = (8, 4096, 32, 128), ((8, 1, 32, 128),)  # decoding
OPS, PASSES = ("rotary", "rotary_interleaved"), {FORWARD: 1, RECORDED: 1, TRAINING: 2}


@functools.cache
def tables(tokens: int, size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(1, tokens + 1, device=device)[:, None]  # position 0 does not turn
    angles = positions * 10_000.0 ** -(torch.arange(0, size, 2, device=device) / size)
    return angles.cos(), angles.sin()


def ours(x: torch.Tensor, **options: object) -> torch.Tensor:
    return lspm_kernels.rotary(x.transpose(1, 2), *tables(x.shape[1], x.shape[3], x.device), **options)


def formula(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    cos, sin = tables(x.shape[1], x.shape[3], x.device)
    wide = x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))  # at least, as the op says
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    y = a * cos - b * sin, b * cos + a * sin
    return (torch.stack(y, -1).flatten(-2) if interleaved else torch.cat(y, -1)).to(x.dtype)


@functools.cache  # the tables as transformers keeps them: in x's dtype, an angle for each dimension
def doubled(*key, dtype: torch.dtype, interleaved: bool) -> list[torch.Tensor]:
    return [torch.stack((t, t), 2 if interleaved else 1).flatten(1).to(dtype) for t in tables(*key)]


def transformers(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """apply_rotary_pos_emb of its Llama and, interleaved, of its GPT-J."""
    cos, sin = doubled(x.shape[1], x.shape[3], x.device, dtype=x.dtype, interleaved=interleaved)
    x, half = x.transpose(1, 2), x.shape[-1] // 2
    if interleaved:
        return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def case(op: str, mode: str, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Case:
    style = functools.partial(functools.partial, interleaved=op == "rotary_interleaved")
    work = PASSES[mode] * torch.Size(shape).numel()
    return Case(
        op, mode, dtype, "B{}-T{}-H{}-D{}".format(*shape), lambda: [torch.randn(shape).to(dtype)], table,
        style(ours), {"torch": style(formula), "transformers": style(transformers)},
        bytes=2 * work * dtype.itemsize, flops=3 * work, roof=None if shape in SMALL else "copy",
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    large = ((2, 9, 3, 64),) if smoke else LARGE
    for op, dtype, mode in itertools.product(OPS, (torch.float32, torch.bfloat16), PASSES):
        yield from (case(op, mode, dtype, s) for s in (*(() if mode == RECORDED else large), *SMALL))


def gpu_cases() -> list[Case]:
    return [case(OPS[0], m, torch.bfloat16, s) for m in (FORWARD, TRAINING) for s in (GPU_LARGE, *SMALL)]


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_rotary(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("rotary", __doc__, cases, gpu_cases=gpu_cases))
