"""Fine-tuning a part of a language model: what is frozen, adapters from the scripts, and their mistakes."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace

import finetune
import generate as script
import pretrain
import pytest
import torch
from safetensors.torch import save_file
from tiny_gpt import CONFIG, LLAMA, make_task
from tiny_task import configuration, counting

from lspm_models import train
from lspm_models.checkpoint import checkpoints, read_tensors
from lspm_models.hugging_face import load_pretrained, save_pretrained
from lspm_models.models.freezing import freeze, freeze_stages
from lspm_models.models.lora import lora_layers
from lspm_models.run_log import read_log
from lspm_models.sources import load_language_model
from lspm_models.train import fit
from lspm_models.tuning import Tuning

SMALL = "--context 16 --layers 2 --heads 2 --width 16 --tokenizer character".split()
SHORT = (
    "--batch-size 4 --steps 6 --evaluate-every 3 --checkpoint-every 2 --evaluation-batches 2 --device cpu"
).split()
LORA = (
    "--lora-rank 2 --lora-alpha 4 --lora-dropout 0.1 --lora-targets *attn.c_attn *mlp.* --learning-rate 0.1"
).split()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a text and a run."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100)
    with pytest.MonkeyPatch.context() as patch:
        corpus = ["--corpus", str(folder / "fox.txt"), "--out", str(folder / "run")]
        patch.setattr("sys.argv", ["pretrain.py", *SMALL, *SHORT, *corpus])
        assert pretrain.main() == 0
    return folder


@pytest.fixture
def tune(run, base, tmp_path, monkeypatch):
    """Fine-tunes the run with options: exit code, stdout, stderr."""
    monkeypatch.setattr(script, "signal", object())  # no handler outlives a test

    def tune(name, *options, init=base / "run"):
        begun = ("--init", init, "--corpus", base / "fox.txt", *SHORT)
        return run(finetune, *begun, *options, "--out", tmp_path / name)

    return tune


def losses(folder):
    return [(row["step"], row["train_loss"], row["validation_loss"]) for row in read_log(folder / "log.csv")]


def newest(folder):
    return read_tensors(checkpoints(folder / "checkpoints")[-1] / "model.safetensors")


def changed(one, other):
    return {name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])}


@pytest.mark.parametrize("patterns", [["model.h.1", "*ln_f*", "model.wte"], ["*attn*", "*.bias"]], ids=str)
def test_what_is_frozen_has_no_gradient_no_state_and_keeps_its_bits(patterns, tmp_path):
    task = make_task(replace(CONFIG, vocabulary_size=16))
    freeze(task, patterns)
    before = {name: parameter.detach().clone() for name, parameter in task.named_parameters()}
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    if "*.bias" in patterns:
        assert frozen == {name for name in before if ".attn." in name or name.endswith(".bias")}
    else:
        assert frozen == {name for name in before if re.match(r"model\.(h\.1|ln_f|wte)\.", name)}
    fit(task, counting(), configuration(), tmp_path)
    after = dict(task.named_parameters())
    assert changed(before, after) == before.keys() - frozen
    assert all(after[name].grad is None for name in frozen)
    state = read_tensors(checkpoints(tmp_path / "checkpoints")[-1] / "training.safetensors")
    with_state = {name.split("/")[1] for name in state if name.startswith("optimizer/")}
    assert with_state == before.keys() - frozen
    assert newest(tmp_path).keys() == before.keys()  # the run stands alone


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["gpt", "llama"])
def test_stages_are_the_embeddings_and_the_blocks(config):
    task = make_task(config)
    assert freeze_stages(task.model, 0) == []
    freeze_stages(task.model, 2)
    frozen = {name for name, parameter in task.named_parameters() if not parameter.requires_grad}
    assert {".".join(name.split(".")[:3]) for name in frozen} == (
        {"model.wte.weight", "model.wpe.weight", "model.h.0"}
        if config is CONFIG
        else {"model.embed_tokens.weight", "model.layers.0"}
    )
    with pytest.raises(
        ValueError, match=r"^freeze: stages must be 0 to 4, the stem or the embeddings and 3 more, got 5$"
    ):
        freeze_stages(task.model, 5)


def test_finetune_freezes(tune, base, tmp_path):
    code, out, err = tune("a", "--freeze", "model.w?e", "*.0.attn")
    assert (code, err) == (0, "")
    assert re.search(r"model      7\.33k parameters, 5\.50?k of which train: 2 layers", out)
    moved = changed(newest(base / "run"), newest(tmp_path / "a"))
    assert moved and not any(re.match(r"model\.(w|h\.0\.attn)", name) for name in moved)
    assert tune("b", "--freeze", "2")[0] == 0
    assert {name.split(".")[1] for name in changed(newest(base / "run"), newest(tmp_path / "b"))} == {
        "h",
        "ln_f",
    }
    assert not any(".0." in name for name in changed(newest(base / "run"), newest(tmp_path / "b")))


def test_finetune_learns_adapters_goes_on_exactly_and_generates(tune, run, base, tmp_path, monkeypatch):
    code, out, err = tune("whole", *LORA)
    assert (code, err) == (0, "")
    assert re.search(r"model      \d\.\d+k parameters, 896 of which train: 2 layers", out)
    assert f"adapter    {tmp_path}/whole/adapter, as peft reads it" in out
    rate = train.learning_rate

    def interrupted(done, config):
        if done == 4 / 6:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(done, config)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        code, out, _ = tune("parts", *LORA)
    assert (code, "interrupted at step 4, which is saved" in out) == (130, True)
    assert run(finetune, "--resume", tmp_path / "parts")[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert not changed(newest(tmp_path / "parts"), newest(tmp_path / "whole"))
    message = "finetune.py: checkpoint: tuning.lora_rank must be 2 as in .*, got 3\n"
    code, _, err = run(finetune, "--resume", tmp_path / "whole", "--lora-rank", 3)
    assert code == 2 and re.fullmatch(message, err)

    stored, weights = newest(tmp_path / "whole"), newest(base / "run")
    assert len(stored) == 2 * 2 * 3 and all(name.split(".")[-1] in ("lora_A", "lora_B") for name in stored)
    task, _ = load_language_model(tmp_path / "whole")
    assert not lora_layers(task) and all(parameter.requires_grad for parameter in task.parameters())
    for name, weight in task.state_dict().items():
        a, b = (stored.get(name.replace("weight", matrix)) for matrix in ("lora_A", "lora_B"))
        expected = weights[name] if a is None else weights[name] + 2 * (b @ a)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)
        assert (a is None) == torch.equal(weight, weights[name])
    save_pretrained(task, tmp_path / "hf")  # the sum as a whole model
    assert not changed(load_pretrained(tmp_path / "hf").state_dict(), task.state_dict())

    options = ("--prompt", "the", "--greedy", "--tokens", 30)
    said = [run(script, folder, *options) for folder in (base / "run", tmp_path / "whole")]
    assert said[0][0] == said[1][0] == 0 and said[0] != said[1]
    assert tune("more", *LORA, init=tmp_path / "whole")[0] == 0  # adapters beside the sums
    assert tune("still", "--freeze", "model.h", init=tmp_path / "whole")[0] == 0
    kept = changed(newest(tmp_path / "still"), load_language_model(tmp_path / "whole")[0].state_dict())
    assert kept == {"model.wte.weight", "model.wpe.weight", "model.ln_f.weight", "model.ln_f.bias"}


def test_adapters_without_their_weights_say_so(tune, run, base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "moved")
    assert tune("a", "--lora-rank", 2, init=tmp_path / "moved")[0] == 0
    shutil.rmtree(tmp_path / "moved")
    code, _, err = run(script, tmp_path / "a")
    message = (
        r"checkpoint: .*/moved/.*, which the adapters in .*/a/.* belong to, must be there, got no such path\n"
    )
    assert code == 2 and re.fullmatch(rf"generate\.py: {message}", err)
    code, _, err = run(finetune, "--resume", tmp_path / "a")
    message = r"checkpoint: .*/moved/.* must be a run folder or a checkpoint, got no such folder\n"
    assert code == 2 and re.fullmatch(rf"finetune\.py: {message}", err)


def test_adapters_are_refused_beside_other_weights(tune, run, base, tmp_path):
    shutil.copytree(base / "run", tmp_path / "base")
    assert tune("a", "--lora-rank", 2, init=tmp_path / "base")[0] == 0
    path = checkpoints(tmp_path / "base" / "checkpoints")[-1] / "model.safetensors"
    stored = read_tensors(path)
    stored["model.wpe.weight"] = stored["model.wpe.weight"] + 1
    save_file(stored, path)
    message = (
        r"checkpoint: weights of the model must be those that the adapters in .*/a/checkpoints/.* "
        r"learned beside, got others in model\.wpe\.weight\n"
    )
    code, _, err = run(script, tmp_path / "a")
    assert code == 2 and re.fullmatch(rf"generate\.py: {message}", err)
    code, _, err = run(finetune, "--resume", tmp_path / "a", "--steps", 8)
    assert code == 2 and re.fullmatch(rf"finetune\.py: {message}", err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--lora-rank 0", "tuning: lora_rank must be a whole number of at least 1, got 0"),
        ("--lora-rank 2 --lora-alpha -1", "tuning: lora_alpha must be positive and finite, got -1.0"),
        ("--lora-rank 2 --lora-dropout 1", "tuning: lora_dropout must be in [0, 1), got 1.0"),
        ("--lora-dropout 0.5", "tuning: lora_dropout must be beside lora_rank, got 0.5 alone"),
        (
            "--lora-rank 2 --freeze *",
            "tuning: freeze must be absent beside lora_rank, which freezes all, got *",
        ),
        (
            "--lora-rank 2 --lora-targets lm_head",
            "add_lora: targets must match linear layers, got 'lm_head', which matches none; nearest: "
            "model.h.*.mlp.c_fc, model.h.*.mlp.c_proj, model.h.*.attn.c_proj",
        ),
        ("--freeze 9", "freeze: stages must be 0 to 3, the stem or the embeddings and 2 more, got 9"),
        (
            "--freeze model.wte model.h.7",
            "freeze: patterns must match parameters or modules, got 'model.h.7', which matches none; "
            "nearest: model.h.*, model.h, model.h.*.mlp",
        ),
        ("--freeze model", "freeze: patterns must leave parameters to train, got model"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(tune, tmp_path, options, message):
    code, _, err = tune("a", *options.split())
    assert (code, err) == (2, f"finetune.py: {message}\n")
    assert not (tmp_path / "a").exists()


def test_without_options_everything_learns(tune, tmp_path):
    assert not Tuning() and Tuning(freeze=["2"]) and Tuning(lora_rank=1)
    _, out, _ = tune("a")
    assert re.search(r"model      7\.33k parameters: 2 layers", out)
    state = json.loads((checkpoints(tmp_path / "a" / "checkpoints")[-1] / "state.json").read_text())
    asked = json.loads((tmp_path / "a" / "config.json").read_text())
    assert "tuning" not in state["settings"] and "tuning" not in asked  # as in runs from before there was any
