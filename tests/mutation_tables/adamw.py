"""Bugs in adamw, on every backend, and in the optimizer."""

import sys
from functools import partial

from mutations import Mutation

setup = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
OPTIMIZER = tuple(f"tests/ops/test_adamw_{name}.py" for name in ("optimizer", "state"))
in_cpu = partial(
    Mutation,
    file="csrc/cpu/adamw.cpp",
    tests=("tests/ops/test_adamw.py", "-x", "-k", "not compile"),
    command=("sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}"),
)
in_binding = partial(in_cpu, file="csrc/bindings_adamw.cpp", tests=("tests/ops/test_adamw_errors.py", "-x"))
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/adamw.py",
    tests=("tests/ops/test_adamw_triton.py", "-x", "-k", "sm_80 and not spills"),
)
in_module = partial(Mutation, file="lspm_kernels/adamw.py", tests=(*OPTIMIZER, "-x"))

MUTATIONS = [
    in_cpu(
        name="adamw, cpu: maximize is forgotten",
        old="s.maximize ? -by : by",
        new="by",
    ),
    in_cpu(
        name="adamw, cpu: no correction of the second moment's bias",
        old="1 / std::sqrt(1 - std::pow(s.beta2, double(step)))",
        new="1",
    ),
    in_cpu(
        name="adamw, cpu: decay of the parameter as it was rounded, not of its master",
        old="const F x = kMaster ? load(master) : load(param);",
        new="const F x = load(param);",
    ),
    in_cpu(
        name="adamw, cpu: AMSGrad loses a NaN",
        old="(a > b) | (a != a) ? a : b",
        new="a > b ? a : b",
    ),
    in_cpu(
        name="adamw, cpu: a tensor's last chunk ends with the first",
        old="std::min(begin + kChunk, tensors[t].elements)",
        new="std::min(kChunk, tensors[t].elements)",
    ),
    in_cpu(
        name="adamw, cpu: all tensors have the first one's step",
        old="t && tensors[t].step == tensors[t - 1].step",
        new="t",
    ),
    in_cpu(
        name="adamw, cpu: all tensors round by the first one's words",
        old="for_each_word(step.seed, row, begin, end,",
        new="for_each_word(step.seed, 0, begin, end,",
    ),
    in_cpu(
        name="adamw, cpu: each chunk begins its words anew",
        file="csrc/cpu/philox.h",
        old="draw<decltype(blocks)::value>(seed, row, d, words);",
        new="draw<decltype(blocks)::value>(seed, row, d - begin, words);",
    ),
    in_cpu(
        name="adamw, cpu: squares in float32",
        old="const D wide = __builtin_convertvector(v, D);",
        new="const D wide = __builtin_convertvector(v * v, D);\n    sum += wide;\n    return;",
    ),
    in_cpu(
        name="adamw, cpu: the norm leaves out what follows the last four vectors",
        old="for_each_vector(n - i, [&](int64_t rest, auto lanes)",
        new="for_each_vector(n * 0, [&](int64_t rest, auto lanes)",
    ),
    in_binding(
        name="adamw, binding: a gradient of other strides passes",
        old="(elements && !lies_as(views[i], params[i]))",
        new="false",
    ),
    in_binding(
        name="adamw, binding: parameters with gaps pass",
        old='if (!has_no_gaps(params[i])) TensorView::refuse("params", "have no gaps");',
        new="",
    ),
    in_triton(
        name="adamw, triton: a masked tile leaves out eps",
        old="step_size, root, decay, grow1, keep2, grow2, eps, factor, seed, TILE, False,",
        new="step_size, root, decay, grow1, keep2, grow2, 0.0, factor, seed, TILE, False,",
    ),
    in_triton(
        name="adamw, triton: the numbers of the first tensor for all",
        old="tl.load(numbers + tensor), tl.load(numbers + count + tensor)",
        new="tl.load(numbers), tl.load(numbers + count)",
    ),
    in_triton(
        name="adamw, triton: chunks are numbered through all tensors",
        old="- (chunks.cumsum(0) - chunks)[tensors]",
        new="",
    ),
    in_triton(
        name="adamw, triton: squares in float32",
        old="        g = g.to(tl.float64)\n        sums += g * g",
        new="        sums += (g * g).to(tl.float64)",
    ),
    in_triton(
        name="adamw, triton: no mask at a tensor's end",
        old="if start + TILE <= size:\n            _change(",
        new="if start <= size:\n            _change(",
    ),
    in_module(
        name="adamw, optimizer: clipping makes small gradients larger",
        old=".clamp(max=1.0)",
        new="",
    ),
    in_module(
        name="adamw, optimizer: the norm is the scaled loss's",
        old="grad_norm = grad_norm * scale.to(grad_norm.device, non_blocking=True)",
        new="pass",
    ),
    in_module(
        name="adamw, optimizer: a step with an infinite gradient is not skipped",
        old="if found_inf is not None and found_inf.item():",
        new="if False:",
    ),
    in_module(
        name="adamw, optimizer: masters are rounded when they are loaded",
        old="if name in _STATES and value.dtype == torch.float32:",
        new="if False:",
    ),
    in_module(
        name="adamw, optimizer: contiguous state beside channels_last parameters",
        old=" or found.stride() != strides",
        new="",
        tests=("tests/ops/test_adamw_state.py", "-x", "-W", "error"),
    ),
]
