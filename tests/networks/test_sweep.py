"""The small networks of the sweep, and the sweep itself."""

import json
import os
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from gaqat_optim import convert, quantize_model
from networks import sweep
from networks.checks import CHECKS, run_checks
from networks.counters import norms_left
from networks.outcomes import OBSCURE, REFUSED, UNCLEAR, WRONG, WrongResult, advised_exclude, described, problems, told
from networks.parity import compare_layers
from networks.registry import Network, all_networks, chosen
from networks.table import by_network, networks_of_page, write_page

NETWORKS = all_networks()
SMALL = [name for name, network in NETWORKS.items() if network.small]
IN_TESTS = [name for name in CHECKS if name != "export"]  # which takes the most time


@pytest.mark.usefixtures("torchvision")
@pytest.mark.parametrize("name", SMALL)
def test_a_network_is_quantized_trained_copied_and_converted_or_the_user_is_told(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    record = run_checks(NETWORKS[name], IN_TESTS, lambda record: None)
    assert not problems(record)
    assert list(record["seconds"]) == IN_TESTS


def test_the_registry_is_large_and_has_small_networks_of_each_library():
    assert len(NETWORKS) >= 100
    assert len(SMALL) == 15
    assert {name.partition("/")[0] for name in SMALL} >= {"timm", "torchvision", "transformers"}
    assert [n.name for n in chosen(["timm: mix*", "bert"])][-1] == "transformers/bert"
    with pytest.raises(ValueError, match="no network or family matches nothing"):
        chosen(["nothing"])


# -- the table ------------------------------------------------------------------------------------------------------


def test_the_page_on_networks_lists_those_of_the_registry():
    families: dict[str, list[str]] = {}
    for network in NETWORKS.values():
        families.setdefault(network.family, []).append(network.name.partition("/")[2])
    assert networks_of_page() == families


def test_the_table_is_written_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- begin: table of families, from make sweep -->\nold\n<!-- end: table of families -->\nafter\n"
    )
    networks = [Network(f"a/{name}", "family", nn.Identity, torch.ones) for name in ("one", "two", "three")]
    one, two = record("a/one", layer_mac_share=0.5), record("a/two", layer_mac_share=1.0, left_out=["2 LSTM"])
    write_page({"a/one": one, "a/two": two}, networks, page)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "50.0 %, 75.0 %" in text
    assert "two: 2 LSTM" in text
    assert networks_of_page(page) == {"family": ["one", "two", "three"]}
    assert "a/one" in by_network([one, two])


def record(name, **figures):
    return {
        "name": name,
        "family": "family",
        "figures": {"refusals": [], **figures},
        "errors": [],
        "told": {},
        "seconds": {},
    }


# -- what counts as wrong -------------------------------------------------------------------------------------------


def test_an_error_counts_by_who_raises_it_and_what_it_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.LSTM(2, 2))

    def of(function):
        try:
            function()
        except Exception as error:
            return described(error, "check", model)["kind"]

    assert of(lambda: quantize_model(model)) == REFUSED
    assert of(lambda: quantize_model(model, "config")) == UNCLEAR
    assert of(lambda: nn.Linear(2, 2)(torch.ones(3))) == OBSCURE

    def wrong():
        raise WrongResult("differs")

    assert of(wrong) == WRONG


def test_the_exclude_of_an_error_is_read_from_its_text():
    assert advised_exclude("leave it with exclude=('1', '*.attn.qkv')") == ("1", "*.attn.qkv")
    assert advised_exclude("leave it with exclude=('1',)") == ("1",)
    assert advised_exclude("leave it") is None


def test_warnings_of_other_packages_are_not_ours():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn_explicit("theirs", UserWarning, torch.__file__, 1)
        assert not told(caught)
        quantize_model(model, calibration=[torch.ones(2, 2)])
        warnings.warn("ours", stacklevel=1)
    assert told(caught) == ["ours"]


def test_what_nobody_is_told_is_a_problem():
    assert not problems(record("a"))
    assert "50.0% of the MACs" in problems(record("a", layer_mac_share=0.5))[0]
    assert not problems({**record("a", layer_mac_share=0.5), "told": {"quantize": ["some stay in floating point"]}})
    assert "2 BatchNorms" in problems(record("a", norms_foldable=2))[0]
    assert "differs by 0.1" in problems(record("a", conversion_error=0.1, conversion_layer="head"))[0]
    assert "again" in problems(record("a", refusals=["one", "two"]))[0]
    refused = {"check": "export", "kind": REFUSED, "type": "ValueError", "text": ""}
    assert not problems({**record("a"), "errors": [refused]})
    assert problems({**record("a"), "errors": [{**refused, "kind": OBSCURE}]})


# -- the measurements -----------------------------------------------------------------------------------------------


class Norms(nn.Module):
    """A BatchNorm behind a sum, one behind the concatenation of two layers, and one that a layer shares with others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(4))
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(8), nn.BatchNorm2d(4)])

    def forward(self, x):
        a, b, c, d = (layer(x) for layer in self.layers)
        e = d + 1
        behind = [self.norms[0](e), self.norms[1](torch.cat([a, b], 1).contiguous()), self.norms[2](c)]
        return torch.cat([*behind, c, e], 1)


def test_batchnorms_behind_layers_are_counted_by_whether_they_are_alone():
    deployed = convert(quantize_model(nn.Sequential(nn.Conv2d(3, 3, 1)), calibration=torch.randn(2, 3, 4, 4)))
    model = Norms().eval()
    for i, layer in enumerate(model.layers):
        model.layers[i] = nn.Sequential(deployed) if i == 9 else layer
    x = torch.randn(2, 3, 4, 4)
    for i in range(4):  # deployed layers, beside BatchNorms that are not folded
        one = nn.Sequential(nn.Conv2d(3, 4, 1))
        model.layers[i] = convert(quantize_model(one, calibration=x))[0]
    with torch.no_grad():
        counts = norms_left(model, lambda: model(x))
    assert counts == {"norms_foldable": 1, "norms_shared": 1, "norms_elsewhere": 1}


def test_a_converted_layer_that_differs_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    model = quantize_model(model, calibration=x).eval()
    deployed = convert(model)

    @torch.no_grad()
    def evaluate(network):
        return [network(x)]

    worst, _ = compare_layers(model, deployed, evaluate)
    assert worst < 1e-3  # the rounding of biases
    deployed[2].codes += 1
    worst, layer = compare_layers(model, deployed, evaluate)
    assert worst > 1e-2
    assert layer == "4"


# -- the command ----------------------------------------------------------------------------------------------------


class Computes(nn.Module):
    def forward(self, x):
        while True:
            pass


class Sleeps(nn.Module):
    def forward(self, x):
        time.sleep(60)


class Crashes(nn.Module):
    def forward(self, x):
        os._exit(3)


class Eats(nn.Module):
    def forward(self, x):
        return torch.zeros(1 << 40)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12
@pytest.mark.parametrize(
    ("kind", "seconds", "text"),
    [
        (Computes, 1.0, "more than 1 s of processor time"),
        (Sleeps, 0.1, "not done after 1 s"),
        (Crashes, 60.0, "exit code 3"),
        (Eats, 60.0, "memory"),
    ],
)
def test_a_network_that_hangs_crashes_or_needs_too_much_is_a_record(kind, seconds, text):
    network = Network("a/network", "family", kind, lambda: torch.ones(2, 2))
    record = sweep.in_process(network, ["build"], seconds, gigabytes=64.0)
    (error,) = record["errors"]
    assert (error["check"], error["kind"]) == ("build", OBSCURE)
    assert text in error["text"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Python 3.12
@pytest.mark.usefixtures("torchvision")
def test_the_sweep_goes_on_where_it_stopped(tmp_path, monkeypatch, capfd):
    out = tmp_path / "results.jsonl"
    command = ["sweep", "--only", "timm/test_vit", "timm/test_resnet", "--checks", "build", "--out", str(out)]
    for again in (False, False, True):
        monkeypatch.setattr(sys, "argv", command + ["--again"] * again)
        assert not sweep.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["name"] for record in records] == ["timm/test_resnet", "timm/test_vit"] * 2
    assert len(sweep.read(out)) == 2
    assert capfd.readouterr().out.count("timm/test_vit") >= 4
