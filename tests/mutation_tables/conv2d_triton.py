"""Bugs in the Triton kernels of conv2d."""

from mutations import Mutation

FILE = "lspm_kernels/triton/conv2d.py"
TILES = "lspm_kernels/triton/conv2d_tiles.py"
TESTS = "tests/ops/test_conv2d_triton.py"


def executed(name, case, old, new, file=FILE):
    """A bug that a test of this name sees on sm_80."""
    return Mutation(
        f"triton: conv2d: {name}", file, old, new, (TESTS, "-k", f"sm_80 and not spills and {case}")
    )


MUTATIONS = [
    executed(
        "masked load without other",
        "reference and 3x3-odd-channels",
        "channel, mask=inside, other=0.0)",
        "channel, mask=inside)",
        TILES,
    ),
    executed("one row too few", "reference and padding-over", "(row < height)", "(row < height - 1)", TILES),
    executed("one column too many", "reference and 3x3-odd", "(column < width)", "(column <= width)", TILES),
    executed(
        "channels of the next tap",
        "reference and 3x3-odd",
        "known = channel < depth",
        "known = channel >= 0",
        TILES,
    ),
    executed(
        "taps behind the last", "reference and 7x7-stem", "known = tap < taps", "known = tap >= 0", TILES
    ),
    executed(
        "rows and columns of the dilation change places",
        "reference and asymmetric",
        "move_h, move_w, first, taps_w = g.dilation_h, g.dilation_w,",
        "move_h, move_w, first, taps_w = g.dilation_w, g.dilation_h,",
        TILES,
    ),
    executed(
        "dx: the first tap whatever the phase",
        "reference and 3x3-strided",
        "        if (phase - tap * dilation) % stride == 0:\n            first = tap\n",
        "        first = 0\n",
        TILES,
    ),
    executed(
        "dx: taps one apart, whatever the stride",
        "reference and dilation-shares",
        "s // math.gcd(s, d) for s, d",
        "s for s, d",
    ),
    executed(
        "dx: pixels of one phase alone",
        "reference and phases-without",
        "phases = math.prod(map(min, stride, size))",
        "phases = 1",
    ),
    executed(
        "weight of another group",
        "reference and grouped",
        "((group * filters + filter).to",
        "((group * 0 + filter).to",
    ),
    executed(
        "direct: channels of the filter, not of its group",
        "reference and direct-and",
        "        channel = filter // filters * depth + step % depth\n",
        "        channel = filter * depth + step % depth\n",
    ),
    executed(
        "shift on the other side",
        "epilogue and silu and 3x3",
        "sums += tl.load(shift",
        "sums -= tl.load(shift",
        TILES,
    ),
    executed("relu6 without its 6", "epilogue and relu6", "tl.where(z > 6.0, 6.0, z)", "z", TILES),
    executed(
        "float32 summed over the whole depth",
        "reference and stride-over",
        'tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, sums)',
        'tl.dot(left, right, sums, input_precision="ieee")',
        TILES,
    ),
    executed(
        "statistics: deviations of what is no pixel",
        "statistics and 3x3",
        "tl.where(inside, out - mean[None, :], 0.0)",
        "out - mean[None, :]",
        TILES,
    ),
    executed(
        "statistics: means of tiles as if alike",
        "statistics and 3x3",
        "(squares + (mean - center).square() * count).sum(0)",
        "squares.sum(0)",
    ),
    executed(
        "statistics: of what is not rounded",
        "statistics and many-images",
        "tl.where(inside, out.to(tl.float32), 0.0)",
        "tl.where(inside, activated(sums, ACTIVATION), 0.0)",
        TILES,
    ),
    executed(
        "dweight: a run reads the next",
        "reference and many-images",
        "inside = pixel < end",
        "inside = pixel >= 0",
    ),
    executed(
        "dweight: runs overlap in partial",
        "reference and many-images",
        "at = (tile.to(tl.int64) * groups * filters + filter)[:, None]",
        "at = filter.to(tl.int64)[:, None]",
    ),
    executed(
        "dweight: a tap to the right",
        "reference and 3x3-strided",
        "(tap % geometry.kernel_w * geometry.dilation_w - geometry.padding_w)",
        "(tap % geometry.kernel_w * geometry.dilation_w)",
    ),
    Mutation(
        "triton: conv2d: a tile of more elements than registers",
        TILES,
        "(M=64) if few or flat else tile",
        "(M=64) if few else tile",
        (TESTS, "-k", "sm_80 and spills and stem and dtype0"),
    ),
]
