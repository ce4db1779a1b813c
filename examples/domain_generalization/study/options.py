"""The command line of the studies: a flag for each setting, and what to run where."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .data import DataSet
from .methods import METHODS
from .settings import PRESETS, Settings, in_range, make_settings


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


def number_list(lowest: int, highest: float = float("inf")) -> Callable[[str], list[int]]:
    """A type for argparse: a whole number in a range, or several with commas between them."""
    number = in_range(int, lowest, highest)
    return lambda text: [int(number(part)) for part in text.split(",")]


class JoinLists(argparse.Action):
    """Joins the lists of an option into one, each item once: `a b,c a` gives a, b, c."""

    def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
        setattr(namespace, self.dest, list(dict.fromkeys(item for items in values for item in items)))


def slice_number(text: str) -> tuple[int, int]:
    """A type for argparse: i/n, with i from 1 to n."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 1 to n, as in 2/8; got {text}")
    return int(number), int(count)


def key_value(text: str) -> tuple[str, Any]:
    """A type for argparse: name=value, a whole number where it is one."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"must be name=value, got {text}")
    return name, int(value) if value.isdecimal() else value


def study_parser(data: DataSet | type[DataSet], description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """The command line of a study on this data set. A script adds options of its own."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_choices(parser, data)
    _add_settings(parser, data)
    _add_execution(parser, data)
    return parser


def _add_choices(parser: argparse.ArgumentParser, data: DataSet | type[DataSet]) -> None:
    def add(flag: str, of: Callable[[str], list[Any]], metavar: str, text: str) -> None:
        default = list(data.defaults[flag.lstrip("-")])
        shown = " ".join(map(str, default))
        parser.add_argument(
            flag,
            nargs="+",
            action=JoinLists,
            type=of,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {shown})",
        )

    rows = ", ".join(f"{name} ({method.title})" for name, method in METHODS.items())
    of_domain, of_method = names_from(data.domains, "target"), names_from(METHODS, "method")
    add("--targets", of_domain, "DOMAIN", f"held-out domains, from: {', '.join(data.domains)}")
    add("--seeds", number_list(0), "SEED", "a seed decides data, initial weights and order of batches")
    add("--bits", number_list(2, 8), "N", "bits of weights and activations, 2 to 8, several if you like")
    add("--methods", of_method, "METHOD", f"the rows of the table, from: {rows}; differences are taken to lsq")
    parser.add_argument(
        "--preset",
        choices=list(PRESETS),
        default=data.defaults["preset"],
        help="all settings that have no flag of their own on the command line (default: %(default)s)",
    )


def _add_settings(parser: argparse.ArgumentParser, data: DataSet | type[DataSet]) -> None:
    group = parser.add_argument_group("settings, in the place of the preset's")
    first = data.defaults["preset"]
    by_preset = {name: make_settings(name, data.presets.get(name, {})) for name in (first, *PRESETS)}
    for setting in fields(Settings):
        if setting.name in data.unused:
            continue
        option = setting.metadata["option"]
        default = getattr(by_preset[first], setting.name)
        others = "".join(
            f"; {name}: {_shown(getattr(settings, setting.name))}"
            for name, settings in by_preset.items()
            if getattr(settings, setting.name) != default
        )
        group.add_argument(
            setting.metadata["flag"],
            dest=setting.name,
            default=argparse.SUPPRESS,
            help=f"{setting.metadata['help']} (default: {_shown(default)}{others})",
            **(dict(option) if option is not None else {"action": argparse.BooleanOptionalAction}),
        )


def _shown(value: Any) -> str:
    return {None: "none", True: "yes", False: "no"}.get(value, f"{value}") if not _is_number(value) else f"{value:g}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _add_execution(parser: argparse.ArgumentParser, data: DataSet | type[DataSet]) -> None:
    option = parser.add_argument_group("where and how").add_argument
    out = Path("runs", data.name.lower())
    option("--out", type=Path, default=out, metavar="FOLDER", help="of all results (default: %(default)s)")
    device = data.defaults.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    option("--device", default=device, help="default: %(default)s")
    workers = data.defaults.get("workers", 0)
    option(
        "--workers",
        type=in_range(int, 0),
        default=workers,
        metavar="N",
        help="processes that load images, for each job (default: %(default)s)",
    )
    option(
        "--threads",
        type=in_range(int, 1),
        default=data.defaults.get("threads"),
        metavar="N",
        help="threads of torch (default: %(default)s)",
    )
    option(
        "--save-every",
        type=in_range(int, 0),
        default=200,
        metavar="N",
        help="steps between two checkpoints; 0 for none (default: %(default)s)",
    )
    option("--save-models", action="store_true", help="keep the weights of every method: last, selected, averaged")
    option("--export", action="store_true", help="write every row as an ONNX file too; keeps the weights")
    option("--jobs", type=in_range(int, 1), default=1, metavar="N", help="processes that share the jobs; one GPU each")
    option("--cells", type=slice_number, metavar="I/N", help="only the I-th of N slices of the cells: for array jobs")
    option("--cluster", choices=["slurm", "local"], help="submit the cells by submitit, in --tasks slices, and return")
    option("--tasks", type=in_range(int, 1), default=1, metavar="N", help="tasks of --cluster (default: %(default)s)")
    option(
        "--cluster-options",
        nargs="+",
        type=key_value,
        default=[],
        metavar="NAME=VALUE",
        help="parameters of submitit, such as slurm_partition=gpu gpus_per_node=1 timeout_min=600",
    )


def settings_from(options: argparse.Namespace, data: DataSet) -> Settings:
    """The settings that the options describe."""
    of_user: Mapping[str, Any] = {
        setting.name: getattr(options, setting.name) for setting in fields(Settings) if hasattr(options, setting.name)
    }
    if "cached" in of_user:  # the folder of --cache; where the copies lie changes nothing
        of_user = {**of_user, "cached": True}
    return make_settings(options.preset, data.presets.get(options.preset, {}), of_user)
