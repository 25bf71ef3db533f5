"""The attention of one model of transformers, chosen by its own interface; and that undone."""

import copy
import sys
from collections.abc import Callable

from torch import nn

from lspm_kernels.acceleration.report import Report
from lspm_kernels.compat import hugging_face


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
        else:
            hugging_face.register()
            _own_config(module, type(module.config).__mro__)
            module.set_attn_implementation(hugging_face.IN_PLACE_OF_SDPA)
            report.replaced[place] = "attention, by transformers' interface"


def restore_attention(model: nn.Module) -> None:
    """Gives the modules within model the configs that they had."""
    for module in model.modules():
        if "lspm_config" in vars(module):
            module.config = vars(module).pop("lspm_config")


def _own_config(model, classes) -> None:
    base = next(cls for cls in classes if cls.__name__ in ("PreTrainedConfig", "PretrainedConfig"))
    copies: dict = {}  # what is one config stays one
    for module in model.modules():
        config = vars(module).get("config")
        if isinstance(config, base):
            module.config = copy.deepcopy(config, copies)
            vars(module)["lspm_config"] = config
