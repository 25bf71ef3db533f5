"""Classifiers and models that answer, in folders of Hugging Face's: the same logits, there and back."""

import json

import pytest
import torch
from test_hugging_face_checkpoints import SIZES, TEXT, saved
from tiny_gpt import CONFIG, make_tokens

from lspm_models.hugging_face import save_pretrained
from lspm_models.hugging_face_heads import load_head
from lspm_models.language_models import make_model
from lspm_models.tasks.sequence_classification import SequenceClassification
from oracle import compare

transformers = pytest.importorskip("transformers")
KINDS = {
    "GPT2": {"n_embd": 48, "n_layer": 3, "n_head": 2, "n_positions": 24},
    "Llama": {**SIZES, "max_position_embeddings": 24, "num_key_value_heads": 2},
    "Bert": {**SIZES, "max_position_embeddings": 24, "pad_token_id": 0},
}
LABELS = {0: "bad", 1: "so so", 2: "good"}


def theirs(kind, head, folder):
    config = getattr(transformers, f"{kind}Config")
    options = {"id2label": LABELS} if head == "SequenceClassification" else {}
    options |= {"pad_token_id": 0, **TEXT, **KINDS[kind]}
    return saved(getattr(transformers, f"{kind}For{head}")(config(**options)), folder)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_classes_are_those_of_transformers(kind, tmp_path):
    model = theirs(kind, "SequenceClassification", tmp_path / "hf")
    task, labels = load_head(tmp_path / "hf")
    assert labels == list(LABELS.values())
    tokens = make_tokens(3).clamp(min=1)
    tokens[0, 15:], tokens[1, 4:] = -1, -1
    given = {"input_ids": tokens.clamp(min=0), "attention_mask": (tokens >= 0).long()}
    plain = model(**given).logits
    compare("logits", task(tokens), model.double()(**given).logits, plain)
    save_pretrained(task, tmp_path / "ours", labels=labels)
    back = type(model).from_pretrained(tmp_path / "ours").eval()
    assert back.config.id2label == LABELS
    back.config.pad_token_id = 0
    assert torch.equal(back(**given).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_logits_of_answers_are_those_of_transformers(kind, tmp_path):
    model = theirs(kind, "QuestionAnswering", tmp_path / "hf")
    task, labels = load_head(tmp_path / "hf")
    assert labels == []
    tokens, contexts = make_tokens(2), torch.tensor([[7, 22], [4, 22]])
    given = {"input_ids": tokens}
    if kind == "Bert":
        given["token_type_ids"] = (torch.arange(24) >= contexts[:, :1]).long()
    plain, truth = model(**given), model.double()(**given)
    for ours, name in zip(task(tokens, contexts), ("start_logits", "end_logits"), strict=True):
        compare(name, ours, truth[name], plain[name])
    save_pretrained(task, tmp_path / "ours")
    back = type(model).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(back(**given).start_logits, plain.start_logits)


def test_what_is_no_head_of_theirs_is_refused(tmp_path):
    theirs("GPT2", "SequenceClassification", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    content = json.loads(path.read_text())
    for change, message in (
        (
            {"architectures": ["GPT2Model"]},
            r"architectures in .* must be one of GPT2For.*, got .'GPT2Model'.",
        ),
        ({"id2label": {"1": "a"}}, r"id2label in .* must have a label for each number, got \{'1': 'a'\}"),
        (
            {"id2label": {"0": "a", "1": "b"}},
            r"score\.weight must have .* shape \(2, 48\), got \(3, 48\)",
        ),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            load_head(tmp_path / "hf")
    task = SequenceClassification(make_model(CONFIG), 3, pooling="mean")
    with pytest.raises(ValueError, match=r"^save_pretrained: pooling must be last of this model, got mean$"):
        save_pretrained(task, tmp_path / "a", labels="abc")
    task = SequenceClassification(make_model(CONFIG), 3)
    with pytest.raises(ValueError, match=r"^save_pretrained: labels must be 3, got 2$"):
        save_pretrained(task, tmp_path / "a", labels="ab")
