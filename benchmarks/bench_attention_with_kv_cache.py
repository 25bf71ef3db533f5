"""A step of decoding, a key and a value appended and a query that sees all, against the same in PyTorch."""

import functools
import itertools
import sys
from collections.abc import Iterator

import command
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lspm_kernels
from harness import FORWARD, Case, Goal
from lspm_kernels.ops import attention_with_kv_cache as table

PAGE, SHAPES = 16, ((4, 12, 12, 4096, 64), (2, 16, 4, 4096, 128))  # B, H, H_kv, keys, D
GPU_SHAPES = ((32, 32, 8, 8192, 128), (1, 32, 8, 65536, 128))


def pages(cache: Tensor, B: int) -> Tensor:
    """Whose pages lie as in a cache that has been in use: mixed."""
    return _pages(cache.shape[0], B, cache.device)


@functools.cache
def _pages(count: int, B: int, device: torch.device) -> Tensor:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return order.view(B, count // B).to(device, torch.int32)


def ours(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, backend: str, paged: bool) -> Tensor:
    B = q.shape[0]
    options = {"block_table": pages(k, B)} if paged else {}
    keys = k.shape[0] * k.shape[2] // B
    return lspm_kernels.attention_with_kv_cache(
        q, k, v, k_new, v_new, cache_seqlens=keys - 1, causal=True, backend=backend, **options
    )


def in_torch(q: Tensor, k: Tensor, v: Tensor, k_new: Tensor, v_new: Tensor, paged: bool) -> Tensor:
    if not paged:
        k[:, :, -1:], v[:, :, -1:] = k_new, v_new
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    order = pages(k, q.shape[0])
    k[order[:, -1], :, -1], v[order[:, -1], :, -1] = k_new[:, :, 0], v_new[:, :, 0]
    k, v = (x[order].transpose(1, 2).flatten(2, 3) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def case(dtype: torch.dtype, shape: tuple[int, ...], paged: bool) -> Case:
    B, H, H_kv, keys, D = shape
    cache = (B * keys // PAGE, H_kv, PAGE, D) if paged else (B, H_kv, keys, D)
    sizes = (B, H, 1, D), cache, cache, (B, H_kv, 1, D), (B, H_kv, 1, D)
    return Case(
        "attention_with_kv_cache", FORWARD, dtype, f"{'paged-' * paged}B{B}-H{H}-{H_kv}-K{keys}-D{D}",
        lambda: [torch.randn(size).to(dtype) for size in sizes], table, functools.partial(ours, paged=paged),
        {"torch": functools.partial(in_torch, paged=paged)}, bytes=2 * B * H_kv * keys * D * dtype.itemsize,
        flops=4 * B * H * keys * D, goals=(Goal("roof", 80.0),), roof="read", compiled=False,
    )  # fmt: skip


def cases(smoke: bool = False) -> Iterator[Case]:
    shapes = ((2, 4, 2, 64, 64),) if smoke else SHAPES
    for dtype, shape, paged in itertools.product((torch.float32, torch.bfloat16), shapes, (False, True)):
        yield case(dtype, shape, paged)


def gpu_cases() -> list[Case]:
    return [case(torch.bfloat16, shape, paged) for shape in GPU_SHAPES for paged in (False, True)]


@pytest.mark.parametrize(("case", "variant"), command.pairs(cases()))
def test_attention_with_kv_cache(benchmark, case, variant):
    command.run(benchmark, case, variant)


if __name__ == "__main__":
    sys.exit(command.main("attention_with_kv_cache", __doc__, cases, gpu_cases=gpu_cases))
