"""The study on image folders: ResNet-50 from ImageNet weights, one domain held out, SAGM's published settings.

BatchNorm statistics are frozen, as in SAGM's and SWAD's experiments: its modules stay in evaluation mode while their
weights and biases are trained. The held-out accuracy is that of all images of the held-out domain.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .folders import Collection, FolderError, Split, endless_loader, find_domains, load_split
from .options import add_study_options, real, whole
from .report import FP32, costs, save_results, table, verdict, versions
from .resnet import WeightsError, frozen_batchnorm_train, resnet50
from .study import METHODS, Batch, Settings, Trainer, cell_steps
from .vision import INSTALL, import_torchvision

MEASURES = {"held_out_accuracy": "chosen by source validation", "last_step_accuracy": "last step"}


@dataclass(frozen=True)
class Benchmark:
    """A collection of image folders with the settings that were published for it."""

    collection: Collection
    steps: int
    weight_decay: float
    alpha: float


def loader_accuracy(model: nn.Module, data: Dataset[Any], batch_size: int, workers: int, device: torch.device) -> float:
    """Percent of the images of a data set that the model gets right."""
    model.eval()
    right = total = 0
    with torch.no_grad():
        for x, y in DataLoader(data, batch_size=batch_size, num_workers=workers):
            right += int((model(x.to(device)).argmax(dim=1) == y.to(device)).sum())
            total += len(y)
    return 100 * right / total


def build_parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The command line, with the published settings as defaults."""
    collection = benchmark.collection
    parser = argparse.ArgumentParser(
        description=f"Leave-one-domain-out study of low-bit ResNet-50 on {collection.name}: LSQ, LSQ+SAGM and GAQAT "
        "from one fp32 checkpoint, models chosen by source validation.",
        epilog=f"Layout of the data (DomainBed's): ROOT/{collection.folders[0]}/<domain>/<class>/<image>. "
        f"torchvision is needed, of the version that belongs to your torch, whatever build that is: {INSTALL}",
    )
    parser.add_argument(
        "--root", type=Path, required=True, help=f"the folder that holds {collection.folders[0]}/ with all its domains"
    )
    add_study_options(parser, targets=collection.domains, default_targets=collection.domains, seeds=(0,))
    number = parser.add_argument
    number("--bits", type=whole(2, 8), default=4, help="bits of weights and activations, 2 to 8 (default: %(default)s)")
    number("--steps", type=whole(1), default=benchmark.steps, help="steps of quantized training (default: %(default)s)")
    number("--fp32-steps", type=whole(1), help="fp32 steps before all methods (default: as many as --steps)")
    number("--flat-steps", type=whole(1), help="sharpness-aware fp32 steps of gaqat-flat (default: as many as --steps)")
    number("--eval-every", type=whole(1), default=100, help="steps between validations (default: %(default)s)")
    number("--batch-size", type=whole(1), default=32, help="images per source domain and step (default: %(default)s)")
    number("--lr", type=real(0), default=3e-5, help="learning rate of Adam, constant (default: %(default)s)")
    number("--weight-decay", type=real(0), default=benchmark.weight_decay, help="weight decay (default: %(default)s)")
    number("--dropout", type=real(0, 1), default=0.5, help="dropout before the classifier (default: %(default)s)")
    number("--rho", type=real(0), default=0.05, help="radius of the perturbation (default: %(default)s)")
    number("--alpha", type=real(0), default=benchmark.alpha, help="alpha of SAGM (default: %(default)s)")
    number("--window", type=whole(2), default=100, help="steps in a disorder window (default: %(default)s)")
    number("--threshold", type=real(0, 1), default=0.3, help="disorder that GAQAT freezes below (default: %(default)s)")
    number("--holdout", type=real(0.01, 0.9), default=0.2, help="part of each source domain (default: %(default)s)")
    number("--crop", type=whole(32), default=224, help="side of the images in pixels (default: %(default)s)")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--weights", type=Path, metavar="FILE", help="start from this state dict of ResNet-50")
    start.add_argument("--no-pretrained", action="store_true", help="start from random weights: to try the script out")
    number("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    number("--workers", type=whole(0), default=4, help="processes that load images (default: %(default)s)")
    out = Path("runs", collection.name.lower())
    number("--out", type=Path, metavar="FOLDER", default=out, help="where to write (default: %(default)s)")
    return parser


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes; what is wrong with the data goes to standard error."""
    parser = build_parser(benchmark)
    options = parser.parse_args(argv)
    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device} cannot be used here: {str(error).splitlines()[0]}")
    settings = Settings(
        bits=options.bits,
        steps=options.steps,
        fp32_steps=options.fp32_steps or options.steps,
        flat_steps=options.flat_steps or options.steps,
        every=options.eval_every,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        rho=options.rho,
        alpha=options.alpha,
        window=options.window,
        threshold=options.threshold,
        holdout=options.holdout,
    )
    try:
        folders = find_domains(options.root, benchmark.collection)
        import_torchvision()
        options.out.mkdir(parents=True, exist_ok=True)
        records: list[dict[str, Any]] = []
        cells = len(options.seeds) * len(options.targets)
        with tqdm(total=cells * cell_steps(settings, options.methods), unit="step") as bar:
            for seed in options.seeds:
                for target in options.targets:
                    records += _run_cell(folders, target, seed, options, settings, device, bar)
                    save_results(records, options.out / "results.json")
    except (FolderError, WeightsError, ImportError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    print(table(records, MEASURES))
    print(f"\n{verdict(records, 'held_out_accuracy', where='by source validation')}\n{costs(records)}")
    print(f"Written to {options.out / 'results.json'}")
    return 0


def _run_cell(
    folders: dict[str, Path],
    target: str,
    seed: int,
    options: argparse.Namespace,
    settings: Settings,
    device: torch.device,
    bar: tqdm[Any],
) -> list[dict[str, Any]]:
    """One held-out domain with one seed, all methods: their records."""
    splits: dict[str, Split] = {
        name: load_split(folder, holdout=settings.holdout, seed=1000 * seed + number, crop=options.crop)
        for number, (name, folder) in enumerate(folders.items())
    }
    sources = [split for name, split in splits.items() if name != target]

    def stream(phase: int) -> Iterator[Batch]:
        data = [split.training for split in sources]
        order = 10 * seed + phase
        return endless_loader(data, settings.batch_size, seed=order, workers=options.workers, device=device)

    def measure(model: nn.Module, data: Dataset[Any]) -> float:
        return loader_accuracy(model, data, settings.batch_size, options.workers, device)

    def validate(model: nn.Module) -> float:
        return float(np.mean([measure(model, split.holdout) for split in sources]))

    trainer = Trainer(settings, stream, validate, frozen_batchnorm_train, progress=lambda loss: bar.update())
    model = resnet50(
        len(splits[target].whole.classes),
        weights=options.weights,
        pretrained=not options.no_pretrained,
        dropout=options.dropout,
        seed=seed,
    ).to(device)
    bar.set_description(f"{target}, seed {seed}: fp32 start")
    checkpoint = trainer.erm(model)
    start = {"last_step_accuracy": measure(checkpoint, splits[target].whole)}
    extra = {"dropout": options.dropout, "crop": options.crop, "device": str(device), "start": _start(options)}

    records = []
    for name in options.methods:
        bar.set_description(f"{target}, seed {seed}: {METHODS[name].title}")
        began = time.perf_counter()
        run = trainer.quantized(checkpoint, METHODS[name])
        seconds = time.perf_counter() - began
        records.append(
            {
                "method": name,
                "target": target,
                "seed": seed,
                "bits": settings.bits,
                "source_validation_accuracy": run.validation,
                "selected_step": run.selected_step,
                "held_out_accuracy": measure(run.selected, splits[target].whole),
                "last_step_accuracy": measure(run.last, splits[target].whole),
                FP32: start,
                "seconds": round(seconds, 2),
                "settings": asdict(settings) | extra,
                "versions": versions(),
            }
        )
    return records


def _start(options: argparse.Namespace) -> str:
    if options.weights is not None:
        return str(options.weights.name)
    return "random" if options.no_pretrained else "ImageNet (IMAGENET1K_V1)"
