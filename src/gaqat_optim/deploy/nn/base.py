"""``DeployLayer``: a layer with one weight that computes on integer codes."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ...quant.graph.norm import Norm
from ...quant.graph.output_hook import quantize_output
from ...quant.nn.base import QuantizedModule
from ...quant.summary import QuantRecord, storage_bytes
from ..batchnorm_folding import fold_batchnorm
from ..qdq import dequantize_constant, is_onnx_export
from .activation_quantizer import ActivationQuantizer
from .integer_parameters import IntegerParameters, integer_parameters, max_accumulator
from .registry import DeployedModule

# Integers of smaller magnitude are float32 numbers, and so are all sums of them that stay below it.
_EXACT_IN_FLOAT32 = 2**24
_TENSORS = ("codes", "weight_scale", "float_weight", "bias_codes", "float_bias")


class DeployLayer(DeployedModule):
    """A layer on integer codes: the numeric specification of what runs after an export.

    With the codes a of the input, q of the weight and b of the bias, the scales s_a of the input and s of the weight
    (``weight_scale``), and the accumulator scale u = s_a s (``accumulator_scale``, rounded to float32):

        a = clamp(round(x / s_a), Qn, Qp)
        y = u (sum(a q) + b)

    The sum is exact; it is rounded to float32 once and multiplied once. If the input or the weight is in floating
    point, the bias and the arithmetic are too, on the values of the codes. ``output_quantizer`` is applied to y. All
    arithmetic is in float32 for every dtype of x; the result has the dtype of x.

    The deployed form of your own layer derives from this class and defines :meth:`operation`. Where needed, it sets
    ``is_linear = False`` (the operation is more than sums of products of input and weight: it then runs in floating
    point on the values of the codes), ``channel_axis`` (the axis of the weight for its output channels), or
    ``hyperparameters`` (names of attributes of the layer that the operation needs, each a value that JSON can hold),
    and overrides :attr:`spatial_dims`, or :meth:`copy_hyperparameters` for parameters other than weight and bias.

    Args:
        source: the layer whose hyperparameters and hooks are taken over.
        parameters: weight and bias, the weight in the float layer's layout.
        input_quantizer: ``None`` for an input in floating point.
        output_quantizer: ``None`` for an output in floating point.
        folded_axes: if a BatchNorm was folded into the layer, the numbers of axes of an input for which that is right.
    """

    is_linear: ClassVar[bool] = True  # whether sums of products are all that the operation computes
    channel_axis: ClassVar[int] = 0  # of the weight, for its output channels

    codes: Tensor | None
    weight_scale: Tensor | None
    float_weight: Tensor | None
    bias_codes: Tensor | None
    float_bias: Tensor | None
    accumulator_scale: Tensor | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    derived: ClassVar[tuple[str, ...]] = ("accumulator_scale",)  # buffers that the others determine: in no file

    def __init__(
        self,
        source: Any,
        parameters: IntegerParameters,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
        folded_axes: tuple[int, ...] = (),
    ) -> None:
        super().__init__(source)
        self.weight_bits, self.shift, self.folded_axes = parameters.weight_bits, parameters.shift, folded_axes
        for slot in _TENSORS:
            self.register_buffer(slot, getattr(parameters, slot))
        self.register_buffer("accumulator_scale", None, persistent=False)
        self.input_quantizer, self.output_quantizer = input_quantizer, output_quantizer
        self.exact_in_float32 = True
        self._update_derived()
        self.register_load_state_dict_post_hook(_update_after_loading)  # type: ignore[no-untyped-call]

    @classmethod
    def from_quantized(cls, name: str, layer: QuantizedModule, norm: Norm | None = None) -> Self:
        """The deployed form of a quantized layer, with the BatchNorm ``norm`` folded in if there is one."""
        bias: Any = getattr(layer, "bias", None)
        output: Any = layer.output_quantizer
        gain = None
        if norm is not None:
            gain, bias = fold_batchnorm(norm, bias)
            if not bool(torch.isfinite(gain).all() & torch.isfinite(bias).all()):
                raise ValueError(f"the BatchNorm behind {name!r} has values that are not finite")
            is_left_out = norm.is_output and layer not in set(norm.module.modules())
            if is_left_out and quantize_output in norm.module._forward_hooks.values():
                output = norm.module.output_quantizer
        activation, output = (
            None if quantizer is None else ActivationQuantizer.from_quantizer(quantizer)
            for quantizer in (layer.input_quantizer, output)
        )
        summed = activation if cls.is_linear else None
        weight = layer.channels_first(layer.float_weight().detach())
        parameters = integer_parameters(name, weight, layer.weight_quantizer, bias, summed, gain)
        if parameters.codes is not None:
            parameters = replace(parameters, codes=layer.from_channels_first(parameters.codes))
        if parameters.float_weight is not None:
            parameters = replace(parameters, float_weight=layer.from_channels_first(parameters.float_weight))
        return cls(layer, parameters, activation, output, () if norm is None else norm.axes)

    @classmethod
    def from_dict(cls, source: Any, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The layer that :meth:`to_dict` describes, with these tensors."""
        activation, output = (
            None if fields[slot] is None else ActivationQuantizer(tensors[f"{slot}.scale"], **fields[slot])
            for slot in ("input_quantizer", "output_quantizer")
        )
        own = {slot: tensors[slot] for slot in _TENSORS if slot in tensors}
        parameters = IntegerParameters(**own, weight_bits=fields["weight_bits"], shift=fields["shift"])
        if (parameters.codes is None or parameters.weight_scale is None) and parameters.float_weight is None:
            raise ValueError("a layer without weight")
        return cls(source, parameters, activation, output, tuple(fields["folded_axes"]))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors and the code, for JSON."""
        quantizers = {"input_quantizer": self.input_quantizer, "output_quantizer": self.output_quantizer}
        return {
            **super().to_dict(),
            **{name: getattr(self, name) for name in ("weight_bits", "shift")},
            "folded_axes": list(self.folded_axes),
            **{slot: None if quantizer is None else quantizer.to_dict() for slot, quantizer in quantizers.items()},
        }

    # -- what subclasses define ----------------------------------------------------------------------------------------

    def operation(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer computes on a prepared input; further arguments are those of forward.

        It runs on integer codes if ``is_linear``, on floats, and while an ONNX graph is recorded.
        """
        raise NotImplementedError

    @property
    def spatial_dims(self) -> int:
        """Number of axes behind the channels of the output."""
        return 0

    def prepare_input(self, x: Tensor) -> Tensor:
        """The input in the form that the operation takes, before it is quantized."""
        return x

    def restore_shape(self, y: Tensor, x: Tensor) -> Tensor:
        """The output of the operation in the form that belongs to the input ``x`` of the layer."""
        return y

    def channels_first(self, weight: Tensor) -> Tensor:
        """The weight, or its codes, with the output channels on axis 0."""
        return weight.movedim(self.channel_axis, 0)

    def from_channels_first(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`channels_first`."""
        return weight.movedim(0, self.channel_axis)

    def dequantize_codes(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The operators of an ONNX graph that compute the weight from its codes."""
        return dequantize_constant(codes, scale, self.weight_bits, self.shift, self.channel_axis)

    # -- what all layers share -----------------------------------------------------------------------------------------

    @property
    def folded(self) -> bool:
        """Whether a BatchNorm was folded into the layer."""
        return bool(self.folded_axes)

    @property
    def is_integer(self) -> bool:
        """Whether the layer adds up integers."""
        return self.is_linear and self.codes is not None and self.input_quantizer is not None

    @property
    def weight(self) -> Tensor:
        """The weight in float32, computed from its codes."""
        return self._weight()

    @property
    def bias(self) -> Tensor | None:
        """The bias in float32, or ``None``."""
        return self._bias()

    def _weight(self) -> Tensor:
        if self.codes is None or self.weight_scale is None:
            assert self.float_weight is not None
            return self.float_weight
        if not self.weight_scale.dim():
            return self.codes * self.weight_scale
        codes = self.channels_first(self.codes)
        return self.from_channels_first(codes * self.weight_scale.reshape(-1, *[1] * (codes.dim() - 1)))

    def _bias(self) -> Tensor | None:
        if self.bias_codes is None:
            return self.float_bias
        assert self.accumulator_scale is not None
        return self.bias_codes * self.accumulator_scale

    def quant_record(self, name: str) -> QuantRecord:
        """The line of :func:`~gaqat_optim.quantization_summary` for the layer with the qualified name ``name``."""
        activation, output, scale = self.input_quantizer, self.output_quantizer, self.weight_scale
        scales = (scale, *(q.scale for q in (activation, output) if q is not None))
        numbers = sum(v.numel() for v in (*scales, self.bias_codes, self.float_bias) if v is not None)
        count = self.weight.numel()
        return QuantRecord(
            name=name,
            type=type(self).__name__,
            weight_bits=self.weight_bits,
            weight_granularity=None if scale is None else "channel" if scale.dim() else "tensor",
            weight_scale=None if scale is None else scale.mean().item(),
            weight_snr=None,
            activation_bits=None if activation is None else activation.bits,
            activation_signed=None if activation is None else activation.signed,
            activation_zero_point=None if activation is None else activation.zero_point,
            activation_scale=None if activation is None else activation.scale.item(),
            output_bits=None if output is None else output.bits,
            weights=count,
            bytes=storage_bytes(count, self.weight_bits, numbers),
        )

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as torch's layers name it
        x = input
        if self.folded and x.dim() not in self.folded_axes:
            raise ValueError(
                f"a BatchNorm was folded into this layer ({self.extra_repr()}), which is the same for inputs of "
                f"{' or '.join(map(str, self.folded_axes))} axes only; got an input of shape {tuple(x.shape)}"
            )
        compute = self._recorded if is_onnx_export() else self._computed
        with without_autocast(x):
            y = self.restore_shape(compute(self.prepare_input(x), *args, **kwargs), x)
        if self.output_quantizer is not None:
            y = self.output_quantizer.dequantized(y)
        return y.to(x.dtype)

    def _computed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.is_integer:
            return self.operation(self._float_input(x), self._weight(), self._bias(), *args, **kwargs)
        assert self.accumulator_scale is not None
        total = self._sum(x, *args, **kwargs)
        if self.bias_codes is not None:
            total = total + self._along_channels(self.bias_codes.to(total.dtype))
        return total.to(torch.float32) * self._along_channels(self.accumulator_scale)

    def _sum(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The exact sum of products of codes, without the bias."""
        assert self.codes is not None
        assert self.input_quantizer is not None
        # A GPU library may compute a convolution by a transform (Winograd, FFT) instead of a plain sum.
        plain = x.device.type != "cuda" and self.exact_in_float32
        dtype = torch.float32 if plain else torch.float64
        # Rounding leaves an exact sum as it is and removes the rounding errors of a transform.
        return self.operation(self.input_quantizer(x).to(dtype), self.codes.to(dtype), None, *args, **kwargs).round()

    def _recorded(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The operators of an ONNX graph, in place of the computation."""
        weight, bias = self.float_weight, self.float_bias
        if self.codes is not None and self.weight_scale is not None:
            weight = self.dequantize_codes(self.codes, self.weight_scale)
        if self.bias_codes is not None and self.accumulator_scale is not None:
            bias = dequantize_constant(self.bias_codes, self.accumulator_scale)
        assert weight is not None
        return self.operation(self._float_input(x), weight, bias, *args, **kwargs)

    def _float_input(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) if self.input_quantizer is None else self.input_quantizer.dequantized(x)

    def _along_channels(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * self.spatial_dims) if v.dim() else v

    def _update_derived(self) -> None:
        """Set what the buffers determine: the accumulator scale, and whether float32 holds the largest sum."""
        if not self.is_integer:
            return
        assert self.codes is not None
        assert self.weight_scale is not None
        assert self.input_quantizer is not None
        self.accumulator_scale = self.input_quantizer.scale * self.weight_scale
        largest = max_accumulator(self.channels_first(self.codes), self.input_quantizer.qmin, self.input_quantizer.qmax)
        if self.bias_codes is not None:
            largest = largest + self.bias_codes.to(torch.float64).abs()
        self.exact_in_float32 = largest.max().item() < _EXACT_IN_FLOAT32

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        if self.weight_scale is None:
            descriptions = [f"floating-point weight {shape}"]
        else:
            granularity = "channel" if self.weight_scale.dim() else "tensor"
            descriptions = [f"{self.weight_bits}-bit weight {shape} per {granularity}"]
        if self.bias is not None:
            descriptions.append("floating-point bias" if self.bias_codes is None else "int32 bias")
        if self.folded:
            descriptions.append("BatchNorm folded")
        if self.is_integer:
            descriptions.append(f"sums in {'float32' if self.exact_in_float32 else 'float64'}")
        return ", ".join(descriptions)


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which autocast does not round sums to half precision, if it is enabled for the device of ``x``."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _update_after_loading(layer: nn.Module, incompatible_keys: Any) -> None:
    """A hook of ``load_state_dict``, which runs when the scale of the input is loaded too."""
    assert isinstance(layer, DeployLayer)
    layer._update_derived()
