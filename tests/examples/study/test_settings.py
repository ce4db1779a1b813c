"""The two presets, and what they become."""

from __future__ import annotations

import pytest

from domain_generalization.image_folder_study import PUBLISHED
from domain_generalization.study.settings import OUR_READING, PRESETS, Settings, make_settings


def test_the_published_preset_is_what_the_papers_give() -> None:
    settings = make_settings("published", {})
    assert (settings.scale_domain, settings.init, settings.granularity) == ("linear", "lsq", "tensor")
    assert (settings.learning_rate, settings.scale_lr, settings.schedule) == (3e-5, None, "constant")
    assert (settings.rho, settings.interval, settings.batch_size, settings.holdout) == (0.05, 1, 32, 0.2)
    assert (settings.dropout, settings.batchnorm, settings.size, settings.every) == (0.5, "frozen", 224, 100)
    assert not settings.round_biases


@pytest.mark.parametrize(
    ("name", "steps", "rate", "decay", "alpha"),
    [
        ("pacs", 5001, 3e-5, 1e-4, 1e-3),
        ("vlcs", 5001, 1e-5, 1e-4, 1e-3),
        ("officehome", 5001, 1e-5, 1e-4, 5e-4),
        ("terraincognita", 5001, 1e-5, 1e-4, 1e-3),
        ("domainnet", 15001, 3e-5, 1e-6, 5e-4),
    ],
)
def test_data_sets_have_their_own(name: str, steps: int, rate: float, decay: float, alpha: float) -> None:
    settings = make_settings("published", PUBLISHED[name][1])
    assert (settings.steps, settings.learning_rate, settings.weight_decay, settings.alpha) == (
        steps,
        rate,
        decay,
        alpha,
    )
    assert settings.fp32_steps == settings.flat_steps == steps


def test_the_user_overrides_the_data_set_which_overrides_the_preset() -> None:
    assert make_settings("recommended", {"scale_domain": "linear"}).scale_domain == "linear"
    assert make_settings("recommended", {"scale_domain": "linear"}, {"scale_domain": "log"}).scale_domain == "log"
    assert make_settings("recommended", {"steps": 9}, {"flat_steps": 2}).flat_steps == 2
    assert make_settings("recommended", {"steps": 9}, {"flat_steps": 2}).fp32_steps == 9
    with pytest.raises(TypeError, match="no such setting: ro"):
        make_settings("published", {"ro": 1})


def test_the_quantization_is_that_of_the_settings() -> None:
    config = make_settings("published", {"first_last_bits": 6}).quantization(5)
    assert (config.weight_bits, config.activation_bits, config.first_last_bits) == (5, 5, 6)
    assert (config.weight_granularity, config.init, config.scale_domain) == ("tensor", "lsq", "linear")


def test_our_reading_names_settings_that_exist() -> None:
    values = vars(make_settings("published", {}))
    for name, line in OUR_READING.items():
        assert name in values
        assert line.format(**values)
    assert set(PRESETS["recommended"]) <= set(Settings.__dataclass_fields__)
