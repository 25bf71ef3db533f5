"""Config files: checked like flags, and the bundled ones."""

import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pretrain
import pytest
import torch

from lspm_models.image_job import ImageJob
from lspm_models.jobs import job_of
from lspm_models.models.resnet import ResNet
from lspm_models.options import Parser, errors_in_one_line, merge, read_config
from lspm_models.scene_job import JOBS
from lspm_models.text_job import TextJob
from lspm_models.text_options import Text

CONFIGS = Path(pretrain.__file__).parent / "configs"
SECTIONS = TextJob.sections


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "[model]\nwidht = 3",
            "config: model.widht must be an option, got an unknown one; did you mean width?",
        ),
        ("[models]\nwidth = 3", "config: section must be one of model, data, training, got 'models'"),
        ("model = 'llama'", "config: model must be a section of options, got 'llama'"),
        ("[model]\nwidth = '3'", "config: model.width must be a whole number, got '3'"),
        ("[model]\nbias = 1", "config: model.bias must be true or false, got 1"),
        ("[training]\nclip = 'no'", "config: training.clip must be a number, got 'no'"),
    ],
)
def test_config_files_are_checked(tmp_path, content, message):
    (tmp_path / "c.toml").write_text(content)
    with pytest.raises(ValueError) as error:
        merge(SECTIONS, [read_config(tmp_path / "c.toml")])
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.toml", "[model\n", "must be TOML or JSON, got "),
        ("deep.json", "[" * 100_000, "must be TOML or JSON, got maximum recursion depth exceeded"),
        ("list.json", "[1, 2]", r"must hold sections with options, got \[1, 2\]$"),
    ],
)
def test_a_config_file_that_is_none(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"^config: .*{name} {message}"):
        read_config(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("no room"),
        RuntimeError("can't allocate memory: no room"),
    ],
    ids=["python", "gpu", "cpu"],
)
def test_too_little_memory_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as end, errors_in_one_line("pretrain.py"):
        raise error
    said = capsys.readouterr().err
    assert said.startswith("pretrain.py: memory must suffice for what is asked for, got too little: ")
    assert (end.value.code, said.count("\n"), said[-8:]) == (1, 1, "no room\n")
    with pytest.raises(RuntimeError, match="another"), errors_in_one_line("pretrain.py"):
        raise RuntimeError("another")


def test_what_a_terminal_cannot_show_is_told_in_escapes(monkeypatch):
    with TextIOWrapper(BytesIO(), "ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        Parser("", [])
        print("né \udce9", flush=True)
        assert out.buffer.getvalue() == b"n\\xe9 \\udce9\n"


def test_a_name_that_is_no_text(tmp_path):
    (tmp_path / "c.toml").write_text("[model]\nmodel = ['gpt']")
    with pytest.raises(ValueError, match=r"""^model: name must be one of gpt, .*, got "\['gpt'\]"$"""):
        job_of(["--config", str(tmp_path / "c.toml")])


def test_a_value_of_two_dashes(capsys):
    parser = Parser("", [])
    parser.add_config("text", Text)
    parser.add_config("model", TextJob.sections["model"])
    assert vars(parser.parse_args(["--prompt=--"])) == {"prompt": "--"}
    for option in ("--tokens", "--model"):
        with pytest.raises(SystemExit) as end:
            parser.parse_args([f"{option}=--"])
        assert end.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.endswith(": --tokens: must be a whole number, got '--'")
    assert "--model: invalid choice: '--'" in second


def test_the_bundled_configs_are_valid():
    parameters = {}
    for path in sorted(CONFIGS.glob("gpt*.toml")):
        configs = {
            name: SECTIONS[name](**options) for name, options in merge(SECTIONS, [read_config(path)]).items()
        }
        shape = configs["model"].with_vocabulary(configs["data"].vocabulary_size)
        table = (shape.vocabulary_size + shape.context) * shape.width
        block = 12 * shape.width**2 + 13 * shape.width
        parameters[path.stem] = table + shape.layers * block + 2 * shape.width
    assert parameters["gpt2_124m"] == 124_439_808  # as published
    assert parameters["gpt_tiny"] < 1e6 < parameters["gpt_demo"] < 1e7


def test_the_bundled_configs_for_images_are_valid():
    parameters = {}
    for path in sorted(CONFIGS.glob("resnet*.toml")):
        merged = merge(ImageJob.sections, [ImageJob.defaults, read_config(path)])
        configs = {name: ImageJob.sections[name](**options) for name, options in merged.items()}
        with torch.device("meta"):
            model = ResNet(configs["model"].for_images(3 if path.stem == "resnet50" else 1))
        parameters[path.stem] = sum(parameter.numel() for parameter in model.parameters())
    assert parameters["resnet50"] == 25_557_032 - 2_049_000  # as published, without the head for 1000 classes
    assert parameters["resnet10_digits"] < 4e5 < parameters["resnet18_fashion"] < 1e6


def test_the_bundled_configs_for_scenes_are_valid():
    parameters = {}
    for name, job in JOBS.items():
        for path in sorted(CONFIGS.glob(f"{name}*.toml")):
            merged = merge(job.sections, [job.defaults, read_config(path)])
            configs = {name: job.sections[name](**options) for name, options in merged.items()}
            assert (configs["model"].model, configs["data"].data) == (name, "mnist_5k")
            with torch.device("meta"):
                task = configs["model"].task(10)
            parameters[path.stem] = sum(parameter.numel() for parameter in task.parameters())
    assert 4e5 < parameters["unet_digits"] < 6e5 < parameters["detector_digits"] < 2e6
