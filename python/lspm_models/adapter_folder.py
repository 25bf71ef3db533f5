"""Adapters in a folder as peft has them: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lspm_models.checkpoint import header, read_tensors, refuse_other_base
from lspm_models.files import remove, replaced, write_tensors
from lspm_models.hugging_face import HEAD
from lspm_models.hugging_face_config import FORMATS, Format
from lspm_models.json_files import read_object
from lspm_models.models.lora import add_lora, lora_layers
from lspm_models.tasks.language_modelling import LanguageModelling

MODEL, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
MATRICES = ("lora_A", "lora_B")
# What peft may have done besides, which we do not; the first is what we write.
FIXED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "modules_to_save": (None,),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "lora_bias": (False, None),
}


def save_adapter(task: LanguageModelling, folder: str | Path, base: str | Path | None = None) -> None:
    """Writes the adapters of a model, whole or not at all; in place of a folder that is there.

    peft.PeftModel.from_pretrained puts them beside the weights of transformers' model of the same shape.

    Args:
        task: of add_lora, with one rank and one alpha.
        folder: gets the two files.
        base: where the weights are that the adapters belong to.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = lora_layers(task)
    if not layers:
        raise ValueError("save_adapter: task must have adapters, got none")
    form = _format(task)
    names = {name: _theirs(name, form) for name in layers}
    first = next(iter(layers.values()))
    config = {name: known[0] for name, known in FIXED.items()} | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout.p,
        "target_modules": list(names.values()),
        "fan_in_fan_out": bool(form.transposed),
        "inference_mode": True,
    }
    tensors = {
        f"{PREFIX}{names[name]}.{matrix}.weight": getattr(layer, matrix).detach().contiguous().cpu()
        for name, layer in layers.items()
        for matrix in MATRICES
    }
    remove(Path(folder))
    with replaced(Path(folder)) as partial:
        partial.mkdir(parents=True)
        write_tensors(tensors, partial / MODEL, metadata=header(task))
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(task: LanguageModelling, folder: str | Path, *, strict: bool = True) -> LanguageModelling:
    """Gives a model the adapters that save_adapter wrote, or peft's save_pretrained; all else is frozen.

    Args:
        task: without adapters, with the weights that they belong to.
        folder: with the two files.
        strict: refuse weights other than those that the adapters learned beside, where save_adapter wrote
            which; peft does not.

    Returns:
        task.

    Raises:
        ValueError: a file is missing or damaged, the config asks for what we do not compute, or tensors are
            of layers that the model does not have, or of another shape, or the weights are others; the
            message names them.
    """
    folder = Path(folder)
    config, tensors = read_object(folder / CONFIG), read_tensors(folder / MODEL)
    for name, known in FIXED.items():
        if config.get(name, known[0]) not in known:
            _refuse(f"{name} of {folder / CONFIG}", repr(known[0]), repr(config[name]))
    form = _format(task)
    linears = {
        _theirs(name, form): name for name, module in task.named_modules() if isinstance(module, nn.Linear)
    }
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, matrix = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if layer in linears and matrix == "base_layer":  # peft copies a head's weight
            if torch.equal(tensor, task.get_submodule(linears[layer]).weight):
                continue
        if layer not in linears or matrix not in MATRICES:
            _refuse(f"tensors of {folder / MODEL}", "of linear layers of the model", key)
        found.setdefault(linears[layer], {})[matrix] = tensor
    if strict:
        hint = "; strict=False takes them all the same"
        refuse_other_base(folder / MODEL, task, "load_adapter: weights of task", hint)
    rank = config.get("r")
    add_lora(task, rank, config.get("lora_alpha"), config.get("lora_dropout", 0.0), targets=list(found))
    for name, layer in lora_layers(task).items():
        for matrix in MATRICES:
            parameter, tensor = getattr(layer, matrix), found[name].get(matrix)
            if tensor is None or tensor.shape != parameter.shape:
                got = None if tensor is None else tuple(tensor.shape)
                _refuse(f"{name}.{matrix} in {folder}", f"of shape {tuple(parameter.shape)}", got)
            with torch.no_grad():
                parameter.copy_(tensor)
    return task


def _format(task: LanguageModelling) -> Format:
    return next(form for form in FORMATS.values() if form.config is type(task.config))


def _theirs(name: str, form: Format) -> str:
    head = HEAD.removesuffix(".weight")
    return name if name == head else form.prefix + name.removeprefix("model.")


def _refuse(what: str, rule: str, value: Any) -> None:
    raise ValueError(f"load_adapter: {what} must be {rule}, got {value}")
