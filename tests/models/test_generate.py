"""Generation: the cached loop against the full one, and sampling against distributions known exactly."""

from dataclasses import replace

import pytest
import torch
from tiny_gpt import BOTH, CONFIG, make_task

from lspm_models.generate import generate

PROMPT = [7, 3, 60, 0, 21]


def task_with_logits(logits):
    """A language model whose logits are these, whatever it reads."""
    task = make_task(replace(CONFIG, vocabulary_size=len(logits)))
    with torch.no_grad():
        task.model.ln_f.weight.zero_()
        task.model.ln_f.bias.zero_()
        task.model.ln_f.bias[0] = 1
        task.model.wte.weight[:, 0] = torch.as_tensor(logits)
    return task


def sampled(probabilities, *, rows=500, tokens=20, **arguments):
    """How often each token is drawn by a model of these probabilities, of rows * tokens."""
    task = task_with_logits(torch.tensor(probabilities).log())
    drawn = generate(task, [0], max_new_tokens=tokens, sequences=rows, seed=0, **arguments)
    return torch.tensor(drawn).flatten().bincount(minlength=len(probabilities))


def assert_drawn_from(counts, probabilities):
    """Pearson's chi-squared test, which a right sampler fails once in a million times."""
    expected = torch.tensor(probabilities) * counts.sum()
    possible = expected > 0
    assert not counts[~possible].any()
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    assert (
        freedom == 0 or torch.special.gammaincc(torch.tensor(freedom / 2), torch.tensor(statistic / 2)) > 1e-6
    )


@pytest.mark.parametrize("context", [1, 7, 24])
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0}, {"seed": 5, "sequences": 3, "top_k": 9, "top_p": 0.9}]
)
@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_cached_tokens_are_those_of_the_full_loop(context, sampling, config):
    task = make_task(replace(config, context=context))
    arguments = {"max_new_tokens": 60, **sampling}  # the window slides in each case
    cached = generate(task, PROMPT[:context], **arguments)
    full = generate(task, PROMPT[:context], **arguments, use_cache=False)
    assert cached == full
    assert all(len(sequence) == 60 for sequence in cached)
    assert (
        len(set(cached[0])) > 5 or context == 1
    )  # with one token to look at, greedy text soon repeats itself


@torch.no_grad()
def test_window_slides_to_the_last_half_of_the_context():
    task = make_task()
    text = PROMPT + generate(task, PROMPT, max_new_tokens=25, temperature=0)[0]
    for length in range(len(PROMPT), len(text)):
        start = 0 if length <= 24 else 25 - 12  # from 25 tokens, of which the model sees 12, on
        logits = task(torch.tensor([text[start:length]]))[0, -1]
        assert logits.argmax() == text[length]


def test_greedy_takes_the_most_probable():
    assert generate(task_with_logits([0.0, 3.0, 2.9, -1.0]), [0], max_new_tokens=3, temperature=0) == [
        [1, 1, 1]
    ]


def test_a_seed_decides_the_tokens():
    task = make_task()

    def tokens(seed):
        return generate(task, PROMPT, max_new_tokens=30, sequences=2, seed=seed)

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
    assert tokens(1)[0] != tokens(1)[1]
    torch.manual_seed(3)
    first = tokens(None)
    assert tokens(None) != first
    torch.manual_seed(3)
    assert tokens(None) == first


def test_a_seed_leaves_the_generator_of_torch_alone():
    task = make_task()
    before = torch.get_rng_state()
    generate(task, PROMPT, max_new_tokens=5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("temperature", [0, 1])
def test_the_first_token_is_one_of_those_allowed(temperature):
    drawn = generate(
        task_with_logits([5.0, 1, 1, 0]),
        [0],
        max_new_tokens=9,
        sequences=40,
        first=[3, 1],
        seed=0,
        temperature=temperature,
    )
    assert {tokens[0] for tokens in drawn} == ({1, 3} if temperature else {1})
    assert {token for tokens in drawn for token in tokens[1:]} >= {0}


def test_stop_token_ends_each_sequence_by_itself():
    task = make_task()
    arguments = {"max_new_tokens": 40, "sequences": 4, "seed": 2}
    free = generate(task, PROMPT, **arguments)
    stop = free[0][7]
    stopped = generate(task, PROMPT, **arguments, stop=stop)
    for sequence, whole in zip(stopped, free, strict=True):
        assert sequence == (whole[: whole.index(stop)] if stop in whole else whole)
    first = min(free[0].index(stop), free[0].index(free[0][3]))
    assert generate(task, PROMPT, **arguments, stop={stop, free[0][3]})[0] == free[0][:first]
    assert len({len(sequence) for sequence in stopped}) > 1


def test_generation_ends_when_all_sequences_have():
    task = task_with_logits([0.0, 50.0])
    runs = []
    task.model.register_forward_hook(lambda *_: runs.append(1))
    assert generate(task, [0], max_new_tokens=100, sequences=3, stop=1) == [[], [], []]
    assert len(runs) == 1


def test_stream_sees_each_token_and_may_end_its_sequence():
    task = make_task()
    arguments = {"max_new_tokens": 12, "sequences": 3, "seed": 4}
    free = generate(task, PROMPT, **arguments)
    seen = []

    def stream(sequence, token):
        seen.append((sequence, token))
        return sequence == 1 and len(seen) > 6

    streamed = generate(task, PROMPT, **arguments, stream=stream)
    assert seen[:6] == [(row, free[row][step]) for step in range(2) for row in range(3)]
    assert streamed == [free[0], free[1][:3], free[2]]
    assert [token for row, token in seen if row == 1] == streamed[1]


def test_samples_have_the_distribution_of_the_model():
    probabilities = [0.4, 0.3, 0.15, 0.1, 0.05]
    assert_drawn_from(sampled(probabilities), probabilities)


def test_temperature_sharpens_by_its_inverse_as_exponent():
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    sharp = probabilities**2 / (probabilities**2).sum()
    assert_drawn_from(sampled(probabilities.tolist(), temperature=0.5), sharp.tolist())


def test_top_k_never_leaves_the_k():
    assert_drawn_from(sampled([0.1, 0.3, 0.2, 0.4], top_k=2), [0, 3 / 7, 0, 4 / 7])
    assert (sampled([0.25] * 4, top_k=1) > 0).all()  # equals stay together


def test_top_p_draws_from_the_nucleus():
    assert_drawn_from(sampled([0.05, 0.5, 0.15, 0.3], top_p=0.75), [0, 0.625, 0, 0.375])


def test_min_p_draws_from_what_is_probable_enough():
    assert_drawn_from(sampled([0.06, 0.5, 0.14, 0.3], min_p=0.5), [0, 0.625, 0, 0.375])


def test_the_penalty_is_for_the_prompt_and_what_came_after():
    task = task_with_logits([3.0, 2.5, 2.0, 1.5])
    assert generate(task, [0], max_new_tokens=3, temperature=0, repetition_penalty=4.0) == [[1, 2, 3]]


@pytest.mark.parametrize("training", [True, False])
def test_runs_without_dropout_and_gives_the_mode_back(training):
    task = make_task(replace(CONFIG, dropout=0.5))
    whole = generate(task.eval(), PROMPT, max_new_tokens=8, temperature=0)
    assert generate(task.train(training), PROMPT, max_new_tokens=8, temperature=0) == whole
    assert task.training == training
    with pytest.raises(ValueError):
        generate(task, [61], max_new_tokens=8)
    assert task.training == training


def test_takes_tensors_and_bfloat16_models():
    task = make_task().bfloat16()
    cached = generate(task, torch.tensor(PROMPT), max_new_tokens=20, temperature=0)
    assert cached == generate(task, PROMPT, max_new_tokens=20, temperature=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": []}, "generate: prompt must be 1 to 24 tokens, the context, got 0"),
        ({"prompt": [0] * 25}, "generate: prompt must be 1 to 24 tokens, the context, got 25"),
        ({"prompt": [[0, 1]]}, "generate: prompt must be 1 to 24 tokens, the context, got shape (1, 2)"),
        ({"prompt": [61]}, "GPT: tokens must be in [0, 61), got 61"),
        ({"max_new_tokens": 0}, "generate: max_new_tokens must be an integer of at least 1, got 0"),
        ({"max_new_tokens": None}, "generate: max_new_tokens must be an integer of at least 1, got None"),
        ({"sequences": 1.5}, "generate: sequences must be an integer of at least 1, got 1.5"),
        ({"top_k": 0}, "generate: top_k must be an integer of at least 1, got 0"),
        ({"top_p": 0.0}, "generate: top_p must be in (0, 1], got 0.0"),
        ({"top_p": 1.1}, "generate: top_p must be in (0, 1], got 1.1"),
        ({"top_p": float("nan")}, "generate: top_p must be in (0, 1], got nan"),
        ({"min_p": 1.1}, "generate: min_p must be in [0, 1], got 1.1"),
        ({"repetition_penalty": 0.0}, "generate: repetition_penalty must be finite and above 0, got 0.0"),
        ({"temperature": -0.1}, "generate: temperature must be finite and at least 0, got -0.1"),
        ({"temperature": float("inf")}, "generate: temperature must be finite and at least 0, got inf"),
        ({"first": [3, 61]}, "generate: first must be ids in [0, 61), got [3, 61]"),
        ({"seed": -1}, "generate: seed must be in [0, 2**64), got -1"),
        ({"seed": 0.5}, "generate: seed must be in [0, 2**64), got 0.5"),
        ({"seed": 2**64}, "generate: seed must be in [0, 2**64), got 18446744073709551616"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        generate(make_task(), **{"prompt": PROMPT, "max_new_tokens": 4, **arguments})
    assert str(error.value) == message


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_a_broken_model(temperature, value):
    task = make_task()
    with torch.no_grad():
        task.model.wte.weight[3] = value
    with pytest.raises(ValueError, match=r"^generate: logits must be below infinity, .*, got (nan|inf)$"):
        generate(task, [0], max_new_tokens=1, temperature=temperature)
