"""Every number of a study, its flag on the command line, and the two presets."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gaqat_optim import QuantConfig

AS_MANY_AS_STEPS = 0  # of `fp32_steps` and `flat_steps`


def in_range(kind: type[int] | type[float], lowest: float, highest: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an `int` or a `float` from `lowest` to `highest`."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not lowest <= value <= highest:
            bounds = f"at least {lowest:g}" if highest == math.inf else f"from {lowest:g} to {highest:g}"
            raise ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    return parse


def _number(kind: type[int] | type[float], lowest: float, highest: float = math.inf) -> Mapping[str, Any]:
    return {"type": in_range(kind, lowest, highest), "metavar": "N"}


def _choice(*names: str) -> Mapping[str, Any]:
    return {"choices": names}


def _setting(default: Any, flag: str, option: Mapping[str, Any] | None, meaning: str) -> Any:
    """A field with its flag. `option`: arguments of argparse's `add_argument`; None for a pair --x and --no-x."""
    return field(default=default, metadata={"flag": flag, "option": option, "help": meaning})


_STEPS = _number(int, 1)
_NUMBER = _number(float, 0)
_FRACTION = _number(float, 0, 1)


@dataclass(frozen=True)
class Settings:
    """Every number of a study, as results.json records it. A method ignores what it does not use.

    The defaults are the preset "published". A field has its flag, so that there is no setting without one.
    """

    # Training
    steps: int = _setting(5001, "--steps", _STEPS, "steps of a method")
    fp32_steps: int = _setting(
        AS_MANY_AS_STEPS, "--fp32-steps", _number(int, 0), "fp32 steps before all methods; 0: as many as --steps"
    )
    flat_steps: int = _setting(
        AS_MANY_AS_STEPS,
        "--flat-steps",
        _number(int, 0),
        "fp32 steps with SAGM of the flat start; 0: as many as --steps",
    )
    every: int = _setting(100, "--eval-every", _STEPS, "steps between two source validations")
    batch_size: int = _setting(32, "--batch-size", _STEPS, "images per source domain and step")
    learning_rate: float = _setting(3e-5, "--lr", _NUMBER, "learning rate of Adam")
    scale_lr: float | None = _setting(None, "--scale-lr", _NUMBER, "learning rate of the scales, if another one")
    weight_decay: float = _setting(1e-4, "--weight-decay", _NUMBER, "weight decay of Adam; scales have none")
    schedule: str = _setting(
        "constant", "--schedule", _choice("constant", "cosine"), "learning rate within each phase: constant or to zero"
    )
    holdout: float = _setting(
        0.2, "--holdout", _number(float, 0.01, 0.9), "part of each source domain that selects the model"
    )
    oracle: bool = _setting(
        True, "--oracle", None, "also validate on the held-out domain, and report the best (not a fair choice)"
    )
    # Network and images
    batchnorm: str = _setting(
        "frozen", "--batchnorm", _choice("frozen", "train"), "statistics of BatchNorm; its weights are always trained"
    )
    dropout: float = _setting(0.5, "--dropout", _FRACTION, "before the classifier, in networks that have it")
    size: int = _setting(224, "--size", _number(int, 16), "side of the images in pixels, of image folders")
    cached: bool = _setting(
        False,
        "--cache",
        {"type": Path, "metavar": "FOLDER"},
        "keep decoded images in this folder, shrunk to a shorter side of 256, and train on them",
    )
    # Two passes
    rho: float = _setting(0.05, "--rho", _NUMBER, "radius of the perturbation")
    alpha: float = _setting(1e-3, "--alpha", _NUMBER, "alpha of SAGM")
    interval: int = _setting(1, "--interval", _STEPS, "a second pass in every so many steps only")
    replay_rng: bool = _setting(False, "--replay-rng", None, "the same dropout masks in both passes")
    # Freezing
    policy: str = _setting(
        "disorder",
        "--policy",
        _choice("disorder", "once", "always", "random", "conflict", "opposition", "alternate"),
        "the policy of gaqat, gaqat-flat, both and smooth",
    )
    freeze: str | None = _setting(
        None, "--freeze", _choice("task", "smooth", "both"), "the part that they freeze, where the row does not say it"
    )
    window: int = _setting(100, "--window", _number(int, 2), "steps in a window")
    threshold: float = _setting(0.3, "--threshold", _FRACTION, "disorder below which a scale is frozen")
    quantile: float | None = _setting(None, "--quantile", _FRACTION, "freeze this fraction instead of a threshold")
    measure: str = _setting("task", "--measure", _choice("task", "smooth"), "the gradient whose disorder is judged")
    when: str = _setting("below", "--when", _choice("below", "above"), "freeze below or above the threshold")
    conflict_threshold: float = _setting(
        0.5, "--conflict-threshold", _FRACTION, "sign conflict above which the row conflict freezes"
    )
    fraction: float = _setting(0.5, "--fraction", _FRACTION, "what the row random freezes")
    # Quantization
    scale_domain: str = _setting("linear", "--scale-domain", _choice("linear", "log"), "what is trained of a scale")
    init: str = _setting("lsq", "--init", _choice("lsq", "mse"), "first values of the scales")
    granularity: str = _setting(
        "tensor", "--granularity", _choice("tensor", "channel"), "one scale for a weight tensor, or for each channel"
    )
    first_last_bits: int = _setting(8, "--first-last-bits", _number(int, 2, 8), "bits of the first and the last layer")
    calibration_batches: int = _setting(4, "--calibration-batches", _STEPS, "batches that set the first scales")
    round_biases: bool = _setting(
        False, "--round-biases", None, "train and evaluate with the biases of the deployed network"
    )
    # Averaging
    average: str = _setting("none", "--average", _choice("none", "swad"), "further rows with averaged weights")
    average_start: int = _setting(3, "--average-start", _STEPS, "N_s of SWAD, in validations")
    average_end: int = _setting(6, "--average-end", _STEPS, "N_e of SWAD, in validations")
    average_tolerance: float = _setting(1.3, "--average-tolerance", _number(float, 1), "r of SWAD")
    # Arithmetic
    amp: str = _setting("none", "--amp", _choice("none", "bf16", "fp16"), "half precision in training")
    compile: bool = _setting(False, "--compile", None, "torch.compile for the training passes")

    def quantization(self, bits: int) -> QuantConfig:
        """The quantization that these settings describe."""
        return QuantConfig(
            weight_bits=bits,
            activation_bits=bits,
            weight_granularity=self.granularity,  # type: ignore[arg-type]
            first_last_bits=self.first_last_bits,
            init=self.init,  # type: ignore[arg-type]
            scale_domain=self.scale_domain,  # type: ignore[arg-type]
        )


# "published": what the papers on GAQAT, SAGM and SWAD give, and DomainBed's protocol; data sets add alpha, steps,
# learning rate and weight decay. "recommended": what did better in our own runs, at the same learning rate.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "published": {},
    "recommended": {
        "scale_domain": "log",
        "init": "mse",
        "granularity": "channel",
        "round_biases": True,
        "oracle": False,
    },
}

# What no paper says, by the field that decides it. A study under "published" prints these lines when it starts.
OUR_READING: Mapping[str, str] = {
    "fp32_steps": "quantization starts from an fp32 network trained by ERM for {fp32_steps} steps",
    "window": "windows of {window} steps",
    "threshold": "freezing below a disorder of {threshold}",
    "freeze": "what is frozen is the task part of a scale's gradient",
    "first_last_bits": "first and last layer have {first_last_bits} bits",
    "calibration_batches": "activation scales start from {calibration_batches} training batches",
    "alpha": "SAGM's alpha {alpha} and rho {rho}, which perturb the scales as well as the weights",
    "scale_lr": "scales have the learning rate of the weights, and no weight decay",
    "batchnorm": "statistics of BatchNorm are {batchnorm}, as in SAGM's and SWAD's code",
}


def make_settings(preset: str, of_data: Mapping[str, Any], of_user: Mapping[str, Any] | None = None) -> Settings:
    """The preset, changed by the data set, changed by the user. "As many as --steps" is resolved."""
    values = {**PRESETS[preset], **of_data, **(of_user or {})}
    unknown = set(values) - {setting.name for setting in fields(Settings)}
    if unknown:
        raise TypeError(f"no such setting: {', '.join(sorted(unknown))}")
    for name in ("fp32_steps", "flat_steps"):
        values[name] = values.get(name) or values.get("steps", Settings.steps)
    return Settings(**values)
