"""Bugs in linear_cross_entropy: in its kernels, and in what cuts the logits into blocks."""

import sys
from functools import partial

from mutations import Mutation

setup = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
build = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}")
CPU = ("tests/ops/test_linear_cross_entropy.py", "-x")
OPERATOR = ("tests/ops/test_linear_cross_entropy_operator.py", "-x", "-k", "not compile and not export")
TRITON = ("tests/ops/test_linear_cross_entropy_triton.py", "-x", "-m", "not long")
in_cpu = partial(Mutation, file="csrc/cpu/linear_cross_entropy.cpp", tests=CPU, command=build)
in_blocks = partial(Mutation, file="lspm_kernels/linear_cross_entropy_blocks.py", tests=CPU)
in_op = partial(Mutation, file="lspm_kernels/ops/linear_cross_entropy.py", tests=CPU)
in_triton = partial(Mutation, file="lspm_kernels/triton/linear_cross_entropy.py", tests=TRITON)

MUTATIONS = [
    in_cpu(
        name="linear_cross_entropy, cpu: what is kept is not brought to a larger logit",
        old="of(1, r) * std::exp(double(before) - shift)",
        new="of(1, r) * (before > -kInfinity)",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: a target is looked for in every block",
        old="target[row] >= s.first && target[row] < s.first + s.cols",
        new="target[row] % s.cols >= 0 && s.first == 0",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: class weights of the first block for all",
        old="weight ? weight + s.first : nullptr",
        new="weight",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: a target's gradient overwritten by that of the others",
        old="if (here) FirstLanes{1}.store(x + target, of_target);",
        new="(void)of_target;",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: the cap has no slope", old="d = d * slope(v / s.softcap);", new=";"
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: z_loss without the class's weight",
        old="s.z_loss * this->weight_of(this->target[r]) * lse * lse",
        new="s.z_loss * lse * lse",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: the gradient of lse is lost",
        old="(dlse ? dlse[r] : 0)",
        new="0",
    ),
    in_cpu(
        name="linear_cross_entropy, cpu: the bias keeps the last block's gradient",
        old="lanes.load(dbias + begin + c) + sum",
        new="sum",
    ),
    in_blocks(
        name="linear_cross_entropy, blocks: the weight keeps the last block's gradient",
        old="products.add(dweight, logits.t(), inputs)",
        new="products.put(dweight, logits.t(), inputs)",
    ),
    in_blocks(
        name="linear_cross_entropy, blocks: hidden's gradient in the wrong rows",
        old="dhidden.index_copy_(0, places[part],",
        new="dhidden.index_copy_(0, places[part].sort(descending=True)[0],",
    ),
    in_blocks(
        name="linear_cross_entropy, blocks: a block is all of the logits",
        old="most = min(count * each // part, _MOST)",
        new="most = count * each",
        tests=OPERATOR,
    ),
    in_blocks(
        name="linear_cross_entropy, blocks: products under autocast in its dtype",
        file="lspm_kernels/products.py",
        old="        torch.mm(a, b, out=c)",
        new="        c.copy_(a.to(torch.bfloat16) @ b.to(torch.bfloat16))",
    ),
    in_op(
        name="linear_cross_entropy, op: the mean over rows, whatever they weigh",
        old="share *= class_weight[target.clamp(0, len(weight) - 1)]",
        new="pass",
    ),
    in_op(
        name="linear_cross_entropy, op: gradients that are kept are scaled in place",
        old="if saves or torch._C._autograd._get_current_graph_task_keep_graph():",
        new="if saves:",
    ),
    in_op(
        name="linear_cross_entropy, op: the second derivative of a scaled gradient is silently 0",
        old="found = _scaled(ctx.row, dloss, hidden, weight, bias, *made)",
        new="found = [m * dloss for m in made]",
        tests=OPERATOR,
    ),
    in_op(
        name="linear_cross_entropy, op: gradients of torch.func are silently 0",
        old="return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()",
        new="return True",
        tests=OPERATOR,
    ),
    in_triton(
        name="linear_cross_entropy, triton: each block begins anew",
        old="if BEGINS:",
        new="if True:",
    ),
    in_triton(
        name="linear_cross_entropy, triton: products are not brought to a larger logit",
        old="q * (_shift_of(largest) - shift) + tl.sum(product, 1)",
        new="tl.sum(product, 1)",
    ),
    in_triton(
        name="linear_cross_entropy, triton: the target's class counted from the block's first",
        old="gradient -= tl.where(first + col == wanted",
        new="gradient -= tl.where(col == wanted",
    ),
]
