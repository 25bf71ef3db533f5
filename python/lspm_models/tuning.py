"""What fine-tuning changes of a language model: all of it, all but what is frozen, or adapters beside it."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import nn

from lspm_models.models.bert import BertConfig
from lspm_models.models.freezing import freeze, freeze_stages
from lspm_models.models.lora import TARGETS, add_lora, check_lora
from lspm_models.options import option

BERT_TARGETS = ("*attention.*",)  # what TARGETS are in the names of a BERT


@dataclass(frozen=True)
class Tuning:
    """Which weights learn. Without options, all; it is false then."""

    freeze: tuple[str, ...] = option(
        (),
        "keep parameters as they are whose names, or whose modules' names, match patterns; or a number: the "
        "embeddings and so many blocks less one",
        default="none",
        metavar="PATTERN",
    )
    lora_rank: int | None = option(None, "learn adapters of so many columns beside layers", default="none")
    lora_alpha: float = option(16.0, "adapters count alpha / rank times")
    lora_dropout: float = option(0.0, "probability of dropping a feature on its way to an adapter")
    lora_targets: tuple[str, ...] = option(
        TARGETS,
        "names of linear layers that get one",
        default=f"{' '.join(TARGETS)}, of a BERT {' '.join(BERT_TARGETS)}",
        metavar="PATTERN",
    )

    def __post_init__(self) -> None:
        for name in ("freeze", "lora_targets"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists
        if self.lora_rank is not None:
            check_lora("tuning: lora_", self.lora_rank, self.lora_alpha, self.lora_dropout)
            if self.freeze:
                got = " ".join(self.freeze)
                raise ValueError(
                    f"tuning: freeze must be absent beside lora_rank, which freezes all, got {got}"
                )
            return
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name.startswith("lora_") and value != item.default:
                raise ValueError(f"tuning: {item.name} must be beside lora_rank, got {value} alone")

    def __bool__(self) -> bool:
        return bool(self.freeze) or self.adapts

    @property
    def adapts(self) -> bool:
        """Whether adapters learn, and the weights beside them stay where they came from."""
        return self.lora_rank is not None

    def apply(self, task: nn.Module) -> None:
        """Freezes parts of a task, or gives it new adapters.

        Raises:
            ValueError: a pattern matches nothing.
        """
        if self.adapts:
            is_usual = self.lora_targets == TARGETS and isinstance(task.config, BertConfig)
            targets = BERT_TARGETS if is_usual else self.lora_targets
            add_lora(task, self.lora_rank, self.lora_alpha, dropout=self.lora_dropout, targets=targets)
        elif len(self.freeze) == 1 and self.freeze[0].isdecimal():
            freeze_stages(task.model, int(self.freeze[0]))
        elif self.freeze:
            freeze(task, self.freeze)
