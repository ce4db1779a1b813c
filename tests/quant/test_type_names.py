"""Types are found again by their names, or refused."""

import pytest
from torch import nn

from gaqat_optim import QuantConfig
from gaqat_optim.quant.type_names import type_name, type_named


class Outer:
    class Inner(nn.Linear):
        pass


def test_types_are_found_by_their_qualified_name_or_named():
    config = QuantConfig(overrides={Outer.Inner: {"weight_bits": 8}})
    assert QuantConfig.from_dict(config.to_dict()) == config

    class Local(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"<locals>\.Local was defined in a function"):
        QuantConfig(overrides={Local: {"weight_bits": 8}}).to_dict()


@pytest.mark.parametrize("kind", [nn.Linear, Outer.Inner])
def test_the_name_of_a_type_finds_it_again(kind):
    assert type_named(type_name(kind)) is kind


@pytest.mark.parametrize("name", ["no.such.Type", "torch.nn.Linnear", "torch.nn.functional", "", "a type"])
def test_a_name_of_no_type_is_refused_with_the_name(name):
    with pytest.raises(ValueError, match=repr(name)):
        type_named(name)
