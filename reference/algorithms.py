"""Honest algorithms that lose digits which the textbook formula keeps.

Each has a noise floor of its own, by the same method. An error inside the floor of one of them, and not inside the
textbook's, is no mistake in the mathematics: it is a quality, which is named. Every algorithm here computes the same
function as the textbook's pair; a scaled or a missing term does not pass as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from gradproof.reference.activations import sigmoid_backward, silu_backward, tanh_backward
from gradproof.reference.attention import (
    multi_head_attention_backward,
    multi_head_attention_forward,
    scaled_dot_product_attention_backward,
    scaled_dot_product_attention_forward,
)
from gradproof.reference.classification import (
    bce_with_logits_forward,
    cross_entropy_backward,
    sigmoid_focal_forward,
)
from gradproof.reference.common import (
    Array,
)
from gradproof.reference.distances import triplet_margin_backward
from gradproof.reference.margins import multilabel_soft_margin_forward
from gradproof.reference.normalization import (
    batch_norm_backward,
    batch_norm_forward,
    group_norm_backward,
    group_norm_forward,
    instance_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
    local_response_norm_forward,
    rms_norm_backward,
    rms_norm_forward,
)
from gradproof.reference.other_layers import (
    batch_norm_by_folding,
    by_folding,
    by_moments,
    celu_by_exp,
    celu_from_value,
    elu_by_exp,
    elu_from_value,
    local_response_norm_through_power,
    lp_pool_by_powers,
    lp_pool_by_powers_backward,
    lp_pool_of_scaled,
    lp_pool_of_scaled_backward,
    recurrent_by_quotient,
    reduce_norm_by_powers,
    reduce_norm_by_powers_backward,
    reduce_std_dividing_first,
    reduce_std_dividing_first_backward,
    reduce_var_by_moments,
    rows_of_output,
    selu_by_exp,
    selu_from_value,
    sigmoid_by_quotient,
    sigmoid_by_tanh,
    silu_by_tanh,
    softsign_of_quotient,
    softsign_of_quotient_backward,
    tanh_by_quotient,
    tanhshrink_by_quotient,
    tanhshrink_by_quotient_backward,
    through_square,
    through_variance,
    weight_norm_by_rsqrt,
    weight_norm_by_rsqrt_backward,
)
from gradproof.reference.other_losses import (
    bce_with_logits_by_logarithms,
    bce_with_logits_by_logarithms_backward,
    bce_with_logits_in_terms,
    cross_entropy_from_sum,
    huber_in_parts,
    huber_in_parts_backward,
    log_cosh_by_logaddexp,
    log_cosh_by_logaddexp_backward,
    log_softmax_from_sum,
    logsumexp_keeping_out,
    multilabel_soft_margin_by_logarithms,
    multilabel_soft_margin_in_terms,
    sigmoid_focal_from_values,
    softmax_from_sum,
    triplet_margin_by_powers,
)
from gradproof.reference.piecewise import (
    celu_backward,
    celu_forward,
    elu_backward,
    elu_forward,
    selu_backward,
    selu_forward,
)
from gradproof.reference.recurrent import (
    GRU,
    LSTM,
    TANH,
    gru_backward,
    lstm_backward,
    rnn_tanh_backward,
)
from gradproof.reference.reductions import (
    reduce_var_backward,
)
from gradproof.reference.softmax import (
    log_softmax_backward,
    logsumexp_backward,
    softmax_backward,
)
from gradproof.reference.walk import Row


@dataclass(frozen=True)
class Algorithm:
    """Another way to compute a layer.

    name: the formula in a few words. row: its forward and backward functions, None for the textbook's.
    in_order: whether sums are taken term after term, so that the rounding of every partial sum counts.
    one_sided: whether it rounds a constant that may be larger than the result, so that errors lean to one side.
    """

    name: str
    row: Row | None = None
    in_order: bool = False
    one_sided: bool = False


def _normalizations(
    forward: Callable[..., tuple[Array, Any]], backward: Callable[..., Any], folded: Row | None = None
) -> tuple[Algorithm, ...]:
    return (
        Algorithm(FOLDED, folded or (partial(forward, normalize=by_folding), backward)),
        Algorithm(MOMENTS, (partial(forward, normalize=by_moments), backward), in_order=True),
        Algorithm(VARIANCE, (forward, partial(backward, step=through_variance))),
    )


FROM_SUM = "exp(x - logsumexp(x))"
MOMENTS = "mean(x^2) - mean(x)^2"
VARIANCE = "g r - c r^3 sum(g c) / n, c = x - m"
FOLDED = "x r - mean(x) r"
OUTPUT_ROWS = "row sums of dO * O"
EXP_LESS_ONE = "exp(x) - 1"
FROM_EXPM1 = "expm1(x) + 1"
OF_QUOTIENT = "1 / (1 + |x|) - |x| / (1 + |x|)^2"
IN_PARTS = "(e - delta) + delta"
LOGARITHMS = "log(1 + exp(-x)) and log(1 + exp(x)) one by one"
DIFFERENCE = "logaddexp(e, -e) - log(2)"
FROM_VALUES = "s (1 - s) of s(x) and s(-x)"
BY_RSQRT = "v / sqrt(v . v), derived term by term"
POWERS = "(sum |x|^p)^(1/p)"
RESCALED = "s |x / s|"
DIVIDED = "(g / (n s)) (x - m)"
BY_POWER = "g x d^(-beta - 1)"
TANH_QUOTIENT = "a quotient for tanh(x)"
QUOTIENT = "x - tanh(x) with a quotient for tanh(x), 1 - (1 - tanh(x)^2)"
LOGITS = "g exp(x - log(1 + exp(x))) - g target"
BY_TANH = "(1 + tanh(x / 2)) / 2"

IN_ORDER = Algorithm("sums taken term after term", in_order=True)
"""What a loop does, for any layer: the rounding of every partial sum counts."""

ALGORITHMS: dict[str, tuple[Algorithm, ...]] = {
    "softmax": (Algorithm(FROM_SUM, (softmax_from_sum, softmax_backward)),),
    "log_softmax": (Algorithm(FROM_SUM, (log_softmax_from_sum, log_softmax_backward)),),
    "logsumexp": (Algorithm(FROM_SUM, (logsumexp_keeping_out, logsumexp_backward)),),
    "cross_entropy": (Algorithm(FROM_SUM, (cross_entropy_from_sum, cross_entropy_backward)),),
    "scaled_dot_product_attention": (
        Algorithm(
            OUTPUT_ROWS,
            (
                scaled_dot_product_attention_forward,
                partial(scaled_dot_product_attention_backward, rows=rows_of_output),
            ),
        ),
    ),
    "multi_head_attention": (
        Algorithm(
            OUTPUT_ROWS,
            (multi_head_attention_forward, partial(multi_head_attention_backward, rows=rows_of_output)),
        ),
    ),
    "layer_norm": _normalizations(layer_norm_forward, layer_norm_backward),
    "rms_norm": (Algorithm(VARIANCE, (rms_norm_forward, partial(rms_norm_backward, step=through_square))),),
    "batch_norm": _normalizations(
        batch_norm_forward, batch_norm_backward, (batch_norm_by_folding, batch_norm_backward)
    ),
    "group_norm": _normalizations(group_norm_forward, group_norm_backward),
    "instance_norm": _normalizations(instance_norm_forward, group_norm_backward),
    "reduce_var": (Algorithm(MOMENTS, (reduce_var_by_moments, reduce_var_backward), in_order=True),),
    "reduce_std": (Algorithm(DIVIDED, (reduce_std_dividing_first, reduce_std_dividing_first_backward)),),
    "reduce_norm": (Algorithm(POWERS, (reduce_norm_by_powers, reduce_norm_by_powers_backward), one_sided=True),),
    "lp_pool": (
        Algorithm(POWERS, (lp_pool_by_powers, lp_pool_by_powers_backward), one_sided=True),
        Algorithm(RESCALED, (lp_pool_of_scaled, lp_pool_of_scaled_backward)),
    ),
    "local_response_norm": (Algorithm(BY_POWER, (local_response_norm_forward, local_response_norm_through_power)),),
    "sigmoid_focal": (Algorithm(FROM_VALUES, (sigmoid_focal_forward, sigmoid_focal_from_values)),),
    "weight_norm": (Algorithm(BY_RSQRT, (weight_norm_by_rsqrt, weight_norm_by_rsqrt_backward)),),
    "bce_with_logits": (
        Algorithm(LOGITS, (bce_with_logits_forward, bce_with_logits_in_terms)),
        Algorithm(LOGARITHMS, (bce_with_logits_by_logarithms, bce_with_logits_by_logarithms_backward)),
    ),
    "multilabel_soft_margin": (
        Algorithm(LOGITS, (multilabel_soft_margin_forward, multilabel_soft_margin_in_terms)),
        Algorithm(LOGARITHMS, (multilabel_soft_margin_forward, multilabel_soft_margin_by_logarithms)),
    ),
    "triplet_margin": (Algorithm(POWERS, (triplet_margin_by_powers, triplet_margin_backward)),),
    "softsign": (Algorithm(OF_QUOTIENT, (softsign_of_quotient, softsign_of_quotient_backward)),),
    "huber": (Algorithm(IN_PARTS, (huber_in_parts, huber_in_parts_backward)),),
    "elu": (
        Algorithm(EXP_LESS_ONE, (elu_by_exp, elu_backward)),
        Algorithm(FROM_EXPM1, (elu_forward, elu_from_value)),
    ),
    "selu": (
        Algorithm(EXP_LESS_ONE, (selu_by_exp, selu_backward)),
        Algorithm(FROM_EXPM1, (selu_forward, selu_from_value)),
    ),
    "celu": (
        Algorithm(EXP_LESS_ONE, (celu_by_exp, celu_backward)),
        Algorithm(FROM_EXPM1, (celu_forward, celu_from_value)),
    ),
    "log_cosh": (Algorithm(DIFFERENCE, (log_cosh_by_logaddexp, log_cosh_by_logaddexp_backward), one_sided=True),),
    "tanh": (Algorithm(TANH_QUOTIENT, (tanh_by_quotient, tanh_backward)),),
    "rnn_tanh": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(TANH), rnn_tanh_backward)),),
    "gru": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(GRU, sigmoid=sigmoid_by_quotient), gru_backward)),),
    "lstm": (Algorithm(TANH_QUOTIENT, (recurrent_by_quotient(LSTM, sigmoid=sigmoid_by_quotient), lstm_backward)),),
    "tanhshrink": (Algorithm(QUOTIENT, (tanhshrink_by_quotient, tanhshrink_by_quotient_backward)),),
    "sigmoid": (Algorithm(BY_TANH, (sigmoid_by_tanh, sigmoid_backward)),),
    "silu": (Algorithm(BY_TANH, (silu_by_tanh, silu_backward)),),
}
"""Layer -> its other honest algorithms."""


def algorithms_of(layer: str) -> tuple[Algorithm, ...]:
    """The honest algorithms of a layer beside the textbook's."""
    return (*ALGORITHMS.get(layer, ()), IN_ORDER)
