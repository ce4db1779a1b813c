"""Names of scale parameters and of the buffers beside them: all that quant/ and optim/ share."""

# One name for each domain in which a scale is learned.
LOG_SCALE, LINEAR_SCALE = "lsq_log_scale", "lsq_scale"
# The buffers that a quantizer sets together with its first scale.
ZERO_POINT, SCALE_RANGE = "scale_zero_point", "scale_range"
QUANTIZER_BUFFERS = (ZERO_POINT, SCALE_RANGE)


def is_scale_name(name: str) -> bool:
    """Whether a qualified parameter name belongs to a scale of this package.

    >>> is_scale_name("layer1.conv.weight_quantizer.lsq_log_scale"), is_scale_name("clip.logit_scale")
    (True, False)
    """
    return name.rpartition(".")[2] in (LOG_SCALE, LINEAR_SCALE)
