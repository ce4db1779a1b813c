"""Types are found again by their names, or refused."""

import pytest
from torch import nn

from gaqat_optim import QuantConfig


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
