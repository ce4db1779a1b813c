"""The command line: every setting has a flag, and what it says is what is meant."""

from __future__ import annotations

import argparse
from dataclasses import fields

import pytest

from domain_generalization.digit_study import DigitData
from domain_generalization.study import options
from domain_generalization.study.settings import Settings, make_settings
from tiny_study import TinyData


def parser() -> argparse.ArgumentParser:
    return options.study_parser(TinyData(), "A study.")


@pytest.mark.parametrize("setting", fields(Settings), ids=lambda setting: setting.name)
def test_every_setting_has_a_flag_that_sets_it(setting: object) -> None:
    name, flag = setting.name, setting.metadata["flag"]  # type: ignore[attr-defined]
    before = options.settings_from(parser().parse_args([]), TinyData())
    option = setting.metadata["option"]  # type: ignore[attr-defined]
    now = getattr(before, name)
    if option is None:
        arguments, expected = [flag.replace("--", "--no-") if now else flag], not now
    elif "choices" in option:
        expected = next(choice for choice in option["choices"] if choice != now)
        arguments = [flag, expected]
    elif name == "cached":
        arguments, expected = [flag, "some/folder"], True
    else:
        value = "1" if now != 1 and name not in ("first_last_bits", "size", "window", "holdout") else "0.5"
        special = {
            "first_last_bits": "5",
            "size": "33",
            "window": "7",
            "interval": "3",
            "average_tolerance": "2",
            "calibration_batches": "2",
        }
        value = special.get(name, value)
        arguments = [flag, value]
        expected = option["type"](value)
    after = options.settings_from(parser().parse_args(arguments), TinyData())
    assert getattr(after, name) == expected != now
    changed = {other.name for other in fields(Settings) if getattr(after, other.name) != getattr(before, other.name)}
    assert changed == {name}


def test_the_preset_is_under_the_flags() -> None:
    data = DigitData()
    chosen = options.study_parser(data, "").parse_args(["--preset", "published", "--rho", "0.7"])
    settings = options.settings_from(chosen, data)
    assert (settings.scale_domain, settings.rho, settings.batch_size) == ("linear", 0.7, 16)
    default = options.settings_from(options.study_parser(data, "").parse_args([]), data)
    assert default == make_settings("recommended", data.presets["recommended"])


def test_settings_that_mean_nothing_have_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.study_parser(DigitData(), "").parse_args(["--dropout", "0.1"])
    assert "unrecognized arguments: --dropout" in capsys.readouterr().err


def test_help_says_what_each_preset_has() -> None:
    text = " ".join(parser().format_help().split())
    assert "(default: linear; recommended: log)" in text
    assert all(action.help for action in parser()._actions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "--bits: must be from 2 to 8, got 9"),
        (["--cells", "0/3"], "--cells: must be i/n"),
        (["--cluster-options", "gpus"], "--cluster-options: must be name=value, got gpus"),
        (["--amp", "int8"], "--amp: invalid choice: 'int8'"),
    ],
)
def test_bad_values_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(arguments)
    assert message in capsys.readouterr().err


def test_lists_and_pairs() -> None:
    chosen = parser().parse_args(
        ["--bits", "3,4", "3", "--cells", "2/5", "--cluster-options", "gpus_per_node=1", "slurm_partition=a=b"]
    )
    assert chosen.bits == [3, 4]
    assert chosen.cells == (2, 5)
    assert dict(chosen.cluster_options) == {"gpus_per_node": 1, "slurm_partition": "a=b"}
