"""The random words of Philox4x32-10 in plain PyTorch."""

from torch import Tensor

_LOW = 0xFFFFFFFF


def words_of(x: list[Tensor], seed: int | Tensor) -> list[Tensor]:
    """The four words of each counter (x[0], x[1], x[2], x[3]) under a seed."""
    keys = [seed & _LOW, seed >> 32 & _LOW]
    for _ in range(10):
        (a, b), (c, d) = _product(x[0], 0xD2511F53), _product(x[2], 0xCD9E8D57)
        x = [c ^ x[1] ^ keys[0], d, a ^ x[3] ^ keys[1], b]
        keys = [keys[0] + 0x9E3779B9 & _LOW, keys[1] + 0xBB67AE85 & _LOW]
    return x


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low half of a * b; int64 holds the product of 32 and 16 bits."""
    small, large = a * (b & 0xFFFF), a * (b >> 16)
    middle = (small >> 16) + large
    return middle >> 16, (middle & 0xFFFF) << 16 | small & 0xFFFF
