"""accelerate(model): one line that makes an existing model faster; restore(model) takes it back."""

import sys
from collections.abc import Iterable
from fnmatch import fnmatch

import torch
from torch import nn

from lspm_kernels.acceleration import hugging_face, rules
from lspm_kernels.acceleration.options import DTYPES, Options
from lspm_kernels.acceleration.report import Report
from lspm_kernels.acceleration.swap import Swap, Swapped, is_swapped, swap, unswap

_OP = "accelerate"
_Names = Iterable[str | type[nn.Module]]


def accelerate(
    model: nn.Module,
    *,
    inference: bool = False,
    dtype: torch.dtype | None = None,
    allow: _Names | None = None,
    deny: _Names | None = None,
    verbose: bool = False,
) -> Report:
    """Makes a model faster in place, with the parameters that it has.

    Modules keep their identity, names, hooks and state_dict; each that is recognised gets a subclass of its
    own class, with a forward of our kernels. Recognised are torch.nn's layers; what is proven equal to one by
    its numbers, as transformers' norms and activations; chains in a forward that torch.fx can follow, such as
    convolution, batch norm and ReLU, or linear, GELU and linear; what any forward calls or adds itself:
    torch's attention, rotary embeddings proven by their numbers, residual sums before a norm; and attention,
    where transformers' interface lets it be chosen. A module that takes another way than its kernel's (a
    dtype, a device, a mask of its own) computes as before. What is done already is left as it is, so a second
    call changes nothing.

    Args:
        model: any torch.nn.Module; only this object changes, not its class and not other models.
        inference: it will not be trained until restored: layers may keep copies of their weights in the
            layout that is fastest, made at the first call without a gradient and again after a change.
        dtype: beside inference, of linear layers' copies: bfloat16, float16 or int8. None: they have none.
        allow: names of modules as named_modules() gives them, with * and ?, or classes: only these are
            changed, and what is in them. None: all.
        deny: the same, of what is left alone.
        verbose: writes the report to sys.stderr.

    Returns:
        A Report: what was replaced, what was not, and why.

    Raises:
        TypeError: model is no Module; allow or deny has what is no name and no class.
        ValueError: dtype is given without inference or is none of the three; a name in allow or deny fits no
            module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and (not inference or dtype not in DTYPES):
        rule = f"be None, or with inference=True one of {', '.join(map(str, DTYPES))}"
        raise ValueError(f"{_OP}: dtype must {rule}, got {dtype} with inference={inference}")
    allowed, denied = _chosen(model, "allow", allow), _chosen(model, "deny", deny)

    def is_chosen(path: str) -> bool:
        return path not in denied and (allowed is None or path in allowed)

    options = Options(inference=inference, dtype=dtype)
    report = Report()
    for path, module in model.named_modules():
        if is_swapped(module):
            report.replaced[path] = "replaced before"
        elif not is_chosen(path):
            continue
        elif isinstance(module, Swapped):
            report.left[path] = f"{type(module).__name__} was made of a replaced class"
        else:
            found = rules.find(model, path, module, options)
            if isinstance(found, Swap):
                try:
                    swap(module, found)
                    report.replaced[path] = found.what
                except TypeError as error:  # slots, or a metaclass that allows no such class
                    report.left[path] = f"its class cannot be replaced: {error}"
            elif found is not None:
                report.left[path] = found
    hugging_face.replace_attention(model, is_chosen, report)
    if verbose:
        sys.stderr.write(f"{report}\n")
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undoes accelerate: every module has its class again; parameters and hooks are as they are.

    Returns:
        model.

    Raises:
        TypeError: model is no Module.
        ValueError: a replaced class was built upon, as by torch.nn.utils.parametrize or FSDP; nothing is
            changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"restore: model must be a torch.nn.Module, got {type(model).__name__}")
    for path, module in model.named_modules():
        if isinstance(module, Swapped) and not is_swapped(module):
            rule = f"{path!r} must have the class that accelerate gave it"
            raise ValueError(f"restore: {rule}, got {type(module).__name__}, built upon that")
    for module in list(model.modules()):
        if is_swapped(module):
            unswap(module)
    hugging_face.restore_attention(model)
    return model


def _chosen(model, name, names) -> set[str] | None:
    """The paths of modules that names fit, and of all within them; of a shared one by any of its names."""
    if names is None:
        return set() if name == "deny" else None
    found = set()
    rule = f"{name} must have names or classes of its modules"
    given = [names] if isinstance(names, str | type) else names
    if not isinstance(given, Iterable):
        raise TypeError(f"{_OP}: {rule}, got {given!r}")
    named = list(model.named_modules(remove_duplicate=False))
    for wanted in given:
        if not isinstance(wanted, str | type):
            raise TypeError(f"{_OP}: {rule}, got {wanted!r}")
        if isinstance(wanted, type):
            fits = {path for path, module in named if isinstance(module, wanted)}
        else:
            fits = {path for path, _ in named if fnmatch(path, wanted)}
        if not fits:
            raise ValueError(f"{_OP}: {rule}, got {wanted!r}")
        found |= fits
    within = tuple(f"{path}." for path in found)
    first = {module: path for path, module in model.named_modules()}
    return {first[module] for path, module in named if "" in found or f"{path}.".startswith(within)}
