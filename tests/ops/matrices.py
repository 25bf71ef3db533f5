"""Sparse matrices for the tests of the ops that factorise them."""

import torch

K_OF_EACH_KIND = [
    1,
    3,
    16,
    20,
    50,
    64,
    130,
]  # below a vector, whole ones, blocks of vectors, and what is left


def matrix(rows, columns, entries, wide=False, values=None):
    """indptr, indices and values of random entries, many in the first rows and none in the last one."""
    at = (torch.rand(entries) ** 3 * (rows - 1)).long().sort().values
    indptr = torch.zeros(rows + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(at, minlength=rows).cumsum(0)
    indices = torch.randint(columns, (entries,), dtype=torch.int64 if wide else torch.int32)
    return indptr, indices, torch.rand(entries) if values is None else values(entries)


def same_for_any_number_of_threads(call):
    """The bits of call() are those of one thread with two and three of them too."""
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call())
    return torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
