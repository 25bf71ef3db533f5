"""Bugs in bias_act, swiglu and mlp, on every backend and in what leads to them."""

import sys
from functools import partial

from mutations import Mutation

ACT = ("tests/ops/test_bias_act.py", "-x")
GLU = ("tests/ops/test_swiglu.py", "-x")
MLP = ("tests/ops/test_mlp.py", "tests/ops/test_mlp_operators.py", "-x")
TRITON = ("tests/ops/test_mlp_triton.py", "-x", "-k", "sm_80 and not spills")
# Only this one, so that no module without the bug is left to run the tests.
SETUP = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
BUILD = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {SETUP}")

in_activation = partial(Mutation, file="csrc/cpu/activation.h", tests=ACT, command=BUILD)
in_act = partial(Mutation, file="csrc/cpu/bias_act.cpp", tests=ACT, command=BUILD)
in_glu = partial(Mutation, file="csrc/cpu/swiglu.cpp", tests=GLU, command=BUILD)
in_binding = partial(Mutation, file="csrc/bindings_activation.cpp", tests=GLU, command=BUILD)
in_op = partial(Mutation, file="lspm_kernels/ops/bias_act.py", tests=ACT)
in_glu_op = partial(Mutation, file="lspm_kernels/ops/swiglu.py", tests=GLU)
in_mlp = partial(Mutation, file="lspm_kernels/ops/mlp.py", tests=MLP)
in_triton = partial(Mutation, file="lspm_kernels/triton/bias_act.py", tests=TRITON)

MUTATIONS = [
    in_activation(
        name="bias_act, cpu: a term of the normal distribution off in its fourth digit",
        old="0.0525623448f",
        new="0.0525723448f",
    ),
    in_activation(
        name="bias_act, cpu: the distribution function cut off before it is 0",
        old="(kIsFloat<T> ? -11.0f : -13.0f)",
        new="(kIsFloat<T> ? -4.0f : -5.0f)",
    ),
    in_activation(
        name="bias_act, cpu: the density of gelu's tanh form without its cubic term",
        old="(m * m * 0.214064449f + 1.59576912f)",
        new="1.59576912f",
    ),
    in_activation(
        name="bias_act, cpu: a sum in float32 of what is computed for half types",
        file="csrc/cpu/bias_act.cpp",
        old="std::conditional_t<sizeof(W) == sizeof(float), float, T>",
        new="T",
    ),
    in_act(
        name="bias_act, cpu: no bias in the backward", old="lanes.load(x + j) + b", new="lanes.load(x + j)"
    ),
    in_act(
        name="bias_act, cpu: a sum begun with what its memory held",
        old="std::fill(sums, sums + s.cols, 0.0f);",
        new="",
    ),
    in_act(
        name="bias_act, cpu: the odd row of a run left out",
        old="if (begin < end) backward<kStream, 1>",
        new="if (begin > end) backward<kStream, 1>",
    ),
    in_act(
        name="bias_act, cpu: dbias of one row of two",
        old="total = k ? total + v : v;",
        new="total = v;",
    ),
    in_glu(
        name="swiglu, cpu: the gradient of up through the slope",
        old="write<kStream>(dup + i, g * a, lanes);",
        new="write<kStream>(dup + i, through<kActivation, T>(g, z), lanes);",
    ),
    in_glu(
        name="swiglu, cpu: rows that lie apart taken for one piece",
        old="return s.rows > 1 && ",
        new="return s.rows < 0 && ",
    ),
    in_binding(
        name="swiglu, cpu: a stride of 0 taken for none",
        old="apart ? stride : s.cols",
        new="stride ? stride : s.cols",
    ),
    in_op(
        name="bias_act, op: no zeros for the gradient of no rows",
        old="row is None or x.numel() else",
        new="True else",
    ),
    in_op(
        name="bias_act, op: a bias that is not contiguous read as if it were",
        old="row.forward(x, None if bias is None else bias.contiguous(), y, activation)",
        new="row.forward(x, None if bias is None else bias.as_strided(bias.shape, (1,)), y, activation)",
    ),
    in_glu_op(
        name="swiglu, op: columns that lie apart",
        old="    t = checks.rows(t)\n",
        new="",
    ),
    in_mlp(
        name="mlp, op: the first product activated in place though a backward follows",
        old="hidden = torch.empty_like(inner) if saves else inner",
        new="hidden = inner",
    ),
    in_mlp(
        name="mlp, op: the gradient of x by the gate alone",
        old="addmm(matmul(dgate, weight_gate), dup, weight_up)",
        new="matmul(dgate, weight_gate)",
    ),
    in_triton(
        name="bias_act, triton: dbias of rows that do not exist",
        old="total += tl.where(inside, grad, 0.0)",
        new="total += load(dy, at, known[None, :]) * slope(z, c, ACTIVATION)",
    ),
    in_triton(
        name="bias_act, triton: the last runs are not added",
        old="for first in range(0, runs, RUNS):",
        new="for first in range(0, runs - 1, RUNS):",
    ),
    in_triton(
        name="swiglu, triton: up's rows as far apart as gate's",
        file="lspm_kernels/triton/swiglu.py",
        old="load(_rows(up, row, up_stride, col), 0, inside)\n    tl.store(_rows(y",
        new="load(_rows(up, row, gate_stride + 1, col), 0, inside)\n    tl.store(_rows(y",
    ),
]
