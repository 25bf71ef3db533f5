"""`python -m lspm_kernels bench`, as a user runs it: models of a file, of transformers, of torchvision."""

import json
import subprocess
import sys

import pytest
import torch

from lspm_kernels import bench, bench_target, bench_times
from lspm_kernels.__main__ import main
from lspm_kernels.bench_check import Comparison, compare
from lspm_kernels.bench_times import measure

MODELS = """
import torch
from torch import nn

class Tiny(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16))

class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Tiny()
    def forward(self, x, scale=1.0):
        return {"y": nn.functional.dropout(self.inner(x), 0.5, self.training) * scale, "steps": 3}

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(7, 16), nn.LayerNorm(16)
    def forward(self, ids, scale):
        return self.norm(self.table(ids)) * scale

class Counts(nn.Module):
    def forward(self, x):
        return (x > 0).sum()

made = Tiny()
number = 3
def broken():
    raise OSError("no  such\\nfile")
def given():
    return (torch.randn(5, 16),), {"scale": 2.0}
def alone():
    return {"x": torch.randn(5, 16)}
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """bench of a model in a file of the current folder: exit code, stdout and stderr."""
    (tmp_path / "models_of_mine.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_times, "_SECONDS_A_TURN", 0)  # one call a turn

    def run(model, *options):
        code = main(["bench", model.replace("mine:", "models_of_mine:"), "--rounds", "2", *options])
        return code, *capsys.readouterr()

    yield run
    sys.modules.pop("models_of_mine", None)


def test_as_a_command(tmp_path):
    (tmp_path / "models_of_mine.py").write_text(MODELS)
    command = [sys.executable, "-m", "lspm_kernels", "bench"]
    options = ["--input", "6,16", "--training", "--rounds", "2", "--threads", "1", "--json", "found.json"]
    command += ["models_of_mine:Tiny", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "models_of_mine:Tiny (Tiny, 0.0 M parameters)"
    assert lines[1] == "training step, float32, 1 threads, inputs: 0 (6, 16) float32"
    assert lines[2].startswith("checked in train: 7 results; each may err 2 x what the model itself errs")
    assert lines[3].startswith("equal: all do. Greatest difference from float64 of any result: ")
    assert [line.split()[0] for line in lines[5:8]] == ["median", "before", "after"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["replaced"] and f"replaced: {len(found['replaced'])} modules" in lines
    assert set(found["variants"]) == {"before", "after"}
    assert all(row["rounds"] == 2 and row["median_ms"] > 0 for row in found["variants"].values())
    assert found["variants"]["before"]["speedup"] == 1
    assert found["threads"] == 1 and found["options"]["training"]


@pytest.mark.parametrize(
    "model, options, says",
    [
        ("mine:made", ["--input", "6,16", "--dtype", "bfloat16"], "inference, bfloat16"),
        ("mine:Tiny", ["--input", "6,16", "--autocast", "bfloat16"], "inference, autocast bfloat16"),
        ("mine:Dropping", ["--inputs", "models_of_mine:given"], "inputs: 0 (5, 16) float32"),
        ("mine:Dropping", ["--inputs", "models_of_mine:alone", "--training"],
         "checked in eval, as in training the model drops at random: 7 results"),
        ("mine:Words", ["--input", "int64:2,9", "--input", "1"], "0 (2, 9) int64; 1 (1,) float32"),
        ("mine:Words", ["--input", "int32:2,9@3", "--input", "1", "--training"], "0 (2, 9) int32"),
    ],
)  # fmt: skip
def test_models_of_a_file(command, model, options, says):
    code, out, err = command(model, *options)
    assert (code, err) == (0, "")
    assert says in out and "equal: all do" in out and "\nafter " in out


def test_torch_compile_and_a_plot(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: model)
    code, out, _ = command("mine:Tiny", "--input", "6,16", "--compile", "--plot", "times.png")
    assert code == 0 and "\ncompile " in out
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["gpt2", *(pytest.param(n, marks=pytest.mark.long) for n in ("vit", "t5"))])
def test_a_folder_of_transformers(command, tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = {
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=32, n_layer=1, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2
        ),
        "vit": lambda: transformers.ViTConfig(image_size=32, patch_size=8, **sizes),
        "t5": lambda: transformers.T5Config(
            d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, vocab_size=97
        ),
    }[kind]()
    config.save_pretrained(tmp_path / "folder")
    code, out, err = command("hf:folder", "--training")
    assert code == 0, err
    shape = "pixel_values (4, 3, 32, 32) float32" if kind == "vit" else "input_ids (4, 128) int64"
    assert f"inputs: {shape}; labels (4" in out
    assert "attention, by transformers' interface" in out
    if kind == "gpt2":
        code, out, err = command("hf:folder", "--input", "int64:2,20")
        assert code == 0 and "inputs: input_ids (2, 20) int64\n" in out


def test_a_backbone_of_torchvision_is_not_downloaded(monkeypatch):
    api = pytest.importorskip("torchvision").models._api
    monkeypatch.setattr(api, "load_state_dict_from_url", lambda url, **_: pytest.fail(url))
    model = bench_target.load("torchvision:lraspp_mobilenet_v3_large")
    assert type(model).__name__ == "LRASPP"


def test_a_model_of_torchvision(command):
    pytest.importorskip("torchvision")
    code, out, _ = command("torchvision:squeezenet1_1", "--input", "1,3,32,32", "--rounds", "1")
    assert code == 0 and "SqueezeNet, 1.2 M parameters" in out


def test_a_wrong_model_has_no_time(command, monkeypatch, tmp_path):
    accelerate = bench.accelerate

    def spoil(model, **options):
        report = accelerate(model, **options)
        with torch.no_grad():
            model[2].bias[3] += 1e-3
        return report

    monkeypatch.setattr(bench, "accelerate", spoil)
    code, out, _ = command("mine:Tiny", "--input", "6,16", "--json", "found.json")
    assert code == 1
    assert "NOT equal: 1 results err more; not timed. The first:\n  output: " in out
    assert "median" not in out and not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    "model, options, message",
    [
        ("mine", [], "MODEL must be 'package.module:factory', 'hf:<model type or folder>' or"
         " 'torchvision:<model>', got 'mine'"),
        ("nowhere.at_all:made", [],
         "import nowhere.at_all raised ModuleNotFoundError: No module named 'nowhere'"),
        ("mine:missing", [], "MODEL must name what models_of_mine has, got 'missing'"),
        ("mine:number", [], "MODEL must be or return a torch.nn.Module, got int"),
        ("mine:broken", [], "models_of_mine:broken() raised OSError: no such file"),
        ("hf:nothing", [], "MODEL must be hf: and a model type of transformers or a folder, got 'nothing'"),
        ("torchvision:resnet1", [],
         "MODEL must be one of torchvision.models.list_models(), got 'resnet1'"),
        ("mine:Tiny", [], "--input must be given for this MODEL, as in --input 8,3,224,224, got none"),
        ("mine:Tiny", ["--input", "6x16"], "--input must be sizes, as 8,3,224,224 or int64:2,512 or"
         " int64:2,512@1000 (integers below 1000), got '6x16'"),
        ("mine:Tiny", ["--input", "real:6,16"], "--input must be sizes, as 8,3,224,224 or int64:2,512 or"
         " int64:2,512@1000 (integers below 1000), got 'real:6,16'"),
        ("mine:Tiny", ["--input", f"{2**60},16"], f"--input {2**60},16 raised"),
        ("mine:Tiny", ["--inputs", "alone"], "--inputs must be 'package.module:name', got 'alone'"),
        ("mine:Tiny", ["--input", "6,16", "--rounds", "0"], "--rounds must be at least 1, got 0"),
        ("mine:Tiny", ["--input", "6,16", "--threads", "-1"], "--threads must be at least 1, got -1"),
        ("mine:Tiny", ["--input", "6,15"], "models_of_mine:Tiny, called with these inputs, raised"
         " RuntimeError: mat1 and mat2 shapes cannot be multiplied (6x15 and 16x32)"),
        ("mine:Counts", ["--input", "6"], "MODEL must return tensors of floating-point numbers, got none"),
        ("mine:Counts", ["--input", "6", "--training"],
         "MODEL must return a tensor with a gradient for --training, got none"),
        ("mine:Tiny", ["--input", "6,16", "--json", "no/folder.json"], "writing a file raised"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(command, model, options, message):
    code, _, err = command(model, *options)
    assert code == 2
    assert err.startswith(f"bench: {message}") and err.count("\n") == 1
    assert err == f"bench: {message}\n" or message.endswith("raised")


def test_an_option_that_is_none_is_one_line(capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["bench", "hf:gpt2", "--dtype", "bf16"])
    choices = "--dtype: invalid choice: 'bf16' (choose from 'float32', 'bfloat16', 'float16')"
    assert capsys.readouterr().err == f"python -m lspm_kernels bench: {choices}; see --help\n"


def test_the_rule():
    ones, eps = torch.ones(3, dtype=torch.float64), torch.finfo(torch.float32).eps
    before, truth = {"a": ones + 1e-5, "b": ones}, {"a": ones, "b": ones}
    found = {c.name: c for c in compare(before, {"a": ones - 2e-5, "b": ones[:2]}, truth, torch.float32)}
    assert found["a"].holds and found["a"].allowed == pytest.approx(2e-5 + eps)
    assert found["b"] == Comparison("b", 0.0, float("inf"), eps) and not found["b"].holds
    assert not compare(before, {"a": ones + 3e-5, "b": ones}, truth, torch.float32)[0].holds
    broken = {"a": ones / 0, "b": ones}
    assert not compare(before, broken, truth, torch.float32)[0].holds
    assert all(c.holds for c in compare(broken, broken, truth, torch.float32))  # it was so before


def test_rounds_are_interleaved_and_reversed():
    seen = []
    turns = {name: lambda _, name=name: (seen.append(name), 0.1)[1] for name in "ab"}
    rows = measure(turns, 3, torch.device("cpu"))
    assert seen[4:10] == ["a", "b", "b", "a", "a", "b"]  # behind two of warm-up, before those of memory
    assert rows["b"]["speedup"] == 1 and rows["b"]["median_ms"] == pytest.approx(100)
