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
What is done is kept in the output folder: the same command again goes on, or prints the table at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from domain_generalization.conflict import ConflictRecorder, save_conflict_plot
from domain_generalization.deployment import deploy, trained_network
from domain_generalization.digit_domains import DOMAINS, save_samples
from domain_generalization.digit_study import DigitData, load_once
from domain_generalization.study.jobs import START, Job
from domain_generalization.study.program import Finished, run_program, study_parser
from domain_generalization.study.progress import next_steps, wrapped
from domain_generalization.study.report import costs, table, verdict

# The run of the first of these methods is plotted and exported.
EXAMPLE_METHODS = ("gaqat", "gaqat-flat", "lsq+sagm", "lsq")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = study_parser(DigitData, summary, epilog=details)
    parser.add_argument("--full", action="store_true", help="hold out each of the four domains in turn")
    return parser


def example_of(jobs: Sequence[Job]) -> Job | None:
    """The job of the first cell that is plotted and exported."""
    in_first_cell = {
        job.method: job for job in reversed(jobs) if (job.target, job.seed) == (jobs[0].target, jobs[0].seed)
    }
    return next((in_first_cell[name] for name in EXAMPLE_METHODS if name in in_first_cell), None)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study that the command line describes."""

    def make_data(options: argparse.Namespace) -> DigitData:
        options.targets = list(DOMAINS) if options.full else options.targets
        return DigitData()

    return run_program(build_parser(), make_data, argv, example=example_of, finish=show)


def show(finished: Finished) -> None:
    """Print the table, and write the plots and the network of the first cell."""
    study, records, folder = finished.study, finished.records, finished.study.out
    settings = study.settings
    bits = sorted({cell[2] for cell in finished.cells})
    count = len({cell[:2] for cell in finished.cells})
    widths = " and ".join(f"W{width}A{width}" for width in bits)
    print(
        f"\nHeld-out accuracy in percent at {widths} (first and last layer {settings.first_last_bits} bits),\n"
        f"{len({job.seed for job in finished.jobs})} seed(s), standard errors over {count} cell(s):\n"
    )
    methods = {job.method for job in finished.jobs} | {record["method"] for record in records}
    print(table(records, study.data.measures, methods=methods, cells=finished.cells))
    print(f"\n{wrapped(verdict(records))}\n{wrapped(costs(records))}\n")
    save_samples(load_once(finished.jobs[0].seed), folder / "samples.png")
    if study.example is not None and study.result(study.example) is not None:
        _show_example(finished, study.example)
    print(f"\n{finished.seconds:.0f} seconds, {torch.get_num_threads()} thread(s). All files are in {folder}.\n")
    name = "the .onnx file" if study.example is None else f"{study.example.method}.onnx"
    print(
        next_steps(
            f"Look at {folder / 'samples.png'}, and at {folder / 'conflict.png'} if there is one.",
            f"Run {name} in a program of yours, in Python or C++: docs/from_checkpoint_to_device.md.",
            "Quantize your own network: the loop in README.md, explained in docs/quickstart.md.",
        )
    )


def _show_example(finished: Finished, job: Job) -> None:
    study, folder = finished.study, finished.study.out
    weights = study.weights(job)
    if weights is None:
        print(wrapped(f"No plot and no network file: {job.title} was trained before, without keeping them."))
        print(f"Remove {study.folder(job)} to have it trained again.")
        return
    if "recorder" in weights:
        recorder = ConflictRecorder()
        recorder.load_state_dict(weights["recorder"])
        settings = study.settings
        save_conflict_plot(recorder, folder / "conflict.png", threshold=settings.threshold, window=settings.window)
    else:
        print(wrapped("No conflict plot: it takes a method with two passes, recorded from its first step on."))
    fp32 = trained_network(study, Job(job.target, job.seed, None, START))
    images, labels = load_once(job.seed)[job.target]
    print("Writing the network as ONNX files, and comparing them in onnxruntime ...\n", flush=True)
    report = deploy(trained_network(study, job), fp32, images, labels, folder / f"{job.method}.onnx")
    print(wrapped(str(report), indent="  "))


if __name__ == "__main__":
    sys.exit(main())
