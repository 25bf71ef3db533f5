"""Bugs in the CPU's products of matrices, and in where ops take them."""

from functools import partial

from mutations import Mutation

from mutation_tables.cross_entropy import build

TESTS = ("tests/ops/test_matmul.py", "-x", "-k", "not compile")
in_cpu = partial(Mutation, file="csrc/cpu/matmul.cpp", tests=TESTS, command=build("avx2"))
in_tiles = partial(in_cpu, file="csrc/cpu/matmul_bf16.cpp", command=build("avx512_bf16"))
in_products = partial(Mutation, file="lspm_kernels/products.py", tests=TESTS)

MUTATIONS = [
    in_cpu(
        name="matmul, cpu: tiles of rows that depend on the number of threads",
        old="if (rows > kTileRows) rows -= rows % kTileRows;",
        new="",
    ),
    in_cpu(
        name="matmul, cpu: the bias is written over",
        old="accumulate || bias || d > 0",
        new="accumulate || d > 0",
    ),
    in_cpu(
        name="matmul, cpu: the last columns are those of the first panel",
        old="w.right + whole / kPanel * panel, panel, tile",
        new="w.right, panel, tile",
    ),
    in_cpu(
        name="matmul, cpu: what was in c is lost in the last columns",
        old="sum = add ? sum + tile[i * kPanel + j] : tile[i * kPanel + j];",
        new="sum = tile[i * kPanel + j];",
    ),
    in_cpu(
        name="matmul, cpu: a transposed left side taken for one by rows",
        old="is_transposed(a) ? &multiply_tiles<true, float>",
        new="false ? &multiply_tiles<true, float>",
    ),
    in_tiles(
        name="matmul, tiles: a part of the depth forgets those before it",
        old="kColumns, rows, d + k > 0);",
        new="kColumns, rows, k > 0);",
    ),
    in_tiles(
        name="matmul, tiles: what is behind the depth is not zero",
        old="round_up(depth, kTile) - depth, bf16{});",
        new="0, bf16{});",
    ),
    in_tiles(
        name="matmul, tiles: a transposed left side taken for one by rows",
        old="if (is_transposed(a)) {",
        new="if (false) {",
    ),
    in_tiles(
        name="matmul, tiles: what was in c is lost",
        old="if (accumulate) sum += lanes.load(to + j);",
        new="",
    ),
    in_products(
        name="products: thin ones are packed",
        old="return min(*a.shape, b.shape[1]) >= LEAST",
        new="return True",
    ),
    in_products(
        name="products: a gradient of the weight that is transposed",
        old="matmul(dy.t(), x) if wants_dweight",
        new="matmul(x.t(), dy) if wants_dweight",
    ),
    in_products(
        name="products: a bias has no gradient",
        old="dy.sum(0) if wants_dbias else None",
        new="None",
    ),
]
