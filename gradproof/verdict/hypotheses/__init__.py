"""Named mistakes of a backward pass: what each would have given for a layer, computed from the reference.

A hypothesis makes guesses about one node; `gradproof.verdict.diagnosis` keeps those that reproduce what an adapter
gave.
"""

from __future__ import annotations

from gradproof.verdict.hypotheses import (
    activations,
    attention,
    gated,
    general,
    losses,
    memory,
    normalization,
    precision,
    recurrent,
    sums,
)
from gradproof.verdict.hypotheses.suspect import Hypothesis

FACTORS = ("factor 2", "factor 1/N missing", "factor 1/N too many")
"""Of which a mistake that scales is a special case."""

HYPOTHESES: dict[str, Hypothesis] = {
    each.name: each
    for each in (
        Hypothesis(
            "cotangent as ones",
            "equals the gradient for a cotangent of ones: check that the cotangent that arrives is used",
            general.ones,
        ),
        Hypothesis(
            "cotangent's first element",
            "equals the gradient for the cotangent's first element {}: check that all of it is used",
            general.first_element,
        ),
        Hypothesis(
            "only a part",
            "equals the gradient {}, and is zero in the rest: check that every block is computed and written",
            general.only_part,
            covers=("another option", "zero", "shifted", "one block of a sum"),
        ),
        Hypothesis(
            "mask missing",
            "equals the gradient without the mask: check that the backward pass applies it",
            attention.mask_missing,
            covers=("derivative missing", "another option"),
        ),
        Hypothesis(
            "mask scale missing",
            "equals the gradient without the mask's scale 1 / (1 - p): check that the backward pass applies it",
            attention.mask_scale_missing,
            covers=("another option",),
        ),
        Hypothesis(
            "attention scale missing",
            "equals the gradient without the scale of the scores: check that the backward pass applies it",
            attention.scale_missing,
            covers=FACTORS,
        ),
        Hypothesis(
            "attention scale twice",
            "equals what the scale applied once more to {} gives: check that it is applied to q and k, once each",
            attention.scale_too_many,
            covers=FACTORS,
        ),
        Hypothesis(
            "attention row sums missing",
            "equals P dP, without the row sums of dout * out: check that P times these sums is subtracted",
            attention.row_sums_missing,
        ),
        Hypothesis(
            "another causal mask",
            "equals what another causal mask gives ({}): check the mask of the backward pass",
            attention.another_causal_mask,
            covers=("another option",),
        ),
        Hypothesis(
            "grouped heads not summed",
            "equals {} of each group: check that keys and values sum the gradients of all heads that share them",
            attention.heads_not_summed,
            covers=FACTORS,
        ),
        Hypothesis(
            "rotation not inverted",
            "equals the cotangent turned on by the same angles: check the sign of the sine in the backward pass",
            attention.turned_on,
        ),
        Hypothesis(
            "another position",
            "equals what positions {} give: check the position that the first angle belongs to",
            attention.another_position,
        ),
        Hypothesis(
            "another divisor of the mean",
            "equals what dividing by {} gives: check that the mean divides by the weights of the rows that count",
            losses.another_divisor,
            covers=(*FACTORS, "reduction", "another option"),
        ),
        Hypothesis(
            "ignored rows",
            "equals the gradient with that of ignored rows beside it: check that the backward pass zeroes them",
            losses.ignored_rows,
            covers=("another option",),
        ),
        Hypothesis(
            "gate's derivative",
            "equals what {} gives in the gate's half: check that it is taken at the gate, and is whole",
            gated.gate_derivative,
            covers=("product term missing",),
        ),
        Hypothesis(
            "gate for value",
            "equals what the activation of the other half gives: check which half is the gate",
            gated.gate_for_value,
        ),
        Hypothesis(
            "softmax element by element",
            "equals dout times the diagonal of softmax's Jacobian: check that every output depends on every input",
            normalization.element_by_element,
        ),
        Hypothesis(
            "normalisation term missing",
            "equals the gradient without {}: check the backward formula, in which the statistics depend on the input",
            normalization.terms_missing,
        ),
        Hypothesis(
            "mean subtracted",
            "equals layer norm's formula, from which a mean is subtracted: check that RMS norm has no mean of g",
            normalization.mean_subtracted,
        ),
        Hypothesis(
            "means over other axes",
            "equals the formula with its means over {}: check over which axes the backward pass takes them",
            normalization.other_axes,
            covers=("training formula", "normalisation term missing"),
        ),
        Hypothesis(
            "means over a padded block",
            "equals what means over {} elements give: check that sums are divided by how many there are",
            normalization.padded_means,
            covers=("normalisation term missing",),
        ),
        Hypothesis(
            "training formula",
            "equals the formula of training, in evaluation: check that the given statistics are held constant",
            normalization.training_formula,
        ),
        Hypothesis(
            "ddof",
            "equals what another divisor of the variance gives ({}): check n against n - 1",
            normalization.another_ddof,
        ),
        Hypothesis(
            "eps",
            "equals what eps elsewhere gives ({}): check where eps is added, and how large it is",
            normalization.another_eps,
        ),
        Hypothesis(
            "reduction",
            "equals what {} gives: check the factor 1/N of the mean",
            general.reduction,
            covers=("factor 1/N missing", "factor 1/N too many"),
        ),
        Hypothesis(
            "bias not summed",
            "equals the cotangent not summed over {}: check the sum that makes the bias' gradient",
            sums.bias_not_summed,
            covers=("broadcast not summed", "derivative missing", "one block of a sum"),
        ),
        Hypothesis(
            "broadcast not summed",
            "equals the gradient not summed over the axes that were broadcast: check that it gets the operand's shape",
            sums.broadcast_not_summed,
        ),
        Hypothesis(
            "one block of a sum",
            "equals the gradient from {} alone: check that blocks of rows add up what they sum",
            sums.one_block,
        ),
        Hypothesis(
            "assigned, not accumulated",
            "equals the gradient with one pick of each index: check that what repeated indices get is added up",
            sums.assigned,
        ),
        Hypothesis(
            "one time step",
            "equals the gradient of the {} time step alone: check that weights add up their gradients over time",
            recurrent.one_step,
        ),
        Hypothesis(
            "carry missing",
            "equals the gradient without {}: check what the walk back through time carries",
            recurrent.carry_missing,
        ),
        Hypothesis(
            "gate order",
            "equals what the gates' rows in the order {} give: check the order of the gates in weights and biases",
            recurrent.gate_order,
            covers=("halves exchanged",),
        ),
        Hypothesis(
            "approximate gelu",
            "equals what {} gives: check which form of gelu each of the two passes has",
            activations.another_gelu,
        ),
        Hypothesis(
            "another option",
            "equals what {} gives: check that the option reaches both passes",
            general.other_option,
            covers=("another activation", "normalisation term missing"),
        ),
        Hypothesis(
            "derivative missing",
            "equals the cotangent as it came: check that the layer's derivative is multiplied in",
            activations.derivative_missing,
            covers=("saved array overwritten", "another activation", "derivative at the output"),
        ),
        Hypothesis(
            "derivative at the output",
            "equals the derivative taken at the layer's output: check that it is taken at the input",
            activations.at_output,
        ),
        Hypothesis(
            "derivative at the input",
            "equals the formula for the derivative from the output, at the input: check what is cached",
            activations.at_input,
        ),
        Hypothesis(
            "derivative twice",
            "equals the gradient times the derivative once more: check that it is applied once",
            activations.twice,
        ),
        Hypothesis(
            "product term missing",
            "equals one of the two terms of the product rule: check that the other one is added",
            activations.one_term,
            covers=("another activation",),
        ),
        Hypothesis(
            "another activation",
            "equals the derivative of {}: check which activation the backward pass has",
            activations.other_activation,
        ),
        Hypothesis(
            "ties",
            "equals what another treatment of ties gives ({}): check which of equal elements get the gradient",
            general.ties,
            at_kinks=True,
        ),
        Hypothesis(
            "another subgradient",
            "equals what the {} gives: check that the choice at the kink is the same for every element",
            general.subgradient,
            at_kinks=True,
        ),
        Hypothesis(
            "zero",
            "is zero: check that the gradient reaches this argument",
            general.zero,
            covers=("saved array overwritten", "derivative at the output", "shifted"),
        ),
        Hypothesis(
            "sign",
            "equals the gradient with the opposite sign: check the sign of the derivative",
            general.opposite,
            covers=("derivative missing", "arguments exchanged"),
        ),
        Hypothesis("sign lost", "equals the gradient's magnitude: check that its sign is kept", general.magnitude),
        Hypothesis(
            "factor 2",
            "equals {} the gradient: check the factor 2, as the derivative of a square has it",
            general.two,
        ),
        Hypothesis(
            "factor 1/N missing",
            "equals the gradient without the factor 1/N ({}): check the reduction",
            general.times_n,
        ),
        Hypothesis(
            "factor 1/N too many",
            "equals the gradient times 1/N ({}): check whether to sum or to average",
            general.over_n,
        ),
        Hypothesis(
            "arguments exchanged",
            "equals the gradients of {}, exchanged: check which is handed to which",
            general.exchanged,
        ),
        Hypothesis(
            "transposed",
            "equals the gradient transposed: check the order of its axes",
            general.transposed,
            covers=("another layout",),
        ),
        Hypothesis(
            "halves exchanged",
            "equals the gradient with its halves exchanged along {}: check their order",
            general.halves,
        ),
        Hypothesis(
            "flipped",
            "equals the gradient flipped along {}: check convolution against cross-correlation",
            general.flipped,
        ),
        Hypothesis("shifted", "equals the gradient one element off along {}: check the padding", general.shifted),
        Hypothesis(
            "another layout",
            "equals the gradient in another layout: check the order of its axes and elements",
            general.laid_out,
        ),
        Hypothesis(
            "cotangent read as contiguous",
            "equals the gradient for the cotangent's memory read in a row ({}): check its strides",
            memory.read_as_contiguous,
            in_place=True,
        ),
        Hypothesis(
            "cotangent read with other strides",
            "equals the gradient for the cotangent read with the strides of another array, {}: check its own",
            memory.read_with_other_strides,
            in_place=True,
        ),
        Hypothesis(
            "saved array overwritten",
            "equals what backward gives for {}: check that nothing is written to what it reads",
            memory.overwritten,
        ),
        Hypothesis(
            "rounded running sum",
            "equals the sum over the rows taken one by one in {}: check the dtype that it is kept in",
            precision.running_sum,
            covers=("lower precision", "operands rounded"),
        ),
        Hypothesis(
            "operands rounded",
            "equals the gradient of operands rounded to {}: check the precision of matrix products",
            precision.operands_rounded,
        ),
        Hypothesis(
            "lower precision",
            "agrees within the rounding of {}, in whose numbers it is: check the dtype of the computation",
            precision.lower_precision,
            covers=("operands rounded",),
        ),
    )
}
"""Name -> hypothesis, the most specific first."""
