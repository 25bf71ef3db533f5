"""One process or many: what training needs of torch.distributed, and nothing where it was not launched so."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from lspm_models.progress import counted


@dataclass(frozen=True)
class Processes:
    """This process and how many there are."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls) -> Processes:
        """Joins the group that torchrun launched, or stays alone."""
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            return cls()
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(dist.destroy_process_group)  # its threads must not outlive the interpreter
        return cls(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Returns the device called `name`; "auto" is this process's GPU, or the CPU where there is none."""
        if name == "auto":
            name = f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"fit: device must be one like cpu, cuda or cuda:1, got {name!r}") from error
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"fit: device must be one like cpu, cuda or cuda:1, got {name!r}")
        if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
            got = f"{name!r} with {counted(count, 'CUDA GPU')}"
            raise ValueError(f"fit: device must be one this machine has, got {got}")
        return device

    def sum(self, values: list[float], device: torch.device) -> list[float]:
        """Returns the element-wise sum over all processes."""
        if self.count == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: Any) -> list:
        """Returns the value of every process, in order of rank."""
        if self.count == 1:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: float, device: torch.device) -> float:
        """Returns the value of the first process."""
        if self.count == 1:
            return value
        return self.sum([value if self.first else 0.0], device)[0]

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Runs the body on the first process, then on the others, who find its files."""
        if not self.first:
            dist.barrier()
        yield
        if self.first and self.count > 1:
            dist.barrier()

    def wrap(self, module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        """Returns the module, averaging gradients over the processes where there are several."""
        if self.count == 1:
            return module
        devices = [device] if device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(module, device_ids=devices)
