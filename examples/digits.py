"""The demo: low-bit networks on a domain they never saw, four methods side by side, in a few minutes on one core.

Four domains of digits (handwritten, printed, blended with photographs, sketched) come from files inside scikit-learn
and matplotlib. A small residual network learns three of them in fp32, is quantized, and trains on by each method. The
fourth domain measures it:

    lsq         LSQ: quantization-aware training with the plain base optimizer
    lsq+sagm    the same with sharpness-aware steps (SAGM), nothing frozen
    gaqat       the same with freezing by gradient disorder
    gaqat-flat  GAQAT from a flat start: sharpness-aware fp32 steps before quantization

    python examples/digits.py --out results

The demo prints a table with standard errors and writes results.json, samples.png, conflict.png and the network as ONNX.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from domain_generalization.conflict import save_conflict_plot
from domain_generalization.deployment import deploy
from domain_generalization.digit_domains import DOMAINS, load_domains, save_samples
from domain_generalization.digit_study import MEASURES, Cell, run_cell
from domain_generalization.options import add_study_options, add_training_options, in_range, settings_from
from domain_generalization.report import costs, save_results, table, verdict
from domain_generalization.study import Settings, cell_steps

DEFAULTS = {
    "bits": 3,
    "steps": 160,
    "fp32_steps": 600,
    "flat_steps": None,
    "every": 20,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "rho": 0.5,
    "alpha": 1e-3,
    "window": 20,
    "threshold": 0.3,
}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_options(parser, domains=DOMAINS, targets=("blended", "sketch"), first_seeds=(0, 1))
    parser.add_argument("--full", action="store_true", help="hold out each of the four domains in turn")
    add_training_options(parser, DEFAULTS)
    parser.add_argument("--threads", type=in_range(int, 1), default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), metavar="FOLDER", help="output folder (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes."""
    parser = build_parser()
    options = parser.parse_args(argv)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    targets = list(DOMAINS) if options.full else options.targets
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        run_study(settings_from(options, cosine=True), targets, options.seeds, options.methods, options.out)
    finally:
        torch.set_num_threads(threads)
    return 0


def run_study(settings: Settings, targets: list[str], seeds: list[int], methods: list[str], folder: Path) -> None:
    """Run every cell, then print the table and write the plots and the network of the first cell."""
    start = time.perf_counter()
    first: Cell | None = None
    records = []
    count = len(seeds) * len(targets)
    with tqdm(total=count * cell_steps(settings, methods), unit="step", mininterval=0.5) as bar:
        for seed in seeds:
            domains = load_domains(seed)
            if first is None:
                save_samples(domains, folder / "samples.png")
            for target in targets:
                cell = run_cell(domains, target, seed, methods, settings, bar)
                first = first or cell
                records += cell.records
                # After every cell, so that an interrupted run keeps its finished cells.
                save_results(records, folder / "results.json")
        bar.set_description("done")

    print(
        f"\nHeld-out accuracy at W{settings.bits}A{settings.bits} (first and last layer 8 bits), {len(seeds)} seed(s), "
        f"standard errors over {count} cell(s):\n"
    )
    print(table(records, MEASURES))
    print(f"\n{verdict(records)}\n{costs(records)}\n")
    assert first is not None
    if first.recorder is None:
        print("No conflict plot: it takes a method with two passes.")
    else:
        save_conflict_plot(first.recorder, folder / "conflict.png", threshold=settings.threshold)
    print(deploy(first.model, first.checkpoint, *first.target, folder / f"{first.example}.onnx"))
    print(f"Written to the folder {folder}.")
    print(f"{time.perf_counter() - start:.0f} seconds, {torch.get_num_threads()} thread(s).")


if __name__ == "__main__":
    sys.exit(main())
