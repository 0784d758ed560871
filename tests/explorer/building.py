"""Small panels of every kind that an exact sum has to hold for."""

from __future__ import annotations

import dataclasses
import functools

import torch

from tests.features.building import N_OUT, model, sae
from tl_bilinear import Dictionary, FeatureInteractions
from tl_bilinear.circuits import FeatureCircuit
from tl_bilinear.explorer import graph_panel, language_panel

LAYER = "blocks.1"
INTO, RESIDUAL = f"{LAYER}.mlp.hook_in", f"{LAYER}.hook_resid_mid"
OUTPUT = f"{LAYER}.hook_mlp_out"
TOKENS = torch.tensor(
    [[3, 1, 4, 1, 5, 9, 2, 6], [2, 6, 5, 3, 5, 8, 9, 7], [9, 3, 2, 3, 8, 4, 6, 2]]
)
WIDE = 400
KEPT = 48
HOSTILE = "<script>document.title='run'</script><img src=x onerror=\"document.title='run'\">"


def into(architecture="topk", hook=RESIDUAL, **fields):
    return sae(hook, architecture, dtype="float64", **fields)


def out(architecture="topk", **fields):
    return sae(OUTPUT, architecture, n=N_OUT, seed=1, dtype="float64", **fields)


CASES = {
    "plain": lambda: (model(bilinear_bias=False), into(hook=INTO), out()),
    "norm": lambda: (model(normalization_type="LN"), into(), out()),
    "gated": lambda: (model(), into("gated"), out("gated")),
    "mean": lambda: (
        model(),
        into(normalize_activations="layer_norm"),
        out(normalize_activations="layer_norm"),
    ),
    "skip": lambda: (
        model(),
        sae("blocks.0.hook_resid_pre", "skip_transcoder", hook_out=RESIDUAL, dtype="float64"),
        sae(INTO, "skip_transcoder", n=N_OUT, seed=1, hook_out=OUTPUT, dtype="float64"),
    ),
}


@functools.cache
def run(case):
    """A run of a small random model, with labels that are HTML."""
    built, one, other = CASES[case]()
    features = FeatureInteractions(built, 1, one, other)
    features = features.with_labels(
        input=[f"{HOSTILE} in {i}" for i in range(features.inputs.n)],
        output=[f"{HOSTILE} out {i}" for i in range(features.outputs.n)],
    )
    return features.run(TOKENS, progress=False)


@functools.cache
def wide_run(rows=18):
    """A run of a layer wider than the page decomposes."""
    built = model(d_model=WIDE, d_mlp=WIDE, d_head=WIDE // 2, dtype=torch.float32)
    one = sae(INTO, d=WIDE)
    other = sae(OUTPUT, n=12, seed=1, d=WIDE)
    tokens = torch.randint(1, 10, (rows, 8), generator=torch.Generator().manual_seed(0))
    return FeatureInteractions(built, 1, one, other).run(tokens, progress=False)


def few(sae):
    """The first features of an SAE: what the others make becomes part of the error."""
    whole = Dictionary.of(sae)
    return Dictionary(
        whole.decoder[:KEPT], hook=whole.hook, encoder=whole.encoder[:KEPT],
        encoder_hook=whole.encoder_hook, decoder_bias=whole.decoder_bias,
        encoder_offset=whole.encoder_offset[:KEPT], encode=lambda x: whole.encode(x)[..., :KEPT],
        prepend_bos=True,
    )  # fmt: skip


def few_features(run, **words):
    """The panel of a run cut to its first features: 768 take a while."""
    known = run.features
    cut = FeatureInteractions(
        known.model, known.layer, few(known.inputs.sae), few(known.outputs.sae)
    )
    return language_panel(dataclasses.replace(run, features=cut), **words)


@functools.cache
def graphs():
    """Of two layers of a small model: from weights, at a token, and with nothing active."""
    built = model(normalization_type="LN")
    dictionaries = {
        name: Dictionary.of(
            one, labels=[f"{HOSTILE} {name} {i}" for i in range(one.W_dec.shape[0])]
        )
        for name, one in {
            "before": sae("blocks.0.hook_resid_pre", dtype="float64"),
            "0": sae("blocks.0.hook_mlp_out", seed=2, dtype="float64"),
            "1": out(),
        }.items()
    }
    circuit = FeatureCircuit(
        built, {0: dictionaries["0"], 1: dictionaries["1"]}, {HOSTILE: dictionaries["before"]}
    )
    weights, there = circuit.graph(15), circuit.graph_at(TOKENS[0], 4, 8)
    nothing = there._choose(torch.tensor([], dtype=torch.long))
    return {f"from weights {HOSTILE}": weights, f"at {HOSTILE}": there, "nothing": nothing}


def graphs_panel():
    return graph_panel(
        graphs(),
        title=f"graph {HOSTILE}",
        facts={HOSTILE: HOSTILE},
        links={"mlp 1": ("norm", "output"), "mlp 0": ("absent", "output")},
    )


def panel(case):
    return language_panel(run(case), title=f"{case} {HOSTILE}", facts={HOSTILE: HOSTILE}, name=case)


def with_documents(panel, **changed):
    """A panel with some documents replaced: functions of the document that was there."""
    documents = dict(panel.documents)
    for name, change in changed.items():
        made = documents[f"{panel.manifest['name']}-{name}"]
        documents[f"{panel.manifest['name']}-{name}"] = lambda read, made=made, change=change: (
            change(made(read))
        )
    return dataclasses.replace(panel, documents=documents)
