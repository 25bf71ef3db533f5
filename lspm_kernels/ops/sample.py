"""The next token of a text, drawn from a language model's logits."""

import torch
from torch import Tensor

from lspm_kernels import checks, compiled, dispatch, triton
from lspm_kernels.dispatch import Backend
from lspm_kernels.operator import Operator
from lspm_kernels.reference import sample as reference

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_METHODS = ("inverse", "gumbel")
_MOST = 2**21 - 1  # tokens whose sums fit; csrc/sample.h

_NAME = "sample_forward"
BACKENDS = (
    Backend("cpu", "cpu", _FLOATS, compiled.cpu_kernel(_NAME), None, compiled.nothing_missing),
    Backend("triton", "cuda", _FLOATS, triton.kernel(_NAME), None, triton.missing),
)


def _forward(
    row, logits, temperatures, previous, seed, temperature, top_k, top_p, min_p, penalty, gumbel, logprob,
    saves=True,
):  # fmt: skip
    tokens = logits.new_empty(len(logits), dtype=torch.int64)
    logprobs = logits.new_empty(len(logits) if logprob else 0, dtype=torch.float32)
    if row is not None and len(logits):
        given = logits.contiguous(), temperatures, previous, tokens, logprobs if logprob else None
        row.forward(*given, temperature, top_k, top_p, min_p, penalty, gumbel, int(seed))
    return tokens, logprobs


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[0])


def _gradient(ctx, _, dlogprobs):
    rule = "a draw has no gradient: take the log-softmax of its logits by a function that has one"
    raise NotImplementedError(f"sample: {rule}")


_sample = Operator(
    "sample(Tensor logits, Tensor? temperatures, Tensor? previous, Tensor seed, float temperature, int top_k,"
    " float top_p, float min_p, float repetition_penalty, bool gumbel, bool return_logprob)"
    " -> (Tensor tokens, Tensor logprobs)",
    BACKENDS,
    _forward,
    _save,
    _gradient,
)


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    previous: Tensor | None = None,
    method: str = "inverse",
    seed: int | None = None,
    return_logprob: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A token of each row, drawn from what is left of softmax(logits / temperature); nothing is sorted.

    In this order, which is that of Hugging Face's generate: logits of previous tokens are divided by
    repetition_penalty, or multiplied where they are negative; temperature; of the tokens, those stay whose
    logit is at least the top_k-th largest; of these, those where all more probable ones sum to less than
    top_p; of these, those at least min_p times as probable as the most probable one. Equal tokens stay or go
    together, where Hugging Face's top-p takes as many of the equal ones as it needs, by no stated rule.

    All is exact but each probability, which float32 rounds, and 2 ** -40 of the largest one cuts off. So a
    seed draws the same tokens on every backend, instruction set and number of threads, and a row's draw
    depends on its number, not on the other rows.

    Args:
        logits: (..., V), float32, bfloat16 or float16, V below 2 ** 21; probabilities are in float32.
        temperature: finite and at least 0, or a tensor of one number a row, logits' shape without V. 0 takes
            the largest logit, of equal ones the first.
        top_k: from 1 on; may be larger than V. None: all.
        top_p: above 0, up to 1. None: 1, which is all.
        min_p: from 0 to 1. None: 0.
        repetition_penalty: above 0; has no effect without previous.
        previous: (rows, T), int64, rows as in logits.reshape(-1, V): tokens that are penalised once, however
            often they stand there. Below 0 there is none, for rows of unequal lengths. One from V on is an
            error on a CPU; on a GPU, for which nothing waits, it is none.
        method: "inverse", by one uniform number a row, or "gumbel", by a number for each token that stays
            (Gumbel's maximum, as a race of exponential numbers).
        seed: from 0 to 2 ** 63 - 1; the counters of Philox under it are a row's and a token's numbers. None
            draws one from torch's default generator.
        return_logprob: gives logprob too.
        backend: "cpu", "triton" or "reference"; None takes the first that admits the call.

    Returns:
        tokens: int64, logits' shape without V. -1 for a row that has no distribution: one with NaN or
            infinity, with -infinity alone, or, on a GPU, with a temperature below 0 or NaN.
        logprob: float32, likewise: the log of the probability that the token had among those that stayed, so
            0 where temperature is 0; NaN where the token is -1. To ask for its gradient is an error.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.
        NotImplementedError: the backend asked for does not take this call; a gradient is asked for.

    Source: Fan et al., "Hierarchical Neural Story Generation" (2018), top-k; Holtzman et al., "The Curious
    Case of Neural Text Degeneration" (2020), top-p; Nguyen et al., "Turning Up the Heat" (2025), min-p;
    Keskar et al., "CTRL" (2019), the penalty; Salmon et al., "Parallel Random Numbers" (2011), Philox.
    """
    _check(logits, temperature, top_k, top_p, min_p, repetition_penalty, previous, method)
    row = dispatch.pick("sample", BACKENDS, backend, logits)
    seed = checks.seed("sample", seed)
    shape, rows = logits.shape[:-1], logits.reshape(-1, logits.shape[-1])
    temperatures = None
    if isinstance(temperature, Tensor):
        temperatures, temperature = temperature.to(torch.float32).reshape(-1), 1.0
    if repetition_penalty == 1:
        previous = None
    top_k, top_p, min_p = min(top_k or _MOST, _MOST), float(top_p or 1), float(min_p or 0)
    options = min(float(temperature), 2.0**126), top_k, top_p, min_p, float(repetition_penalty)
    gumbel = method == "gumbel"
    if row is None:
        tokens, logprobs = _on_reference(rows, temperatures, previous, seed, *options, gumbel)
    else:
        previous = previous if previous is None else previous.contiguous()
        tokens, logprobs = _sample(row, rows, temperatures, previous, seed, *options, gumbel, return_logprob)
    tokens = tokens.reshape(shape)
    return (tokens, logprobs.reshape(shape)) if return_logprob else tokens


def _on_reference(logits, temperatures, previous, seed, temperature, top_k, top_p, min_p, penalty, gumbel):
    if temperatures is None:
        temperatures = torch.full_like(logits[:, 0], temperature, dtype=torch.float32)
    if previous is not None and checks.readable(previous):
        unknown = previous[previous >= logits.shape[1]]
        if len(unknown):
            raise ValueError(f"sample: previous must be below {logits.shape[1]}, got {unknown[0].item()}")
    given = temperatures[:, None], top_k, top_p, min_p, penalty, previous
    return reference.sample(reference.weights(logits, *given), seed, gumbel)


def _check(logits, temperature, top_k, top_p, min_p, repetition_penalty, previous, method):
    op = "sample"
    checks.floating(op, "logits", logits)
    tokens, rows = logits.shape[-1], logits.shape[:-1]
    if not 1 <= tokens <= _MOST:
        raise ValueError(f"{op}: logits must be of 1 to {_MOST} tokens, got {tokens}")
    if isinstance(temperature, Tensor):
        _check_temperatures(temperature, rows, logits.device)
    else:
        checks.number(op, "temperature", temperature, 0, float("inf"))
    if top_k is not None:
        checks.integer(op, "top_k", top_k, 1)
    if top_p is not None and not (isinstance(top_p, int | float) and 0 < top_p <= 1):
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p!r}")
    if min_p is not None and not (isinstance(min_p, int | float) and 0 <= min_p <= 1):
        raise ValueError(f"{op}: min_p must be in [0, 1], got {min_p!r}")
    penalty = repetition_penalty
    if not (isinstance(penalty, int | float) and 0 < penalty < float("inf")):
        raise ValueError(f"{op}: repetition_penalty must be above 0 and finite, got {penalty!r}")
    checks.one_of(op, "method", method, _METHODS)
    if previous is not None:
        _check_previous(previous, rows.numel(), logits.device)


def _check_temperatures(t, rows, device):
    if t.shape != rows or not t.is_floating_point():
        rule = f"a number or a floating-point tensor of shape {tuple(rows)}"
        raise ValueError(f"sample: temperature must be {rule}, got {checks.kind(t)}")
    checks.beside("sample", "logits", device, temperature=t)
    if checks.readable(t) and not t.is_cuda:
        for value in t.flatten().tolist():
            checks.number("sample", "temperature", value, 0, float("inf"))


def _check_previous(previous, rows, device):
    if not isinstance(previous, Tensor) or previous.dim() != 2 or len(previous) != rows:
        rule = f"a tensor of shape ({rows}, T)"
        raise ValueError(f"sample: previous must be {rule}, got {checks.shape(previous)}")
    if previous.dtype != torch.int64:
        raise ValueError(f"sample: previous must have dtype torch.int64, got {previous.dtype}")
    checks.beside("sample", "logits", device, previous=previous)
