"""The emulator itself: instruction models against independent references, and planted bugs it must find."""

import itertools

import numpy as np
import pytest
import torch

from cuda_on_cpu import build, ptx2cpp
from cuda_on_cpu.library import (
    FLAVOURS,
    KernelError,
    fixture,
    load,
    run_tests_under_asan,
    run_under_asan,
    with_long,
)

SELFTEST = build.HERE / "selftest.cu"

library = fixture(SELFTEST, flavours=with_long(FLAVOURS, ("fast",)))


def run(library, name, *arguments, outputs):
    """Calls `name` with tensors copied to the device; the last `outputs` of them come back."""
    buffers = [library.copy(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    library.call(name, *buffers)
    return [b.tensor() for b in buffers if not isinstance(b, (int, type(None)))][-outputs:]


def layout(shape, stride, rows):
    """Row and column of each (lane, value) in a CuTe layout, column-major over `rows`."""

    def offset(index, shape, stride):
        total = 0
        for extent, step in zip(shape, stride, strict=True):
            total += index % extent * step
            index //= extent
        return total

    lane_shape, value_shape = shape
    lane_stride, value_stride = stride
    lanes = [offset(lane, lane_shape, lane_stride) for lane in range(32)]
    values = [offset(value, value_shape, value_stride) for value in range(int(np.prod(value_shape)))]
    offsets = torch.tensor(lanes)[:, None] + torch.tensor(values)
    return offsets % rows, offsets // rows


# CUTLASS, include/cute/atom/mma_traits_sm80.hpp: SM80_16x8x16 and SM80_16x8x8.
D_LAYOUT = layout(((4, 8), (2, 2)), ((32, 1), (16, 8)), 16)
A_LAYOUT_16 = layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)), 16)
B_LAYOUT_16 = layout(((4, 8), (2, 2)), ((16, 1), (8, 64)), 8)
A_LAYOUT_8 = layout(((4, 8), (2, 2)), ((16, 1), (8, 64)), 16)
B_LAYOUT_8 = layout(((4, 8), (2,)), ((8, 1), (32,)), 8)


@pytest.mark.parametrize("kind, dtype", [(0, torch.bfloat16), (1, torch.float16), (2, torch.float32)])
def test_mma_has_the_layouts_of_cutlass(library, kind, dtype):
    depth, a_layout, b_layout = (8, A_LAYOUT_8, B_LAYOUT_8) if kind == 2 else (16, A_LAYOUT_16, B_LAYOUT_16)
    a, b, c = (
        torch.randint(-8, 9, (16, depth)),
        torch.randint(-8, 9, (8, depth)),
        torch.randint(-99, 99, (16, 8)),
    )
    a_lanes = a[a_layout].to(dtype).contiguous().view(torch.int32)
    b_lanes = b[b_layout].to(dtype).contiguous().view(torch.int32)
    (d,) = run(library, "mma_test", a_lanes, b_lanes, c[D_LAYOUT].float(), kind, outputs=1)
    assert torch.equal(d, (a @ b.T + c)[D_LAYOUT].float())


@pytest.mark.parametrize("transpose", [False, True])
def test_ldmatrix(library, transpose):
    matrices = torch.randint(0, 2**15, (4, 8, 8), dtype=torch.int16)
    out = library.empty((32, 4), torch.int32)
    run(library, "ldmatrix_test", matrices, out, int(transpose), outputs=1)
    expected = matrices.transpose(1, 2) if transpose else matrices
    assert torch.equal(
        out.tensor().view(torch.int16).view(32, 4, 2), expected.reshape(4, 32, 2).transpose(0, 1)
    )


def test_cp_async_fills_with_zeros_where_not_valid(library):
    values, out = torch.randint(1, 2**30, (64, 4), dtype=torch.int32), library.empty((64, 4), torch.int32)
    run(library, "cp_async_test", values, out, outputs=1)
    values[20:32] = 0
    assert torch.equal(out.tensor(), values)


def test_prefetch_changes_nothing(library):
    values, out = torch.arange(64, dtype=torch.int32), library.empty(64, torch.int32)
    run(library, "prefetch_test", values, out, outputs=1)
    assert torch.equal(out.tensor(), values)


def test_ex2(library):
    x, out = torch.linspace(-140, 20, 64), library.empty(64)
    run(library, "ex2_test", x, out, outputs=1)
    expected = torch.where(x < -126, 0, x.double().exp2())
    torch.testing.assert_close(out.tensor().double(), expected, rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pack(library, dtype):
    x, out = torch.randn(128) * torch.logspace(-6, 4, 128), library.empty(128, dtype)
    run(library, "pack_test", x, out, int(dtype == torch.float16), outputs=1)
    assert torch.equal(out.tensor(), x.to(dtype))


def test_cvt_tf32_rounds_ties_away_from_zero(library):
    x, out = torch.randn(64), library.empty(64, torch.int32)
    x[:4] = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-20, float("inf")])
    run(library, "tf32_test", x, out, outputs=1)
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    expected = torch.ldexp(scaled.sign() * (scaled.abs() + 0.5).floor() / 2**11, exponent)
    expected[3] = float("inf")
    assert torch.equal(out.tensor().view(torch.float32).double(), expected)


def test_launch_bounds_are_enforced_on_ptx(library):
    out = library.empty(64, torch.int32)
    if library.flavour != "ptxcheck":
        return library.call("bounds_test", out, 64)  # g++ does not see __launch_bounds__
    with pytest.raises(KernelError, match="more threads than __launch_bounds__"):
        library.call("bounds_test", out, 64)


@pytest.mark.parametrize("count", [100, 40_000], ids=["400 bytes", "160 KB, which launch() asks for"])
def test_dynamic_shared_memory(library, count):
    out = library.empty(count, torch.int32)
    library.call("dynamic_shared_test", out, count)
    assert torch.equal(out.tensor(), torch.arange(count - 1, -1, -1, dtype=torch.int32))


def test_too_much_shared_memory(library):
    message = (
        r"failed at selftest.cu:\d+: .* invalid launch: 200000 bytes of dynamic shared memory, limit 166912$"
    )
    with pytest.raises(KernelError, match=message):
        library.call("dynamic_shared_test", library.empty(50_000, torch.int32), 50_000)


def test_shuffles_and_votes(library):
    values, out = torch.randint(0, 1000, (64,), dtype=torch.int32), library.empty((64, 10), torch.int32)
    run(library, "warp_test", values, out, outputs=1)
    everything = values.tolist()
    for thread, result in enumerate(out.tensor().tolist()):
        warp, lane = everything[thread // 32 * 32 :][:32], thread % 32
        expected = [
            warp[5],
            warp[lane - 3] if lane >= 3 else warp[lane],
            warp[lane + 4] if lane % 8 < 4 else warp[lane],
            warp[lane ^ 9],  # 9 < 16: never out of its half
            ballot(warp, 1, range(32)),
            int(everything[40] in warp),
            1,
            sum(warp),
            warp[lane // 4 * 4 + (thread + 1) % 4],
            warp[lane ^ 1] if lane < 8 else ballot(warp, 2, range(8, 32)),
        ]
        assert result == expected, f"thread {thread}"


def ballot(warp, bit, lanes):
    """As a signed 32-bit number."""
    votes = sum(1 << lane for lane in lanes if warp[lane] & bit)
    return votes - (1 << 32) if votes >> 31 else votes


def test_atomics(library):
    x = torch.rand(3000)
    counts = torch.zeros(8, dtype=torch.int32)
    zeros = (torch.zeros(1), counts, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    total, histogram, largest, count = run(library, "atomic_test", x, 3000, *zeros, outputs=4)
    torch.testing.assert_close(total.double(), x.double().sum()[None], rtol=1e-5, atol=0)
    assert torch.equal(histogram, torch.bincount((x * 8).int(), minlength=8).int())
    assert (largest.item(), count.item()) == (2999, 9000)


@pytest.mark.parametrize("kind, dtype", [(0, torch.bfloat16), (1, torch.float16)])
def test_conversions_round_as_pytorch_does(library, kind, dtype):
    bits = torch.arange(-(2**31), 2**31, 2**32 // 20_011, dtype=torch.int64).to(torch.int32)
    near_ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 65519.99, 65520.0, 2.0**-25, 6e-8])
    x = torch.cat([bits.view(torch.float32), near_ties, -near_ties])
    out, back = library.empty(x.shape, dtype), library.empty(x.shape)
    run(library, "convert_test", x, out, back, len(x), kind, outputs=2)
    assert torch.equal(out.tensor().nan_to_num(7.0), x.to(dtype).nan_to_num(7.0))
    assert torch.equal(out.tensor().isnan(), x.isnan())
    assert torch.equal(back.tensor().nan_to_num(7.0), x.to(dtype).float().nan_to_num(7.0))


NOTHING = ""
BUGS = {  # of bug_kernel: what the report says
    0: NOTHING,
    1: "race",
    2: NOTHING,
    3: "race",
    4: "race",
    5: "race",
    6: "race",
    7: NOTHING,
    8: "lanes of a warp meet in different warp operations",
    9: "divergent __syncthreads: some threads exited, others wait",
    10: "deadlock: no thread can run",
    11: "out of bounds: 4-byte read",
    12: "out of bounds: 4-byte write",
    13: "uninitialised shared memory",
    14: "race between blocks",
    15: "uninitialised global memory",
    16: "uninitialised shared memory",
    17: "misaligned address",
    18: "race",
    19: "out of bounds: 4-byte write",
    20: "out of bounds",
    23: NOTHING,
    24: "race",
}
FOUND_WITHOUT_CHECKS = (8, 9, 10)  # where threads meet, the runtime sees it in any flavour


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(library, bug):
    if library.flavour == "asan" and BUGS[bug]:
        pytest.skip("asan aborts: test_asan_finds_its_own")
    if library.flavour == "fast" and BUGS[bug] and bug not in FOUND_WITHOUT_CHECKS:
        pytest.skip("not found without the checks of every access")
    out, zeros = library.empty(64, torch.int32), library.copy(torch.zeros(64, dtype=torch.int32))
    if not BUGS[bug]:
        return library.call("bug_test", out, zeros, bug)
    with pytest.raises(KernelError, match=BUGS[bug]) as error:
        library.call("bug_test", out, zeros, bug)
    if library.flavour.endswith("check") and "deadlock" not in BUGS[bug] and "divergent" not in BUGS[bug]:
        assert "selftest.cu:" in str(error.value).split("failed at", 1)[1].split(":", 2)[2]


@pytest.mark.parametrize("seed", range(4))
def test_races_are_found_under_any_schedule(seed):
    library = load("check", SELFTEST)
    library.configure(seed)
    for bug, report in itertools.islice(BUGS.items(), 1, 7):
        out, zeros = library.empty(64, torch.int32), library.copy(torch.zeros(64, dtype=torch.int32))
        if report:
            with pytest.raises(KernelError, match=report):
                library.call("bug_test", out, zeros, bug)
    library.configure()
    library.free()


@pytest.mark.long
@pytest.mark.skipif("asan" in FLAVOURS, reason="this is the run under asan")
def test_asan():
    run_tests_under_asan(__file__)


ASAN_BUGS = {
    11: "AddressSanitizer: use-after-poison",
    19: "runtime error: index 64 out of bounds",
    21: "AddressSanitizer: stack-buffer-overflow|runtime error: index 4 out of bounds",
    22: "runtime error: shift exponent 40 is too large",
}
RUN_BUG = """
import ctypes, sys
c = ctypes.CDLL(sys.argv[1])
c.emu_malloc.restype = ctypes.c_void_p
out, zeros = (ctypes.c_void_p(c.emu_malloc(ctypes.c_size_t(256))) for _ in range(2))
c.emu_memset(zeros, 0, ctypes.c_size_t(256))
c.bug_test(out, zeros, ctypes.c_int64(int(sys.argv[2])))
"""


@pytest.mark.skipif("asan" in FLAVOURS, reason="starts runs under asan")
@pytest.mark.parametrize("bug", ASAN_BUGS)
def test_asan_finds_its_own(bug):
    path = build.kernels([SELFTEST], "asan")
    with pytest.raises(KernelError, match=ASAN_BUGS[bug]):
        run_under_asan("-c", RUN_BUG, str(path), str(bug))


def test_unknown_instructions_are_refused():
    entry = ".entry k(.param .u64 p)\n{\n\t.reg .b32 %r<2>;\n\tdp4a.u32.u32 %r0, %r0, %r1, %r0;\n\tret;\n}\n"
    with pytest.raises(
        ValueError, match=r"^ptx2cpp: k: unknown instruction: dp4a\.u32\.u32 %r0, %r0, %r1, %r0$"
    ):
        ptx2cpp.translate(entry)
    too_many = entry.replace("dp4a.u32.u32 %r0, %r0, %r1, %r0", "add.s32 %r0, %r0, %r1, %r0")
    with pytest.raises(ValueError, match=r"^ptx2cpp: k: unknown instruction: add\.s32 %r0, %r0, %r1, %r0$"):
        ptx2cpp.translate(too_many)
    saturating = entry.replace("dp4a.u32.u32 %r0, %r0, %r1, %r0", "add.sat.s32 %r0, %r0, %r1")
    with pytest.raises(ValueError, match=r"^ptx2cpp: k: unknown instruction: add\.sat\.s32 %r0, %r0, %r1$"):
        ptx2cpp.translate(saturating)
