"""Alternating least squares in plain PyTorch, row by row: what the kernels compute."""

import torch


def mf_als(x, y, indptr, indices, values, weight, reg, reg_exponent, alpha, implicit, steps):
    """New rows x: the normal equations solved, or steps of conjugate gradient from x; 0 without entries."""
    out, gram = torch.zeros_like(x), y.T @ y
    one = torch.eye(x.size(1), dtype=x.dtype, device=x.device)
    for row, (begin, end) in enumerate(zip(indptr.tolist(), indptr[1:].tolist(), strict=False)):
        if begin == end:
            continue
        named, part, n = y[indices[begin:end].long()], slice(begin, end), end - begin
        v = x.new_ones(n) if values is None else values[part]
        w = alpha * v if implicit else torch.ones_like(v) if weight is None else weight[part]
        matrix = named.T @ (w[:, None] * named) + (gram if implicit else 0) + reg * n**reg_exponent * one
        side = named.T @ (1 + w if implicit else w * v)
        lacking = reg == 0 and not implicit and n < x.size(1)  # whatever rounding would make of it
        if not steps and (lacking or torch.linalg.cholesky_ex(matrix).info):
            raise ValueError(not_definite(row))
        out[row] = _steps(matrix, side, x[row], steps) if steps else torch.linalg.solve(matrix, side)
    return out


def _steps(matrix, side, x, steps):
    p = r = side - matrix @ x
    left, steepest, info = r @ r, r.new_zeros(()), torch.finfo(x.dtype)
    least = (info.eps**2 * left).clamp(min=info.tiny / info.eps)
    for _ in range(steps):
        slope = p @ (matrix @ p) / (p @ p)
        if left < least or slope <= info.eps * (steepest := torch.fmax(steepest, slope)):
            break  # as but rounding is left
        length = left / (p @ p) / slope
        x, r = x + length * p, r - length * (matrix @ p)
        p, left = r + (r @ r) / left * p, r @ r
    return x


def not_definite(row):
    return f"mf_als_: the matrix of every row must be positive definite, got row {row}'s: raise reg"
