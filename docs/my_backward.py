from gradproof.reference import LAYERS, NumpyReference


def layer_norm_backward(dout, cache):
    """A common mistake: the mean of g z is left out."""
    _, reciprocal, weight, axes = cache
    g = dout if weight is None else dout * weight
    gradients = LAYERS["layer_norm"].backward(dout, cache)
    return gradients | {"x": reciprocal * (g - g.mean(axis=axes, keepdims=True))}


class MyBackward(NumpyReference):
    name = "mine"

    def __init__(self):
        super().__init__(rows={"layer_norm": (LAYERS["layer_norm"].forward, layer_norm_backward)})
