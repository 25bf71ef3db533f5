"""BERT: our kernels against the reference, in a step and over a training run, and what the model promises."""

import inspect
import math
import textwrap
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from tiny_bert import BERT, make_bert, make_inputs, make_targets, masked_step
from tiny_gpt import check_step, make_tokens

from lspm_kernels import use_backend
from lspm_models import language_models
from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.masking import Masking
from lspm_models.data.tokenizers import Characters
from lspm_models.models.bert import Bert, BertConfig
from lspm_models.models.operations import FUSED, PLAIN
from oracle import compare

NONE = torch.zeros(1, 2, dtype=torch.int64)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


@pytest.mark.parametrize("ops", [FUSED, PLAIN], ids=["fused", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_agrees_with_the_reference(ops, dtype):
    inputs = make_inputs()
    ours = make_bert(ops=ops).to(dtype)
    eager = make_bert().to(dtype)
    truth = make_bert().to(dtype).double()
    logits, our_step = ours(*inputs), masked_step(ours, inputs[0])
    with use_backend("reference"):
        compare("logits", logits, truth(*inputs), eager(*inputs))
        check_step(our_step, masked_step(truth, inputs[0]), masked_step(eager, inputs[0]), dtype)


def test_autocast_is_as_accurate_as_the_reference_under_it():
    tokens = make_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        ours, logits = masked_step(make_bert(), tokens), make_bert()(tokens)
        with use_backend("reference"):
            eager = masked_step(make_bert(), tokens)
    with use_backend("reference"):
        truth = masked_step(make_bert().double(), tokens)
    assert (logits.dtype, ours[0].dtype) == (torch.bfloat16, torch.float32)
    check_step(ours, truth, eager, torch.bfloat16)


@pytest.mark.long
def test_compiles_to_one_graph():
    task, tokens = make_bert(replace(BERT, layers=1)), make_tokens()
    eager = masked_step(task, tokens)
    task.loss = torch.compile(task.loss, fullgraph=True)
    compiled = masked_step(task, tokens)
    with use_backend("reference"):
        truth = masked_step(make_bert(replace(BERT, layers=1)).double(), tokens)
    check_step(compiled, truth, eager, torch.float32)


def test_gradient_checkpointing_changes_nothing():
    config, tokens = replace(BERT, dropout=0.2), make_tokens()

    def seeded_step(**arguments):
        task = make_bert(config, **arguments)
        torch.manual_seed(3)
        return masked_step(task, tokens)

    (loss, gradients), (again, gradients_again) = seeded_step(), seeded_step(gradient_checkpointing=True)
    assert torch.equal(loss, again)
    for a, b in zip(gradients, gradients_again, strict=True):
        assert torch.equal(a, b)


def bert(weights, tokens, types, seen, config):
    """The features and logits of one text by BERT's formulas, a head at a time, from a float64 state dict."""

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + config.eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def act(x):
        inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
        return {
            "gelu": 0.5 * x * (1 + torch.erf(x / 2**0.5)),
            "gelu_tanh": 0.5 * x * (1 + torch.tanh(inner)),
            "relu": x.clamp(min=0),
            "silu": x * x.sigmoid(),
        }[config.activation]

    e = "model.embeddings"
    table = weights[f"{e}.word_embeddings.weight"]
    x = table[tokens] + weights[f"{e}.position_embeddings.weight"][: len(tokens)]
    x = norm(x + weights[f"{e}.token_type_embeddings.weight"][types], f"{e}.LayerNorm")
    for layer in range(config.layers):
        h = f"model.encoder.layer.{layer}"
        heads = [
            linear(x, f"{h}.attention.self.{n}").chunk(config.heads, -1) for n in ("query", "key", "value")
        ]
        results = []
        for q, k, v in zip(*heads, strict=True):
            scores = (q @ k.T / q.shape[-1] ** 0.5).masked_fill(seen == 0, -math.inf)
            results.append(scores.softmax(-1) @ v)
        added = linear(torch.cat(results, -1), f"{h}.attention.output.dense")
        x = norm(x + added, f"{h}.attention.output.LayerNorm")
        added = linear(act(linear(x, f"{h}.intermediate.dense")), f"{h}.output.dense")
        x = norm(x + added, f"{h}.output.LayerNorm")
    p = "cls.predictions"
    hidden = norm(act(linear(x, f"{p}.transform.dense")), f"{p}.transform.LayerNorm")
    return x, hidden @ table.T + weights[f"{p}.bias"], linear(x[0], "model.pooler.dense").tanh()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_computes_the_formulas_of_bert(activation):
    config = replace(BERT, activation=activation)
    tokens, mask, types = make_inputs()
    with use_backend("reference"):
        task = make_bert(config).double()
        features, logits = task.model(tokens, mask, types), task(tokens, mask, types)
        for i in range(2):
            truth = bert(task.state_dict(), tokens[i], types[i], mask[i], config)
            torch.testing.assert_close((features[i], logits[i], task.model.pooled(features)[i]), truth)


def test_what_stands_at_padding_is_never_seen():
    task, (tokens, mask, types) = make_bert().eval(), make_inputs()
    features = task.model(tokens, mask, types)
    short = task.model(tokens[:1, :17], token_types=types[:1, :17])
    torch.testing.assert_close(features[:1, :17], short)
    other = tokens.clone()
    other[0, 17:] = (other[0, 17:] + 1) % BERT.vocabulary_size
    assert torch.equal(task.model(other, mask.bool(), types)[0, :17], features[0, :17])
    assert torch.equal(task.model(tokens, torch.ones_like(mask), types)[1], features[1])


def test_every_token_sees_both_sides():
    task, tokens = make_bert(), make_tokens(batch=1)
    features = task.model(tokens)
    for changed in (0, 11, 23):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % BERT.vocabulary_size
        assert (task.model(other) != features).any(-1).all()


def test_the_head_sees_what_was_hidden_alone():
    task, tokens = make_bert(), make_tokens()
    targets = make_targets(tokens)
    counts = targets != -100
    rows = []
    task.cls["predictions"].register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    loss, sums = task.evaluate(tokens, targets)
    assert rows == [int(counts.sum())]
    torch.testing.assert_close(task.loss(tokens, targets), loss)
    logits = task(tokens)[counts]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets[counts]))
    found = (logits.argmax(-1) == targets[counts]).sum()
    assert sums.tolist() == [found, counts.sum()]
    assert task.metrics([3.0, 4.0]) == {"accuracy": 0.75}
    assert task.loss(tokens, torch.full_like(tokens, -100)).isnan()


def train(config, steps=30):
    """The losses of a character model on the source of a module of the standard library."""
    text = inspect.getsource(textwrap)
    tokenizer = MaskTokenizer.of(Characters.train([text], 100))
    ids, masking = np.array(tokenizer.encode(text)), Masking(tokenizer, 0.15)
    torch.manual_seed(0)
    task = language_models.make_task(replace(config, vocabulary_size=tokenizer.vocabulary_size))
    optimizer, generator = torch.optim.AdamW(task.parameters(), lr=3e-3), np.random.default_rng(0)
    losses = []
    for _ in range(steps):
        starts = generator.integers(len(ids) - config.context, size=(32, 1))
        loss = task.loss(*masking.hide(ids[starts + np.arange(config.context - 2)], generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def test_trains_like_the_reference():
    config = BertConfig(128, 32, layers=2, heads=2, width=64)
    ours = train(config)
    with use_backend("reference"):
        reference = train(config)
    assert ours[0] > 4.2  # log(77) = 4.34: it begins with no idea
    assert ours[-5:].mean() < 3.4  # on its way to 3.04, the entropy of this text's characters
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=0)


def test_names_are_those_of_hugging_face():
    layer = [
        "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
        "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
    ]  # fmt: skip
    tables = [f"embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")]
    parts = ["embeddings.LayerNorm", *(f"encoder.layer.{i}.{name}" for i in range(3) for name in layer)]
    model = [*tables, *(f"{name}.{kind}" for name in [*parts, "pooler.dense"] for kind in ("weight", "bias"))]
    transform = [f"transform.{name}.{kind}" for name in ("dense", "LayerNorm") for kind in ("weight", "bias")]
    head = [f"cls.predictions.{name}" for name in ("bias", *transform)]
    assert list(make_bert().state_dict()) == [*(f"model.{name}" for name in model), *head]
    assert list(Bert(BERT).state_dict()) == model


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (BertConfig(30_522, 512, 12, 12, 768, pooler=True), 109_482_240),  # bert-base-uncased
        (BertConfig(30_522, 512, 24, 16, 1024, pooler=True), 335_141_888),  # bert-large-uncased
        (BertConfig(30_522, 512, 6, 12, 384, pooler=True), 22_713_216),  # all-MiniLM-L6-v2
    ],
    ids=["base", "large", "minilm"],
)
def test_has_as_many_parameters_as_the_published(config, count):
    with torch.device("meta"):
        assert Bert(config).parameter_count == count


def test_begins_as_bert_does():
    torch.manual_seed(0)
    for name, parameter in language_models.make_task(BertConfig(500, 400, 2, 2, 128)).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            rel = 0.03 if parameter.numel() > 1000 else 0.15
            assert parameter.std().item() == pytest.approx(0.02, rel=rel)


def test_dropout_is_for_training_only():
    task, tokens = make_bert(replace(BERT, dropout=0.5)), make_tokens()
    assert not torch.equal(task(tokens), task(tokens))
    assert torch.equal(task.eval()(tokens), make_bert().eval()(tokens))
    for part in task.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    assert not torch.equal(task.train()(tokens), task(tokens))  # probabilities are dropped too


def test_a_pooler_stays_as_it_is():
    task = make_bert()
    masked_step(task, make_tokens())
    assert task.model.pooler["dense"].weight.grad is None
    assert all(p.requires_grad == ("pooler" not in name) for name, p in task.named_parameters())


def test_config_survives_a_dictionary():
    assert BertConfig(**asdict(BERT)) == BERT
    assert language_models.from_settings(language_models.to_settings(BERT), "there") == BERT
    assert BertConfig(61, 24, 1, 1, 48).hidden == 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 0}, "BertConfig: layers must be a positive integer, got 0"),
        ({"hidden": -1}, "BertConfig: hidden must be a positive integer, got -1"),
        ({"token_types": 0}, "BertConfig: token_types must be a positive integer, got 0"),
        ({"heads": 5}, "BertConfig: width must be a multiple of heads (5), got 48"),
        ({"dropout": 1.0}, "BertConfig: dropout must be in [0, 1), got 1.0"),
        ({"activation": "x"}, "BertConfig: activation must be one of relu, silu, gelu, gelu_tanh, got 'x'"),
        ({"pooler": 1}, "BertConfig: pooler must be true or false, got 1"),
        ({"eps": 0.0}, "BertConfig: eps must be positive and finite, got 0.0"),
    ],
)
def test_config_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        replace(BERT, **arguments)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([[0, 61]]),), "Bert: tokens must be in [0, 61), got 61"),
        ((torch.zeros(1, 25).long(),), "Bert: tokens must fit the context of 24, got 25"),
        ((torch.zeros(4),), "Bert: tokens must be (B, T) int64, got (4,) float32"),
        ((*make_inputs()[:1], torch.ones(2)), "Bert: mask must have the shape of tokens (2, 24), got (2,)"),
        ((NONE, None, torch.tensor([[0, 2]])), "Bert: token_types must be in [0, 2), got 2"),
    ],
)
def test_model_refuses(arguments, message):
    with pytest.raises(ValueError) as error:
        Bert(BERT)(*arguments)
    assert str(error.value) == message


def test_refuses_what_it_has_not():
    message = r"^MaskedLanguageModelling.loss: targets must have the shape of tokens .*, got \(2, 23\)$"
    with pytest.raises(ValueError, match=message):
        make_bert().loss(make_tokens(), make_tokens(length=23))
    with pytest.raises(ValueError, match=r"^Bert: pooled must be of a model with a pooler, got pooler=F"):
        Bert(replace(BERT, pooler=False)).pooled(torch.zeros(1, 2, 48))
