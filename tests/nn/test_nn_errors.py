"""lspm_kernels.nn refuses what torch.nn refuses, by the same errors, and takes what torch.nn takes."""

import pytest
import torch

from lspm_kernels import nn

TABLE, LOGITS, CLASSES = (2**16, 64), torch.zeros(256, 1000), torch.zeros(256, dtype=torch.int64)
HIDDEN, FEW = torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64)
NUMBERS = torch.zeros(2**17)


def ids(*values):
    return torch.tensor(values)


REFUSED = {
    "an id too large": lambda nn: nn.Embedding(*TABLE)(ids(2**16)),
    "an id below 0": lambda nn: nn.Embedding(*TABLE)(ids(-1)),
    "an id of a bag": lambda nn: nn.EmbeddingBag(*TABLE, mode="sum")(ids(2**16), ids(0)),
    "an id of a mean below 0": lambda nn: nn.EmbeddingBag(*TABLE)(ids(-1), ids(0)),
    "a first bag behind 0": lambda nn: nn.EmbeddingBag(*TABLE, mode="sum")(ids(1, 2), ids(1)),
    "bags beyond the ids": lambda nn: nn.EmbeddingBag(*TABLE, mode="sum")(ids(1, 2), ids(0, 5)),
    "a class too large": lambda nn: nn.CrossEntropyLoss()(LOGITS, CLASSES + 1000),
    "a class below 0": lambda nn: nn.CrossEntropyLoss()(LOGITS, CLASSES - 1),
    "too much smoothing": lambda nn: nn.CrossEntropyLoss(label_smoothing=1.5)(LOGITS, CLASSES),
    "no reduction": lambda nn: nn.CrossEntropyLoss(reduction="average")(LOGITS, CLASSES),
    "a class of a layer": lambda nn: nn.LinearCrossEntropyLoss(64, 2**15)(HIDDEN, FEW + 2**15),
    "no reduction of a layer": lambda nn: nn.LinearCrossEntropyLoss(64, 2**15, reduction="max")(HIDDEN, FEW),
    "no approximation": lambda nn: nn.GELU("erf")(NUMBERS),
    "a share that is no number": lambda nn: nn.Dropout(float("nan"))(NUMBERS),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_torch_refuses_is_refused_as_torch_does(case):
    found = []
    for library in (torch.nn, nn):
        with pytest.raises(Exception) as error:
            REFUSED[case](library)
        found.append((error.type, str(error.value)))
    assert found[0] == found[1]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_has_no_break(dynamic):
    table, loss = nn.Embedding(*TABLE), nn.CrossEntropyLoss(label_smoothing=1.5)
    compiled = torch.compile(table, fullgraph=True, backend="eager", dynamic=dynamic)
    assert torch.equal(compiled(ids(1, 2)), table(ids(1, 2)))
    with pytest.raises(RuntimeError, match="label_smoothing must be between"):
        torch.compile(loss, backend="eager", dynamic=dynamic)(LOGITS, CLASSES)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_may_end_before_the_ids_do(mode):
    theirs, ours = (
        library.EmbeddingBag(*TABLE, mode=mode, include_last_offset=True) for library in (torch.nn, nn)
    )
    ours.load_state_dict(theirs.state_dict())
    given = ids(1, 2, 3), ids(0, 2)
    assert torch.equal(ours(*given), theirs(*given))
    assert ours(*given).shape == (1, 64)


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=repr)
def test_a_single_number_of_no_dimension_is_taken(activation):
    x = torch.tensor(0.5)
    assert torch.equal(activation(x), activation.__class__.__base__.forward(activation, x))
