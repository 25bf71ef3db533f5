"""Bugs in the CUDA kernels of conv2d and in what gives them scratch."""

from functools import partial

from mutations import Mutation

TILES, FORWARD, BACKWARD = (
    f"csrc/cuda/{name}" for name in ("conv2d_tiles.cuh", "conv2d.cu", "conv2d_backward.cu")
)


def seen_by(words):
    return (
        "tests/ops/test_conv2d_cuda.py",
        "-x",
        "-m",
        "not long",
        "-k",
        f"check and not ptxcheck and ({words})",
    )


ANY = seen_by("against")
in_tiles = partial(Mutation, file=TILES, tests=ANY)
in_forward = partial(Mutation, file=FORWARD, tests=ANY)
in_backward = partial(Mutation, file=BACKWARD, tests=ANY)
in_scratch = partial(Mutation, file="lspm_kernels/conv2d_scratch.py", tests=ANY)

MUTATIONS = [
    in_tiles(
        name="conv2d cuda: waits for one tile too few",
        old="cp_async_wait<kConvStages - 2>",
        new="cp_async_wait<kConvStages - 1>",
    ),
    in_tiles(
        name="conv2d cuda: no group committed at the end, so that the last tiles are not waited for",
        old="if (ahead < steps) load(ahead % kConvStages);\n    ptx::cp_async_commit();",
        new="if (ahead < steps) load(ahead % kConvStages), ptx::cp_async_commit();",
    ),
    in_tiles(
        name="conv2d cuda: barrier before a tile is multiplied lost",
        old="    __syncthreads();  // the tile has come, and every warp is done with the one before\n",
        new="",
    ),
    in_tiles(
        name="conv2d cuda: a tile loaded where another is multiplied",
        old="const int ahead = step + kConvStages - 1;",
        new="const int ahead = step + kConvStages;",
    ),
    in_tiles(
        name="conv2d cuda: taps a column apart whatever the dilation",
        old="term.second * step_w) * channels",
        new="term.second) * channels",
    ),
    in_tiles(
        name="conv2d cuda: padding on the right is read",
        old="unsigned(pixel.column + term.second * step_w) < unsigned(width)",
        new="pixel.column + term.second * step_w >= 0",
    ),
    in_tiles(
        name="conv2d cuda: padding above is read",
        old="unsigned(pixel.row + term.first * step_h) < unsigned(height)",
        new="pixel.row + term.first * step_h < height",
    ),
    in_tiles(
        name="conv2d cuda: terms behind the last tap are read",
        old=" && term.first < tap_rows",
        new="",
        tests=seen_by("against or finite"),
    ),
    in_tiles(
        name="conv2d cuda: zeros of the padding lost",
        old="c.sees(pixel, term));",
        new="true);",
    ),
    in_tiles(
        name="conv2d cuda: points behind the last are read",
        old="exists ? row : kNowhere",
        new="row",
    ),
    in_tiles(
        name="conv2d cuda: a carry from column to row lost",
        old="to.second += step.second + over;",
        new="to.second += step.second;",
    ),
    in_tiles(
        name="conv2d cuda: a carry from row to image lost",
        old="to.first += step.first + above;",
        new="to.first += step.first;",
    ),
    in_tiles(
        name="conv2d cuda: chunks not permuted among banks",
        old="(chunk ^ (kChunks == 4 ? row / 2 % 4 : row % 8))",
        new="chunk",
        tests=seen_by("bank"),
    ),
    in_tiles(
        name="conv2d cuda: matrices below and beside exchanged",
        old="row += (below_first ? second : third) * 8",
        new="row += (below_first ? third : second) * 8",
    ),
    in_tiles(
        name="conv2d cuda: elements of a chunk that are not there copied",
        old="v.at[e] = e < count ? from[e]",
        new="v.at[e] = count > 0 ? from[e]",
    ),
    in_forward(
        name="conv2d cuda: filters behind the last are read",
        old="first_filter + own + i * kApart < c.filters && at",
        new="at",
    ),
    in_forward(
        name="conv2d cuda: weight behind its last term is read",
        old="< c.filters && at < call.pitch",
        new="< c.filters",
    ),
    in_forward(
        name="conv2d cuda: the first group's channels for all",
        old="static_cast<const T*>(call.input) + group * c.depth",
        new="static_cast<const T*>(call.input)",
    ),
    in_forward(
        name="conv2d cuda: sums written over tiles that are still read",
        old="  __syncthreads();  // every warp is done with the tiles\n",
        new="",
    ),
    in_forward(
        name="conv2d cuda: sums read before all are written",
        old="      }\n  __syncthreads();\n",
        new="      }\n",
    ),
    in_forward(
        name="conv2d cuda: residual dropped",
        old="if (residual) y += ",
        new="if (false) y += ",
        tests=seen_by("epilogue"),
    ),
    in_forward(
        name="conv2d cuda: scale after shift",
        old="    if (epilogue.scale) y *= epilogue.scale[filter + e];\n"
        "    if (epilogue.shift) y += epilogue.shift[filter + e];\n",
        new="    if (epilogue.shift) y += epilogue.shift[filter + e];\n"
        "    if (epilogue.scale) y *= epilogue.scale[filter + e];\n",
        tests=seen_by("epilogue"),
    ),
    in_forward(
        name="conv2d cuda: scale of the first group's filters",
        old="group * c.filters + filter,\n                    point.first",
        new="filter,\n                    point.first",
        tests=seen_by("epilogue"),
    ),
    in_forward(
        name="conv2d cuda: relu loses nan",
        old="return z < 0.0f ? 0.0f : z;",
        new="return z > 0.0f ? z : 0.0f;",
        tests=seen_by("activations"),
    ),
    in_forward(
        name="conv2d cuda: relu6 is relu",
        old="z > 6.0f ? 6.0f : z",
        new="z",
        tests=seen_by("epilogue"),
    ),
    in_forward(
        name="conv2d cuda: vectors although the output is misaligned",
        old="aligned_for_vectors(out.data, out.epilogue.residual)",
        new="aligned_for_vectors(out.epilogue.residual)",
        tests=seen_by("misaligned"),
    ),
    in_forward(
        name="conv2d cuda: copies although the input is misaligned",
        old=" && aligned_for_vectors(input);",
        new=";",
        tests=seen_by("misaligned"),
    ),
    in_forward(
        name="conv2d cuda: a misaligned weight taken as it lies",
        old=" && aligned_for_vectors(weight.data) &&",
        new=" &&",
        tests=seen_by("misaligned"),
    ),
    in_forward(
        name="conv2d cuda: any weight taken as it lies",
        old="return count == 1 || stride == wanted;",
        new="return true;",
    ),
    in_forward(
        name="conv2d cuda: packed weight not filled up with zeros",
        old="packed[index] = at < c.terms()",
        new="if (at < c.terms()) packed[index] = at < c.terms()",
    ),
    in_backward(
        name="conv2d cuda: gradient of x: the first tap of every phase",
        old="while (first < kernel && (phase",
        new="while (false && (phase",
    ),
    in_backward(
        name="conv2d cuda: gradient of x: taps apart by the stride whatever the dilation",
        old="step(int(stride / std::gcd(stride, dilation)))",
        new="step(int(stride))",
    ),
    in_backward(
        name="conv2d cuda: gradient of x: phases of rows all in the first row",
        old="(i * s.width + j) * channels",
        new="j * channels",
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: dz of the next run",
        old="at + left_row + i < count ? c.filters - filter : 0",
        new="c.filters - filter",
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: runs of unequal place",
        old="const int64_t first = blockIdx.y * points_of_run;",
        new="const int64_t first = blockIdx.y * (points_of_run - 1);",
        tests=seen_by("runs"),
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: last run dropped",
        old="p < partials; ++p",
        new="p + 1 < partials; ++p",
        tests=seen_by("runs"),
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: runs of all groups in one place",
        old="(int64_t(blockIdx.y) * c.groups + group) * c.filters * terms",
        new="int64_t(blockIdx.y) * c.groups * c.filters * terms",
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: copies although filters do not fill chunks",
        old="c.depth % kChunk == 0 && c.filters % kChunk == 0 &&",
        new="c.depth % kChunk == 0 &&",
    ),
    in_backward(
        name="conv2d cuda: gradient of weight: strides of a plain layout",
        old="s.weight_strides[0], s.weight_strides[1], s.weight_strides[2]",
        new="s.group_channels() * s.taps(), s.taps(), s.kernel_w",
        tests=seen_by("layout"),
    ),
    in_scratch(
        name="conv2d cuda: scratch for the weight without what fills vectors up",
        old="outputs * -(-terms // 8) * 8",
        new="outputs * terms",
    ),
    in_scratch(
        name="conv2d cuda: runs of few pixels",
        old="min(_BLOCKS // blocks, pixels // _FEWEST_PIXELS)",
        new="_BLOCKS // blocks",
        tests=("tests/ops/test_conv2d_cuda.py", "-k", "occupy"),
    ),
]
