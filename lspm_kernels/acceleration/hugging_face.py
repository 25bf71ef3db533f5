"""The attention of one model of transformers, chosen by its own interface; and that undone."""

import copy
import inspect
import re
import sys
from collections.abc import Callable
from functools import cache

from torch import nn

from lspm_kernels.acceleration.report import Report
from lspm_kernels.acceleration.swap import original
from lspm_kernels.compat import hugging_face

_CONFIGS = "PreTrainedConfig", "PretrainedConfig"
_MISSING = object()


def replace_attention(model: nn.Module, is_chosen: Callable[[str], bool], report: Report) -> None:
    """Has the models of transformers within model, those that are chosen, use our attention for sdpa's.

    Which attention a model uses stands in its config, which other models may share: it gets a copy.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not hasattr(transformers, "AttentionMaskInterface"):
        return
    of_transformers = transformers.PreTrainedModel
    inner: set[nn.Module] = set()
    for path, module in model.named_modules():
        if not isinstance(module, of_transformers) or module in inner or not is_chosen(path):
            continue
        inner.update(module.modules())
        place = f"{path}.config" if path else "config"
        if any("lspm_config" in vars(each) for each in module.modules()):
            report.replaced[place] = "replaced before"
        elif module.config._attn_implementation != "sdpa":
            kind = module.config._attn_implementation
            report.left[place] = f"its attention is {kind!r}: only what is 'sdpa' is replaced"
        elif not module._can_set_attn_implementation():
            report.left[place] = "its attention does not ask transformers' interface"
        elif any(_asks_for_sdpa(original(each).__module__) for each in module.modules()):
            report.left[place] = "its code does something else where its attention is not called 'sdpa'"
        else:
            hugging_face.register()
            base = next(c for c in type(module.config).__mro__ if c.__name__ in _CONFIGS)
            owners = _own_config(module, base)
            module.set_attn_implementation(_in_place_of_sdpa(module.config))
            made: dict = {}
            for owner in owners:
                vars(owner)["lspm_config"] += (copy.deepcopy(owner.config, made),)
            report.replaced[place] = "attention, by transformers' interface"


def restore_attention(model: nn.Module) -> None:
    """Gives the modules within model the configs that they had, with what was set since."""
    for module in model.modules():
        if "lspm_config" in vars(module):
            config, ours, made = vars(module).pop("lspm_config")
            _carry_over(ours, made, config)
            if module.config is ours:  # else it was given another one
                module.config = config


def _carry_over(ours, made, config) -> None:
    """Sets in config what was changed in ours since it was made, as by resize_token_embeddings."""
    for name, value in vars(ours).items():
        before = vars(made).get(name, _MISSING)
        if type(value) is type(before) and isinstance(getattr(value, "sub_configs", None), dict):
            _carry_over(value, before, vars(config)[name])
        elif value is not before and value != before:
            vars(config)[name] = value


@cache
def _asks_for_sdpa(name: str) -> bool:
    """Whether a file asks for that name: DeepSeek V3.2's hides the keys that it drops for that alone."""
    try:
        code = inspect.getsource(sys.modules[name])
    except (KeyError, OSError, TypeError):
        return False
    return re.search(r"""_attn_implementation\b.*["']sdpa["']""", code) is not None


def _in_place_of_sdpa(config) -> str | dict:
    """What set_attn_implementation takes for ours where a config or one within it has "sdpa", there alone."""
    kind = config._attn_implementation
    kind = hugging_face.IN_PLACE_OF_SDPA if kind == "sdpa" else kind
    within = {name: getattr(config, name) for name in config.sub_configs}
    kinds = {name: _in_place_of_sdpa(inner) for name, inner in within.items() if inner is not None}
    return {"": kind, **kinds} if kinds else kind


def _own_config(model, base) -> list[nn.Module]:
    """The modules that have a copy of their config now; `lspm_config` has theirs and the copy."""
    owners = []
    copies: dict = {}  # what is one config stays one
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, base):
            module.config = copy.deepcopy(config, copies)
            vars(module)["lspm_config"] = config, module.config
            owners.append(module)
    return owners
