"""A check that what an op changes in place lies in memory of its own."""

from torch import Tensor

from lspm_kernels import checks


def apart(op: str, tensors: dict[str, Tensor | None]) -> None:
    """Raises ValueError where tensors, at most one of them not contiguous, have memory in common."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    if not (checks.readable(given[0][1]) and checks.plain(*(t for _, t in given))):
        return
    spans = []
    for name, t in given:
        begin, size = t.data_ptr(), t.nbytes
        if size and not t.is_contiguous():
            places = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
            size = places * t.element_size()
        for other, low, high in spans:
            if begin < high and low < begin + size:
                raise ValueError(f"{op}: {name} must lie apart from {other}, got memory of both")
        spans.append((name, begin, begin + size))
