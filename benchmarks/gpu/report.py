"""The JSON and the Markdown of `make gpu`: one table, under a heading that says on what it was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu.correctness import Tests, by_function
from timing import Ratio, markdown


@dataclass
class Report:
    """All that the command found.

    Attributes:
        device: "cuda" or "cpu", where everything was asked to run.
        machine: the name of the card, or of the processor's architecture.
        setting: versions.
        tests: of any device.
        rows: of gpu.rows, as dictionaries.
        failed: measurements that failed, with their errors.
        left_out: measurements that the time did not suffice for.
        seconds: how long all of it took.
    """

    device: str
    machine: str
    setting: dict[str, str]
    columns: tuple[str, ...]
    tests: Tests = field(default_factory=Tests)
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_error(self) -> bool:
        return self.tests.is_error or bool(self.failed)

    @property
    def heading(self) -> str:
        if self.device == "cuda":
            return f"# gaqat-optim on {self.machine}"
        return f"# gaqat-optim on a CPU ({self.machine}): the command tried on small networks, no figures of a GPU"

    def check_devices(self) -> None:
        """Raise if a row was measured on another device than the heading says."""
        wrong = [f"{row['what']} ({row['device']})" for row in self.rows if row["device"] != self.device]
        if wrong:
            raise RuntimeError(f"measured on another device than {self.device}: {', '.join(wrong)}")

    def to_markdown(self) -> str:
        self.check_devices()
        setting = ", ".join(f"{name} {value}" for name, value in self.setting.items())
        parts = [self.heading, f"{setting}. {self.seconds:.0f} s in all.", *self._tests(), "## Speed and memory"]
        parts.append("Ratios of medians of interleaved runs ± their spread; less is better.")
        cells = [
            [row["what"], row["multiples_of"], *(shown(row["cells"].get(c)) for c in self.columns)] for row in self.rows
        ]
        parts.append(markdown(["", "multiples of", *self.columns], cells))
        parts += listed("No figure in the table", self._reasons())
        parts += listed("Failed", self.failed)
        parts += listed("Left out, since the time was over", self.left_out)
        return "\n\n".join(parts) + "\n"

    def _tests(self) -> list[str]:
        tests = self.tests
        if tests.not_run_because:
            return ["## Tests", f"**No test was run: {tests.not_run_because}.**"]
        counts = f"{tests.passed} passed, {len(tests.failed)} failed, {len(tests.skipped)} skipped"
        parts = ["## Tests", f"On {self.device}: {counts}, {len(tests.left_out)} left out, since the time was over."]
        parts += listed("Failed", [f"`{test}`: {last_line(reason)}" for test, reason in tests.failed.items()])
        parts += listed("Skipped for want of a GPU, which is an error here", tests.skipped_without_cuda)
        skipped = [test for test in tests.skipped if test not in tests.skipped_without_cuda]
        parts += listed("Skipped", [f"`{test}`: {tests.skipped[test]}" for test in skipped])
        return parts + listed("Left out", [f"{n} of `{test}`" for test, n in by_function(tests.left_out).items()])

    def _reasons(self) -> list[str]:
        reasons: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            for column, cell in row["cells"].items():
                if isinstance(cell, str):
                    reasons.setdefault((column, cell), []).append(row["what"])
        return [f"{column}, {cell} ({len(rows)} of {len(self.rows)} rows)" for (column, cell), rows in reasons.items()]

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write report.md and report.json, and return their paths."""
        text, values = self.to_markdown(), asdict(self)
        paths = folder / "report.md", folder / "report.json"
        paths[0].write_text(text, encoding="utf-8")
        paths[1].write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        return paths


def shown(cell: dict[str, Any] | str | None) -> str:
    return str(Ratio(**cell)) if isinstance(cell, dict) else "-"


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def listed(title: str, lines: list[str]) -> list[str]:
    return [f"{title}:\n\n" + "\n".join(f"- {line}" for line in lines)] if lines else []
