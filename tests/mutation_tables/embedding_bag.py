"""Bugs in embedding_bag, its updates and the module that trains by them."""

import sys
from functools import partial

from mutations import Mutation

setup = f"LSPM_ISAS=base LSPM_CUDA=0 {sys.executable} setup.py build_ext --inplace"
build = ("sh", "-c", f"rm -rf lspm_kernels/_cpu && {setup}")
BAGS, UPDATE, MODULE = (
    (f"tests/ops/test_{name}.py", "-x", "-k", "not compile")
    for name in ("embedding_bag", "embedding_bag_update", "fused_embedding_bag")
)
in_bags = partial(Mutation, file="csrc/cpu/bags.h", tests=BAGS, command=build)
in_kernel = partial(in_bags, file="csrc/cpu/embedding_bag.cpp")
in_update = partial(in_bags, file="csrc/cpu/embedding_bag_update.cpp", tests=UPDATE)
in_checks = partial(Mutation, file="lspm_kernels/embedding_bag_checks.py", tests=BAGS)
in_triton = partial(
    Mutation,
    file="lspm_kernels/triton/embedding_bag.py",
    tests=("tests/ops/test_embedding_bag_triton.py", "-x", "-k", "sm_80 and not spills"),
)
in_triton_bags = partial(in_triton, file="lspm_kernels/triton/bags.py")
in_triton_update = partial(
    Mutation,
    file="lspm_kernels/triton/embedding_bag_update.py",
    tests=("tests/ops/test_embedding_bag_update_triton.py", "-x", "-k", "sm_80 and not spills"),
)
in_cuda = partial(
    Mutation,
    file="csrc/cuda/embedding_bag.cu",
    tests=("tests/ops/test_embedding_bag_cuda.py", "-x", "-k", "not ptxcheck and not asan"),
)
in_cuda_bags = partial(in_cuda, file="csrc/cuda/bags.cuh")
in_cuda_update = partial(
    Mutation,
    file="csrc/cuda/embedding_bag_update.cu",
    tests=("tests/ops/test_embedding_bag_update_cuda.py", "-x", "-k", "not ptxcheck and not asan"),
)
in_module = partial(Mutation, file="lspm_kernels/fused_embedding_bag.py", tests=MODULE)

MUTATIONS = [
    in_bags(
        name="embedding_bag, cpu: padding counted in a mean",
        old="count -= padded(p);",
        new="count -= 0;",
    ),
    in_bags(
        name="embedding_bag, cpu: an index below 0 passes",
        old="largest <= Unsigned(std::numeric_limits<I>::max()) && ",
        new="",
        tests=("tests/ops/test_embedding_bag.py", "-x", "-k", "bad_arguments"),
    ),
    in_bags(
        name="embedding_bag, cpu: offsets may fall",
        old="if (offsets[b] < offsets[b - 1]) refuse",
        new="if (false) refuse",
    ),
    in_bags(
        name="embedding_bag, cpu: the second pass of the sort is left out",
        old="for (int pass = 0; pass < passes; ++pass,",
        new="for (int pass = 0; pass < std::min(passes, 1); ++pass,",
    ),
    in_bags(
        name="embedding_bag, cpu: threads scatter before all have counted",
        old="for (int64_t i = begin; i < end; ++i) ++mine[digit(from[i])];\n#pragma omp barrier",
        new="for (int64_t i = begin; i < end; ++i) ++mine[digit(from[i])];",
        tests=("tests/ops/test_embedding_bag.py", "tests/ops/test_embedding_bag_update.py", "-k", "threads"),
    ),
    in_bags(
        name="embedding_bag, cpu: a row that spans two chunks is begun again in the second",
        old="while (i && i < end && row(i) == row(i - 1)) ++i;",
        new="",
        tests=("tests/ops/test_embedding_bag_update.py", "tests/ops/test_embedding_bag.py", "-k", "threads"),
    ),
    in_kernel(
        name="embedding_bag, cpu: rows after the last one that stands in a bag are not cleared",
        old="last < sorted.count() ? sorted.row(last) : s.rows",
        new="last < sorted.count() ? sorted.row(last) : 0",
    ),
    in_update(
        name="embedding_bag_update, cpu: weight_decay is left out",
        old="lanes.store(g + d, lanes.load(g + d) + lanes.load(row + d) * float(step_.weight_decay));",
        new="lanes.store(g + d, lanes.load(g + d));",
    ),
    in_update(
        name="embedding_bag_update, cpu: Adam's moments not corrected",
        old="root_ = 1 / std::sqrt(1 - std::pow(step.beta2, double(step.step)));",
        new="root_ = 1;",
    ),
    in_update(
        name="embedding_bag_update, cpu: every vector rounded by the words of the first",
        file="csrc/cpu/philox.h",
        old="lane(n % kVectors * kLanes) + uint32_t(c)",
        new="lane(0) + uint32_t(c)",
    ),
    in_update(
        name="embedding_bag_update, cpu: infinity rounded at random",
        file="csrc/cpu/random_rounding.h",
        old="return (bits & 0x7f800000u) == 0x7f800000u ? v : reinterpret_cast<F>(moved);",
        new="return reinterpret_cast<F>(moved);",
    ),
    in_triton(
        name="embedding_bag, triton: an index outside the table is read",
        old="known = own & is_row(index, rows)\n        inside",
        new="known = own\n        inside",
    ),
    in_triton(
        name="embedding_bag, triton: padding counted in a mean",
        old="taken += own.to(tl.int32)",
        new="taken += (place < end).to(tl.int32)",
    ),
    in_triton(
        name="embedding_bag, triton: a row that goes on is written with what one chunk has of it",
        old="if begins & ~goes_on:",
        new="if begins:",
    ),
    in_triton_bags(
        name="embedding_bag, triton: a row that ends with its chunk is left to the next one",
        old="goes_on = (end == last) & (tl.load(ordered + end, mask=end < count, other=-1) == row)",
        new="goes_on = end == last",
    ),
    in_triton_bags(
        name="embedding_bag, triton: a row that goes on begins with what the one before it left",
        old="part = 2 * at + (at == chunk).to(tl.int64)",
        new="part = 2 * at",
    ),
    in_triton(
        name="embedding_bag, triton: the weight of padding has a gradient",
        old="own = exists & ~is_padding(index, padding_idx)",
        new="own = exists",
    ),
    in_triton(
        name="embedding_bag, triton: rows in no bag are not cleared",
        old="dweight.zero_()",
        new="pass",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: a row that goes on changes by what one chunk has of it",
        old="if begins & ~goes_on:",
        new="if begins:",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: padding's row changes",
        old="if (begins | (first % CHUNK == 0)) & has_gradient(row, rows, padding_idx):",
        new="if (begins | (first % CHUNK == 0)) & (row >= 0) & (row < rows):",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: a row is written while its threads still read it",
        old="tl.debug_barrier()",
        new="pass",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: Adagrad's squares are of columns that are none too",
        old="tl.sum(g * g, 0) / dim",
        new="tl.sum(g * g, 0) / DIM",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: every block of columns rounded by the words of the first",
        file="lspm_kernels/triton/hashing.py",
        old="counter = first // 4 + ",
        new="counter = ",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: a NaN rounded at random",
        file="lspm_kernels/triton/hashing.py",
        old="tl.where((bits & 0x7F800000) == 0x7F800000, value, moved)",
        new="moved",
    ),
    in_triton_update(
        name="embedding_bag_update, triton: Adam's second moment not corrected",
        old="lr, root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5",
        new="lr = lr / (1 - beta1**step)",
    ),
    in_cuda(
        name="embedding_bag, cuda: padding counted in a mean",
        old="taken += own;",
        new="taken += first + n * step < end;",
    ),
    in_cuda(
        name="embedding_bag, cuda: each index of a long bag once for each warp",
        old="bounds[n].begin + threadIdx.y, bounds[n].end, blockDim.y, d);",
        new="bounds[n].begin + group, bounds[n].end, groups, d);",
    ),
    in_cuda(
        name="embedding_bag, cuda: a mean over what one group of lanes has counted",
        old="taken += __shfl_xor_sync(kAllLanes, taken, distance);",
        new="taken = __shfl_xor_sync(kAllLanes, taken, distance);",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: the sums of warps are overwritten by those of the next long bag",
        old="    __syncthreads();  // before other sums take their place\n",
        new="",
    ),
    in_cuda(
        name="embedding_bag, cuda: the weight of padding has a gradient",
        old="const bool own = exists && !bags.is_padding(index), known",
        new="const bool own = exists, known",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: an index one past the last row is read",
        old="return uint64_t(index) < uint64_t(s.rows);",
        new="return uint64_t(index) <= uint64_t(s.rows);",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: a row that goes on is written with what one chunk has of it",
        old="if (counts && begins && ends)",
        new="if (counts && begins)",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: a row that ends with its chunk is left to the next one",
        old="at < end || end == bags.s.indices || rows[end] != row;",
        new="at < end || end == bags.s.indices;",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: a row that goes on begins with what the one before it left",
        old="part(at, at == chunk)",
        new="part(at, false)",
    ),
    in_cuda_bags(
        name="embedding_bag, cuda: a long row loses its last chunk",
        old="return (begin - 1) / kSortedChunk;",
        new="return begin / kSortedChunk - 1;",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: Adagrad's state is read while the first lane changes it",
        old="state = __shfl_sync(group_mask(), state, first_lane());",
        new="state = first[row];",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: the squares of a wide row are those of its last columns",
        old="*kept = begins ? total : *kept + total;",
        new="*kept = total;",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: a wide row's state grows with each block of its columns",
        old="      if (begins) {",
        new="      if (true) {",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: a part's row is changed by every group of lanes",
        old="    if (threadIdx.y == 0) whole(row, sums);",
        new="    whole(row, sums);",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: a lane's columns all rounded by one word",
        old="uint32_t((d + e) / 64 * 16 + (d + e) % 16)",
        new="uint32_t(d / 64 * 16 + d % 16)",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: Adam's second moment not corrected",
        old="root = float(1 / std::sqrt(1 - std::pow(step.beta2, double(step.step))));",
        new="root = 1;",
    ),
    in_cuda_update(
        name="embedding_bag_update, cuda: a NaN rounded at random",
        old="return (bits & 0x7f800000u) == 0x7f800000u ? value : __uint_as_float(moved);",
        new="return __uint_as_float(moved);",
    ),
    in_checks(
        name="embedding_bag: a state of float16 passes",
        old="    if state.dtype != wide:",
        new="    if False:",
        tests=UPDATE,
    ),
    in_module(
        name="FusedEmbeddingBag: the weights' gradient is of the table after the step",
        old="if ctx.needs_input_grad[4]:  # first",
        new="ctx.module.update(dout, *ctx.saved_tensors)\n        if ctx.needs_input_grad[4]:  # first",
    ),
    in_module(
        name="FusedEmbeddingBag: a table in evaluation is trained",
        old="if not (module.training and torch.is_grad_enabled()):",
        new="if not torch.is_grad_enabled():",
    ),
]
