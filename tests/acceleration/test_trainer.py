"""transformers' Trainer, which needs Hugging Face's package accelerate: it takes the same steps with ours."""

import copy

import pytest
import torch

import lspm_kernels as lk
import oracle

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs Hugging Face's package accelerate")

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3


def model():
    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=64, n_embd=128, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def trained(made, folder, **options):
    """The losses of a few steps, and how far all parameters went."""
    ids = torch.randint(4096, (4 * STEPS, 64), generator=torch.Generator().manual_seed(2))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, logging_steps=1, optim="sgd",
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, learning_rate=1.0, **options,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = transformers.Trainer(made, arguments, train_dataset=data)
    before = torch.cat([p.detach().flatten() for p in made.parameters()])
    trainer.train()
    after = torch.cat([p.detach().flatten() for p in made.parameters()])
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == STEPS and (after - before).norm() > 0.1
    return torch.tensor(losses, dtype=after.dtype), after - before


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.long),
        pytest.param({"gradient_checkpointing": True}, id="checkpointed", marks=pytest.mark.long),
    ],
)
def test_it_trains_as_it_did(options, tmp_path):
    made = model()
    wide, plain = copy.deepcopy(made).double(), copy.deepcopy(made)
    report = lk.accelerate(made)
    assert "head, whose loss needs no logits" in report.replaced.values()
    actual = trained(made, tmp_path, **options)
    truth = trained(wide, tmp_path / "truth", **{**options, "bf16": False})
    expected = trained(plain, tmp_path / "plain", **options)
    for name, *results in zip(("losses", "steps"), actual, truth, expected, strict=True):
        if name == "steps" or "bf16" not in options:  # in bfloat16 three numbers' errors are a matter of luck
            oracle.compare(name, *results)
    saved = type(made).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in made.state_dict().items())
    lk.restore(made)
    assert [type(module) for module in made.modules()] == [type(module) for module in plain.modules()]
