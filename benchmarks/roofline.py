"""What each case can take at best, and what compilers made of the GPU kernels: predicted, not measured.

The bound of a case is the larger of bytes / bandwidth and operations / peak. For this CPU both roofs are
measured, for GPUs they are of NVIDIA's data sheets.
"""

import argparse
import dataclasses
import importlib.util
import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import bench_attention
import bench_attention_options
import bench_attention_varlen
import bench_attention_with_kv_cache
import bench_batch_norm_act
import bench_bias_act
import bench_bpr
import bench_conv2d
import bench_conv2d_batch_norm
import bench_cross_entropy
import bench_dropout
import bench_embedding
import bench_embedding_bag
import bench_global_avg_pool
import bench_layer_norm
import bench_linear
import bench_linear_cross_entropy
import bench_linear_many_rows
import bench_max_pool2d
import bench_mf
import bench_mf_als
import bench_mf_sgd
import bench_mlp
import bench_nmf
import bench_rotary
import bench_sample
import bench_swiglu
import bench_top_k_scores
import machine
import results
import sass
import tables
import torch

import harness

OPS = (
    bench_layer_norm, bench_attention, bench_attention_options, bench_attention_varlen,
    bench_attention_with_kv_cache, bench_rotary, bench_max_pool2d, bench_global_avg_pool,
    bench_bias_act, bench_swiglu, bench_mlp, bench_linear, bench_linear_many_rows,
    bench_cross_entropy, bench_linear_cross_entropy,
    bench_dropout, bench_embedding, bench_embedding_bag,
    bench_batch_norm_act, bench_conv2d, bench_conv2d_batch_norm,
    bench_mf, bench_mf_als, bench_mf_sgd, bench_bpr, bench_nmf, bench_top_k_scores, bench_sample,
)  # fmt: skip
PREDICTED = "predicted, not measured"
# GB/s; GFLOP/s of float32 and, on tensor cores without sparsity, of bfloat16.
# A100: NVIDIA A100 Tensor Core GPU data sheet, SXM 80 GB. H100: NVIDIA H100 Tensor Core GPU data sheet, SXM.
# B200: NVIDIA Blackwell data sheet, HGX B200, an eighth of the board's figures.
GPUS = {
    "A100": (2039, {torch.float32: 19_500, torch.bfloat16: 312_000}),
    "H100": (3350, {torch.float32: 67_000, torch.bfloat16: 989_000}),
    "B200": (8000, {torch.float32: 75_000, torch.bfloat16: 2_250_000}),
}


def this_cpu() -> tuple[float, dict[torch.dtype, float]]:
    """Copy bandwidth in GB/s and matmul peaks in GFLOP/s: the best of five."""
    moved = 2**30
    copy = machine.copy_roof()
    bandwidth = moved / 1e9 / best(lambda: copy(moved))
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        matmul, flops = machine.matmul_roof(dtype)
        peaks[dtype] = flops / 1e9 / best(matmul)
    return bandwidth, peaks


def best(function) -> float:
    run = harness.repeated(function, "cpu")
    return min(run(1) for _ in range(5))


def bound(case: harness.Case, bandwidth: float, peaks: dict[torch.dtype, float]) -> tuple[float, str]:
    """Microseconds that the case takes at least, and which roof says so."""
    moving = case.bytes / bandwidth / 1e3
    # Element by element nothing is multiplied on tensor cores or AMX tiles, and arithmetic is in float32.
    computing = case.flops / peaks[case.dtype if case.roof == "matmul" else torch.float32] / 1e3
    return max((moving, "memory"), (computing, "compute"))


def rooflines(machines: dict[str, tuple]) -> Iterator[dict]:
    """One row for each case that has a roof: what it moves and computes, and its bound on each machine."""
    for case in itertools.chain.from_iterable(bench.cases() for bench in OPS):
        if case.roof is None:
            continue
        columns = {"case": str(case), "MiB moved": tables.mebibytes(case.bytes)}
        columns["GFLOP"] = tables.number(case.flops / 1e9)
        columns["FLOP/byte"] = tables.number(case.flops / case.bytes)
        for name, roofs in machines.items():
            microseconds, limit = bound(case, *roofs)
            columns[f"{name}, us"] = f"{tables.number(microseconds)} {limit}"
        yield {"benchmark": "roofline", "case": str(case), "columns": columns}


def machine_code() -> Iterator[dict]:
    """One row for each CUDA kernel and architecture, over the types and shapes that it is compiled for."""
    for source in sorted((machine.ROOT / "csrc" / "cuda").glob("*.cu")):
        for arch in sass.SHARED:
            yield from resources(arch, sass.kernels(source, arch))


def triton_code() -> Iterator[dict]:
    """The same of Triton's kernels, over their tiles."""
    from cuda_on_cpu import triton_driver

    for arch in sass.SHARED:
        for op, launch in (("attention", launch_attention), ("conv2d", launch_conv2d)):
            with triton_driver.activated(int(arch[3:]), execute=False) as driver:
                launch()
            kernels = (
                dataclasses.replace(
                    kernel, name=f"triton: {op}{r.kernel}", shared=r.shared, most_threads=32 * r.warps
                )
                for r in driver.resources
                for kernel in sass.compiled(r.cubin, arch)
            )
            yield from resources(arch, kernels)


def launch_attention() -> None:
    """Every tile, causal, and with a cap and dropout too."""
    from lspm_kernels.triton import attention

    for dim, dtype in itertools.product((64, 128, 256), (torch.float32, torch.bfloat16)):
        q, k, v, out = (torch.empty(1, 2, 144, dim, dtype=dtype) for _ in range(4))
        lse, statistics, nothing = torch.empty(1, 2, 144), torch.empty(2, 1, 2, 144), (None,) * 4
        for softcap, dropout in ((0.0, 0.0), (2.0, 0.1)):
            options = None, (-1, 0, 0, 1), (1.0, softcap, dropout)
            attention.forward(q, k, v, *nothing, out, lse, statistics, *options)
            attention.backward(
                out, None, q, k, v, *nothing, out, statistics, q, k, v, None, statistics, *options
            )


def launch_conv2d() -> None:
    """Every tile with the epilogue of a model in evaluation; a stem and a depthwise convolution too."""
    from lspm_kernels.triton import conv2d

    wide = ((width, width, 1) for width in (256, 64, 32, 16))
    for (channels, filters, groups), dtype in itertools.product(
        (*wide, (3, 64, 1), (64, 64, 64)), (torch.float32, torch.bfloat16)
    ):
        x, y = (torch.empty(1, 130, 130, c, dtype=dtype) for c in (channels, filters))
        weight, scale = torch.empty(filters, channels // groups, 3, 3, dtype=dtype), torch.empty(filters)
        geometry = (1, 1), (1, 1), (1, 1), groups
        conv2d.forward(x, weight, scale, scale, y, y, None, geometry, 1)
        conv2d.backward(y, x, weight, x, weight, geometry)


def resources(arch: str, kernels: Iterable[sass.Kernel]) -> Iterator[dict]:
    families: dict[str, list[sass.Kernel]] = {}
    for kernel in kernels:
        families.setdefault(kernel.name, []).append(kernel)
    for name, family in families.items():
        occupancies = [kernel.occupancy() for kernel in family if kernel.most_threads]
        tensor, other = max(kernel.inner_loop() for kernel in family)
        columns = {
            "kernel": name,
            "for": arch,
            "compiled": f"{len(family)} times",
            "registers": span(kernel.registers for kernel in family),
            "spilled, bytes": str(sum(kernel.spilled for kernel in family)),
            "shared, bytes": span(kernel.shared for kernel in family),
            "occupancy, %": span(round(100 * occupancy) for occupancy in occupancies),
            "inner loop": f"{tensor} tensor-core, {other} other",
        }
        yield {"benchmark": "sass", "case": f"{name}/{arch}", "columns": columns}


def span(values: Iterable[int]) -> str:
    ends = sorted(set(values))
    return " to ".join(str(end) for end in dict.fromkeys(ends[:1] + ends[-1:]))


def main() -> int:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--json", type=Path, metavar="PATH", help="put the rows into this result file")
    parser.add_argument("--smoke", action="store_true", help="do not compile the GPU kernels")
    options = parser.parse_args()
    about = {"variant": PREDICTED} | machine.description() | {"command": "python benchmarks/roofline.py"}
    bandwidth, peaks = cpu = this_cpu()
    matmul = ", ".join(f"{tables.number(peak)} in {str(dtype)[6:]}" for dtype, peak in peaks.items())
    print(f"This CPU, measured: copy {tables.number(bandwidth)} GB/s, matmul GFLOP/s: {matmul}\n")
    rows = [row | about for row in rooflines({"this CPU": cpu} | GPUS)]
    print(f"Bounds: {PREDICTED}\n\n{tables.table(rows)}\n")
    reason = "--smoke leaves them out" if options.smoke else sass.missing()
    if reason is None:
        compiled = [row | about for row in machine_code()]
        print(f"CUDA kernels as compiled: {PREDICTED}\n\n{tables.table(compiled)}")
        rows += compiled
    else:
        print(f"CUDA kernels: {reason}")
    if not options.smoke and importlib.util.find_spec("triton"):
        compiled = [row | about for row in triton_code()]
        print(f"\nTriton kernels as compiled: {PREDICTED}\n\n{tables.table(compiled)}")
        rows += compiled
    if options.json:
        results.save(options.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
