"""Times an op beside what it replaces: first the oracle, then interleaved rounds, then one table.

A wrong kernel has no time. In every round each variant runs once, in an order that is reversed from one round
to the next, and what is reported are medians over rounds, of times and of ratios within a round: neither the
order nor a slow second of the machine favours a side. Where an op is bound by memory, its inputs rotate
through more than the last cache holds, and its results stay alive for a while, as a model's activations do.
"""

import collections
import contextlib
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import machine
import torch
from torch import Tensor

sys.path.append(str(machine.ROOT / "tests"))
import oracle

FORWARD, RECORDED, TRAINING = "forward", "forward-recorded", "forward+backward"
MEMORY = {"copy": machine.copy_roof, "read": machine.read_roof}
SECONDS_PER_TURN, SECONDS_PER_CASE = 0.04, 1.6
CALLS_OF_OVERHEAD, CALLS_OF_SMOKE = 2000, 10
FEWEST_ROUNDS, MOST_ROUNDS = 5, 25


@dataclass(frozen=True)
class Goal:
    """What a result must reach: `speedup` over torch, or over a variant, percent of `roof`, `extra_us`."""

    what: str
    bound: float

    def judge(self, row: dict) -> dict:
        of = {"roof": row["roof_percent"], "extra_us": row["extra_us"]} | row["speedup"]
        of["speedup"] = row["speedup"].get("torch")
        value = of[self.what]
        met = value <= self.bound if self.what == "extra_us" else value >= self.bound
        return {"what": self.what, "bound": self.bound, "got": value, "met": met}


@dataclass(frozen=True, eq=False)
class Case:
    """One op on one shape and dtype in one mode.

    inputs() makes the op's tensors. ours and baselines take them all; ours takes `backend` too, a row of
    table.BACKENDS. bytes and flops are what any implementation must move and compute; roof says what bounds
    it, "copy", "read" or "matmul", or is None where the overhead of a call is timed. part(tensor) is as much
    of a tensor as the oracle computes by itself.
    """

    op: str
    mode: str
    dtype: torch.dtype
    shape: str
    inputs: Callable[[], list[Tensor]]
    table: ModuleType
    ours: Callable
    baselines: dict[str, Callable]
    bytes: int
    flops: int
    roof: str | None
    goals: tuple[Goal, ...] = ()  # for a CPU
    part: Callable[[Tensor], Tensor] = lambda tensor: tensor
    compiled: bool = True
    meaning: Callable | None = None  # what the oracle takes for the truth; None: the first baseline

    def __str__(self) -> str:
        return "/".join((self.op, self.mode, str(self.dtype).removeprefix("torch."), self.shape))

    def kernels(self, device: str) -> dict[str, Callable]:
        """Our function on each backend that this machine can run, or on the reference where there is none."""
        names = [row.name for row in self.table.BACKENDS if row.device == device and row.missing() is None]
        return {
            f"lspm-{name}": lambda *inputs, name=name: self.ours(*inputs, backend=name)
            for name in names or ["reference"]
        }


class WrongError(Exception):
    """A variant's results are not the op's."""


class Workload:
    """A case with its inputs made: gives a function of a number of calls for each variant."""

    def __init__(self, case: Case, device: str, rotate: bool = True):
        self.case, self.device = case, device
        torch.manual_seed(0)
        with torch.device(device):
            inputs = [tensor.to(device).requires_grad_(case.mode != FORWARD) for tensor in case.inputs()]
        self.reference = case.meaning or next(iter(case.baselines.values()))
        with torch.no_grad():
            outputs = _tuple(self.reference(*inputs))
        gradients = [torch.randn_like(output) for output in outputs] if case.mode == TRAINING else []
        touched = sum(tensor.nbytes for tensor in (*inputs, *gradients))
        copies = machine.last_level_cache(device) // touched + 2 if rotate and case.roof in MEMORY else 1
        self.sets = [(inputs, gradients)]
        for _ in range(copies - 1):
            clones = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
            self.sets.append((clones, [tensor.clone() for tensor in gradients]))
        self.rotation = itertools.cycle(self.sets)  # shared: no variant meets what another has just read

    def call(self, function: Callable) -> Callable:
        """function as one call of the case's mode, on (inputs, gradients of outputs)."""
        if self.case.mode == TRAINING:
            return lambda inputs, gradients: _with_gradients(function, inputs, gradients)
        return lambda inputs, gradients: function(*inputs)

    def recording(self):
        return torch.no_grad() if self.case.mode == FORWARD else contextlib.nullcontext()

    def turn(self, function: Callable) -> Callable[[int], float]:
        """A function of a number of calls that gives the seconds they took."""
        call, rotation = self.call(function), self.rotation

        def run(calls: int) -> float:
            alive = collections.deque(maxlen=len(self.sets))
            with self.recording():
                return repeated(lambda: alive.append(call(*next(rotation))), self.device)(calls)

        return run

    def check(self, name: str, function: Callable) -> None:
        """Raises WrongError unless function obeys the tests' tolerance rule."""
        inputs, gradients = self.sets[0]
        part = self.case.part
        parts = [part(tensor).detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in parts]
        slices = [part(tensor) for tensor in gradients]
        with self.recording():
            actual = [part(tensor) for tensor in self.results(function, inputs, gradients)]
            truth = self.results(self.reference, wide, [tensor.double() for tensor in slices])
            plain = self.results(self.reference, parts, slices)
        compare(name, actual, truth, plain)

    def results(self, function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        if self.case.mode == TRAINING:
            outputs, derivatives = _with_gradients(function, inputs, gradients)
            return [*_tuple(outputs), *derivatives]
        return [*_tuple(function(*inputs))]

    def roof(self) -> dict[str, Callable[[int], float]]:
        """Under the name "roof", a function of a number of calls: the seconds that the case's roof allows."""
        if self.case.roof == "matmul":
            matmul, flops = machine.matmul_roof(self.case.dtype, self.device)
            product = repeated(matmul, self.device)
            return {"roof": lambda calls: product(1) * calls * self.case.flops / flops}
        if self.case.roof in MEMORY:
            move = MEMORY[self.case.roof](self.device)
            return {"roof": lambda calls: repeated(lambda: move(calls * self.case.bytes), self.device)(1)}
        return {}


def compare(name: str, actual: list[Tensor], truth: list[Tensor], plain: list[Tensor]) -> None:
    """Holds every result to the one tolerance rule of the tests.

    Raises: WrongError.
    """
    for index, results in enumerate(zip(actual, truth, plain, strict=True)):
        try:
            oracle.compare(f"{name}: result {index}", *results)
        except AssertionError as error:
            raise WrongError(str(error)) from None


def one_gradient(results: list[Tensor]) -> list[Tensor]:
    """A model's output, and the gradients of its parameters as one tensor: single ones of small norm weights
    have no digits of their own."""
    return [results[0], *([torch.cat([g.flatten() for g in results[1:]])] if results[1:] else [])]


def measure(case: Case, device: str, smoke: bool) -> list[dict]:
    """Checks and times every variant of a case.

    Returns: one row for each variant.
    Raises: WrongError, before anything is timed.
    """
    workload = Workload(case, device, rotate=not smoke)
    kernels = case.kernels(device)
    variants = kernels | case.baselines
    overhead = case.roof is None
    if case.compiled and not (overhead or smoke):
        torch.compiler.reset()
        variants["compile"] = torch.compile(workload.reference, dynamic=False)
    for name, function in kernels.items():
        workload.check(name, function)
    turns = {name: workload.turn(function) for name, function in variants.items()}
    memory = {}
    if not overhead:
        memory = {name: machine.peak_bytes(partial(turn, 1), device) for name, turn in turns.items()}
    calls = CALLS_OF_SMOKE if smoke else CALLS_OF_OVERHEAD if overhead else calls_per_turn(turns)
    seconds = interleave(turns | workload.roof(), calls, rounds=1 if smoke else None)
    rows = summarise(str(case), list(kernels), seconds, case.roof)
    work, unit = (case.flops, "GFLOP/s") if case.roof == "matmul" else (case.bytes, "GB/s")
    for row in rows:
        row["peak_bytes"] = memory.get(row["variant"])
        row["rate"], row["unit"] = (None, None) if overhead else (work / row["median_us"] / 1e3, unit)
        judged = case.goals if row["variant"] in kernels and device == "cpu" and not smoke else ()
        judged = [goal for goal in judged if goal.what != "compile" or "compile" in variants]
        row["goals"] = [goal.judge(row) for goal in judged]
    return rows


def calls_per_turn(turns: dict[str, Callable[[int], float]]) -> int:
    """So many calls that the slowest variant's turn is long enough to time; warms every variant up."""
    for turn in turns.values():
        turn(2)
    return max(1, round(SECONDS_PER_TURN / max(turn(1) for turn in turns.values())))


def interleave(
    turns: dict[str, Callable[[int], float]], calls: int, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds a call of every turn in every round; the order of the turns is reversed from round to round."""
    names = list(turns)
    if rounds is None:
        once = sum(turns[name](calls) for name in names)  # a round of warm-up
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(SECONDS_PER_CASE / once)))
    seconds = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            for name in names if number % 2 else reversed(names):
                seconds[name].append(turns[name](calls) / calls)
    finally:
        gc.enable()
    return seconds


def summarise(
    case: str, ours: list[str], seconds: dict[str, list[float]], roof: str | None = None
) -> list[dict]:
    """One row for each variant: medians over rounds, of times and of ratios within a round."""
    baselines = [name for name in seconds if name not in (*ours, "roof")]
    rows = []
    for name in (*ours, *baselines):
        times = seconds[name]
        low, median, high = (1e6 * value for value in quartiles(times))
        extra = [mine - theirs for mine, theirs in zip(times, seconds[baselines[0]], strict=True)]
        speedup = {other: median_ratio(seconds[other], times) for other in baselines} if name in ours else {}
        row = {"case": case, "variant": name, "median_us": median, "low_us": low, "high_us": high}
        row |= {"rounds": len(times), "speedup": speedup, "extra_us": 1e6 * statistics.median(extra)}
        row |= {"roof": roof, "roof_percent": 100 * median_ratio(seconds["roof"], times) if roof else None}
        rows.append(row)
    return rows


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Of the ratios within each round: a round in which the machine is slow slows both."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def repeated(function: Callable[[], object], device: str) -> Callable[[int], float]:
    """A function of a number of calls that gives the seconds they took."""

    def run(calls: int) -> float:
        machine.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            function()
        machine.synchronize(device)
        return time.perf_counter() - start

    return run


def _tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _with_gradients(function: Callable, inputs: list[Tensor], gradients: list[Tensor]) -> tuple:
    outputs = function(*inputs)
    return outputs, torch.autograd.grad(_tuple(outputs), inputs, gradients)
