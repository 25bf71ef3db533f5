"""Text for the training scripts: a BERT that learns the tokens that were hidden."""

from __future__ import annotations

import torch

from lspm_models.data.mask_tokenizer import MaskTokenizer
from lspm_models.data.masking import MaskedTextConfig, MaskedTextData, Masking
from lspm_models.data.text import prepare_text
from lspm_models.fit_config import FitConfig
from lspm_models.language_models import BertOptions, make_task
from lspm_models.scripts import Run
from lspm_models.tasks.masked_language_modelling import MaskedLanguageModelling
from lspm_models.text_job import TextJob

PRETRAINING = """\
Pretrain a BERT on text: it learns the tokens that were hidden, from both sides. Accuracy is the share of the
hidden tokens of the validation text that it finds; they are the same ones at each evaluation. The run folder
is as a GPT's. In brackets stands what holds without the option."""

FINE_TUNING = """\
Go on with a BERT on another text, beginning with the weights and the tokenizer of a run or of a Hugging Face
folder that has its masked language modelling head. In brackets stands what holds without the option."""


class BertJob(TextJob):
    """See Job."""

    sections = {"model": BertOptions, "data": MaskedTextConfig, "training": FitConfig}  # noqa: RUF012
    pretraining = (
        PRETRAINING,
        (
            "pretrain.py --model bert --minutes 3 --out runs/bert",
            "pretrain.py --model bert --whole-words --corpus notes.txt letters/",
            "pretrain.py --config python/configs/bert_tiny.toml",
            "pretrain.py --resume runs/bert --minutes 6",
        ),
    )
    fine_tuning = (
        FINE_TUNING,
        (
            "finetune.py --init runs/bert --corpus shakespeare --steps 200 --out runs/bard",
            "finetune.py --init bert-base-uncased/ --corpus letters/ --whole-words",
        ),
    )
    init_help = "to begin with: run folder, one checkpoint in it, or Hugging Face's folder"
    free = ("dropout",)

    def prepare(self, run: Run) -> tuple[MaskedLanguageModelling, MaskedTextData]:
        with run.processes.first_before_others():
            tokenizer, tokens = prepare_text(run.data, run.folder, run.report, MaskTokenizer.of)
        torch.manual_seed(run.training.seed)
        task = make_task(run.model.with_vocabulary(tokenizer.vocabulary_size))
        data = MaskedTextData(
            tokens,
            Masking(tokenizer, run.data.masked, whole_words=run.data.whole_words),
            run.model.context,
            run.training.batch_size,
            validation_batches=run.training.evaluation_batches,
            seed=run.training.seed,
            process=run.processes.rank,
            processes=run.processes.count,
        )
        return task, data

    def finish(self, run: Run, task: MaskedLanguageModelling, data: MaskedTextData) -> None:
        guess = data.unigram_accuracy()
        if guess is not None:
            run.report(f"guess      the most frequent token has an accuracy of {guess:.4f}")
        run.report(f"try it     python python/predict.py {run.quoted} --text 'return [MASK]'")
