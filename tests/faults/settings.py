"""Bad settings: every config, and fields of models."""

import json
import math

from transformer_lens.model_bridge import TransformerBridge

import tl_bilinear
from tests.faults.campaign import Case, each
from tests.models.building import config
from tl_bilinear.models import HookedBilinearTransformer
from tl_bilinear.recipes.images import TrainingConfig
from tl_bilinear.recipes.language import (
    FinetuneConfig,
    LanguageConfig,
    RunOptions,
    SAETrainingConfig,
    TextConfig,
    TokenizerConfig,
    choose_config,
)

NAN, INF = math.nan, math.inf


def _count(name):
    return {
        "0": ({name: 0}, rf"{name} must be at least [12], got 0"),
        "-1": ({name: -1}, rf"{name} must be at least [12], got -1"),
        "NaN": ({name: NAN}, rf"{name} must be at least [12], got nan"),
        "enormous": ({name: 10**12}, rf"{name} must be less than 2,147,483,648"),
    }


def _positive(name, most=None):
    values = {
        "negative": ({name: -1.0}, rf"{name} must (not be negative|be positive), got -1\.0"),
        "NaN": ({name: NAN}, rf"{name} must (not be negative|be positive), got nan"),
        "infinite": ({name: INF}, rf"{name} must (not be negative|be positive), got inf"),
    }
    if most is not None:
        values["far too large"] = ({name: 1e30}, rf"{name} must be at most 1, got 1e\+30")
    return values


def _share(name):
    return {
        what: ({name: value}, rf"{name} must lie in \[0, 1\)?\]?, got")
        for what, value in {"negative": -0.1, "above 1": 1.5, "NaN": NAN}.items()
    }


def _word(name, *more):
    return {
        "unknown": ({name: "odd"}, rf"unknown {name} 'odd'; there are"),
        "empty": ({name: ""}, rf"unknown {name} ''"),
    }


def configs():
    cases = []

    def add(cls, *tables):
        for table in tables:
            name = next(iter(next(iter(table.values()))[0]))
            cases.extend(each(f"{cls.__name__}({name})", lambda fields: cls(**fields), table))

    loop = (
        _count("batch"),
        _count("steps"),
        _positive("learning_rate", 1),
        _positive("weight_decay"),
        _positive("epochs"),
        _share("warmup"),
        _share("beta1"),
        _share("beta2"),
    )
    sizes = [_count(name) for name in ("n_layers", "d_model", "d_mlp", "n_heads")]
    add(LanguageConfig, *loop, *sizes, _word("activation"))
    add(
        FinetuneConfig,
        *loop,
        _count("fit_rows"),
        _positive("extra"),
        _share("anneal"),
        _share("distill"),
        _word("path"),
        _word("schedule"),
    )
    rates = [_positive(name, 1) for name in ("learning_rate", "final_learning_rate")]
    add(
        SAETrainingConfig,
        *rates,
        _positive("expansion"),
        _positive("aux_loss"),
        _count("k"),
        _count("batch"),
        _count("buffer"),
    )
    add(TokenizerConfig, _count("size"), _count("limit"))
    add(
        TextConfig,
        _count("n_ctx"),
        _count("limit"),
        {"1": ({"n_ctx": 1}, "n_ctx must be at least 2, got 1")},
    )
    add(
        TrainingConfig,
        _count("size"),
        _count("batch"),
        _count("epochs"),
        _positive("learning_rate", 1),
        _positive("noise"),
        _positive("weight_decay"),
        _positive("activation_noise"),
        _positive("dropout"),
    )
    cases += each(
        "TextConfig(validation)",
        lambda v: TextConfig(validation=v),
        {
            str(v): (v, "validation must be a share between 0 and 1, or a source")
            for v in (0, 1, -0.5, 2.0, NAN)
        },
    )
    cases += each(
        "RunOptions",
        lambda f: RunOptions(**f),
        {
            "precision": ({"precision": "fp4"}, "unknown precision 'fp4'"),
            "device": ({"device": "tpu"}, "device is 'cpu' or left out"),
        },
    )
    cases += each(
        "SAETrainingConfig",
        lambda f: SAETrainingConfig(**f),
        {
            "points": ({"points": ("odd",)}, "unknown points odd"),
            "no points": ({"points": ()}, "points must name at least one"),
            "twice": ({"layers": (1, 1)}, "layers must name at least one, each once"),
            "tokens": ({"tokens": 5}, "5 tokens do not make one batch"),
        },
    )
    cases += [
        Case(
            "heads that do not divide",
            lambda _: LanguageConfig(d_model=30, n_heads=4),
            "does not divide into n_heads=4",
        ),
        Case("an unknown preset", lambda _: choose_config("huge"), "unknown config 'huge'"),
        Case(
            "dropout of all",
            lambda _: TrainingConfig(dropout=1.0),
            "dropout is a share of the embedding below 1",
        ),
        Case(
            "a seed of 80 bits",
            lambda _: TrainingConfig(seed=2**80),
            "seed must be an integer of 64 bits",
        ),
        Case(
            "a batch beyond the text",
            lambda _: LanguageConfig(batch=10).total_steps(5),
            "a batch of 10 rows is more than the 5 rows",
        ),
    ]
    return cases


def model_fields():
    """Through a constructor, a bridge, and a saved config."""
    bad = {}
    for name in ("n_layers", "d_model", "d_head", "n_ctx", "d_mlp", "n_heads", "d_vocab"):
        for what, value in {
            "a word": "2",
            "negative": -8,
            "a fraction": 1.5,
            "NaN": NAN,
            "true": True,
        }.items():
            bad[f"{name} {what}"] = ({name: value}, rf"{name} is .*expected a positive integer")
    for name in ("d_model", "d_head", "d_mlp"):
        bad[f"{name} 0"] = ({name: 0}, rf"{name} is 0; expected a positive integer")
    bad["n_ctx 1e12"] = ({"n_ctx": 10**12}, r"n_ctx is 1000000000000; TransformerLens holds masks")
    bad["n_ctx 1e12 with a fraction"] = (
        {"n_ctx": 1e12},
        r"n_ctx is 1000000000000\.0; expected a positive integer",
    )
    bad["d_vocab enormous"] = ({"d_vocab": 2**40}, r"d_vocab is 1099511627776, which no model has")
    bad["eps NaN"] = ({"eps": NAN}, r"eps is nan; expected a finite number")
    bad["eps a word"] = ({"eps": "1e-5"}, r"eps is '1e-5'; expected a finite number")
    bad["bias a word"] = (
        {"bilinear_bias": "yes"},
        r"bilinear_bias is 'yes'; expected true or false",
    )
    cases = each(
        "HookedBilinearTransformer(...)",
        lambda f: HookedBilinearTransformer.from_config(config(**f)),
        bad,
    )
    bridged = {k: v for k, v in bad.items() if not k.startswith("bias")}
    cases += each(
        "boot_bilinear(...)",
        lambda f: TransformerBridge.boot_bilinear({**config(**f), "seed": 0}),
        bridged,
    )
    for name, (fields, sentence) in bad.items():
        cases.append(
            Case(
                f"config.json: {name}",
                lambda p, f=fields: _load_changed(p, f),
                rf"config\.json does not describe a bilinear transformer: .*{sentence}",
            )
        )
    cases += [
        Case(
            "an unknown field",
            lambda _: HookedBilinearTransformer.from_config(config(d_modl=3)),
            "has no field 'd_modl' .did you mean 'd_model'",
        ),
        Case(
            "an activation",
            lambda _: HookedBilinearTransformer.from_config(config(act_fn="gelu")),
            "a bilinear MLP has no element-wise nonlinearity",
        ),
    ]
    return cases


def _load_changed(folder, fields):
    from tests.faults.files import saved_model

    place = saved_model(folder)
    path = place / "config.json"
    content = json.loads(path.read_text())
    content["config"].update(fields)
    path.write_text(json.dumps(content))
    return tl_bilinear.HookedBilinearTransformer.from_pretrained(place)


def cases():
    return [*configs(), *model_fields()]
