"""The LSQ quantizer as a module: one learned scale, or one per channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ...scale_names import LINEAR_SCALE, LOG_SCALE, SCALE_RANGE, ZERO_POINT
from .compiled import is_exporting
from .functional import (
    MAX_BITS,
    MIN_BITS,
    ClampStraightThrough,
    integer_bounds,
    lsq_bound,
    lsq_quantize,
    lsq_quantize_unchecked,
    zero_point_form,
    zero_point_of,
)
from .scale_init import check_initial, initial_scale, initial_zero_point

# How far a scale may go from its initial value, either way. No network needs more, and from much further away it would
# not come back: the gradient of log(s) is proportional to s, and vanishes with it.
_MAX_DRIFT = 1024.0
_SMALLEST, _LARGEST = 1e-12, 1e12


class LSQQuantizer(nn.Module):
    """Fake-quantizes its input with a learned scale (step size).

    The scale s is a parameter of shape ``(1,)`` or ``(channels,)``: log(s) under the name ``lsq_log_scale``, or s
    itself under ``lsq_scale``. It stays within a factor of 1024 of its initial value: a clamp whose gradient is the
    identity bounds it, and each training forward moves a value beyond a bound back. The parameter always exists. An
    activation quantizer that was not calibrated sets it at its first training forward that has values; the network then
    makes it the same on all ranks of ``torch.distributed`` (:func:`~gaqat_optim.quantize_model`).

    Codes are integers from -z to 2^bits - 1 - z. The zero point z is chosen together with the first scale, as the pair
    of least squared error, and stays: 0 for values that are never negative, about 2^(bits - 1) for symmetric ones, and
    little in between for those of a GELU or SiLU, whose codes would otherwise be half unused.

    The gradient of the scale is multiplied by LSQ's g = 1/sqrt(N Qp), with -Qn - 1 for Qp where it is larger. N is the
    number of weights per scale, or the number of features in one sample (not in the batch, so that accumulating
    micro-batches gives the gradient of the whole batch).

    Args:
        bits: bits of a code, 2 to 8.
        signed: z = 2^(bits - 1) if true, 0 if false; ``None`` lets :meth:`initialize` choose z.
        channels: number of scales; ``None`` for one in all, of shape ``(1,)``.
        channel_axis: the axis of the input that ``channels`` counts; needs ``channels``.
        axis0_is_batch: whether axis 0 of the input is a batch (activations), which g then leaves out.
        init: the initial scale, ``"mse"`` or ``"lsq"``.
        scale_domain: ``"log"`` or ``"linear"``.
        device: device of the parameter.

    Raises:
        ValueError: ``bits`` is outside 2..8, or only one of ``channels`` and ``channel_axis`` is given.

    Example:
        >>> import torch
        >>> quantizer = LSQQuantizer(3, signed=True)
        >>> v = torch.tensor([-1.0, -0.2, 0.1, 0.75])
        >>> quantizer.initialize(v, 0.25)
        >>> quantizer(v).tolist()
        [-1.0, -0.25, 0.0, 0.75]
        >>> quantizer.qmin, quantizer.qmax
        (-4, 3)

    Reference: Esser et al., *Learned Step Size Quantization*, arXiv 1902.08153.
    """

    scale_zero_point: Tensor
    scale_range: Tensor

    def __init__(
        self,
        bits: int,
        *,
        signed: bool | None = None,
        channels: int | None = None,
        channel_axis: int | None = None,
        axis0_is_batch: bool = False,
        init: str = "mse",
        scale_domain: str = "log",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ValueError(f"bits must be from {MIN_BITS} to {MAX_BITS}, got {bits}")
        if (channels is None) != (channel_axis is None):
            raise ValueError("channels and channel_axis go together: give both, or neither for one scale in all")
        self.bits = bits
        self.channel_axis = channel_axis
        self.axis0_is_batch = axis0_is_batch
        self.init = init
        self.scale_domain = scale_domain
        self.enabled = True
        # Faster. Only safe where no consumer changes the output in place; the compute of quantized layers does not.
        self.save_output_for_backward = False
        self.name = ""
        self.is_sharded = False
        start = torch.zeros(channels or 1, dtype=torch.float32, device=device)  # log(1)
        name = LOG_SCALE if scale_domain == "log" else LINEAR_SCALE
        self.register_parameter(name, nn.Parameter(start if scale_domain == "log" else start + 1))
        # forward decides by Python values (no synchronisation, no graph break); the buffers put them in state dicts.
        self._zero_point = None if signed is None else zero_point_of(bits, signed)
        self._own_zero_point = None if axis0_is_batch else self._zero_point
        self._range: tuple[float, float] | None = None
        # In floating point, since an average of weights and buffers (EMA) would cut off an integer.
        self.register_buffer(ZERO_POINT, torch.tensor(self._zero_point or 0, dtype=torch.float32, device=device))
        self.register_buffer(SCALE_RANGE, torch.zeros(2, dtype=torch.float32, device=device))  # zeros: not set yet

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # FSDP2's fully_shard replaces the parameter by a DTensor shard, by setattr if a class overrides __setattr__.
        # In a forward pass it lends the full tensor instead, and drops what initialize() would write to that.
        if name in (LOG_SCALE, LINEAR_SCALE) and hasattr(value, "full_tensor"):
            self.is_sharded = True
        super().__setattr__(name, value)

    # -- scale, zero point and integer range -------------------------------------------------------------------------

    @property
    def raw_scale(self) -> nn.Parameter:
        """The learned parameter, log(s) or s by ``scale_domain``."""
        return self.lsq_log_scale if self.scale_domain == "log" else self.lsq_scale  # type: ignore[return-value]

    @property
    def scale(self) -> Tensor:
        """The scale s > 0, float32 or float64, of shape ``(1,)`` or ``(channels,)``; differentiable."""
        # At least float32 in a half-precision model, since float16 has no number near the lower bound.
        raw = self.raw_scale.to(torch.promote_types(self.raw_scale.dtype, torch.float32))
        bounded: Tensor = ClampStraightThrough.apply(raw, *self._raw_bounds)  # type: ignore[no-untyped-call]
        return self._of_raw(bounded)

    def _of_raw(self, raw: Tensor) -> Tensor:
        # A copy, since the next forward of a shared layer clamps the parameter in place.
        return raw.exp() if self.scale_domain == "log" else raw.clone()

    @property
    def _raw_bounds(self) -> tuple[float, float]:
        low, high = self._range or (_SMALLEST, _LARGEST)
        return (math.log(low), math.log(high)) if self.scale_domain == "log" else (low, high)

    @property
    def zero_point(self) -> int | None:
        """How many of the codes are negative, z = -Qn; ``None`` before data has decided."""
        return self._zero_point

    @property
    def signed(self) -> bool | None:
        """Whether codes can be negative; ``None`` before data has decided."""
        return None if self._zero_point is None else self._zero_point > 0

    @property
    def is_initialized(self) -> bool:
        """Whether the scale has its initial value."""
        if self._range is None:
            self.read_buffers()  # Libraries that load a checkpoint fill them without telling the module.
        return self._range is not None

    @property
    def qmin(self) -> int:
        """Lower integer bound Qn."""
        return self._integer_bounds()[0]

    @property
    def qmax(self) -> int:
        """Upper integer bound Qp."""
        return self._integer_bounds()[1]

    def _integer_bounds(self) -> tuple[int, int]:
        if self._zero_point is None:
            raise RuntimeError(self._unset_message())
        return integer_bounds(self.bits, self._zero_point)

    def _unset_message(self) -> str:
        return (
            f"the quantizer {self.name!r} has no scale yet: pass calibration= to quantize_model, "
            "or run one forward pass in training mode first"
        )

    def extra_repr(self) -> str:
        form = "zero point by calibration" if self._zero_point is None else zero_point_form(self.bits, self._zero_point)
        where = "per tensor" if self.channel_axis is None else f"per channel of axis {self.channel_axis}"
        unset = "" if self.is_initialized else ", not calibrated"
        return f"{self.bits} bits, {form}, {where}, {self.scale_domain} scale{unset}"

    # -- initialization and forward ----------------------------------------------------------------------------

    @torch.no_grad()
    def initialize(self, v: Tensor, scale: Tensor | float | None = None, zero_point: int | None = None) -> None:
        """Set zero point (unless ``signed`` was given) and scale from the values ``v``.

        Args:
            v: the values to represent: the weight, or a sample of activations, in the layout of the input.
            scale: the initial scale, to set it instead of computing it from ``v``.
            zero_point: z, likewise.

        Raises:
            ValueError: ``v`` is empty or not finite, ``scale`` is not positive and finite, or ``zero_point`` is outside
                0..2^bits - 2.
            RuntimeError: ``fully_shard`` has split the scale.
        """
        if self.is_sharded:
            raise RuntimeError(
                f"the quantizer {self.name!r} cannot take its scale from data once fully_shard has split it: pass "
                "calibration= to quantize_model, or load a state dict before the first forward pass"
            )
        check_initial(self.name, self.bits, v, scale, zero_point)
        if zero_point is None:
            zero_point = self._zero_point
        if zero_point is None:
            zero_point = initial_zero_point(v, self.bits, scale)
        if scale is None:
            scale = initial_scale(v, *integer_bounds(self.bits, zero_point), self.channel_axis, self.init)
        raw = torch.as_tensor(scale, dtype=torch.float32).clamp(_SMALLEST, _LARGEST)
        self.raw_scale.copy_(raw.log() if self.scale_domain == "log" else raw)
        self.scale_zero_point.fill_(zero_point)
        self.scale_range.copy_(torch.stack([raw.min() / _MAX_DRIFT, raw.max() * _MAX_DRIFT]))
        self.read_buffers()

    def forward(self, v: Tensor) -> Tensor:
        if not self.enabled or self.keeps_waiting(v):
            return v
        scale, qmin, qmax, grad_scale, channel_axis = self.lsq_arguments(v)
        if self.save_output_for_backward:
            return lsq_quantize_unchecked(v, scale, qmin, qmax, grad_scale, channel_axis, True)
        return lsq_quantize(v, scale, qmin, qmax, grad_scale=grad_scale, channel_axis=channel_axis)

    def keeps_waiting(self, v: Tensor) -> bool:
        """Whether the quantizer has no scale yet, and ``v`` no values to take it from: an expert without a token.

        >>> LSQQuantizer(4, axis0_is_batch=True).keeps_waiting(torch.empty(0, 8))
        True
        """
        return self._range is None and self.axis0_is_batch and v.numel() == 0

    def lsq_arguments(self, v: Tensor) -> tuple[Tensor, int, int, float, int | None]:
        """Scale, Qn, Qp, g and channel axis for a forward of ``v``, which initializes the scale if it is not yet."""
        if self._range is None:
            self.read_buffers()  # AveragedModel and broadcasts fill them without telling the module
        if self._range is None:
            if not self.training:
                raise RuntimeError(self._unset_message())
            self.initialize(v.detach())
        # Not by self.training, on which torch.compile would compile again, and not in an export: it would contain both.
        if torch.is_grad_enabled() and not is_exporting():
            grad_scale, raw = self.grad_scale_for(v), self.raw_scale
            with torch.no_grad():  # A value that the optimizer has put beyond a bound comes back to the bound.
                low, high = self._raw_bounds
                raw.clamp_(low, min(high, torch.finfo(raw.dtype).max))
            # In half precision the bound itself may have been rounded up.
            scale = self.scale if raw.dtype.itemsize < 4 else self._of_raw(raw)
        else:
            grad_scale, scale = 1.0, self.scale
        return scale, *self._integer_bounds(), grad_scale, self.channel_axis

    def grad_scale_for(self, v: Tensor) -> float:
        """LSQ's g for values like ``v``."""
        sizes = v.shape[1:] if self.axis0_is_batch and v.dim() > 1 else v.shape
        count = math.prod(sizes) // self.raw_scale.numel()
        return 1.0 / math.sqrt(max(count, 1) * lsq_bound(*self._integer_bounds()))

    # -- state dict --------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if not self.scale_range.is_meta and self.scale_range[1] > 0:
            # The zero point of signed weights tells the bits, that of activations is below their number of codes.
            possible = range(2**self.bits - 1) if self._own_zero_point is None else (self._own_zero_point,)
            if (loaded := round(self.scale_zero_point.item())) not in possible:
                rest[-1].append(  # The errors of all modules are raised at once.
                    f"the quantizer {self.name!r} has {self.bits} bits, zero point {loaded} is that of other codes: "
                    "quantize the network with the quant_config of the one that was saved"
                )
                return
        self._range = None
        self.read_buffers()

    def read_buffers(self) -> None:
        if self.scale_range.is_meta:
            return
        low, high = self.scale_range.tolist()
        if high > 0:
            self._range = max(low, _SMALLEST), min(high, _LARGEST)
            self._zero_point = round(self.scale_zero_point.item())
