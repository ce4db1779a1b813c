"""The ``exclude=`` that an error recommends: it works as it stands, and leaves nothing else in floating point."""

import ast

from torch import nn

from gaqat_optim import QuantConfig
from gaqat_optim.quant.exclude_advice import exclude_argument


def blocks(count=3):
    return nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(2, 2), "out": nn.Linear(2, 2)}) for _ in range(count)))


def advice(model, names, exclude=()):
    return ast.literal_eval(exclude_argument(model, names, exclude).removeprefix("exclude="))


def left_in_float(model, exclude):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [name for name, layer in QuantConfig(exclude=exclude).resolve(layers).items() if layer is None]


def test_repeated_blocks_share_a_pattern():
    names = ["0.fc", "1.fc", "2.fc"]
    assert advice(blocks(), names) == ("*.fc",)
    assert left_in_float(blocks(), ("*.fc",)) == names


def test_a_pattern_that_would_match_another_module_is_not_used():
    names = ["0.fc", "2.fc"]
    assert advice(blocks(), names) == ("0.fc", "2.fc")
    assert left_in_float(blocks(), advice(blocks(), names)) == names


def test_a_module_by_another_name_counts_as_another():
    model = blocks(2)
    model.append(nn.ModuleDict({"fc": model[0]["fc"]}))
    assert advice(model, ["0.fc", "1.fc"]) == ("0.fc", "1.fc")


def test_what_is_excluded_already_comes_first():
    assert advice(blocks(), ["0.fc", "1.fc", "2.fc"], exclude=("1.out",)) == ("1.out", "*.fc")
