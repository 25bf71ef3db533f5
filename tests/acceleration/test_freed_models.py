"""A model that nobody holds is freed, whatever was found out about it."""

import gc
import weakref

import pytest
import torch
import zoo

import lspm_kernels as lk


def alive(parts):
    """The classes of those that weak references still find."""
    for _ in range(2):  # what was kept of a module goes after it
        gc.collect()
    return [type(part()).__name__ for part in parts if part() is not None]


@pytest.mark.parametrize("restored", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "bert", "llama", "transformer", "lightning"])
def test_an_accelerated_model_is_freed(name, restored):
    pytest.importorskip(zoo.PACKAGES[name])
    model, given = zoo.built(name, tiny=True, batch=1, trains=True)
    lk.accelerate(model)
    zoo.loss_of(model(**given)).backward()
    model.eval()(**{key: value for key, value in given.items() if key != "labels"})
    if restored:
        lk.restore(model)
    parts = [weakref.ref(part) for part in model.modules()]
    del model
    assert alive(parts) == []


@pytest.mark.parametrize("name", ["resnet18", "bert", "llama"])
def test_copies_of_weights_are_freed_with_them(name):
    pytest.importorskip(zoo.PACKAGES[name])
    model, given = zoo.built(name, tiny=True, batch=1, trains=False)
    lk.accelerate(model, inference=True, dtype=torch.bfloat16)
    with torch.inference_mode():
        model(**given)
    parts = [weakref.ref(part) for part in (*model.modules(), *model.parameters())]
    del model
    assert alive(parts) == []
