"""python/generate.py as a person runs it: what it writes, and the one line it says when it cannot."""

import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_gpt import CONFIG, make_task

from lspm_models.checkpoint import save_checkpoint
from lspm_models.data.tokenizers import ByteBpe, Characters, load_tokenizer, save_tokenizer
from lspm_models.generate import generate
from lspm_models.models.gpt import GPT
from lspm_models.tasks.language_modelling import LanguageModelling

SCRIPT = Path(__file__).parents[2] / "python" / "generate.py"
ALPHABET = "abcdefghijklmnopqrstuvwxyz 床前明月光()=:\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder with one checkpoint of a random GPT over characters."""
    return make_run(tmp_path_factory.mktemp("run"))


def make_run(folder, tokenizer=None):
    tokenizer = tokenizer or Characters(ALPHABET)
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    config = {**asdict(CONFIG), "vocabulary_size": tokenizer.vocabulary_size}
    task = make_task(type(CONFIG)(**config))
    optimizer = torch.optim.AdamW(task.parameters())
    state = {"settings": {"model": config}, "random": []}
    save_checkpoint(folder / "checkpoints", 7, task, optimizer, state=state, keep=1)
    return folder


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process: exit code, standard output, standard error."""
    spec = importlib.util.spec_from_file_location("generate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGPIPE)}

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", None if stdin is None else io.StringIO(stdin))
        try:
            code = script.main()
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def expected(folder, prompt, behind=True, **arguments):
    """The texts that the library makes of a prompt, behind end_of_text or not."""
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    config = json.loads(next(folder.glob("checkpoints/*/state.json")).read_text())["settings"]["model"]
    task = make_task(type(CONFIG)(**config))
    prompt, first = tokenizer.healed(prompt)
    tokens = [tokenizer.end_of_text] * behind + tokenizer.encode(prompt)
    continuations = generate(task, tokens, first=first, stop=tokenizer.end_of_text, **arguments)
    return [prompt + tokenizer.decode(tokens) for tokens in continuations]


def test_writes_the_continuation(run, folder):
    [text] = expected(folder, "def ", max_new_tokens=200, temperature=0.8, seed=3)
    assert run(folder, "--prompt", "def ", "--seed", 3) == (0, text + "\n", "")
    assert text.startswith("def ")


def test_writes_several_continuations_with_every_option(run, folder):
    sampling = {"temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "seed": 1}
    sampling["repetition_penalty"] = 1.2
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in sampling.items()]
    texts = expected(folder, "床前", max_new_tokens=40, sequences=3, **sampling)
    headed = "".join(f"--- {i} of 3 ---\n{text}\n" for i, text in enumerate(texts, 1))
    assert run(folder, "--prompt", "床前", "--tokens", 40, "--sequences", 3, *flags) == (0, headed, "")
    assert len(set(texts)) == 3


def test_joins_the_bytes_of_a_character(run, tmp_path):
    make_run(tmp_path, ByteBpe.train(["月"], vocabulary_size=257))
    [text] = expected(tmp_path, "月", max_new_tokens=100, temperature=0.8, seed=1)
    assert run(tmp_path, "--prompt", "月", "--tokens", 100, "--seed", 1) == (0, text + "\n", "")


def test_greedy_needs_no_seed(run, folder):
    [text] = expected(folder, "def ", max_new_tokens=30, temperature=0)
    assert run(folder, "--prompt", "def ", "--tokens", 30, "--greedy") == (0, text + "\n", "")
    assert run(folder, "--prompt", "def ", "--tokens", 30, "--temperature", 0) == (0, text + "\n", "")


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_keeps_weights_in_fewer_bits(run, folder, weights):
    code, text, error = run(folder, "--prompt", "let", "--greedy", "--tokens", 10, "--weights", weights)
    assert (code, error) == (0, "") and len(text) == len("let") + 10 + 1


def test_ends_before_the_stop_text(run, folder):
    [text] = expected(folder, "ab", max_new_tokens=30, seed=5, temperature=0.8)
    stop = text[12:14]
    until = text[: 2 + text[2:].index(stop)]
    assert run(folder, "--prompt", "ab", "--tokens", 30, "--seed", 5, "--stop", stop) == (0, until + "\n", "")


def test_writes_couplets_and_says_how_many_keep_the_form(run, tmp_path):
    """A model that only ever counts on: which line it is decides the form."""
    text = "床前明月光，疑是地上霜。\n"  # noqa: RUF001
    tokenizer = Characters("".join(dict.fromkeys(text + "思")))
    make_run(tmp_path, tokenizer)
    follow = dict(pairwise(tokenizer.encode(text * 2)))

    def logits(task, features):
        chosen = [follow.get(token, 0) for token in seen[-1][:, -1].tolist()]
        return 100.0 * F.one_hot(torch.tensor(chosen), tokenizer.vocabulary_size)[:, None]

    seen = []
    with pytest.MonkeyPatch.context() as patch:
        forward = GPT.forward
        patch.setattr(GPT, "forward", lambda self, x, cache: seen.append(x) or forward(self, x, cache))
        patch.setattr(LanguageModelling, "head", lambda task, features: logits(task, features)[:, 0])
        form = "five characters, a comma, five characters and a full stop\n"
        for prompt, poems, kept in (("床前", 1, 2), ("床前", 2, 2), ("思床前", 1, 0), ("明", 1, 0)):
            whole = prompt + (text * 2).split(prompt[-1], 1)[1]
            whole = "\n".join(whole.splitlines()[:poems]) + "\n\n"
            said = f"{whole * 2}{kept} of 2 keep the form: {poems} x {form}"
            options = ("--couplets", poems, "--sequences", 2, "--seed", 1)
            assert run(tmp_path, "--prompt", prompt, *options) == (0, said, "")
        code, output, _ = run(tmp_path, "--prompt", "床前", "--couplets", 2, "--tokens", 12)
        assert code == 0 and f"0 of 1 keep the form: 2 x {form}" in output  # cut short


def test_a_prompt_may_fill_the_context(run, folder):
    (text,) = expected(folder, "a" * 24, behind=False, max_new_tokens=5, seed=1)
    assert run(folder, "--prompt", "a" * 24, "--tokens", 5, "--seed", 1) == (0, text + "\n", "")


def test_reads_the_prompt_from_standard_input(run, folder):
    [text] = expected(folder, "a\nb", max_new_tokens=20, seed=1, temperature=0.8)
    assert run(folder, "--prompt", "-", "--tokens", 20, "--seed", 1, stdin="a\nb\n") == (0, text + "\n", "")


def test_a_closed_standard_input_is_told(run, folder):
    said = "generate.py: --prompt: - stands for standard input, which must be open, got a closed one\n"
    assert run(folder, "--prompt", "-", stdin=None) == (2, "", said)


def test_begins_a_text_without_a_prompt(run, folder):
    [text] = expected(folder, "", max_new_tokens=20, seed=1, temperature=0.8)
    assert run(folder, "--tokens", 20, "--seed", 1) == (0, text + "\n", "")


def test_takes_one_checkpoint_too(run, folder):
    checkpoint = folder / "checkpoints" / "step-00000007"
    assert run(checkpoint, "--seed", 2) == run(folder, "--seed", 2)


def test_help_is_a_page_with_every_option(run):
    code, page, errors = run("--help")
    assert (code, errors) == (0, "")
    options = "prompt tokens sequences stop greedy temperature top-k top-p min-p repetition-penalty seed help"
    for option in options.split():
        assert f"--{option} " in page
    assert "MODEL [options]" in page
    assert all(len(line) <= 110 for line in page.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokns", "3"], "unknown option --tokns; did you mean --tokens?"),
        (["--tokens", "many"], "--tokens: must be a whole number, got 'many'"),
        (["--tokens", "0"], "generate: max_new_tokens must be an integer of at least 1, got 0"),
        (["--sequences", "0"], "generate: sequences must be an integer of at least 1, got 0"),
        (["--temperature", "-1"], "generate: temperature must be finite and at least 0, got -1.0"),
        (["--top-k", "0"], "generate: top_k must be an integer of at least 1, got 0"),
        (["--top-p", "1.5"], "generate: top_p must be in (0, 1], got 1.5"),
        (["--min-p", "-1"], "generate: min_p must be in [0, 1], got -1.0"),
        (["--repetition-penalty", "0"], "generate: repetition_penalty must be finite and above 0, got 0.0"),
        (["--seed", "-1"], "generate: seed must be in [0, 2**64), got -1"),
        (["--prompt", ""], "generate: prompt must be 1 to 24 tokens, the context, got 0"),
        (["--prompt", "a" * 25], "generate: prompt must be 1 to 24 tokens, the context, got 25"),
        (["--couplets", "0"], "generate: couplets must be at least 1, got 0"),
        (["--couplets", "1", "--stop", "a"], "generate: stop must be absent beside couplets, got 'a'"),
        (["--couplets", "1", "--chat", "a"], "generate: chat must be absent beside couplets, got 'a'"),
        (["--stop", ""], "TextStream: stop must be at least one character, got ''"),
    ],
    ids=str,
)
def test_says_in_one_line_what_is_wrong(run, folder, arguments, message):
    assert run(folder, *arguments) == (2, "", f"generate.py: {message}\n")


def test_asks_for_a_run(run):
    assert run() == (2, "", "generate.py: the following arguments are required: MODEL\n")


def test_refuses_a_folder_that_is_not_there(run, tmp_path):
    message = "must be a run folder or a checkpoint, got no such folder"
    assert run(tmp_path / "none") == (2, "", f"generate.py: checkpoint: {tmp_path / 'none'} {message}\n")


def test_refuses_the_folder_of_a_gguf_file(run, tmp_path):
    (tmp_path / "tiny.gguf").touch()
    said = f"generate.py: gguf: {tmp_path} must be a GGUF file, got the folder of tiny.gguf\n"
    assert run(tmp_path, "--prompt", "a") == (2, "", said)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", None], ids=["cut", "empty", "missing"]
)
def test_refuses_a_broken_checkpoint(run, tmp_path, name, damage):
    file = make_run(tmp_path) / "checkpoints" / "step-00000007" / name
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    code, output, errors = run(tmp_path)
    assert (code, output) == (2, "")
    is_json = name == "state.json" and damage is not None
    assert errors.startswith(
        f"generate.py: json: {file} must be JSON" if is_json else "generate.py: checkpoint: "
    )
    assert errors.count("\n") == 1
    assert str(file.parent) in errors


def test_streams_and_ends_quietly_when_its_reader_has_enough(folder):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, SCRIPT, folder, "--prompt", "床", "--tokens", "1000000000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.read(10).decode(errors="ignore").startswith("床")
        process.stdout.close()
        assert process.wait(timeout=60) == -signal.SIGPIPE
        assert process.stderr.read() == b""
