"""QuantConfig: validation, and which layer gets what."""

import copy
import json
import pickle
from dataclasses import asdict, replace

import pytest
from torch import nn

from gaqat_optim import QuantConfig


def five_layers():
    return {name: nn.Linear(2, 2) for name in ("stem", "body.0", "body.1", "body.2", "head")}


def bits(resolved):
    return {
        name: None if layer is None else (layer.weight_bits, layer.activation_bits) for name, layer in resolved.items()
    }


def test_first_and_last_layer_get_their_own_bits():
    assert bits(QuantConfig(3, 4).resolve(five_layers())) == {
        "stem": (8, 8), "body.0": (3, 4), "body.1": (3, 4), "body.2": (3, 4), "head": (8, 8),
    }  # fmt: skip
    assert set(bits(QuantConfig(3, 4, first_last_bits="same").resolve(five_layers())).values()) == {(3, 4)}
    none = bits(QuantConfig(3, 4, first_last_bits=None).resolve(five_layers()))
    assert (none["stem"], none["body.0"], none["head"]) == (None, (3, 4), None)


def test_first_last_bits_do_not_quantize_what_nothing_else_does():
    assert bits(QuantConfig(3, None).resolve(five_layers()))["stem"] == (8, None)


def test_the_last_override_wins_and_beats_first_last_bits():
    config = QuantConfig(
        overrides={"body.*": {"weight_bits": 2}, nn.Linear: {"activation_bits": 5}, "body.1": {"weight_bits": 6}}
    )
    assert bits(config.resolve(five_layers())) == {
        "stem": (8, 5), "body.0": (2, 5), "body.1": (6, 5), "body.2": (2, 5), "head": (8, 5),
    }  # fmt: skip


def test_exclude_beats_overrides():
    config = QuantConfig(overrides={"body.1": {"weight_bits": 6}}, exclude=["body.[12]"])
    resolved = bits(config.resolve(five_layers()))
    assert [name for name, layer in resolved.items() if layer is None] == ["body.1", "body.2"]


def test_a_layer_with_two_names_has_one_setting():
    layers = five_layers()
    layers["alias"] = layers["body.1"]
    layers["end"] = layers.pop("head")
    resolved = bits(QuantConfig(overrides={"alias": {"weight_bits": 7}}).resolve(layers))
    assert resolved["alias"] == resolved["body.1"] == (7, 4)


@pytest.mark.parametrize("value", [1, 9, 0, -4, 4.0, True, "4"])
@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "output_bits", "first_last_bits"])
def test_bits_outside_2_to_8_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer from 2 to 8"):
        QuantConfig(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight_granularity": "row"}, ValueError, "weight_granularity must be one of 'channel', 'tensor'"),
        ({"activation_signed": 1}, ValueError, "activation_signed"),
        ({"init": "max"}, ValueError, "init"),
        ({"scale_domain": "sqrt"}, ValueError, "scale_domain"),
        (
            {"overrides": {"a": {"bits": 3}}},
            ValueError,
            r"overrides\['a'\]: unknown setting 'bits'; a layer has weight_b",
        ),
        ({"overrides": {"a": {"weight_bits": 1}}}, ValueError, r"overrides\['a'\]: weight_bits must be"),
        ({"overrides": {"a": 3}}, TypeError, "mapping such as"),
        ({"overrides": {3: {}}}, TypeError, "pattern"),
        ({"overrides": ["a"]}, TypeError, "overrides must map"),
        ({"exclude": "head"}, TypeError, "exclude must be a sequence"),
    ],
)
def test_bad_settings_are_refused_at_construction(arguments, error, words):
    with pytest.raises(error, match=words):
        QuantConfig(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"overrides": {"bodi.*": {}}}, "overrides: 'bodi.*' matches none of the 5 quantizable layers; near it: 'body"),
        ({"overrides": {"body": {}}}, r"near it: 'body\.\*'"),
        ({"exclude": ["haed"]}, "exclude: 'haed' matches none .* near it: 'head'"),
        ({"overrides": {nn.Conv2d: {}}}, "overrides: Conv2d matches none .* their types: Linear"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_matches(arguments, words):
    with pytest.raises(ValueError, match=words):
        QuantConfig(**arguments).resolve(five_layers())


def settings(**changes):
    overrides = {"body.*": {"weight_bits": 2, "init": "lsq"}, nn.Conv2d: {"activation_signed": True}, "head": {}}
    return {"weight_bits": 3, "overrides": overrides, "exclude": ["stem"], **changes}


def test_equal_configurations_have_one_hash():
    assert hash(QuantConfig()) == hash(QuantConfig())
    turned = {"body.*": {"init": "lsq", "weight_bits": 2}, nn.Conv2d: {"activation_signed": True}, "head": {}}
    a, b = QuantConfig(**settings()), QuantConfig(**settings(overrides=turned, exclude=("stem",)))
    assert a == b
    assert hash(a) == hash(b)
    assert {a: 1, QuantConfig(): 2}[b] == 1
    for change in ({"weight_bits": 4}, {"exclude": ()}, {"overrides": {}}, {"overrides": {nn.Linear: {}}}):
        assert QuantConfig(**settings(**change)) != a
    assert len({QuantConfig(**settings(**change)) for change in ({}, {"weight_bits": 4}, {"exclude": ()})}) == 3


def test_the_order_of_overrides_makes_a_difference_as_it_does_for_the_layers():
    first, second = {"body.*": {"weight_bits": 2}}, {"body.1": {"weight_bits": 6}}
    a, b = QuantConfig(overrides=first | second), QuantConfig(overrides=second | first)
    assert bits(a.resolve(five_layers())) != bits(b.resolve(five_layers()))
    assert a != b
    assert a.overrides == second | first  # A plain dict has no order that counts.
    assert a.overrides != 3


@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: QuantConfig(**vars(c)), replace],
    ids=["copy", "deepcopy", "pickle", "constructor", "replace"],
)
def test_copies_are_equal_and_have_the_same_hash(again):
    config = QuantConfig(**settings())
    other = again(config)
    assert other == config
    assert hash(other) == hash(config)
    assert repr(other) == repr(config)
    assert bits(other.resolve({**five_layers(), "conv": nn.Conv2d(1, 1, 1)}))["body.1"] == (2, 4)
    assert replace(other, weight_bits=4).overrides == config.overrides


def test_a_configuration_is_the_settings_that_were_checked():
    """Not the caller's mapping, which may change later, and no mapping that can be changed."""
    given = settings()
    config = QuantConfig(**given)
    before = hash(config)
    given["overrides"]["body.*"]["weight_bits"] = 99
    given["overrides"]["tail"] = {}
    given["exclude"].append("head")
    assert config.overrides["body.*"] == {"weight_bits": 2, "init": "lsq"}
    assert (list(config.overrides), config.exclude) == (["body.*", nn.Conv2d, "head"], ("stem",))
    inner = config.overrides["body.*"]
    for change in (
        lambda: inner.update(weight_bits=5),
        lambda: inner.__setitem__("weight_bits", 5),
        lambda: inner.setdefault("output_bits", 8),
        lambda: inner.__ior__({"weight_bits": 5}),
        lambda: config.overrides.pop("head"),
        lambda: config.overrides.popitem(),
        lambda: config.overrides.clear(),
        lambda: config.overrides.__delitem__("head"),
    ):
        with pytest.raises(TypeError, match=r"immutable: make another with dataclasses.replace"):
            change()
    assert hash(config) == before
    assert QuantConfig(exclude=(name for name in ["stem", "head"])).exclude == ("stem", "head")


def test_a_configuration_without_types_is_json():
    given = settings(overrides={"body.*": {"weight_bits": 2}})
    assert json.loads(json.dumps(asdict(QuantConfig(**given))))["overrides"] == given["overrides"]
    assert QuantConfig(**json.loads(json.dumps(asdict(QuantConfig(**given))))) == QuantConfig(**given)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(),
        QuantConfig(**settings()),
        QuantConfig(2, None, weight_granularity="tensor", activation_signed=True, first_last_bits="same"),
        QuantConfig(
            None, 8, first_last_bits=None, output_bits=8, init="lsq", scale_domain="linear", exclude=["a", "b"]
        ),
        QuantConfig(overrides={"torch.nn.modules.linear.Linear": {"weight_bits": 2}, nn.Linear: {"weight_bits": 3}}),
    ],
    ids=["default", "overrides", "tensor", "floating", "a pattern like a type"],
)
def test_a_configuration_round_trips_through_json(config):
    # Some writers sort keys: the order of the overrides has to live without them.
    again = QuantConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config
    assert hash(again) == hash(config)
    assert repr(again) == repr(config)


def test_what_is_missing_has_its_default_and_overrides_may_be_a_mapping():
    assert QuantConfig.from_dict({}) == QuantConfig()
    given = {"weight_bits": 3, "overrides": {"head": {"weight_bits": 8}}}
    assert QuantConfig.from_dict(given) == QuantConfig(3, overrides={"head": {"weight_bits": 8}})


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"bits": 3}, ValueError, "unknown setting 'bits'; a QuantConfig has weight_bits, "),
        ({"weight_bits": 1}, ValueError, "weight_bits must be an integer from 2 to 8"),
        ({"exclude": "head"}, TypeError, "exclude must be a sequence"),
        ({"overrides": 3}, TypeError, "overrides must map"),
        ({"overrides": ["head"]}, ValueError, "'pattern' or 'type', and 'settings'; got 'head'"),
        ({"overrides": [{"pattern": "a", "type": "b", "settings": {}}]}, ValueError, "'pattern' or 'type'"),
        ({"overrides": [{"pattern": "a", "settings": {"bits": 3}}]}, ValueError, r"overrides\['a'\]: unknown setting"),
        ({"overrides": [{"type": "no.such.Type", "settings": {}}]}, ValueError, "no type 'no.such.Type' here: ModuleN"),
        ({"overrides": [{"type": "torch.nn.Linnear", "settings": {}}]}, ValueError, "no type 'torch.nn.Linnear' here"),
        ({"overrides": [{"type": "torch.nn.functional", "settings": {}}]}, ValueError, "is no type but <module"),
        ("{}", TypeError, "from_dict takes the dict of QuantConfig.to_dict, got str"),
    ],
)
def test_a_wrong_dict_is_refused_by_name(values, error, words):
    with pytest.raises(error, match=words):
        QuantConfig.from_dict(values)
