"""The command line of the studies: lists of names, checked numbers, and the `Settings` that they make."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields

from .study import METHODS, Settings


def in_range(kind: type[int] | type[float], lowest: float, highest: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an `int` or a `float` from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not lowest <= value <= highest:
            bounds = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


def names_from(choices: Iterable[str], kind: str) -> Callable[[str], list[str]]:
    """A type for argparse: one of the choices, or several with commas between them."""
    choices = list(choices)

    def parse(text: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        unknown = [name for name in chosen if name not in choices]
        if unknown or not chosen:
            problem = f"unknown {kind}: {', '.join(unknown)}" if unknown else f"no {kind} given"
            raise argparse.ArgumentTypeError(f"{problem} (choose from {', '.join(choices)})")
        return chosen

    return parse


def seed_list(text: str) -> list[int]:
    """A type for argparse: one seed, or several with commas between them."""
    return [int(in_range(int, 0)(seed)) for seed in text.split(",")]


class JoinLists(argparse.Action):
    """Joins the lists of an option into one, each item once: `a b,c a` gives a, b, c."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, list(dict.fromkeys(item for items in values for item in items)))


# Field of `Settings`: its option, the option's type, and its help.
TRAINING_OPTIONS = {
    "bits": ("--bits", in_range(int, 2, 8), "bits of weights and activations, 2 to 8; first and last layer have 8"),
    "steps": ("--steps", in_range(int, 1), "steps of quantized training"),
    "fp32_steps": ("--fp32-steps", in_range(int, 1), "fp32 steps before all methods"),
    "flat_steps": ("--flat-steps", in_range(int, 1), "sharpness-aware fp32 steps of the flat start"),
    "every": ("--eval-every", in_range(int, 1), "steps between two source validations"),
    "batch_size": ("--batch-size", in_range(int, 1), "images per source domain and step"),
    "learning_rate": ("--lr", in_range(float, 0), "learning rate of Adam"),
    "weight_decay": ("--weight-decay", in_range(float, 0), "weight decay of Adam"),
    "rho": ("--rho", in_range(float, 0), "radius of the perturbation"),
    "alpha": ("--alpha", in_range(float, 0), "alpha of SAGM"),
    "window": ("--window", in_range(int, 2), "steps in a disorder window"),
    "threshold": ("--threshold", in_range(float, 0, 1), "disorder below which GAQAT freezes a scale's task gradient"),
    "holdout": ("--holdout", in_range(float, 0.01, 0.9), "part of each source domain that selects the model"),
}


def add_study_options(
    parser: argparse.ArgumentParser, *, domains: Iterable[str], targets: Iterable[str], first_seeds: Iterable[int]
) -> None:
    """Add `--targets`, `--seeds` and `--methods`; `targets` and `first_seeds` are defaults."""
    lists = {"nargs": "+", "action": JoinLists}
    domains, targets, first_seeds = list(domains), list(targets), list(first_seeds)
    parser.add_argument(
        "--targets",
        **lists,
        type=names_from(domains, "target"),
        default=targets,
        metavar="DOMAIN",
        help=f"held-out domains, from: {', '.join(domains)} (default: {' '.join(targets)})",
    )
    parser.add_argument(
        "--seeds",
        **lists,
        type=seed_list,
        default=first_seeds,
        metavar="SEED",
        help=f"a seed decides data, initial weights and order of batches (default: {' '.join(map(str, first_seeds))})",
    )
    parser.add_argument(
        "--methods",
        **lists,
        type=names_from(METHODS, "method"),
        default=list(METHODS),
        metavar="METHOD",
        help="methods to compare, from: "
        + ", ".join(f"{name} ({method.title})" for name, method in METHODS.items())
        + " (default: all). Differences are taken to lsq.",
    )


def add_training_options(parser: argparse.ArgumentParser, defaults: Mapping[str, float | None]) -> None:
    """Add the option of each field of `Settings` in `defaults`; a default of None means as many as `--steps`."""
    for field, default in defaults.items():
        option, kind, meaning = TRAINING_OPTIONS[field]
        default_text = "as many as --steps" if default is None else "%(default)s"
        parser.add_argument(
            option, dest=field, type=kind, default=default, metavar="N", help=f"{meaning} (default: {default_text})"
        )


def settings_from(options: argparse.Namespace, *, cosine: bool = False) -> Settings:
    """The settings that the options describe; a field without an option keeps its default."""
    values = {field.name: getattr(options, field.name) for field in fields(Settings) if hasattr(options, field.name)}
    for field in ("fp32_steps", "flat_steps"):
        values[field] = values[field] or options.steps
    return Settings(**values, cosine=cosine)
