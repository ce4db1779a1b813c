"""One table of the results of many folders.

    python examples/merge.py runs/pacs-*
    python examples/merge.py runs/* --layout latex > table.tex

The folders must be of the same data set with the same settings; seeds, targets, widths and methods may differ. A result
that two folders have has to be the same in both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from domain_generalization.study.program import print_report
from domain_generalization.study.report import Record, all_cells
from domain_generalization.study.runner import results
from domain_generalization.study.storage import StorageError, differences, read_json

LAYOUTS = {"terminal": "simple", "markdown": "github", "latex": "latex_booktabs"}


def merge(folders: Sequence[Path]) -> tuple[dict[str, Any], list[Record]]:
    """What the folders are for, and the records of all of them.

    Raises:
        StorageError: a folder has no study, or another one, or another result for the same run.
    """
    study: dict[str, Any] | None = None
    found: dict[tuple[Any, ...], tuple[Path, Record]] = {}
    for folder in folders:
        own = read_json(folder / "study.json")
        if own is None:
            raise StorageError(f"{folder}: no study.json in it. Give the folders that --out named.")
        study = study or own
        if others := differences(study, own):
            raise StorageError(
                f"{folder}: not the study of {folders[0]} (there), so one table would mix two:\n  "
                + "\n  ".join(others)
            )
        for record in results(folder):
            key = tuple(record[name] for name in ("target", "seed", "bits", "method"))
            first, known = found.setdefault(key, (folder, record))
            if _accuracies(known) != _accuracies(record):
                raise StorageError(f"{folder}: another result for {key} than in {first}. Remove one of them.")
    assert study is not None
    return study, [record for _, record in found.values()]


def _accuracies(record: Record) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name.endswith("_accuracy")}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="what --out named")
    parser.add_argument("--layout", choices=list(LAYOUTS), default="terminal", help="default: %(default)s")
    parser.add_argument(
        "--by",
        choices=["held_out_accuracy", "last_step_accuracy", "oracle_accuracy"],
        default="held_out_accuracy",
        help="what differences are computed of: source validation, last step or oracle (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    try:
        study, records = merge(options.folders)
    except StorageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    if not records:
        print(f"{parser.prog}: error: no method is done in these folders", file=sys.stderr)
        return 2
    measures = study["measures"]
    if study["settings"]["oracle"]:
        measures["oracle_accuracy"] = "oracle: best on the held-out domain, not a fair choice"
    print_report(records, measures, cells=all_cells(records), main=options.by, layout=LAYOUTS[options.layout])
    return 0


if __name__ == "__main__":
    sys.exit(main())
