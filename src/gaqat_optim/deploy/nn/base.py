"""What all layers of a converted network have in common: integer codes and scales instead of floats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...quant.lsq.functional import integer_bounds
from ...quant.nn.base import QuantizedModule
from ...quant.summary import QuantRecord, storage_bytes
from ..qdq import dequantize_constant, is_onnx_export, quantize_clip_dequantize, zero_point

# Integers of smaller magnitude are float32 numbers, and so are all sums of them that stay below it.
_EXACT_IN_FLOAT32 = 2**24


class ActivationQuantizer(nn.Module):
    """Quantizes activations: ``clamp(round(x / scale), qmin, qmax)``, as float32 tensors of integers.

    Args:
        scale: the step size, float32 of shape ``()``.
        bits: width of the codes.
        signed: whether they have a sign.
        name: qualified name of the quantizer, under which an exported file has its codes.

    Example:
        >>> ActivationQuantizer(torch.tensor(0.5), bits=2, signed=True)(torch.tensor([-9.0, 0.25, 0.75]))
        tensor([-2.,  0.,  1.])
    """

    scale: Tensor

    def __init__(self, scale: Tensor, bits: int, signed: bool, name: str = "") -> None:
        super().__init__()
        self.bits, self.signed, self.name = bits, signed, name
        self.qmin, self.qmax = integer_bounds(bits, signed)
        self.zero_point = zero_point(signed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.float32) / self.scale).round().clamp(self.qmin, self.qmax)

    def dequantized(self, x: Tensor) -> Tensor:
        """The float32 values that the codes of ``x`` stand for."""
        if is_onnx_export():
            return quantize_clip_dequantize(x.to(torch.float32), self.scale, self.bits, self.signed, self.name)
        codes: Tensor = self(x)
        return codes * self.scale

    def extra_repr(self) -> str:
        return f"{self.bits} bits, {'signed' if self.signed else 'unsigned'}, scale {self.scale.item():.6g}"


class QuantDequant(nn.Module):
    """The output quantizer of a module that is no deployed layer: gives the values that the codes stand for.

    Example:
        >>> values = QuantDequant(ActivationQuantizer(torch.tensor(0.5), bits=2, signed=True))
        >>> values(torch.tensor([-9.0, 0.25, 0.75]))
        tensor([-1.0000,  0.0000,  0.5000])
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer.dequantized(x).to(x.dtype)


class DeployLayer(nn.Module):
    """A layer on integer codes: the numeric specification of what runs after an export.

    With the codes a of the input, q of the weight and b of the bias, their scales s_a and s (``weight_scale``), and
    u = s_a s (``unit``, rounded to float32):

        a = clamp(round(x / s_a), Qn, Qp)
        y = u (sum(a q) + b)

    The sum is exact; it is rounded to float32 once and multiplied once. Where the input or the weight is in floating
    point, so are the bias and the arithmetic. ``output_quantizer``, where there is one, is applied to y. All arithmetic
    is in float32, whatever the dtype of x, which is also that of the result.

    Args:
        source: the quantized layer, whose geometry is taken over.
        codes: the weight as int8 codes in the float layer's layout, or ``None``: the trained ones times 2^``shift``.
        weight_scale: float32 of shape ``()`` or ``(channels,)``, beside ``codes``.
        float_weight: the weight as float32 where there are no codes.
        bias_codes: the bias as int32 codes with the scale ``unit``, or ``None``.
        float_bias: the bias as float32, or ``None``.
        weight_bits: width of the trained codes.
        shift: by how many binary digits they are shifted up in 8 bits, which makes ``unit`` that much finer.
        input_quantizer: ``None`` for an input in floating point.
        output_quantizer: ``None`` for an output in floating point.
        folded: whether a BatchNorm was folded into the layer.
    """

    codes: Tensor | None
    weight_scale: Tensor | None
    float_weight: Tensor | None
    bias_codes: Tensor | None
    float_bias: Tensor | None
    unit: Tensor | None
    input_quantizer: ActivationQuantizer | None
    output_quantizer: ActivationQuantizer | None

    def __init__(
        self,
        source: QuantizedModule,
        *,
        codes: Tensor | None = None,
        weight_scale: Tensor | None = None,
        float_weight: Tensor | None = None,
        bias_codes: Tensor | None = None,
        float_bias: Tensor | None = None,
        weight_bits: int | None = None,
        shift: int = 0,
        input_quantizer: ActivationQuantizer | None = None,
        output_quantizer: ActivationQuantizer | None = None,
        folded: bool = False,
    ) -> None:
        super().__init__()
        self.weight_bits, self.shift, self.folded = weight_bits, shift, folded
        self.register_buffer("codes", codes)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("float_weight", float_weight)
        self.register_buffer("bias_codes", bias_codes)
        self.register_buffer("float_bias", float_bias)
        self.register_buffer("unit", None, persistent=False)
        self.input_quantizer, self.output_quantizer = input_quantizer, output_quantizer
        self.exact_in_float32 = True
        self._copy_hyperparameters(source)
        self._update_derived()
        self.register_load_state_dict_post_hook(_derive_again)  # type: ignore[no-untyped-call]

    # -- what the kinds of layers differ in --------------------------------------------------------------------

    def _copy_hyperparameters(self, source: Any) -> None:
        """Copy what the operation needs beside its operands."""

    def _linear_op(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """The linear operation, on what :meth:`_prepare_input` returns; further arguments are those of forward."""
        raise NotImplementedError

    def _prepare_input(self, x: Tensor) -> Tensor:
        """The input in the form that the operation takes, before it is quantized."""
        return x

    def _restore(self, y: Tensor, x: Tensor) -> Tensor:
        """The output in the form that belongs to the input ``x`` of the layer."""
        return y

    def _spatial_dims(self) -> int:
        """Number of axes behind the channels of the output."""
        raise NotImplementedError

    def _by_channel(self, weight: Tensor) -> Tensor:
        """The weight, or its codes, with the output channels on axis 0."""
        return weight

    def _from_channels(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`_by_channel`."""
        return weight

    def _emitted_weight(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The operators that give the weight from its codes, in an ONNX graph."""
        return dequantize_constant(codes, scale, self.weight_bits, self.shift)

    # -- what they have in common ------------------------------------------------------------------------------

    @property
    def is_integer(self) -> bool:
        """Whether the layer adds up integers."""
        return self.codes is not None and self.input_quantizer is not None

    @property
    def weight(self) -> Tensor:
        """The weight in float32: the values that its codes stand for."""
        if self.codes is None:
            assert self.float_weight is not None
            return self.float_weight
        assert self.weight_scale is not None
        scale = self.weight_scale
        if not scale.dim():
            return self.codes * scale
        return self._from_channels(self._by_channel(self.codes) * scale.reshape(-1, *[1] * (self.codes.dim() - 1)))

    @property
    def bias(self) -> Tensor | None:
        """The bias in float32, or ``None``."""
        if self.bias_codes is None:
            return self.float_bias
        assert self.unit is not None
        return self.bias_codes * self.unit

    def quant_record(self, name: str) -> QuantRecord:
        """What :func:`~gaqat_optim.quantization_summary` says of the layer, whose qualified name is ``name``."""
        activation, output = self.input_quantizer, self.output_quantizer
        scales = (self.weight_scale, *(q.scale for q in (activation, output) if q is not None))
        numbers = sum(v.numel() for v in (*scales, self.bias_codes, self.float_bias) if v is not None)
        scale, count = self.weight_scale, self.weight.numel()
        return QuantRecord(
            name=name,
            type=type(self).__name__,
            weight_bits=self.weight_bits,
            weight_granularity=None if scale is None else "channel" if scale.dim() else "tensor",
            weight_scale=None if scale is None else scale.mean().item(),
            weight_snr=None,
            activation_bits=None if activation is None else activation.bits,
            activation_signed=None if activation is None else activation.signed,
            activation_scale=None if activation is None else activation.scale.item(),
            output_bits=None if output is None else output.bits,
            weights=count,
            bytes=storage_bytes(count, self.weight_bits, numbers),
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.folded and x.dim() != 2 + self._spatial_dims():
            raise ValueError(
                f"a BatchNorm was folded into this layer ({self.extra_repr()}), which is the same for inputs of "
                f"{2 + self._spatial_dims()} axes only; got an input of shape {tuple(x.shape)}"
            )
        if is_onnx_export():
            y = self._emitted(self._prepare_input(x), *args, **kwargs)
        elif torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):  # It would round sums to half precision.
                y = self._computed(self._prepare_input(x), *args, **kwargs)
        else:
            y = self._computed(self._prepare_input(x), *args, **kwargs)
        y = self._restore(y, x)
        if self.output_quantizer is not None:
            y = self.output_quantizer.dequantized(y)
        return y.to(x.dtype)

    def _computed(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.input_quantizer is None or self.codes is None:
            x = x.to(torch.float32) if self.input_quantizer is None else self.input_quantizer.dequantized(x)
            return self._linear_op(x, self.weight, self.bias, *args, **kwargs)
        assert self.unit is not None
        # A GPU library may compute a convolution by a transform (Winograd, FFT) instead of a plain sum.
        plain = x.device.type != "cuda" and self.exact_in_float32
        dtype = torch.float32 if plain else torch.float64
        # Rounding changes an exact sum in nothing and removes what a transform leaves behind.
        total = self._linear_op(self.input_quantizer(x).to(dtype), self.codes.to(dtype), None, *args, **kwargs).round()
        if self.bias_codes is not None:
            total = total + self._along_channels(self.bias_codes.to(dtype))
        return total.to(torch.float32) * self._along_channels(self.unit)

    def _emitted(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = x.to(torch.float32) if self.input_quantizer is None else self.input_quantizer.dequantized(x)
        weight, bias = self.float_weight, self.float_bias
        if self.codes is not None and self.weight_scale is not None:
            weight = self._emitted_weight(self.codes, self.weight_scale)
        if self.bias_codes is not None and self.unit is not None:
            bias = dequantize_constant(self.bias_codes, self.unit)
        assert weight is not None
        return self._linear_op(x, weight, bias, *args, **kwargs)

    def _along_channels(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *[1] * self._spatial_dims()) if v.dim() else v

    def _update_derived(self) -> None:
        """Set what follows from the buffers: the unit of the sum, and whether float32 holds the largest one."""
        if self.codes is None or self.input_quantizer is None:
            return
        assert self.weight_scale is not None
        self.unit = self.input_quantizer.scale * self.weight_scale
        largest = max_accumulator(self._by_channel(self.codes), self.input_quantizer.qmin, self.input_quantizer.qmax)
        if self.bias_codes is not None:
            largest = largest + self.bias_codes.to(torch.float64).abs()
        self.exact_in_float32 = largest.max().item() < _EXACT_IN_FLOAT32

    def extra_repr(self) -> str:
        shape = tuple(self.weight.shape)
        if self.weight_scale is None:
            parts = [f"floating-point weight {shape}"]
        else:
            parts = [f"{self.weight_bits}-bit weight {shape} per {'channel' if self.weight_scale.dim() else 'tensor'}"]
        if self.bias is not None:
            parts.append("floating-point bias" if self.bias_codes is None else "int32 bias")
        if self.folded:
            parts.append("BatchNorm folded")
        if self.is_integer:
            parts.append(f"sums in {'float32' if self.exact_in_float32 else 'float64'}")
        return ", ".join(parts)


def _derive_again(layer: nn.Module, incompatible: Any) -> None:
    """After a state dict was loaded, the input's scale included."""
    assert isinstance(layer, DeployLayer)
    layer._update_derived()


def max_accumulator(codes: Tensor, qmin: int, qmax: int) -> Tensor:
    """The largest magnitude that sum(a q) can have in each output channel: float64, shape ``(channels,)``.

    The codes have their output channels on axis 0.

    >>> max_accumulator(torch.tensor([[3, -4], [0, 1]], dtype=torch.int8), 0, 15)
    tensor([105.,  15.], dtype=torch.float64)
    """
    return codes.to(torch.float64).abs().flatten(1).sum(1) * max(-qmin, qmax)
