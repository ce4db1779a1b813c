"""``QuantConfig``: what to quantize, to how many bits, and what that means for each layer."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeVar

from torch import nn
from typing_extensions import Self

from .lsq.functional import MAX_BITS, MIN_BITS
from .type_names import type_name, type_named

K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class LayerConfig:
    """The configuration of one layer: a :class:`QuantConfig` with its overrides applied."""

    weight_bits: int | None
    activation_bits: int | None
    weight_granularity: str
    activation_signed: bool | str
    output_bits: int | None
    init: str
    scale_domain: str

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "output_bits"):
            _check_bits(name, getattr(self, name))
        _check_choice("weight_granularity", self.weight_granularity, ("channel", "tensor"))
        _check_choice("activation_signed", self.activation_signed, (True, False, "auto"))
        _check_choice("init", self.init, ("mse", "lsq"))
        _check_choice("scale_domain", self.scale_domain, ("log", "linear"))

    @property
    def quantizes_nothing(self) -> bool:
        """Whether the layer stays in floating point."""
        return self.weight_bits is None and self.activation_bits is None and self.output_bits is None


class _FrozenDict(dict[K, V]):
    """An immutable dict, and so hashable. Two are equal if their order is, too: the last override wins."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _FrozenDict):
            return list(self.items()) == list(other.items())
        return super().__eq__(other)

    __ne__ = object.__ne__  # dict's own ignores the order

    def __reduce__(self) -> tuple[Any, ...]:  # copy and pickle would set item by item
        return type(self), (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("the overrides of a QuantConfig are immutable: make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse


@dataclass(frozen=True)
class QuantConfig:
    """How :func:`quantize_model` quantizes a network.

    A configuration is immutable and hashable. ``dataclasses.replace`` makes another.

    Args:
        weight_bits: bits of the weights, 2 to 8; ``None`` leaves them in floating point.
        activation_bits: bits of each layer's input, 2 to 8; ``None`` leaves it in floating point.
        weight_granularity: one scale per output ``"channel"``, or one per ``"tensor"`` (as in the LSQ paper).
        activation_signed: whether half of an activation's codes are negative (``True``) or none. ``"auto"`` chooses by
            calibration (or by the first training batch) how many are, by least squared error: none behind a ReLU, about
            half for symmetric values, few behind a GELU, SiLU or Hardswish.
        first_last_bits: bits of weights and input of every layer that reads an input of the network and every one
            that makes an output, found by ``torch.fx`` or, where symbols fail, by ``torch.export`` on a calibration
            batch. In a network that cannot be traced, they are the first and the last quantizable layer in the order of
            ``model.named_modules()``, with a warning. ``"same"`` treats them like the others, ``None`` leaves them in
            floating point.
        output_bits: bits of an additional quantizer for each layer's output; ``None`` for none. It stands where it
            lets a runtime use an integer kernel: behind a BatchNorm and a ReLU that follow, on residual sums as well,
            and nowhere if the next layer quantizes the value anyway.
        init: initial scales, ``"mse"`` (least squared error) or ``"lsq"`` (2 mean|v| / sqrt(Qp)).
        scale_domain: ``"log"`` learns log(s): s is always positive, and a step of the optimizer is relative to s.
            ``"linear"`` learns s itself, as in the paper, with a floor.
        overrides: maps a pattern (``fnmatch`` on the qualified name, as in ``"layer4.*"``) or a module type (exact) to
            a mapping from ``weight_bits``, ``activation_bits``, ``weight_granularity``, ``activation_signed``,
            ``output_bits``, ``init``, ``scale_domain`` to a value. They are applied in order, after
            ``first_last_bits``, so that the last match wins.
        exclude: patterns of layers that stay in floating point.

    Raises:
        ValueError: bits outside 2..8, an unknown choice, or an unknown key in ``overrides``.
        TypeError: a pattern or an override of the wrong type.

    Example:
        >>> config = QuantConfig(3, 3, overrides={"head.*": {"weight_bits": 8}})
        >>> config.weight_bits, config.first_last_bits
        (3, 8)
        >>> QuantConfig(weight_bits=1)
        Traceback (most recent call last):
        ValueError: weight_bits must be an integer from 2 to 8, or None for floating point; got 1
    """

    weight_bits: int | None = 4
    activation_bits: int | None = 4
    _: KW_ONLY
    weight_granularity: Literal["channel", "tensor"] = "channel"
    activation_signed: bool | Literal["auto"] = "auto"
    first_last_bits: int | None | Literal["same"] = 8
    output_bits: int | None = None
    init: Literal["mse", "lsq"] = "mse"
    scale_domain: Literal["log", "linear"] = "log"
    overrides: Mapping[str | type, Mapping[str, Any]] = field(default_factory=dict)
    exclude: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", self._checked_overrides())
        if self.first_last_bits != "same":
            _check_bits("first_last_bits", self.first_last_bits)
        exclude: Any = self.exclude if isinstance(self.exclude, str) else tuple(self.exclude)
        if isinstance(exclude, str) or not all(isinstance(pattern, str) for pattern in exclude):
            raise TypeError(f"exclude must be a sequence of patterns, as in ('head.*',); got {exclude!r}")
        object.__setattr__(self, "exclude", exclude)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dict of what JSON has, for :meth:`from_dict`.

        ``overrides`` become a list, since their order has a meaning and some writers of JSON sort keys. A module type
        is in it by its name, as in ``"torch.nn.modules.linear.Linear"``.

        Raises:
            ValueError: a type in ``overrides`` was defined in a function, where it cannot be found again.

        Example:
            >>> config = QuantConfig(3, 3, overrides={"head": {"weight_bits": 8}, nn.Embedding: {"weight_bits": 4}})
            >>> config.to_dict()["overrides"][1]
            {'type': 'torch.nn.modules.sparse.Embedding', 'settings': {'weight_bits': 4}}
            >>> QuantConfig.from_dict(config.to_dict()) == config
            True
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["exclude"] = list(self.exclude)
        values["overrides"] = [
            {**({"pattern": key} if isinstance(key, str) else {"type": type_name(key)}), "settings": dict(changes)}
            for key, changes in self.overrides.items()
        ]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` described; what is not in ``values`` has its default.

        Module types are found by importing their modules. ``overrides`` may also be a mapping, as in the constructor.

        Raises:
            TypeError: ``values`` is no mapping, or a part of it has the wrong type.
            ValueError: an unknown key, a wrong value, or a type that this process does not find.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"from_dict takes the dict of QuantConfig.to_dict, got {type(values).__name__}")
        known = [f.name for f in fields(cls)]
        if unknown := [key for key in values if key not in known]:
            raise ValueError(f"unknown setting {unknown[0]!r}; a QuantConfig has {', '.join(known)}")
        overrides = values.get("overrides", {})
        if isinstance(overrides, (list, tuple)):
            overrides = dict(map(_override_item, overrides))
        return cls(**{**values, "overrides": overrides})

    def _checked_overrides(self) -> _FrozenDict[str | type, _FrozenDict[str, Any]]:
        """An immutable copy of ``overrides``; raises for all that a layer cannot have."""
        base, checked = self._base(), {}
        if not isinstance(self.overrides, Mapping):
            raise TypeError(f"overrides must map a pattern or a module type to settings, got {self.overrides!r}")
        for key, changes in self.overrides.items():
            if not isinstance(key, (str, type)):
                raise TypeError(f"a key of overrides must be a pattern (str) or a module type, got {key!r}")
            try:
                _override(base, changes)
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{_show(key)}]: {error}") from None
            # In one order, since the order within an override has no meaning.
            checked[key] = _FrozenDict({name: changes[name] for name in _LAYER_FIELDS if name in changes})
        return _FrozenDict(checked)

    def _base(self) -> LayerConfig:
        return LayerConfig(**{name: getattr(self, name) for name in _LAYER_FIELDS})

    def excluded(self, modules: Mapping[str, nn.Module]) -> set[nn.Module]:
        """The ``modules`` that match ``exclude``.

        Raises:
            ValueError: a pattern matches no module.
        """
        return {module for pattern in self.exclude for module in _matches(pattern, modules, "exclude")}

    def resolve(
        self,
        layers: Mapping[str, nn.Module],
        excluded: Collection[nn.Module] | None = None,
        first_and_last: Collection[str] | None = None,
    ) -> dict[str, LayerConfig | None]:
        """The configuration of every layer, or ``None`` where it stays in floating point.

        Args:
            layers: the quantizable layers by qualified name, in order; one used twice stands under both names.
            excluded: what :meth:`excluded` returned, if it was asked about more modules than ``layers``.
            first_and_last: names of the layers that ``first_last_bits`` means; by default the first and the last one.

        Raises:
            ValueError: a pattern or type in ``overrides`` or ``exclude`` matches no layer.
        """
        excluded = self.excluded(layers) if excluded is None else excluded
        # By module, so that a layer with two names has one configuration, no matter which of them a pattern matches.
        configs = dict.fromkeys(layers.values(), self._base())
        if self.first_last_bits != "same":
            names = list(layers)
            ends = [*names[:1], *names[-1:]] if first_and_last is None else first_and_last
            for module in {layers[name] for name in ends}:
                configs[module] = self._first_or_last(configs[module])
        for key, changes in self.overrides.items():
            for module in _matches(key, layers, "overrides"):
                configs[module] = _override(configs[module], changes)
        return {
            name: None if layer in excluded or configs[layer].quantizes_nothing else configs[layer]
            for name, layer in layers.items()
        }

    def with_ends(self, names: Collection[str]) -> Self:
        """The same configuration for a network whose first and last layers are ``names``, without looking for them."""
        base = self._base()
        end = self._first_or_last(base)
        changes = {name: getattr(end, name) for name in _LAYER_FIELDS if getattr(end, name) != getattr(base, name)}
        # First, so that the user's overrides win; a pattern for a name that is a key already is another key.
        keys = [f"{name[:-1]}[{name[-1]}]" if name in self.overrides else name for name in sorted(names)]
        return replace(self, first_last_bits="same", overrides={**dict.fromkeys(keys, changes), **self.overrides})

    def _first_or_last(self, layer: LayerConfig) -> LayerConfig:
        bits: Any = self.first_last_bits
        return replace(
            layer,
            # Weights or inputs that are in floating point everywhere are so here.
            weight_bits=None if layer.weight_bits is None else bits,
            activation_bits=None if layer.activation_bits is None else bits,
            output_bits=None if bits is None else layer.output_bits,
        )


_LAYER_FIELDS = tuple(f.name for f in fields(LayerConfig))


def _check_bits(name: str, bits: Any) -> None:
    valid = isinstance(bits, int) and not isinstance(bits, bool) and MIN_BITS <= bits <= MAX_BITS
    if bits is not None and not valid:
        raise ValueError(
            f"{name} must be an integer from {MIN_BITS} to {MAX_BITS}, or None for floating point; got {bits!r}"
        )


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    # Compared with the type, since 1 == True.
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _override(layer: LayerConfig, changes: Mapping[str, Any]) -> LayerConfig:
    if not isinstance(changes, Mapping):
        raise TypeError(f"expected a mapping such as {{'weight_bits': 8}}, got {changes!r}")
    unknown = [key for key in changes if key not in _LAYER_FIELDS]
    if unknown:
        raise ValueError(f"unknown setting {unknown[0]!r}; a layer has {', '.join(_LAYER_FIELDS)}")
    return replace(layer, **changes)


def _override_item(item: Any) -> tuple[str | type, Any]:
    """Key and value of an override in the form of :meth:`QuantConfig.to_dict`."""
    match item:
        case {"pattern": str(pattern), "settings": settings} if len(item) == 2:
            return pattern, settings
        case {"type": str(name), "settings": settings} if len(item) == 2:
            try:
                return type_named(name), settings
            except ValueError as error:
                raise ValueError(f"overrides: {error}") from error
    raise ValueError(f"each of the overrides must have 'pattern' or 'type', and 'settings'; got {item!r}")


def _show(key: str | type) -> str:
    return repr(key) if isinstance(key, str) else key.__name__


def _matches(key: str | type, layers: Mapping[str, nn.Module], argument: str) -> set[nn.Module]:
    """The layers that ``key`` means; it is an error that lists the nearest names if there are none."""
    if isinstance(key, str):
        matches = {module for name, module in layers.items() if name == key or fnmatchcase(name, key)}
    else:
        matches = {module for module in layers.values() if type(module) is key}
    if matches:
        return matches
    if isinstance(key, str):
        hint = "near it: " + ", ".join(map(repr, _nearest_names(key, list(layers))))
    else:
        hint = "their types: " + ", ".join(sorted({type(module).__name__ for module in layers.values()}))
    raise ValueError(f"{argument}: {_show(key)} matches none of the {len(layers)} quantizable layers; {hint}")


def _nearest_names(pattern: str, names: list[str], most: int = 5) -> list[str]:
    inside = [f"{pattern}.*"] if any(name.startswith(f"{pattern}.") for name in names) else []
    close = difflib.get_close_matches(pattern.strip("*."), names, n=most, cutoff=0.3)
    return (inside + close or names)[:most]
