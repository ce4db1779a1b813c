"""The demo: low-bit networks on a domain they never saw, four methods side by side, in a few minutes on one core.

Four domains of digits (handwritten, printed, blended with photographs, sketched) are built from files that ship inside
scikit-learn and matplotlib. A small residual network learns three of them in fp32, is quantized, trains on by each
method, and is measured on the fourth:

    lsq         LSQ: quantization-aware training with the plain base optimizer
    lsq+sagm    the same with sharpness-aware steps (SAGM), nothing frozen
    gaqat       the same with freezing by gradient disorder
    gaqat-flat  GAQAT from a flat start: sharpness-aware fp32 steps before quantization

    python examples/digits.py --out results

It prints a table with honest errors and writes results.json, samples.png, conflict.png and the network as ONNX.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from domain_generalization.conflict import save_conflict_plot
from domain_generalization.deployment import deploy
from domain_generalization.digit_study import MEASURES, Cell, run_cell
from domain_generalization.digits import DOMAINS, load_domains, save_samples
from domain_generalization.options import add_study_options, real, whole
from domain_generalization.report import costs, save_results, table, verdict
from domain_generalization.study import Settings, cell_steps


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_study_options(parser, targets=DOMAINS, default_targets=("blended", "sketch"), seeds=(0, 1))
    parser.add_argument("--full", action="store_true", help="hold out each of the four domains in turn")
    parser.add_argument(
        "--bits",
        type=whole(2, 8),
        default=3,
        help="bits of weights and activations, 2 to 8; the first and the last layer have 8 (default: %(default)s)",
    )
    parser.add_argument(
        "--steps", type=whole(1), default=160, help="steps of quantized training (default: %(default)s)"
    )
    parser.add_argument(
        "--fp32-steps", type=whole(1), default=600, help="fp32 steps before all methods (default: %(default)s)"
    )
    parser.add_argument(
        "--flat-steps",
        type=whole(1),
        help="sharpness-aware fp32 steps of the flat start (default: as many as --steps)",
    )
    parser.add_argument(
        "--eval-every", type=whole(1), default=20, help="steps between two source validations (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=whole(1), default=16, help="images per source domain and step (default: %(default)s)"
    )
    parser.add_argument("--lr", type=real(0), default=2e-3, help="learning rate of Adam (default: %(default)s)")
    parser.add_argument("--rho", type=real(0), default=0.5, help="radius of the perturbation (default: %(default)s)")
    parser.add_argument("--alpha", type=real(0), default=1e-3, help="alpha of SAGM (default: %(default)s)")
    parser.add_argument("--window", type=whole(2), default=20, help="steps in a disorder window (default: %(default)s)")
    parser.add_argument(
        "--threshold",
        type=real(0, 1),
        default=0.3,
        help="GAQAT freezes a scale's task gradient where its disorder is below this (default: %(default)s)",
    )
    parser.add_argument("--threads", type=whole(1), default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/digits"), metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes."""
    parser = build_parser()
    options = parser.parse_args(argv)
    targets = list(DOMAINS) if options.full else options.targets
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: cannot make the folder {options.out}: {error.strerror}")
    settings = Settings(
        bits=options.bits,
        steps=options.steps,
        fp32_steps=options.fp32_steps,
        flat_steps=options.flat_steps or options.steps,
        every=options.eval_every,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        rho=options.rho,
        alpha=options.alpha,
        window=options.window,
        threshold=options.threshold,
        cosine=True,
    )

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        _study(settings, targets, options.seeds, options.methods, options.out)
    finally:
        torch.set_num_threads(threads)
    return 0


def _study(settings: Settings, targets: list[str], seeds: list[int], methods: list[str], out: Path) -> None:
    began = time.perf_counter()
    records: list[dict[str, Any]] = []
    shown: Cell | None = None
    cells = len(seeds) * len(targets)
    with tqdm(total=cells * cell_steps(settings, methods), unit="step", mininterval=0.5) as bar:
        for seed in seeds:
            domains = load_domains(seed)
            if shown is None:
                save_samples(domains, out / "samples.png")
            for target in targets:
                cell = run_cell(
                    domains,
                    target,
                    seed,
                    methods,
                    settings,
                    progress=lambda loss: bar.update(),
                    announce=partial(_announce, bar, f"{target}, seed {seed}"),
                )
                shown = shown or cell
                records += cell.records
                # After every cell, so that an interrupted run leaves what it had found.
                save_results(records, out / "results.json")
        bar.set_description("done")

    print(
        f"\nHeld-out accuracy at W{settings.bits}A{settings.bits} (first and last layer 8 bits), {len(seeds)} seed(s), "
        f"standard errors over {cells} cell(s):\n"
    )
    print(table(records, MEASURES))
    print(f"\n{verdict(records)}\n{costs(records)}\n")
    if shown is not None:
        _show(shown, settings, out)
    print(f"Written to the folder {out}.")
    print(f"{time.perf_counter() - began:.0f} seconds, {torch.get_num_threads()} thread(s).")


def _announce(bar: tqdm[Any], cell: str, what: str) -> None:
    bar.set_description(f"{cell}: {what}")


def _show(cell: Cell, settings: Settings, out: Path) -> None:
    """The conflict plot and the deployed file, of the first cell."""
    if cell.recorder is None:
        print("No conflict plot: it takes a method with two passes.")
    else:
        save_conflict_plot(cell.recorder, out / "conflict.png", threshold=settings.threshold)
    if cell.model is not None and cell.checkpoint is not None and cell.target is not None:
        print(deploy(cell.model, cell.checkpoint, *cell.target, out / f"{cell.shown}.onnx"))


if __name__ == "__main__":
    sys.exit(main())
