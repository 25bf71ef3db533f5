"""`python -m lspm_kernels bench MODEL`: a model before and after accelerate, checked and timed."""

import argparse
import contextlib
import copy
import json
import platform
import sys
from pathlib import Path

import torch

from lspm_kernels import bench_times
from lspm_kernels.accelerate import accelerate
from lspm_kernels.bench_check import RULE, Comparison, compare, loss_of, results
from lspm_kernels.bench_target import UsageError, inputs_of, load, moved, told
from lspm_kernels.dispatch import dtype_name

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    model = "package.module:factory, hf:<model type or folder> or torchvision:<model>"
    parser.add_argument("model", metavar="MODEL", help=model)
    parser.add_argument("--input", action="append", metavar="SIZES", help="8,3,224,224 or int64:2,512@1000")
    parser.add_argument(
        "--inputs", metavar="FUNCTION", help="package.module:function that returns args, kwargs"
    )
    parser.add_argument("--training", action="store_true", help="a step: forward, .loss or sum, backward")
    parser.add_argument("--dtype", choices=_DTYPES, help="of the model and its inputs")
    parser.add_argument("--autocast", choices=[n for n in _DTYPES if n != "float32"])
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the model, too")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch's pool")
    parser.add_argument("--json", type=Path, metavar="FILE", help="what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a plot of it")


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns its exit code: 1 where results differ, 2 where it cannot be run."""
    try:
        return _run(arguments)
    except UsageError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 2


def _run(arguments):
    for name in ("rounds", "threads"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise UsageError(f"--{name} must be at least 1, got {value}")
    if arguments.plot is not None:
        bench_times.pyplot()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = load(arguments.model).train(arguments.training)
    args, kwargs = inputs_of(model, arguments.model, arguments.input, arguments.inputs, arguments.training)
    if arguments.dtype is not None:
        model = model.to(_DTYPES[arguments.dtype])
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    args, kwargs = moved((args, kwargs), lambda t: t.to(device, dtype if t.is_floating_point() else None))
    with told(f"copy.deepcopy({arguments.model})"):
        faster = copy.deepcopy(model)
    report = accelerate(faster, inference=not arguments.training)
    cast = _DTYPES[arguments.autocast] if arguments.autocast else None
    print(_title(arguments, model, args, kwargs, dtype))
    found, mode = _check(model, faster, (args, kwargs), cast, dtype, arguments)
    print(_verdict(found, mode))
    if not all(c.holds for c in found):
        print(f"\n{report}")
        return 1
    variants = {"before": model, "after": faster}
    if arguments.compile:
        variants = {"before": model, "compile": torch.compile(copy.deepcopy(model)), "after": faster}
    steps = {
        n: _step(m, _call((args, kwargs), cast, device), arguments.training) for n, m in variants.items()
    }
    with told(f"{arguments.model}, timed,"):
        turns = {name: bench_times.turn(step, device) for name, step in steps.items()}
        rows = bench_times.measure(turns, arguments.rounds, device)
    print(f"\n{bench_times.table(rows)}\n\n{report}")
    _write(arguments, rows, found, report)
    return 0


def _call(inputs, cast, device):
    args, kwargs = inputs

    def call(model):
        autocast = contextlib.nullcontext() if cast is None else torch.autocast(device.type, cast)
        with autocast:
            return model(*args, **kwargs)

    return call


def _check(model, faster, inputs, cast, dtype, arguments) -> tuple[list[Comparison], str]:
    """The comparison of all results, and the mode in which they were taken."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    call, training = _call(inputs, cast, device), arguments.training
    mode = "train" if training else "eval"
    with told(f"{arguments.model}, called with these inputs,"):
        before = results(model, call, training)
        again = results(model, call, training, seed=1) if training else before
    if not before:
        raise UsageError("MODEL must return tensors of floating-point numbers, got none")
    # What torch's generator drops is not what ours does.
    if any(not torch.equal(t, again[name]) for name, t in before.items()):
        mode = "eval, as in training the model drops at random"
        before, after = (_in_eval(m, call, training) for m in (model, faster))
    else:
        after = results(faster, call, training)
    wide = copy.deepcopy(model).double().train(mode == "train")
    exact = moved(inputs, lambda t: t.double() if t.is_floating_point() else t)
    with told(f"{arguments.model} in float64"):
        truth = results(wide, _call(exact, None, device), training)
    return compare(before, after, truth, cast or dtype), mode


def _in_eval(model, call, training):
    modes = {m: m.training for m in model.modules()}
    found = results(model.eval(), call, training)
    for module, was in modes.items():
        module.training = was
    return found


def _step(model, call, training):
    def step():
        with torch.set_grad_enabled(training):
            output = call(model)
            if training:
                loss_of(output).backward()
                model.zero_grad(set_to_none=True)

    return step


def _title(arguments, model, args, kwargs, dtype):
    size = sum(p.numel() for p in model.parameters()) / 1e6
    named = {str(i): t for i, t in enumerate(args)} | kwargs
    shapes = [
        f"{n} {tuple(t.shape)} {dtype_name(t.dtype)}" for n, t in named.items() if isinstance(t, torch.Tensor)
    ]
    mode = "training step" if arguments.training else "inference"
    precision = f"autocast {arguments.autocast}" if arguments.autocast else dtype_name(dtype)
    what = f"{arguments.model} ({type(model).__name__}, {size:.1f} M parameters)"
    return f"{what}\n{mode}, {precision}, {torch.get_num_threads()} threads, inputs: {'; '.join(shapes)}"


def _verdict(found, mode):
    worst = found[0]
    lines = [f"checked in {mode}: {len(found)} results; each may err {RULE}"]
    if worst.holds:
        greatest = max(found, key=lambda c: c.after)
        lines.append("equal: all do. Greatest difference from float64 of any result: ")
        lines[-1] += (
            f"{max(c.before for c in found):.2e} before, {greatest.after:.2e} after ({greatest.name})"
        )
    else:
        wrong = [c for c in found if not c.holds]
        lines.append(f"NOT equal: {len(wrong)} results err more; not timed. The first:")
        lines += [
            f"  {c.name}: {c.after:.2e}, allowed {c.allowed:.2e}, before {c.before:.2e}" for c in wrong[:5]
        ]
    return "\n".join(lines)


def _write(arguments, rows, found, report):
    with told("writing a file"):
        if arguments.json is not None:
            options = {k: v for k, v in vars(arguments).items() if k not in ("run", "json", "plot")}
            checked = {"rule": RULE, "worst": vars(found[0])}
            known = {
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
            }
            parts = {"options": options, **known, "variants": rows, "check": checked}
            parts |= {"replaced": report.replaced, "left": report.left}
            arguments.json.write_text(json.dumps(parts, indent=1) + "\n")
        if arguments.plot is not None:
            mode = "training step" if arguments.training else "inference"
            bench_times.plot(arguments.plot, f"{arguments.model}, {mode}", rows)
