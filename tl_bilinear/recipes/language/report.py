"""The quickstart's sections on a language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from tl_bilinear.features.labels import pieces
from tl_bilinear.recipes.language.quickstart import (
    LEAST_ACTIVE,
    RANKS,
    SHARED_TOKENS,
)
from tl_bilinear.recipes.page import chips, embed, shaded, table

if TYPE_CHECKING:
    import pandas

    from tl_bilinear.recipes.language.quickstart import LanguageQuickstart, OutputFeature

_EXAMPLES, _PAIRS = 5, 6
_BEFORE, _AFTER = 22, 7  # tokens shown around a peak

_TERMS = {  # of `Attribution.terms`, in words
    "features x features": "pairs of features",
    "b_dec x b_dec": "the input SAE's bias, squared",
    "error x error": "the input SAE's error, squared",
    "features x b_dec": "features × the input SAE's bias",
    "features x error": "features × the input SAE's error",
    "b_dec x error": "the input SAE's bias × its error",
    "- e . b_dec": "the output SAE's decoder bias",
    "b_enc": "the output SAE's encoder bias",
}


def language_sections(result: LanguageQuickstart) -> str:
    """The model and its text, how features were chosen, and each feature, as HTML."""
    return "".join(
        [
            "<h1>What a bilinear layer of a language model computes, read off its weights</h1>",
            _model(result),
            _terms(result),
            _choice(result),
            *(_feature(result, index) for index in range(len(result.found))),
        ]
    )


def _model(result: LanguageQuickstart) -> str:
    cfg = result.features.model.cfg
    facts = {
        "model": f"{cfg.n_layers} layers of width {cfg.d_model} with bilinear MLPs of {cfg.d_mlp} hidden neurons, "
        f"{cfg.n_heads} heads, a vocabulary of {cfg.d_vocab:,}",
        **result.facts,
        "analysed": f"on {sum(result.tokens):,} tokens of stories that the model wrote itself, in "
        f"{result.seconds:.0f} s",
    }
    rows = "".join(f"<dt>{escape(name)}<dd>{escape(text)}" for name, text in facts.items())
    sample = f"<blockquote>{escape(result.sample)}</blockquote>" if result.sample else ""
    return f"<dl class=note>{rows}</dl>{sample}"


def _terms(result: LanguageQuickstart) -> str:
    features = result.features
    scale = (
        " That hook lies before the norm, so what is said from weights alone holds up to a positive "
        "number of each token, its norm scale, which changes no sign, no ratio and no order."
        if features.passage.needs_scale
        else ""
    )
    return (
        "<h2>What is read</h2>"
        f"<p>Two sparse autoencoders (SAEs) give the layer's activations readable parts: "
        f"{features.inputs.n:,} <b>input features</b> before the MLP of layer {features.layer} "
        f"(<code>{escape(features.passage.hook)}</code>) and {features.outputs.n:,} <b>output features</b> "
        f"after it (<code>{escape(features.output_hook)}</code>).{scale}</p>"
        "<p>The MLP has no activation function: it multiplies two linear maps of its input <code>x</code>. "
        "So what an output feature is before the SAE's own thresholding, its <b>pre-activation</b>, is "
        "<code>xᵀQx</code> plus a constant, and the <b>interaction matrix</b> <code>Q</code> comes from "
        "the weights alone, exactly. Written between input features, its entries say which "
        "<em>pairs</em> of them make the output feature; its <b>eigenvectors</b> are the few directions "
        "that make most of it, <code>xᵀQx = Σ λᵢ (vᵢ·x)²</code> (Pearce et al. 2025, section 5).</p>"
        "<p class=note>Names in the tables are the tokens on which an input feature is most active, "
        "<code>(not) happy</code> where the same token stands before them. A name says where a feature is "
        "active, not what it does, and <code>##ing</code> continues a word.</p>"
    )


def _choice(result: LanguageQuickstart) -> str:
    from tl_bilinear.plots import correlation_figure

    choice = result.choice
    counted = int(choice.enough(LEAST_ACTIVE).sum())
    one, two = choice.mean_active(LEAST_ACTIVE).tolist()
    return (
        "<h2>All output features, and the choice of three</h2>"
        f"<p>How well do one and two eigenvectors predict an output feature on the tokens where it is "
        f"active? Over the {counted:,} of {result.features.outputs.n:,} features that are active on at "
        f"least {LEAST_ACTIVE} of {choice.tokens:,} tokens of the text's first half, the mean correlation "
        f"is {one:.2f} with one and {two:.2f} with two; with two, "
        f"{choice.share_above(0.75, min_active=LEAST_ACTIVE):.0%} are above 0.75.</p>"
        f"{embed(correlation_figure(choice, LEAST_ACTIVE))}"
        f"<p><b>The three below are not typical.</b> They are the ones of these features that two "
        f"eigenvectors predict best, passing over features that are most active where a story begins or "
        f"ends and those that share {SHARED_TOKENS} or more of their ten most promoted tokens with one "
        f"already chosen. They were chosen on the first half of the text, and what is measured on text below "
        f"is measured on the second.</p>"
    )


def _feature(result: LanguageQuickstart, index: int) -> str:
    one = result.found[index]
    return (
        f"<h2 id=feature-{one.feature}>Feature {one.feature}: {escape(one.name)}</h2>"
        + _where(result, index)
        + _pairs(result, one)
        + _spectrum(result, index)
        + _attribution(result, one)
        + _checks(result, one)
    )


def _where(result: LanguageQuickstart, index: int) -> str:
    one, words = result.found[index], result.found[index].promoted.words
    shown = len(one.promoted.promoted)
    found = one.examples
    examples = "".join(
        f"<li>{_context(result, tokens, peak, strengths)}"
        for tokens, peak, strengths in zip(
            found.tokens[:_EXAMPLES].tolist(),
            found.positions[:_EXAMPLES].tolist(),
            found.strengths[:_EXAMPLES].tolist(),
            strict=True,
        )
    )
    return (
        f"<p>Active on {int(result.correlation.counts[index]):,} of {result.correlation.tokens:,} tokens. There "
        f"it adds its decoder direction to the residual stream. As far as that reaches the output directly, "
        f"past the layers in between, it raises and lowers the logits of these tokens most:</p>"
        f"<p class=chips><b class=blue>raises</b> {chips(words[:shown])}</p>"
        f"<p class=chips><b class=red>lowers</b> {chips(words[shown:])}</p>"
        f"<h3>Where it is active</h3><p class=note>The rows of text in which it is strongest, at the framed "
        f"token; darker is more active.</p><ol class=examples>{examples}</ol>"
    )


def _context(
    result: LanguageQuickstart, tokens: Sequence[int], peak: int, strengths: Sequence[float]
) -> str:
    """The tokens around one, within its story, shaded."""
    tokenizer = result.features.model.tokenizer
    start, stop = peak, peak + 1
    while start > max(0, peak - _BEFORE) and tokens[start - 1] != tokenizer.bos_token_id:
        start -= 1
    end = min(len(tokens), peak + _AFTER)
    while stop < end and tokens[stop - 1] != tokenizer.eos_token_id:
        stop += 1
    begins = start == 0 or tokens[start - 1] == tokenizer.bos_token_id
    ends = tokens[stop - 1] == tokenizer.eos_token_id
    html = shaded(pieces(tokenizer, tokens[start:stop]), strengths[start:stop], peak - start)
    return f"{'' if begins else '… '}{html}{'' if ends else ' …'}"


def _pairs(result: LanguageQuickstart, one: OutputFeature) -> str:
    from tl_bilinear.plots import submatrix_figure

    weights = [
        [_pair(result, row["first"], row["second"]), f"{row['coefficient']:+.4f}"]
        for row in one.strongest.to_pandas().head(_PAIRS).to_dict("records")
    ]
    met = [
        [
            _pair(result, row["first"], row["second"]),
            f"{row['tokens']:,} of {one.active.tokens:,}",
            f"{row['mean']:+.3f}",
        ]
        for row in one.active.to_pandas().head(_PAIRS).to_dict("records")
    ]
    n = result.features.inputs.n
    return (
        "<h3>Which pairs of input features make it</h3>"
        f"<p>Left, from the weights: the largest of all {n * (n + 1) // 2:,} coefficients (what stands before "
        f"the product of two features' activations), of pairs that may never meet. Right, from the weights and "
        f"the text: the pairs that contribute most where the feature is active. "
        f"{one.active.pairs_per_token:.0f} pairs are active at once there, and they make "
        f"{one.active.explained:.0%} of the mean pre-activation, {one.active.preactivation:.2f}; the rest are "
        f"constants and what the input SAE misses.</p>"
        f"<div class=tables>{table(['in the weights', 'coefficient'], weights)}"
        f"{table(['on the text', 'tokens', 'mean'], met)}</div>"
        "<details><summary>The strongest pairs of the weights as a matrix</summary>"
        f"{embed(submatrix_figure(one.submatrix))}</details>"
    )


def _pair(result: LanguageQuickstart, b: int, c: int) -> str:
    first, second = (
        f"<span class=name><small>{feature}</small> {escape(result.labels[feature])}</span>"
        for feature in (b, c)
    )
    return f"{first}<sup>2</sup>" if b == c else f"{first} × {second}"


def _spectrum(result: LanguageQuickstart, index: int) -> str:
    from tl_bilinear.plots import statistics_figure

    one, correlation = result.found[index], result.correlation
    outlying, d = len(one.statistics.outlying_eigenvalues), len(one.statistics.eigenvalues)
    found = [f"{float(correlation.active[index, rank - 1]):.3f}" for rank in RANKS]
    return (
        "<h3>How few directions it takes</h3>"
        f"<p>Left, all its interactions: normally distributed ones would fall along a parabola here. Right, the "
        f"eigenvalues of <code>Q</code> beside those expected of a random symmetric matrix of the same size and "
        f"norm: {outlying} of {d} lie outside. The table says how well the leading ones predict the "
        f"pre-activation on the {int(correlation.counts[index]):,} tokens where the feature is active (Pearson "
        f"correlation).</p>"
        f"{embed(statistics_figure(one.statistics))}"
        f"{table(['eigenvectors kept', *map(str, RANKS)], [['correlation', *found]])}"
    )


def _attribution(result: LanguageQuickstart, one: OutputFeature) -> str:
    found = one.attribution
    tokens = one.examples.tokens[0].tolist()
    only = [float(place == found.position) for place in range(len(tokens))]
    largest = found.to_pandas(_PAIRS)
    pairs = [
        [_pair(result, row["first"], row["second"]), f"{row['contribution']:+.4f}"]
        for row in largest.to_dict("records")
    ]
    m = len(found.features)
    if others := m * (m + 1) // 2 - len(pairs):
        rest = float(found.pairs.sum()) - largest["contribution"].sum()
        pairs.append([f"the other {others:,} pairs", f"{rest:+.4f}"])
    terms = [
        [escape(_TERMS.get(name, name)), f"{value:+.4f}"]
        for name, value in found.terms().items()
        if value
    ]
    terms.append(["<b>sum</b>", f"<b>{found.total:+.4f}</b>"])
    terms.append(["<b>the model's own</b>", f"<b>{found.measured:+.4f}</b>"])
    return (
        "<h3>One activation taken apart, exactly</h3>"
        f"<p class=examples>{_context(result, tokens, found.position, only)}</p>"
        f"<p>At the framed token {m} input features are active. Their pairs, the biases of the SAEs and what "
        f"the input SAE misses (its error) sum to the pre-activation that the model has, to a relative "
        f"{found.error:.0e} (float32).</p>"
        f"<div class=tables>{table(['pairs of features', 'contribution'], pairs)}"
        f"{table(['everything', 'contribution'], terms)}</div>"
    )


def _checks(result: LanguageQuickstart, one: OutputFeature) -> str:
    def numbers(frame: pandas.DataFrame, name: Callable[[Any], str], **formats: str) -> Any:
        return [
            [name(row), *(format(row[column], how) for column, how in formats.items())]
            for row in frame.to_dict("records")
        ]

    both = {"predicted": "+.4f", "measured": "+.4f"}
    pairs = numbers(
        one.pairs.to_pandas(),
        lambda row: _pair(result, row["first"], row["second"]),
        tokens=",",
        **both,
        control=".4f",
    )
    taken = numbers(
        one.eigenvectors.to_pandas(),
        lambda row: f"eigenvector {row['component'] + 1}",
        **both,
        error=".0e",
        control_error=".0e",
    )
    removed = numbers(
        one.downstream.to_pandas(),
        lambda row: f"component {row['component'] + 1}",
        effect="+.4f",
        low="+.4f",
        high="+.4f",
        control_effect="+.4f",
    )
    loss = one.loss.to_pandas().iloc[0]
    return (
        "<h3>Does the model agree?</h3>"
        "<p>The running model is intervened on. <b>Pairs</b>: both input features are removed from the "
        "activations, one at a time and together; what is left of the four runs is their interaction alone. "
        "Predicted from the weights, measured in the model (means over tokens), and the mean size of the same "
        "for random directions of the same lengths:</p>"
        + table(["pair", "tokens", "predicted", "measured", "random"], pairs)
        + "<p><b>Eigenvectors</b>: each is taken out of what the layer reads, and the layer answers. Where the "
        "feature is active it must lose exactly that component. Errors are the largest on any token, relative "
        "to the largest value; a random direction must miss:</p>"
        + table(["taken out", "predicted", "measured", "error", "random's error"], taken)
        + f"<p><b>Downstream</b>: the same components are removed from what the layer writes, along the feature's "
        f"decoder direction, where it is active. The logarithm of the probability of the ten tokens that it is "
        f"said to raise changes there by (mean over {len(one.examples.sequences)} rows of text, 95 % interval; "
        f"beside it, as much removed along a random direction):</p>"
        + table(["removed", "change", "from", "to", "random"], removed)
        + f"<p>Without both, the loss of the tokens that follow changes by {loss['difference']:+.4f} nats "
        f"({loss['low']:+.4f} to {loss['high']:+.4f}).</p>"
        f"<p class=note>{_verdict(one)}</p>"
    )


def _verdict(one: OutputFeature) -> str:
    """What the checks say, and what they do not."""
    error = float(one.eigenvectors.error.max())
    control = float(one.eigenvectors.control_error.min())
    exact = (
        "The weights say what the layer does to this feature"
        if error < control / 10
        else "The weights do not say what the layer does to this feature"
    )
    high = one.downstream.interval[:, 1].tolist()
    lowers = [str(number) for number, value in enumerate(high, start=1) if value < 0]
    after = (
        f"Without component {' or '.join(lowers)} the tokens that it is said to raise become less likely."
        if lowers
        else "That it makes the tokens that it is said to raise likelier is not shown: no interval lies below zero."
    )
    return (
        f"{exact} (error {error:.0e}; random directions miss by {control:.0e} or more). {after} That a direction "
        f"resembles a feature would show neither: it takes interventions, and they speak for this text."
    )
