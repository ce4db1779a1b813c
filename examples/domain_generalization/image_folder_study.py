"""The study on image folders: ResNet-50 from ImageNet weights, one domain held out, SAGM's published settings.

BatchNorm statistics are frozen, as in SAGM's and SWAD's experiments: BatchNorm stays in evaluation mode while its
weights and biases are trained. Held-out accuracy counts all images of the held-out domain.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .image_folders import Collection, FolderError, Split, endless_loader, find_domains, load_split
from .options import add_study_options, add_training_options, in_range, settings_from
from .report import Record, costs, run_record, save_results, table, verdict
from .resnet50 import WeightsError, frozen_batchnorm_train, resnet50
from .study import METHODS, Batch, Settings, Trainer, cell_steps
from .torchvision_import import INSTALL, import_torchvision

# Record key to its title in the table.
MEASURES = {"held_out_accuracy": "chosen by source validation", "last_step_accuracy": "last step"}


@dataclass(frozen=True)
class Benchmark:
    """A collection of image folders with its published settings."""

    collection: Collection
    steps: int
    weight_decay: float
    alpha: float


def build_parser(benchmark: Benchmark) -> argparse.ArgumentParser:
    """The command line, with the published settings as defaults."""
    collection = benchmark.collection
    parser = argparse.ArgumentParser(
        description=f"Leave-one-domain-out study of low-bit ResNet-50 on {collection.name}: LSQ, LSQ+SAGM and GAQAT "
        "from one fp32 checkpoint, models chosen by source validation.",
        epilog=f"Layout of the data (DomainBed's): ROOT/{collection.folders[0]}/<domain>/<class>/<image>. "
        f"torchvision is needed, in the version that belongs to your torch; any build will do: {INSTALL}",
    )
    option = parser.add_argument
    option("--root", type=Path, required=True, help=f"the folder that holds {collection.folders[0]}/ with all domains")
    add_study_options(parser, domains=collection.domains, targets=collection.domains, first_seeds=(0,))
    add_training_options(
        parser,
        {
            "bits": 4,
            "steps": benchmark.steps,
            "fp32_steps": None,
            "flat_steps": None,
            "every": 100,
            "batch_size": 32,
            "learning_rate": 3e-5,
            "weight_decay": benchmark.weight_decay,
            "rho": 0.05,
            "alpha": benchmark.alpha,
            "window": 100,
            "threshold": 0.3,
            "holdout": 0.2,
        },
    )
    option("--dropout", type=in_range(float, 0, 1), default=0.5, help="before the classifier (default: %(default)s)")
    option("--crop", type=in_range(int, 32), default=224, help="side of the images in pixels (default: %(default)s)")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, metavar="FILE", help="start from this state dict of ResNet-50")
    weights.add_argument("--no-pretrained", action="store_true", help="start from random weights, to try the script")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    option("--workers", type=in_range(int, 0), default=4, help="processes that load images (default: %(default)s)")
    folder = Path("runs", collection.name.lower())
    option("--out", type=Path, metavar="FOLDER", default=folder, help="folder of results.json (default: %(default)s)")
    return parser


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes. Problems with the data go to standard error."""
    parser = build_parser(benchmark)
    options = parser.parse_args(argv)
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"argument --device: {options.device} cannot be used here: {str(error).splitlines()[0]}")
    settings = settings_from(options)
    try:
        folders = find_domains(options.root, benchmark.collection)
        import_torchvision()
        options.out.mkdir(parents=True, exist_ok=True)
        records: list[Record] = []
        cells = len(options.seeds) * len(options.targets)
        with tqdm(total=cells * cell_steps(settings, options.methods), unit="step") as bar:
            for seed in options.seeds:
                for target in options.targets:
                    records += _run_cell(folders, target, seed, options, settings, bar)
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
    bar: tqdm[Any],
) -> list[Record]:
    """One held-out domain with one seed, all methods: their records."""
    splits: dict[str, Split] = {
        name: load_split(folder, holdout=settings.holdout, seed=1000 * seed + index, crop=options.crop)
        for index, (name, folder) in enumerate(folders.items())
    }
    images = splits[target].whole
    sources = [split for name, split in splits.items() if name != target]
    device = torch.device(options.device)

    def stream(phase: int) -> Iterator[Batch]:
        datasets = [split.training for split in sources]
        return endless_loader(
            datasets, settings.batch_size, seed=10 * seed + phase, workers=options.workers, device=device
        )

    def measure(model: nn.Module, dataset: Dataset[Any]) -> float:
        return loader_accuracy(model, dataset, settings.batch_size, options.workers, device)

    def validate(model: nn.Module) -> float:
        return float(np.mean([measure(model, split.holdout) for split in sources]))

    trainer = Trainer(settings, stream, validate, frozen_batchnorm_train, progress=lambda loss: bar.update())
    bar.set_description(f"{target}, seed {seed}: fp32 start")
    model = resnet50(
        len(images.classes),
        weights=options.weights,
        pretrained=not options.no_pretrained,
        dropout=options.dropout,
        seed=seed,
    )
    checkpoint = trainer.erm(model.to(device))
    fp32_accuracies = {"last_step_accuracy": measure(checkpoint, images)}
    start = "random" if options.no_pretrained else "ImageNet (IMAGENET1K_V1)"
    if options.weights is not None:
        start = options.weights.name
    more_settings = {"dropout": options.dropout, "crop": options.crop, "device": str(device), "start": start}

    records = []
    for name in options.methods:
        bar.set_description(f"{target}, seed {seed}: {METHODS[name].title}")
        run = trainer.quantized(checkpoint, METHODS[name])
        accuracies = {
            "held_out_accuracy": measure(run.selected, images),
            "last_step_accuracy": measure(run.last, images),
        }
        records.append(run_record(name, target, seed, settings, run, accuracies, fp32_accuracies, **more_settings))
    return records


def loader_accuracy(
    model: nn.Module, dataset: Dataset[Any], batch_size: int, workers: int, device: torch.device
) -> float:
    """The accuracy of the model on a data set, in percent."""
    model.eval()
    correct = total = 0
    with torch.no_grad():
        for x, y in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
            correct += int((model(x.to(device)).argmax(dim=1) == y.to(device)).sum())
            total += len(y)
    return 100 * correct / total
