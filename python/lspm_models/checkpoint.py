"""Checkpoints: safetensors and JSON, written whole or not at all, read without executing anything.

A checkpoint is a folder `step-00000100` with model.safetensors, training.safetensors (the optimizer's tensors
and the generators' states) and state.json (step, settings, data position, and every other number).
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lspm_models.files import remove, replaced, write_tensors
from lspm_models.json_files import read_object
from lspm_models.models.lora import adapter_tensors, base_sample, differing, lora_layers

NAME = re.compile(r"step-(\d{8,})")
BASE = "base_sample"  # in the header of a file of adapters


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, *, state: dict, keep: int
) -> Path:
    """Writes a checkpoint and removes the oldest ones.

    Args:
        folder: where checkpoints lie, one folder each.
        step: optimizer steps done.
        model: its parameters and persistent buffers are written, see model_tensors.
        optimizer: over parameters of the model.
        state: whatever else is needed to continue; JSON can hold it. Tensors in its "random" entry, as
            random_state() gives it, are stored apart.
        keep: checkpoints to keep, this one included.

    Returns:
        The path of the checkpoint.
    """
    path = Path(folder) / f"step-{step:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    optimizer_tensors, optimizer_numbers = _optimizer_state(model, optimizer)
    tensors = {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors.items()}
    generators = []
    for rank, generator in enumerate(state["random"]):
        tensors |= {
            f"random/{rank}/{name}": value for name, value in generator.items() if isinstance(value, Tensor)
        }
        generators.append({name: value for name, value in generator.items() if not isinstance(value, Tensor)})
    with replaced(path) as partial:
        partial.mkdir()
        write_tensors(_plain(model_tensors(model)), partial / "model.safetensors", metadata=header(model))
        write_tensors(_plain(tensors), partial / "training.safetensors")
        content = {**state, "step": step, "optimizer": optimizer_numbers, "random": generators}
        (partial / "state.json").write_text(json.dumps(content, indent=1))
        if path.exists():
            remove(path)
    for old in (*checkpoints(folder)[:-keep], *path.parent.glob(".step-*")):  # hidden ones: a kill left them
        remove(old)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, oldest first; half-written ones are invisible."""
    found = [path for path in Path(folder).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(path: Path) -> dict:
    """Reads everything but the tensors.

    Raises:
        ValueError: path is no checkpoint, or a damaged one.
    """
    file = Path(path) / "state.json"
    if not file.exists():
        raise ValueError(f"checkpoint: {path} must be a checkpoint folder, got no state.json in it")
    content = read_object(file)
    if not isinstance(settings := content.get("settings", {}), dict):
        raise ValueError(f"checkpoint: {file} must have an object as settings, got {settings!r}")
    return content


def load_weights(path: Path, model: nn.Module) -> None:
    """Copies the weights of a checkpoint into a model.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape, or the weights beside adapters are not
            those that they learned beside; the message names it.
    """
    file = Path(path) / "model.safetensors"
    stored = read_tensors(file)
    if lora_layers(model):
        refuse_other_base(file, model, "checkpoint: weights of the model")
    copy_weights(stored, model, path)


def copy_weights(stored: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Copies weights into a model; `path` is where the messages say that they are from.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape; the message names it.
    """
    wanted = model_tensors(model)
    for name in sorted(wanted.keys() | stored.keys()):
        if name not in stored or name not in wanted:
            where = "the checkpoint" if name in wanted else "the model"
            raise ValueError(f"checkpoint: {name} must be in both the model and {path}, got none in {where}")
        if stored[name].shape != wanted[name].shape:
            raise ValueError(
                f"checkpoint: {name} must have the model's shape {tuple(wanted[name].shape)}, "
                f"got {tuple(stored[name].shape)} in {path}"
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])


def load_training(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """Copies weights and optimizer state of a checkpoint into place.

    Returns:
        The state that was saved, tensors of its "random" entry included.

    Raises:
        ValueError: the checkpoint does not fit the model or the optimizer.
    """
    load_weights(path, model)
    state, tensors = read_state(path), read_tensors(Path(path) / "training.safetensors")
    names = _parameter_names(model, optimizer)
    entries: dict[int, dict] = {}
    for index, name in enumerate(names):
        fields = {**state["optimizer"].get(name, {})}
        prefix = f"optimizer/{name}/"
        fields |= {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
        if fields:
            entries[index] = fields
    optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
    for rank, generator in enumerate(state["random"]):
        prefix = f"random/{rank}/"
        generator |= {
            key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
        }
    return state


def refuse_mismatch(
    found: dict, wanted: dict, where: str, free: Collection[str] = (), prefix: str = ""
) -> None:
    """Raises for the first field that differs between the settings of a checkpoint and those asked for.

    Args:
        found: settings in the checkpoint; nested dicts are compared field by field.
        wanted: settings asked for.
        where: what the reader calls the checkpoint.
        free: fields, written `section.name`, that may differ.

    Raises:
        ValueError: names the field and both values.
    """
    for name in dict.fromkeys((*found, *wanted)):
        field, ours, theirs = prefix + name, wanted.get(name), found.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            refuse_mismatch(theirs, ours, where, free, f"{field}.")
        elif ours != theirs and field not in free:
            raise ValueError(f"checkpoint: {field} must be {theirs!r} as in {where}, got {ours!r}")


def random_state(device: torch.device) -> dict:
    """Returns the states of Python's, NumPy's and PyTorch's generators."""
    _, numbers, gauss = random.getstate()
    _, keys, *rest = np.random.get_state()
    state = {
        "python": torch.tensor(numbers),
        "python_gauss": gauss,
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_rest": rest,
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict, device: torch.device) -> None:
    """Sets the generators to states that random_state() returned."""
    random.setstate((random.getstate()[0], tuple(state["python"].tolist()), state["python_gauss"]))
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), *state["numpy_rest"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state_dict of a model with every shared tensor under its first name only.

    Of a model with adapters these alone: all else is where the model came from.
    """
    named: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for name, tensor in (adapter_tensors(model) or model.state_dict()).items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if key not in seen:
            seen.add(key)
            named[name] = tensor
    return named


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}


def header(model: nn.Module) -> dict[str, str]:
    """Returns the header of a model's file: of adapters it says which weights they belong to."""
    return {"format": "pt", **({BASE: base_sample(model)} if lora_layers(model) else {})}


def refuse_other_base(path: Path, model: nn.Module, what: str, hint: str = "") -> None:
    """Raises for a model whose weights are not those that the adapters in a file learned beside.

    Args:
        path: a whole safetensors file. Where its header does not say what they were, as peft's, all will do.
        model: with or without adapters.
        what, hint: how the message begins and ends.

    Raises:
        ValueError: names the first tensor that differs.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        sample = (file.metadata() or {}).get(BASE)
    try:
        others = [] if sample is None else differing(sample, base_sample(model))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {BASE} of {path} must be as it was written, got {sample[:60]}"
        ) from error
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        rule = f"be those that the adapters in {path} learned beside"
        raise ValueError(f"{what} must {rule}, got others in {others[0]}{more}{hint}")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a safetensors file.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint: {path} must be there, got no such file") from error
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} must be a whole safetensors file, got {error}") from error


def described(settings: Any, known: Collection[str]) -> str:
    """Returns what a message says of a checkpoint's model: its name, where that is not one of the known."""
    content = settings if isinstance(settings, dict) else {}
    for name in (content.get("task"), content.get("model")):
        if isinstance(name, str) and name not in known:
            return f"that of {name}"
    text = repr(settings)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Returns the names of the optimizer's parameters in its own order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """Returns the optimizer's tensors by `parameter/field`, and its other values by parameter."""
    tensors, numbers = {}, {}
    entries = optimizer.state_dict()["state"]
    for index, name in enumerate(_parameter_names(model, optimizer)):
        for field, value in entries.get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}/{field}"] = value
            else:
                numbers.setdefault(name, {})[field] = value
    return tensors, numbers
