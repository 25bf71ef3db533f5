"""Bugs in the CUDA kernels of layer norm and in what every CUDA kernel includes."""

from functools import partial

from mutations import Mutation

TESTS = ("tests/ops/test_layer_norm_cuda.py", "-k", "not asan")
KERNEL, COMMON = "csrc/cuda/layer_norm.cu", "csrc/cuda/common.cuh"
in_kernel = partial(Mutation, file=KERNEL, tests=TESTS)
in_common = partial(Mutation, file=COMMON, tests=TESTS)

MUTATIONS = [
    in_common(
        name="row_sum: barrier before its shared memory is written again lost",
        old="  __syncthreads();  // the previous call has read its sums\n",
        new="",
    ),
    in_common(
        name="row_sum: barrier before its shared memory is read lost",
        old="] = value;\n  __syncthreads();\n",
        new="] = value;\n",
    ),
    in_common(
        name="warp_sum: one step lost",
        old="distance = kWarp / 2; distance > 0; distance /= 2)\n    value +=",
        new="distance = kWarp / 4; distance > 0; distance /= 2)\n    value +=",
    ),
    in_common(name="warp_sum: half of the lanes named", old="0xFFFFFFFFu", new="0xFFFFu"),
    in_common(name="launch: the stream is not passed on", old="  config.stream = at.stream;\n", new=""),
    in_common(name="device guard: does not set the device", old="if (device != previous_)", new="if (false)"),
    Mutation(
        name="launch: does not ask for more than 48 KiB of shared memory",
        file=COMMON,
        old="if (at.shared_bytes > kWithoutOptIn)",
        new="if (false)",
        tests=("tests/cuda_on_cpu/test_emulator.py", "-k", "shared_memory"),
    ),
    in_common(
        name="device guard: does not restore the device",
        old="~DeviceGuard() { cudaSetDevice(previous_); }",
        new="~DeviceGuard() {}",
    ),
    in_kernel(
        name="bound of a row one too far",
        old="if (base + v * stride < cols)",
        new="if (base + v * stride <= cols)",
    ),
    in_kernel(name="eps lost", old="row_sum(squares) / cols + eps", new="row_sum(squares) / cols"),
    in_kernel(
        name="variance of a sample", old="row_sum(squares) / cols", new="row_sum(squares) / (cols - 1)"
    ),
    in_kernel(
        name="mean in RMS norm", old="centered ? row_sum(total) / cols", new="true ? row_sum(total) / cols"
    ),
    in_kernel(name="rows past the last one computed", old="row < rows ? cols : 0", new="cols"),
    in_kernel(name="sum not stored", old="      store(sum + start + col, held[v]);\n", new=""),
    in_kernel(name="sum not rounded before the norm: wide rows of x", old="residual ? sum : x;", new="x;"),
    in_kernel(name="rstd written though not wanted", old="if (rstd) rstd[row]", new="rstd[row]"),
    in_kernel(
        name="vectors although y is misaligned",
        old="aligned_for_vectors(x, residual, weight, bias, sum, y)",
        new="aligned_for_vectors(x, residual, weight, bias, sum)",
    ),
    in_kernel(name="dsum dropped", old="if (dsum) {", new="if (false) {"),
    in_kernel(name="mean of the gradient dropped", old="dnormalised - mean_total -", new="dnormalised -"),
    in_kernel(name="rows of the next run", old="row < end ? cols : 0", new="row < rows ? cols : 0"),
    in_kernel(
        name="a run up to the last row",
        old="const int64_t end = first + rows_per_run < rows ? first + rows_per_run : rows;",
        new="const int64_t end = rows;",
    ),
    in_kernel(
        name="runs overlap in partial", old="int64_t(blockIdx.x) * 2 * cols", new="int64_t(blockIdx.x) * cols"
    ),
    in_kernel(
        name="dbias of the last row only", old="dbias[v][e] += row_dbias", new="dbias[v][e] = row_dbias"
    ),
    in_kernel(
        name="wide rows: partial not cleared",
        old="      store(run_dweight + col, Vec<float, kWidth>{});\n",
        new="",
    ),
    in_kernel(
        name="column sums: barrier before they are read lost",
        old="    });\n    __syncthreads();\n  }\n  if (threadIdx.y > 0) return;",
        new="    });\n  }\n  if (threadIdx.y > 0) return;",
    ),
    in_kernel(
        name="column sums: barrier before they are written again lost",
        old="    __syncthreads();  // the previous call has read its sums\n",
        new="",
    ),
    in_kernel(name="last run dropped", old="p < partials; ++p", new="p + 1 < partials; ++p"),
    in_kernel(
        name="dweight of the wrong half of a run", old="(2 * p + blockIdx.y)", new="(2 * p + 1 - blockIdx.y)"
    ),
]
