"""Philox4x32-10 in plain PyTorch, and which elements dropout keeps."""

import torch
from torch import Tensor


def kept(seed: int, p: float, batches: range, H: int, T_q: int, T_k: int, device: torch.device) -> Tensor:
    """(batches, H, T_q, T_k), True where a 32-bit word is not below p * 2 ** 32.

    The word of (b, h, i, j) is word j // 16 % 4 of the counter (j // 64 * 16 + j % 16, i, h, b) under `seed`.
    """
    index = [torch.arange(n, device=device) for n in (T_k, T_q, H)]
    index.append(torch.arange(batches.start, batches.stop, device=device))
    j = index[0]
    x = list(
        torch.broadcast_tensors(
            *torch.meshgrid(index[3], index[2], index[1], j // 64 * 16 + j % 16, indexing="ij")
        )
    )
    words = torch.stack(words_of(x[::-1], seed)).gather(0, (j // 16 % 4).expand(1, len(batches), H, T_q, T_k))
    return words[0] >= min(int(p * 2**32), 2**32 - 1)


def words_of(x: list[Tensor], seed: int | Tensor) -> list[Tensor]:
    """The four words of each counter (x[0], x[1], x[2], x[3]) under a seed."""
    low = 0xFFFFFFFF
    keys = [seed & low, seed >> 32 & low]
    for _ in range(10):
        products = _product(x[0], 0xD2511F53), _product(x[2], 0xCD9E8D57)
        x = [products[1][0] ^ x[1] ^ keys[0], products[1][1], products[0][0] ^ x[3] ^ keys[1], products[0][1]]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return x


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low half of a * b; int64 holds the product of 32 and 16 bits."""
    small, large = a * (b & 0xFFFF), a * (b >> 16)
    middle = (small >> 16) + large
    return middle >> 16, (middle & 0xFFFF) << 16 | small & 0xFFFF
