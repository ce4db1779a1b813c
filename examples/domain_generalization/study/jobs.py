"""One training with its folder.

    <out>/study.json                  data set and settings of the study
    <out>/results.json                the records of all methods that are done
    <out>/jobs/<target>-seed<n>/      a cell
        start/  flat-start/           the fp32 networks that methods start from: jobs of their own
        lsq-w3/                       a job
            log.txt                   a line for each validation
            checkpoint.pt             as long as it is not done
            done.json                 written last: its records
            error.txt                 why it failed, until it is done

Processes share a folder by locks. What has its done.json is never done again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gaqat_optim import quantize_model

from .data import Batch, DataSet, Fold, endless_batches
from .methods import ERM, FLAT, METHODS, Method
from .ranks import Ranks
from .settings import Settings
from .storage import read_json, read_tensors

# The phases of a cell. Each draws its batches from its own seed, the same for all methods.
PHASES = ("start", "flat-start", "calibration", "method", "average")
START, FLAT_START = PHASES[:2]


@dataclass(frozen=True)
class Job:
    """One training: a method in a cell, or one of the fp32 networks that methods start from.

    Attributes:
        target: the held-out domain.
        seed: of data, network and order.
        bits: of weights and activations; None without quantization.
        method: a name of `METHODS`, or "start" or "flat-start".
    """

    target: str
    seed: int
    bits: int | None
    method: str

    @property
    def name(self) -> str:
        """Its folder below the folder of the jobs."""
        width = "" if self.bits is None else f"-w{self.bits}"
        return f"{self.target}-seed{self.seed}/{self.method}{width}"

    @property
    def title(self) -> str:
        """For a line on the terminal."""
        width = "" if self.bits is None else f", W{self.bits}A{self.bits}"
        return f"{self.target}, seed {self.seed}{width}: {self.definition.title}"

    @property
    def definition(self) -> Method:
        """What is trained."""
        return {START: ERM, FLAT_START: FLAT}.get(self.method) or METHODS[self.method]

    @property
    def origin(self) -> Job | None:
        """The job whose network it starts from."""
        if self.method == START:
            return None
        return replace(self, bits=None, method=FLAT_START if self.definition.flat_start else START)

    def steps(self, settings: Settings) -> int:
        """How many steps it takes."""
        special = {START: settings.fp32_steps, FLAT_START: settings.flat_steps}
        return special.get(self.method) or settings.steps * self.definition.multiple


@dataclass(frozen=True)
class Study:
    """Everything that a process needs to run jobs of a study. It is pickled for other processes.

    Attributes:
        data: the data set.
        settings: the numbers.
        out: the folder.
        device: where to train.
        workers: processes that load images, for each job.
        threads: of torch; None leaves them.
        save_every: steps between two checkpoints.
        save_models: keep the weights of every method.
        example: a job whose gradients are recorded and whose weights are kept.
    """

    data: DataSet
    settings: Settings
    out: Path
    device: str = "cpu"
    workers: int = 0
    threads: int | None = None
    save_every: int = 200
    save_models: bool = False
    example: Job | None = None
    ranks: Ranks = field(default_factory=Ranks, compare=False)

    def folder(self, job: Job) -> Path:
        """The folder of a job."""
        return self.out / "jobs" / job.name

    def result(self, job: Job) -> dict[str, Any] | None:
        """What a job wrote when it was done; None before."""
        return read_json(self.folder(job) / "done.json")  # type: ignore[no-any-return]

    def weights(self, job: Job) -> dict[str, Any] | None:
        """The networks of a job that is done and kept them: "last", "selected", "average", "recorder"."""
        return read_tensors(self.folder(job) / "model.pt")  # type: ignore[no-any-return]

    def keeps_weights(self, job: Job) -> bool:
        """Whether the weights of a job stay when it is done."""
        return self.save_models or job == self.example or job.method in (START, FLAT_START)

    def network(self, job: Job, state: dict[str, Any] | None = None) -> nn.Module:
        """The untrained network of a job, quantized where the job is; with `state`, those weights."""
        model = self.data.network(job.seed, self.settings).to(self.device)
        if self.device.startswith("cuda"):
            model = model.to(memory_format=torch.channels_last)
        if job.definition.quantized:
            assert job.bits is not None
            model = quantize_model(model, self.settings.quantization(job.bits))
        if state is not None:
            model.load_state_dict(state)
        return model

    def stream(self, fold: Fold, job: Job, phase: str, position: int = 0, *, whole: bool = False) -> Iterator[Batch]:
        """The batches of a phase: this process's part of each, or with `whole` all of it."""
        return endless_batches(
            fold.training,
            self.settings.batch_size,
            10 * job.seed + PHASES.index(phase),
            position=position,
            part=(0, 1) if whole else self.ranks.part,
            workers=self.workers,
            device=torch.device(self.device),
        )
