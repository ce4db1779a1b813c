"""The names that scale parameters have: all that the quantizers and the optimizer share."""

# The parameter's own name tells the domain in which the scale is learned.
LOG_SCALE, LINEAR_SCALE = "lsq_log_scale", "lsq_scale"
# The buffers of a quantizer that are set together with its first scale.
SCALE_IS_SIGNED, SCALE_RANGE = "scale_is_signed", "scale_range"
QUANTIZER_BUFFERS = (SCALE_IS_SIGNED, SCALE_RANGE)


def is_scale_name(name: str) -> bool:
    """Whether a qualified parameter name is that of one of this package's scales.

    >>> is_scale_name("layer1.conv.weight_quantizer.lsq_log_scale"), is_scale_name("clip.logit_scale")
    (True, False)
    """
    return name.rpartition(".")[2] in (LOG_SCALE, LINEAR_SCALE)
