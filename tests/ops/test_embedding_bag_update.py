"""embedding_bag_sgd_, embedding_bag_adagrad_ and embedding_bag_adam_, under every instruction set."""

import functools

import pytest
import torch
from ops.bags import BF16, DTYPES, EMPTY, F32, OPTIONS, SHAPES, made
from torch._subclasses.fake_tensor import FakeTensorMode

import lspm_kernels as lk
import oracle
from lspm_kernels import compiled
from lspm_kernels.ops import embedding_bag_update as ops
from lspm_kernels.reference import philox

UPDATES = {
    "sgd": (lk.embedding_bag_sgd_, 0, {"lr": 0.3}),
    "adagrad": (lk.embedding_bag_adagrad_, 1, {"lr": 0.3, "eps": 1e-3}),
    "adam": (lk.embedding_bag_adam_, 2, {"lr": 0.3, "eps": 1e-3, "betas": (0.8, 0.9), "step": 3}),
}
EACH = pytest.mark.parametrize("optimizer", UPDATES)


def states_of(optimizer, weight):
    """What the optimizer has for a table, as after some steps."""
    shapes = {"sgd": [], "adagrad": [weight.shape[:1]], "adam": [weight.shape] * 2}[optimizer]
    wide = torch.promote_types(weight.dtype, F32)
    return [(torch.rand(shape, device=weight.device) + 1).to(wide) for shape in shapes]


def check_an_index_that_is_none(optimizer, dim):
    """On a GPU, which reports nothing, it changes no row."""
    function, _, settings = UPDATES[optimizer]
    weight, dout = torch.randn(4, dim), torch.randn(3, dim)
    states = states_of(optimizer, weight)
    found, expected = ([t.clone() for t in (weight, *states)] for _ in range(2))
    function(*found, dout, torch.tensor([0, 4, -1, 2**40, 3]), torch.tensor([0, 2, 4]), **settings)
    function(*expected, dout, torch.tensor([0, 3]), torch.tensor([0, 1, 1]), **settings)
    assert all(map(torch.equal, found, expected))


def check(optimizer, weight, states, dout, indices, offsets, **options):
    """Holds what the update makes of copies of its tensors to the oracle's rule."""
    function, _, settings = UPDATES[optimizer]

    def call(weight, *rest, backend=None):
        weight, states, dout = weight.clone(), [t.clone() for t in rest[: len(states_)]], rest[len(states_)]
        given = dict(options)
        if "per_sample_weights" in given:
            given["per_sample_weights"] = given["per_sample_weights"].to(weight.dtype)
        assert (
            function(weight, *states, dout, indices, offsets, **settings | given, backend=backend) is weight
        )
        return weight, *states

    states_ = states
    reference = functools.partial(call, backend="reference")
    oracle.check(call, reference, [weight, *states, dout], gradients=False)


@pytest.mark.every_backend
@EACH
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_reference(optimizer, kind, dtype):
    for rows, dim, lengths in SHAPES + EMPTY:
        indices, offsets, options = made(rows, lengths, kind, dtype)
        weight, dout = torch.randn(rows, dim).to(dtype), (torch.randn(len(lengths), dim) / 2).to(dtype)
        decay = 0.1 * (dim % 2)
        states = states_of(optimizer, weight)
        check(optimizer, weight, states, dout, indices, offsets, weight_decay=decay, **options)


@EACH
def test_every_instruction_set(isa, optimizer):
    for dtype in DTYPES:
        for rows, dim, lengths in SHAPES[2:]:
            indices, offsets, options = made(rows, lengths, "weighted", dtype, torch.int32)
            weight, dout = torch.randn(rows, dim).to(dtype), (torch.randn(len(lengths), dim) / 2).to(dtype)
            states = states_of(optimizer, weight)
            check(optimizer, weight, states, dout, indices, offsets, weight_decay=0.1, **options)


@pytest.mark.every_backend
def test_sgd_and_adam_are_torchs_where_every_row_has_a_gradient():
    indices, dout = torch.arange(6).repeat(2).reshape(4, 3), torch.randn(4, 5)
    for optimizer, theirs in (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)):
        weight = torch.randn(6, 5)
        parameter = torch.nn.Parameter(weight.clone())
        step, states = theirs([parameter], lr=0.1, weight_decay=0.2), [torch.zeros(6, 5), torch.zeros(6, 5)]
        for number in range(1, 4):
            parameter.grad = torch.autograd.grad(lk.embedding_bag(parameter, indices), parameter, dout)[0]
            step.step()
            settings = {"lr": 0.1, "weight_decay": 0.2} | ({"step": number} if optimizer == "adam" else {})
            kept = states if optimizer == "adam" else []
            UPDATES[optimizer][0](weight, *kept, dout, indices, **settings)
        torch.testing.assert_close(weight, parameter.detach())


@pytest.mark.every_backend
@EACH
def test_rows_in_no_bag_and_padding_do_not_change(optimizer):
    function, _, settings = UPDATES[optimizer]
    weight = torch.randn(40, 21)
    states = states_of(optimizer, weight)
    before = [t.clone() for t in (weight, *states)]
    indices = torch.tensor([[3, 7], [39, 3], [7, 0]])
    function(weight, *states, torch.randn(3, 21), indices, padding_idx=7, weight_decay=0.5, **settings)
    for old, new in zip(before, (weight, *states), strict=True):
        changed = (old != new).reshape(40, -1).any(1).nonzero().flatten().tolist()
        assert changed == [0, 3, 39]


@EACH
@pytest.mark.parametrize("kind", ["mean with padding", "weighted"])
def test_same_bits_for_any_number_of_threads(optimizer, kind):
    function, _, settings = UPDATES[optimizer]
    indices, offsets, options = made(70_000, [40] * 2000, kind, BF16)  # of two passes of the sort
    weight, dout = torch.randn(70_000, 20).bfloat16(), torch.randn(2000, 20).bfloat16()
    states, results = states_of(optimizer, weight), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        made_of = [t.clone() for t in (weight, *states)]
        options |= {"stochastic_rounding": True, "seed": 5}
        function(*made_of, dout, indices, offsets, **settings, **options)
        results.append(made_of)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.every_backend
@EACH
def test_special_values_stay_in_their_rows(optimizer):
    for value in (float("nan"), float("inf"), -float("inf"), 1e30, 1e-40):
        weight, dout = torch.randn(6, 35), torch.randn(3, 35)
        dout[1, 17] = value
        indices = torch.tensor([[0, 2], [1, 3], [2, 2]])
        check(optimizer, weight, states_of(optimizer, weight), dout, indices, None)
        after = UPDATES[optimizer][0](
            weight.bfloat16(), *states_of(optimizer, weight), dout.bfloat16(), indices, seed=1,
            stochastic_rounding=True, **UPDATES[optimizer][2],
        )  # fmt: skip
        assert after[[0, 2, 4, 5]].isfinite().all()


@pytest.mark.every_backend
def test_stochastic_rounding_takes_its_words_of_philox():
    rows, dim, seed = 30, 150, 2**40 + 7
    part = 0.3125  # of the step to the next value: exact in float32
    weight = torch.ones(rows, dim).bfloat16()
    dout = torch.full((rows, dim), -part).bfloat16()
    lk.embedding_bag_sgd_(
        weight, dout, torch.arange(rows)[:, None], lr=2**-7, stochastic_rounding=True, seed=seed
    )
    up = philox.kept(seed, 1 - part, range(1), 1, rows, dim, weight.device)[0, 0]
    assert torch.equal(weight.float(), torch.where(up, 1 + 2**-7, 1.0))
    assert abs(up.float().mean() - part) < 0.02


@pytest.mark.every_backend
def test_small_steps_are_lost_without_stochastic_rounding():
    torch.manual_seed(3)
    found = {}
    for stochastic in (False, True):
        weight = torch.ones(64, 64).bfloat16()
        for _ in range(64):
            dout = torch.ones(64, 64).bfloat16()
            options = {"lr": 2**-12, "stochastic_rounding": stochastic}
            lk.embedding_bag_sgd_(weight, dout, torch.arange(64)[:, None], **options)
        found[stochastic] = weight.float().mean()
    assert found[False] == 1
    torch.testing.assert_close(found[True], torch.tensor(1 - 64 * 2**-12), rtol=0, atol=1e-3)


@pytest.mark.every_backend
def test_stochastic_rounding_leaves_a_nan_whose_bits_are_all_set():
    """What a GPU's arithmetic gives; one more in its last place, and it would be -0."""
    weight = torch.ones(3, 20).bfloat16()
    state_sum = torch.full((3,), 0x7FFFFFFF, dtype=torch.int32).view(F32)
    options = {"lr": 0.1, "stochastic_rounding": True, "seed": 3}
    lk.embedding_bag_adagrad_(weight, state_sum, weight[:2].clone(), torch.tensor([[0], [2]]), **options)
    assert torch.equal(weight.isnan().all(1), torch.tensor([True, False, True]))
    assert torch.equal(weight.isnan().any(1), weight.isnan().all(1))


INDICES = torch.tensor([[0, 1], [4, 1]])
GOOD = {"weight": torch.ones(5, 3), "dout": torch.ones(2, 3), "indices": INDICES}
BAD = {
    "weight must be a floating-point tensor (N, D), got (5,) torch.float32": {"weight": torch.ones(5)},
    "weight must be contiguous, got strides (1, 5)": {"weight": torch.ones(3, 5).t()},
    "weight must not require a gradient while gradients are recorded: call it under torch.no_grad()": {
        "weight": torch.ones(5, 3, requires_grad=True)
    },
    "dout must be a tensor of shape (2, 3), got (3, 2)": {"dout": torch.ones(3, 2)},
    "dout must have weight's dtype torch.float32, got torch.bfloat16": {"dout": torch.ones(2, 3).bfloat16()},
    "dout must be on weight's device cpu, got meta": {"dout": torch.ones(2, 3, device="meta")},
    "indices must be at least 0 and below 5, got 7": {"indices": INDICES + 3},
    "offsets must not decrease, got 1": {
        "indices": INDICES.flatten(), "offsets": torch.tensor([0, 2, 1]), "dout": torch.ones(3, 3)
    },
    "mode must be one of sum, mean, got 'max'": {"mode": "max"},
    "lr must be finite and at least 0, got nan": {"lr": float("nan")},
    "lr must be finite and at least 0, got inf": {"lr": float("inf")},
    "lr must be finite and at least 0, got -0.1": {"lr": -0.1},
    "weight_decay must be finite and at least 0, got -1": {"weight_decay": -1},
}  # fmt: skip
BAD_EPS = {"eps must be finite and at least 0, got -1e-08": {"eps": -1e-8}}
BAD_STATES = {
    "adagrad": BAD_EPS | {
        "state_sum must be a tensor of shape (5,), got (5, 3)": {"state_sum": torch.zeros(5, 3)},
        "state_sum must be a tensor of shape (5,), got NoneType": {"state_sum": None},
        "state_sum must have dtype torch.float32, got torch.float64": {"state_sum": torch.ones(5).double()},
        "state_sum must be contiguous, got strides (2,)": {"state_sum": torch.zeros(10)[::2]},
        "state_sum must be on weight's device cpu, got meta": {"state_sum": torch.zeros(5, device="meta")},
    },
    "adam": BAD_EPS | {
        "exp_avg_sq must be a tensor of shape (5, 3), got (5,)": {"exp_avg_sq": torch.zeros(5)},
        "betas must be at least 0 and below 1, got 1.0": {"betas": (0.9, 1.0)},
        "betas must be two numbers, got 0.9": {"betas": 0.9},
        "step must be an integer from 1 to 2 ** 63 - 1, got 0": {"step": 0},
    },
}  # fmt: skip
NAMED = {"sgd": {}, "adagrad": {"state_sum": torch.zeros(5)},
         "adam": {"exp_avg": torch.zeros(5, 3), "exp_avg_sq": torch.zeros(5, 3)}}  # fmt: skip


@EACH
@pytest.mark.parametrize("backend", [None, "reference"])
def test_bad_arguments(optimizer, backend):
    function, _, settings = UPDATES[optimizer]
    for message, wrong in (BAD | BAD_STATES.get(optimizer, {})).items():
        given = {k: v.clone() for k, v in (GOOD | NAMED[optimizer]).items()} | settings | wrong
        tensors = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor) and not v.is_meta}
        with pytest.raises(ValueError) as error:
            function(**given, backend=backend)
        assert str(error.value) == f"embedding_bag_{optimizer}_: {message}"
        assert all(torch.equal(given[k], v) for k, v in tensors.items())  # nothing has changed


def test_limits():
    given = GOOD | {"lr": 0.1, "stochastic_rounding": True}
    with pytest.raises(NotImplementedError, match="cpu needs bfloat16 for stochastic rounding, got float32"):
        lk.embedding_bag_sgd_(**given, backend="cpu")
    with pytest.raises(NotImplementedError, match="reference needs stochastic_rounding=False, got True"):
        lk.embedding_bag_sgd_(**given, backend="reference")
    bf16 = {k: v.bfloat16() if k != "indices" else v for k, v in GOOD.items()}
    with pytest.raises(ValueError, match="embedding_bag_sgd_: seed must be an integer from 0"):
        lk.embedding_bag_sgd_(**bf16, lr=0.1, stochastic_rounding=True, seed=-1)
    assert next(row.name for row in ops.BACKENDS) == "cpu"


def test_the_binding_refuses_what_would_touch_other_memory():
    weight, dout = torch.ones(5, 3), torch.ones(2, 3)
    good = [weight, torch.zeros(5), None, dout, INDICES, None, None, -1, False, 1, (0.1,) * 5, 1, None, 1]
    for message, wrong in {
        "weight must have another number of elements": {0: torch.ones(5, 4)},
        "first must have another number of elements": {1: torch.zeros(4)},
        "first and second must be there where the optimizer has them": {1: None},
        "dout must be contiguous": {3: torch.ones(3, 2).t()},
        "optimizer must be 0, 1 or 2, got 3": {9: 3},
        "weight must be bfloat16 where there is a seed": {12: 1},
    }.items():
        args = list(good)
        for place, value in wrong.items():
            args[place] = value
        with pytest.raises(ValueError, match=message):
            compiled.cpu.embedding_bag_update(*args)


@pytest.mark.parametrize("mode", ["aot_eager", "inductor"])
def test_compile_opcheck_and_fakes(mode):
    torch._dynamo.reset()
    settings = {"lr": 0.1, "step": 2}

    def call(weight, m, v, dout, indices=INDICES):
        lk.embedding_bag_adam_(weight, m, v, dout * 2, indices, **settings)
        return weight + 1

    tensors = [torch.randn(5, 3), torch.rand(5, 3), torch.rand(5, 3), torch.randn(2, 3)]
    copies = [t.clone() for t in tensors]
    found = torch.compile(call, fullgraph=True, backend=mode)(*copies)
    torch.testing.assert_close([found, *copies], [call(*tensors), *tensors])
    op = torch.ops.lspm.embedding_bag_update.default
    numbers = -1, False, 2, 0.1, 1e-8, 0.9, 0.99, 0.0, 1, "cpu"
    torch.library.opcheck(op, (*tensors, INDICES, None, None, None, *numbers))
    with FakeTensorMode() as fake:
        assert call(*map(fake.from_tensor, [*tensors, INDICES])).shape == (5, 3)
    before = tensors[0]._version
    call(*tensors)
    assert tensors[0]._version > before
