"""What the command lines of the examples have in common: lists of names and numbers that are checked on entry."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable

from .study import METHODS


def whole(lowest: int, highest: int | None = None) -> Callable[[str], int]:
    """A type for argparse: a whole number from `lowest` to `highest`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < lowest or (highest is not None and number > highest):
            bounds = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {number}")
        return number

    return parse


def real(lowest: float, highest: float = float("inf")) -> Callable[[str], float]:
    """A type for argparse: a number from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not lowest <= number <= highest:
            bounds = f"at least {lowest:g}" if highest == float("inf") else f"from {lowest:g} to {highest:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {number:g}")
        return number

    return parse


def choice_of(known: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """A type for argparse: one name or several with commas between them, each of them known."""
    names = list(known)

    def parse(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        unknown = [name for name in found if name not in names]
        if unknown or not found:
            problem = f"unknown {what}: {', '.join(unknown)}" if unknown else f"no {what} given"
            raise argparse.ArgumentTypeError(f"{problem} (choose from {', '.join(names)})")
        return found

    return parse


def seed_list(text: str) -> list[int]:
    """A type for argparse: one seed or several with commas between them."""
    return [whole(0)(part) for part in text.split(",")]


class Gather(argparse.Action):
    """Joins the lists that the words of an option give into one list, each item once: `a b,c` gives a, b, c."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, list(dict.fromkeys(item for value in values for item in value)))


def add_study_options(
    parser: argparse.ArgumentParser, *, targets: Iterable[str], default_targets: Iterable[str], seeds: Iterable[int]
) -> None:
    """Add `--targets`, `--seeds` and `--methods`."""
    targets = list(targets)
    parser.add_argument(
        "--targets",
        nargs="+",
        action=Gather,
        type=choice_of(targets, "target"),
        default=list(default_targets),
        metavar="DOMAIN",
        help=f"held-out domains, from: {', '.join(targets)} (default: {' '.join(default_targets)})",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        action=Gather,
        type=seed_list,
        default=list(seeds),
        metavar="SEED",
        help="the seeds; each gives its own data, start and order of batches "
        f"(default: {' '.join(str(seed) for seed in seeds)})",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        action=Gather,
        type=choice_of(METHODS, "method"),
        default=list(METHODS),
        metavar="METHOD",
        help="what to compare, from: "
        + ", ".join(f"{name} ({method.title})" for name, method in METHODS.items())
        + " (default: all). Differences are taken to lsq.",
    )
