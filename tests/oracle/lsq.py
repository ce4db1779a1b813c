"""LSQ with Python floats (float64) and loops, straight from the equations.

Nothing here uses autograd, tensors' arithmetic, or the package itself. Python's ``round`` rounds ties to even.
"""


def lsq(v, scales, grad, qmin, qmax, grad_scale=1.0):
    """LSQ forward and backward, element by element.

    Args:
        v, scales, grad: lists of floats, one entry an element: value, its scale, dL/dv_hat.

    Returns:
        v_hat, dv (lists), ds_terms (list: each element's contribution to the gradient of its scale).
    """
    v_hat, dv, ds_terms = [], [], []
    for x, s, g in zip(v, scales, grad, strict=True):
        u = x / s
        if u <= qmin:
            q, inside, d = qmin, 0.0, qmin
        elif u >= qmax:
            q, inside, d = qmax, 0.0, qmax
        else:
            q = round(u)
            inside, d = 1.0, q - u
        v_hat.append(q * s)
        dv.append(g * inside)
        ds_terms.append(grad_scale * g * d)
    return v_hat, dv, ds_terms
