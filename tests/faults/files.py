"""Damaged files of every kind: cut, altered, with a field or a tensor removed, added or misshapen."""

import dataclasses
import functools
import gzip
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge

from tests.faults.building import circuit, features, found_paths, images, layer, run
from tests.faults.campaign import Case
from tests.features import test_published_saes as published_saes
from tests.models import published_format as published_models
from tests.models.building import bilinear_model
from tests.recipes.conftest import write_idx
from tests.recipes.stories import prepare_stories
from tl_bilinear import io
from tl_bilinear.circuits import FeatureGraph, Paths
from tl_bilinear.features import (
    Attribution,
    FeaturePairs,
    published_disk_loader,
    read_top_sequences,
)
from tl_bilinear.models import HookedBilinearTransformer
from tl_bilinear.recipes.images import Runs, TrainingConfig, load_images
from tl_bilinear.recipes.language import (
    ActivationComparison,
    FinetuneRun,
    LanguageConfig,
    LanguageData,
    LanguageRun,
    SAERun,
    load_tokenizer,
    pack_stories,
    read_stories,
    train_tokenizer,
)
from tl_bilinear.recipes.language.checkpoints import keep_checkpoint, require_whole
from tl_bilinear.tensor import BilinearTensor, Eigendecomposition, cp, hosvd, spectrum, tucker

NAN, INF = float("nan"), float("inf")


@functools.cache
def _once(make):
    """What `make` writes, in a folder that is kept: copied, never changed."""
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    make(folder)
    return folder


def copy(make, folder):
    return Path(shutil.copytree(_once(make), folder / "copy"))


def case(name, make, damage, load, sentence):
    """Load what `make` wrote after `damage` was done to it; all three are given the folder."""

    def call(folder):
        place = copy(make, folder)
        damage(place)
        return load(place)

    return Case(name, call, sentence)


# ---------------------------------------------------------------------- damage


def cut(name, share):
    def damage(folder):
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])

    return damage


def flip(name, place=0.7):
    """One bit in the last part of a file, which in one of tensors is data."""

    def damage(folder):
        path = folder / name
        content = bytearray(path.read_bytes())
        content[int(place * len(content))] ^= 0x40
        path.write_bytes(content)

    return damage


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    def damage(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def tensors(name, change):
    def damage(folder):
        held = load_file(folder / name)
        change(held)
        save_file({key: value.contiguous() for key, value in held.items()}, folder / name)

    return damage


def fields(name, **values):
    """Set fields of a JSON file; a value of None removes one. ``a__b`` is a field of a field."""

    def damage(folder):
        content = json.loads((folder / name).read_text())
        for path, value in values.items():
            *inner, last = path.split("__")
            table = functools.reduce(lambda held, key: held[key], inner, content)
            if value is None:
                del table[last]
            else:
                table[last] = value
        (folder / name).write_text(json.dumps(content))

    return damage


def _set(name, value):
    def change(held):
        held[name] = held[name].clone()
        held[name].view(-1)[1] = value

    return change


# ---------------------------------------------------------------------- models and SAEs


def our_model(folder):
    bilinear_model(bilinear_bias=True).save_pretrained(folder / "model")


def saved_model(folder):
    return copy(our_model, folder) / "model"


def llama(folder):
    model = bilinear_model(positional_embedding_type="rotary", rotary_dim=8, final_rms=True)
    model.unembed.b_U.data.zero_()
    model.to_hf(folder / "model")


def published_model(folder):
    published_models.write(folder / "model")


def published_sae(folder):
    published_saes.write(folder / "model")


def weights_of():
    """Of each kind: what writes it, what loads it, and a weight that it holds."""
    ours = "blocks.1.mlp.W_in"
    return {
        "our model": (
            our_model,
            lambda p: HookedBilinearTransformer.from_pretrained(p / "model"),
            ours,
        ),
        "a bridge of it": (our_model, lambda p: TransformerBridge.boot_bilinear(p / "model"), ours),
        "a Llama": (
            llama,
            lambda p: HookedBilinearTransformer.from_hf(p / "model"),
            "model.layers.1.mlp.gate_proj.weight",
        ),
        "a published model": (
            published_model,
            lambda p: HookedBilinearTransformer.from_pretrained(p / "model"),
            "transformer.h.1.mlp.w.weight",
        ),
        "a published SAE": (
            published_sae,
            lambda p: published_disk_loader(p / "model"),
            "w_enc.weight",
        ),
    }


WEIGHTS, CONFIG = "model/model.safetensors", "model/config.json"


def models():
    cases = []
    for kind, (make, load, weight) in weights_of().items():
        last = weight.rpartition(".")[0].split(".")[-1]
        for name, damage, sentence in (
            (
                "empty weights",
                cut(WEIGHTS, 0),
                r"model\.safetensors is truncated, or not a safetensors file",
            ),
            (
                "half of the weights",
                cut(WEIGHTS, 0.5),
                r"model\.safetensors is truncated, or not a safetensors file",
            ),
            (
                "text for weights",
                write(WEIGHTS, "weights"),
                r"model\.safetensors is truncated, or not a safetensors file",
            ),
            ("no weights", remove(WEIGHTS), r"has no model\.safetensors"),
            (
                "a weight less",
                tensors(WEIGHTS, lambda t, w=weight: t.pop(w)),
                rf"does not fit its config\.json: .*({last}|layers).*",
            ),
            (
                "a weight more",
                tensors(WEIGHTS, lambda t: t.update(more=torch.ones(2))),
                r"more is not in the model|more is not",
            ),
            (
                "a weight of another shape",
                tensors(WEIGHTS, lambda t, w=weight: t.update({w: t[w][:-1].clone()})),
                r"has shape \[.*\] where the config makes it \[",
            ),
            (
                "a NaN weight",
                tensors(WEIGHTS, _set(weight, NAN)),
                rf"{weight} is nan at \[0, 1\]; expected finite weights",
            ),
            (
                "an infinite weight",
                tensors(WEIGHTS, _set(weight, INF)),
                rf"{weight} is inf at \[0, 1\]",
            ),
            (
                "integers for a weight",
                tensors(WEIGHTS, lambda t, w=weight: t.update({w: t[w].long()})),
                rf"{weight} is (torch\.int64|I64); expected floating-point weights",
            ),
            ("no config", remove(CONFIG), r"has no config\.json"),
            ("half of the config", cut(CONFIG, 0.5), r"config\.json is not JSON, or not all of it"),
            ("a list for a config", write(CONFIG, "[1, 2]"), r"config\.json"),
            ("an empty config", write(CONFIG, "{}"), r"config\.json"),
        ):
            cases.append(case(f"{kind}: {name}", make, damage, load, sentence))
    ours, bridge = (weights_of()[kind][1] for kind in ("our model", "a bridge of it"))
    for kind, load in (("our model", ours), ("a bridge of it", bridge)):
        cases += [
            case(
                f"{kind}: a bit of the weights",
                our_model,
                flip(WEIGHTS),
                load,
                r"is damaged: its weights are not those that were written",
            ),
            case(
                f"{kind}: a layer more in the config",
                our_model,
                fields(CONFIG, config__n_layers=3),
                load,
                r"it has weights of the layers \[0, 1\], where n_layers is 3",
            ),
            case(
                f"{kind}: a layer less in the config",
                our_model,
                fields(CONFIG, config__n_layers=1),
                load,
                r"blocks\.1\.\S+ is not in the model|does not fit",
            ),
            case(
                f"{kind}: a million layers",
                our_model,
                fields(CONFIG, config__n_layers=10**6),
                load,
                r"where n_layers is 1000000",
            ),
            case(
                f"{kind}: an enormous width",
                our_model,
                fields(CONFIG, config__d_model=10**9),
                load,
                r"where the config makes it",
            ),
            case(
                f"{kind}: no dtype",
                our_model,
                fields(CONFIG, config__dtype=None),
                load,
                "dtype None is not a torch dtype",
            ),
            case(
                f"{kind}: an integer dtype",
                our_model,
                fields(CONFIG, config__dtype="int8"),
                load,
                "int8 is not that of weights",
            ),
            case(
                f"{kind}: another version",
                our_model,
                fields(CONFIG, format_version=9),
                load,
                "has format_version 9",
            ),
            case(
                f"{kind}: no table",
                our_model,
                fields(CONFIG, config=[1]),
                load,
                "'config' is not a table of fields",
            ),
            case(
                f"{kind}: no width",
                our_model,
                fields(CONFIG, config__d_model=None),
                load,
                "it lacks d_model",
            ),
        ]
    load = weights_of()["a Llama"][1]
    for name, change, sentence in (
        (
            "a layer more",
            {"num_hidden_layers": 3},
            r"weights of the layers \[0, 1\], where num_hidden_layers is 3",
        ),
        ("a layer less", {"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is not in the model"),
        ("a million layers", {"num_hidden_layers": 10**6}, r"where num_hidden_layers is 1000000"),
        ("layers in words", {"num_hidden_layers": "2"}, r"config\.json"),
        ("a negative width", {"hidden_size": -8}, r"config\.json"),
        ("another width", {"hidden_size": 24}, r"where the config makes it"),
        ("another vocabulary", {"vocab_size": 29}, r"where the config makes it \[29, 16\]"),
        ("no length", {"max_position_embeddings": 0}, r"max_position_embeddings is 0"),
        ("an enormous length", {"max_position_embeddings": 10**9}, r"n_ctx is 1000000000|n_ctx"),
        ("biases that are not there", {"mlp_bias": True}, r"mlp\.\w+\.bias is missing"),
        ("an activation", {"hidden_act": "silu"}, r"silu"),
        ("another architecture", {"model_type": "gpt2"}, r"is a 'gpt2' model; expected a Llama"),
        (
            "an unknown architecture",
            {"model_type": "odd"},
            r"config\.json does not describe a model",
        ),
        (
            "a scaled rotation",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            r"rope_type 'yarn' is not supported",
        ),
    ):
        cases.append(
            case(f"a Llama's config: {name}", llama, fields(CONFIG, **change), load, sentence)
        )
    load = weights_of()["a published model"][1]
    for name, change, sentence in (
        ("n_layer", {"n_layer": 4}, r"is missing"),
        ("n_layer a word", {"n_layer": "2"}, r"n_layer is '2'; expected a positive integer"),
        ("d_model", {"d_model": -8}, r"d_model is -8; expected a positive integer"),
        ("n_ctx", {"n_ctx": 10**12}, r"n_ctx is 1000000000000"),
        ("n_head", {"n_head": 3}, r"is not n_head = 3 times"),
        ("no d_hidden", {"d_hidden": None}, r"it lacks d_hidden"),
        ("a gate", {"gate": "relu"}, r"gate is 'relu'"),
        ("no bilinear layer", {"bilinear": False}, r"bilinear is false"),
    ):
        cases.append(
            case(
                f"a published model's config: {name}",
                published_model,
                fields(CONFIG, **change),
                load,
                sentence,
            )
        )
    load = weights_of()["a published SAE"][1]
    for name, change, sentence in (
        ("k", {"k": 0}, r"k is 0; expected a positive integer"),
        ("d_model", {"d_model": "16"}, r"d_model is '16'"),
        ("expansion", {"expansion": 1.5}, r"expansion is 1\.5"),
        ("normalize", {"normalize": NAN}, r"normalize is nan; expected null or a positive number"),
        ("point", {"point": ["odd", 1]}, r"point is \['odd', 1\]"),
        ("no point", {"point": None}, r"it lacks point"),
        ("target", {"target": ["mlp-out", 1]}, r"it is a transcoder"),
        ("a bias that is not there", {"encoder_bias": True}, r"w_enc\.bias is missing"),
    ):
        cases.append(
            case(
                f"a published SAE's config: {name}",
                published_sae,
                fields(CONFIG, **change),
                load,
                sentence,
            )
        )
    cases += [
        Case(
            "no folder",
            lambda p: HookedBilinearTransformer.from_pretrained(p / "no"),
            "is not a directory",
        ),
        Case(
            "a file for a folder",
            lambda p: HookedBilinearTransformer.from_pretrained(__file__),
            "is a file",
        ),
        Case(
            "an empty folder",
            lambda p: HookedBilinearTransformer.from_pretrained(p),
            r"has no config\.json",
        ),
        Case(
            "an empty folder for a Llama",
            lambda p: HookedBilinearTransformer.from_hf(p),
            r"has no config\.json",
        ),
        Case(
            "a number for a Llama",
            lambda p: HookedBilinearTransformer.from_hf(3),
            "from_hf takes a LlamaForCausalLM",
        ),
        Case("no published SAE", lambda p: published_disk_loader(p / "no"), "is not a directory"),
        Case(
            "no top sequences",
            lambda p: read_top_sequences(p, 1, "mlp-in"),
            r"has no top-activations\.safetensors",
        ),
        Case(
            "our own model as a Llama",
            lambda p: HookedBilinearTransformer.from_hf(saved_model(p)),
            "is in tl_bilinear's own format",
        ),
    ]
    return cases


# ---------------------------------------------------------------------- results


def results():
    tensor = layer()
    return {
        BilinearTensor: tensor,
        Eigendecomposition: tensor.interaction().eigh(2),
        type(hosvd(tensor, 2)): hosvd(tensor, 2),
        type(tucker(tensor, 2, 2)): tucker(tensor, 2, 2),
        type(cp(tensor, 2, steps=5, restarts=1, progress=False)): cp(
            tensor, 2, steps=5, restarts=1, progress=False
        ),
        type(spectrum(tensor, k=2, progress=False)): spectrum(tensor, k=2, progress=False),
        FeaturePairs: features().top(0, 3),
        Attribution: run().attribute(0, 2),
        Paths: found_paths(),
        FeatureGraph: circuit().graph(3),
    }


RESULT = "result.safetensors"


def stored():
    cases = []
    for cls, result in results().items():
        name = cls.__name__

        def make(folder, result=result):
            result.save(folder / RESULT)

        load = functools.partial(lambda cls, p: cls.load(p / RESULT), cls)
        first = next(
            f.name
            for f in dataclasses.fields(cls)
            if isinstance(getattr(result, f.name), torch.Tensor)
        )
        numbers = (*cls._finite, "left")[0]
        required = next(
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        )
        for what, damage, sentence in (
            ("empty", cut(RESULT, 0), r"result\.safetensors is truncated or not a result file"),
            ("half", cut(RESULT, 0.5), r"is truncated or not a result file"),
            ("almost all", cut(RESULT, 0.995), r"is truncated or not a result file"),
            ("a bit", flip(RESULT, 0.999), r"its content is not what was written"),
            (
                "a bit of the header",
                flip(RESULT, 0.1),
                r"is truncated or not a result file|not what was written",
            ),
            ("no file", remove(RESULT), r"no such file"),
            (
                "a tensor removed",
                rewritten(lambda t, m, n=first: t.pop(n)),
                rf"the tensor of {first} is missing",
            ),
            (
                "a tensor added",
                rewritten(lambda t, m: t.update(more=torch.ones(1))),
                r"unknown tensors \['more'\]",
            ),
            (
                "integers",
                rewritten(lambda t, m, n=first: t.update({n: (t[n] * 0).bool()})),
                rf"{first} must be",
            ),
            (
                "another shape",
                rewritten(
                    lambda t, m, n=first: t.update({n: torch.ones(2, 1, 3, 1, 1, dtype=t[n].dtype)})
                ),
                rf"{first} must be|shape|is not valid",
            ),
            (
                "NaN",
                rewritten(lambda t, m, n=numbers: t[n].view(-1)[:1].fill_(NAN)),
                rf"{numbers} is nan at \[|{numbers} has 1 NaN or infinite",
            ),
            (
                "a field removed",
                rewritten(lambda t, m, n=required: m["fields"].pop(n)),
                rf"{name} lacks the fields \['{required}'\]",
            ),
            (
                "a field added",
                rewritten(lambda t, m: m["fields"].update(odd=1)),
                rf"{name} has unknown fields \['odd'\]",
            ),
            (
                "another kind",
                rewritten(lambda t, m: m.update(kind="Nobody")),
                rf"holds Nobody, not {name}",
            ),
            ("no kind", rewritten(lambda t, m: m.pop("kind")), r"holds no result of tl_bilinear"),
        ):
            cases.append(case(f"{name}: {what}", make, damage, load, sentence))
    return cases


def rewritten(change):
    """By somebody who makes the digest right again."""

    def damage(folder):
        held, metadata = io.load_tensors(folder / RESULT)
        change(held, metadata)
        io.save_tensors(folder / RESULT, held, metadata)

    return damage


# ---------------------------------------------------------------------- text and runs


def text(folder):
    prepare_stories(folder, 60, 180)


REPORT, TOKENIZER = "data/report.json", "data/tokenizer/tokenizer.json"
TINY = {"n_layers": 1, "d_model": 8, "d_mlp": 8, "n_heads": 1, "batch": 4, "steps": 2}


def language_run(folder):
    """What a finished run leaves, without its model."""
    io.claim(folder / "run", "run")
    settings = {
        "format": "tl_bilinear language run",
        "config": dataclasses.asdict(LanguageConfig(**TINY)),
        "data": {},
    }
    io.write_json(folder / "run" / "run.json", settings)
    result = {
        "loss": 1.0,
        "parameters": 9,
        "steps": 2,
        "tokens": 8,
        "seconds": 1.0,
        "sample": "",
        "history": [{"step": 1, "loss": 1.0}],
    }
    io.write_json(folder / "run" / "result.json", result)


def comparison(folder):
    io.write_json(
        folder / "comparison.json", {f.name: [1] for f in dataclasses.fields(ActivationComparison)}
    )


def checkpoint(folder):
    written = folder / ".writing" / "checkpoint-3"
    written.mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
        (written / name).write_bytes(os.urandom(64))
    keep_checkpoint(folder, 3, 1.0)


def other_tokenizer(folder):
    train_tokenizer(["some other words for another tokenizer"] * 3, 180).save_pretrained(
        folder / "data/tokenizer"
    )


def image_run(folder):
    Runs(folder / "runs", progress=False).train(images(), [TrainingConfig(size=4, epochs=1)])


def load_image_run(folder):
    path = next((folder / "runs").iterdir())
    held, metadata = io.load_tensors(path)
    io.save_tensors(path, {name: value[:1] for name, value in held.items()}, metadata)
    return Runs(folder / "runs", progress=False).train(images(), [TrainingConfig(size=4, epochs=1)])


def idx(folder):
    for prefix in ("train", "t10k"):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", torch.zeros(4, 2, 3))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", torch.arange(4))


def gz(folder):
    (folder / "stories.txt.gz").write_bytes(gzip.compress(b"one<|endoftext|>two" * 200))


def texts():
    cases = []
    load = lambda p: LanguageData.load(p / "data")  # noqa: E731
    arrow = "data/train/data-00000-of-00001.arrow"
    for name, damage, sentence in (
        ("no report", remove(REPORT), r"is not prepared text"),
        ("half of the report", cut(REPORT, 0.5), r"report\.json is not JSON"),
        ("a list for the report", write(REPORT, "[]"), r"is not a table of values"),
        ("another format", fields(REPORT, format="odd"), r"was not written by `tl-bilinear data`"),
        *(
            (
                f"no {field} in the report",
                fields(REPORT, **{field: None}),
                rf"report\.json is damaged, or of another version: its '{field}' is None",
            )
            for field in (
                "n_ctx",
                "vocabulary",
                "tokenizer",
                "stories",
                "rows",
                "cleaning",
                "fingerprint",
            )
        ),
        ("n_ctx a word", fields(REPORT, n_ctx="32"), r"its 'n_ctx' is '32'"),
        ("another n_ctx", fields(REPORT, n_ctx=16), r"does not hold rows of 16 tokens"),
        ("other counts", fields(REPORT, rows__train=1), r"rows, report\.json says 1"),
        (
            "another fingerprint",
            fields(REPORT, fingerprint="0-0"),
            r"are not those that were written",
        ),
        ("another cleaning", fields(REPORT, cleaning={"odd": 1}), r"report\.json is damaged"),
        ("no rows", remove("data/train"), r"train cannot be read"),
        ("half of the rows", cut(arrow, 0.5), r"cannot be read|rows, report|written"),
        ("a bit of a token", flip(arrow, 0.5), r"are not those that were written|cannot be read"),
        ("no tokenizer", remove("data/tokenizer"), r"holds no tokenizer"),
        (
            "half of the tokenizer",
            cut(TOKENIZER, 0.5),
            r"the tokenizer in .* cannot be read: .*tokenizer\.json is not JSON",
        ),
        ("an empty tokenizer", write(TOKENIZER, "{}"), r"the tokenizer in .* cannot be read"),
        (
            "another tokenizer",
            other_tokenizer,
            r"vocabulary of \d+, the tokenizer|is not the one that the tokens there were made with",
        ),
    ):
        cases.append(case(f"data: {name}", text, damage, load, sentence))
    for name, damage, sentence in (
        (
            "no model of it",
            remove("data/tokenizer/tokenizer.json"),
            r"the tokenizer in .* cannot be read|does not mark",
        ),
        ("a list", write(TOKENIZER, "[]"), r"cannot be read"),
    ):
        cases.append(
            case(
                f"tokenizer: {name}",
                text,
                damage,
                lambda p: load_tokenizer(p / "data/tokenizer"),
                sentence,
            )
        )
    made, settings = "run/result.json", "run/run.json"
    for name, damage, sentence in (
        ("no result", remove(made), r"the run .* is not finished"),
        ("no settings", remove(settings), r"no such file: .*run\.json"),
        ("half of the result", cut(made, 0.5), r"result\.json is not JSON"),
        ("half of the settings", cut(settings, 0.5), r"run\.json is not JSON"),
        ("a list for the result", write(made, "[]"), r"result\.json is not a table of values"),
        *(
            (f"no {field}", fields(made, **{field: None}), r"was not written by this version of")
            for field in ("loss", "history", "steps", "sample")
        ),
        ("a field more", fields(made, odd=1), r"was not written by this version of"),
        ("a loss in words", fields(made, loss="low"), r"was not written by this version of"),
        ("a NaN loss", fields(made, loss=NAN), r"its loss is nan"),
        ("a history of numbers", fields(made, history=[1]), r"its history is no list of tables"),
        ("no config", fields(settings, config=None), r"was not written by this version of"),
        (
            "an unknown setting",
            fields(settings, config__odd=1),
            r"was not written by this version of",
        ),
        ("a negative setting", fields(settings, config__batch=-1), r"batch must be at least 1"),
        (
            "a setting in words",
            fields(settings, config__batch="4"),
            r"was not written by this version of",
        ),
    ):
        cases.append(
            case(
                f"run: {name}",
                language_run,
                damage,
                lambda p: LanguageRun.load(p / "run"),
                sentence,
            )
        )
    cases += [
        case(
            "run: of finetuning",
            language_run,
            lambda p: None,
            lambda p: FinetuneRun.load(p / "run"),
            r"was not written by this version of `tl-bilinear finetune`",
        ),
        case(
            "run: of SAEs",
            language_run,
            lambda p: None,
            lambda p: SAERun.load(p / "run"),
            r"was not written by this version of `tl-bilinear train saes`",
        ),
        Case("run: no folder", lambda p: LanguageRun.load(p / "no"), r"is not there"),
        Case("SAEs: no folder", lambda p: SAERun.load(p / "no"), r"is not there"),
        Case(
            "comparison: no folder", lambda p: ActivationComparison.load(p), r"holds no comparison"
        ),
        case(
            "comparison: a column less",
            comparison,
            fields("comparison.json", steps=None),
            ActivationComparison.load,
            r"is not a table of this version",
        ),
        case(
            "comparison: a number",
            comparison,
            fields("comparison.json", steps=3),
            ActivationComparison.load,
            r"is not a table of this version",
        ),
        case(
            "comparison: a longer column",
            comparison,
            fields("comparison.json", steps=[1, 2]),
            ActivationComparison.load,
            r"different lengths",
        ),
        case(
            "image run: other sizes",
            image_run,
            lambda p: None,
            load_image_run,
            r"does not hold the model that its name says",
        ),
    ]
    for name, damage, sentence in (
        ("no optimizer", remove("checkpoint-3/optimizer.pt"), r"optimizer\.pt is missing"),
        ("no random state", remove("checkpoint-3/rng_state.pth"), r"rng_state\.pth is missing"),
        (
            "half of the optimizer",
            cut("checkpoint-3/optimizer.pt", 0.5),
            r"optimizer\.pt is not what was written",
        ),
        (
            "a bit of the weights",
            flip("checkpoint-3/model.safetensors"),
            r"model\.safetensors is not what was written",
        ),
        ("no list", remove("checkpoint-3/seconds.json"), r"there is no seconds\.json"),
        (
            "another list",
            write("checkpoint-3/seconds.json", '{"seconds": 1}'),
            r"in place of a list of its files",
        ),
        ("half of the list", cut("checkpoint-3/seconds.json", 0.5), r"seconds\.json is not JSON"),
    ):
        cases.append(
            case(
                f"checkpoint: {name}",
                checkpoint,
                damage,
                lambda p: require_whole(p / "checkpoint-3"),
                sentence,
            )
        )
    picture, label = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
    for name, damage, sentence in (
        ("no labels", remove(label), r"has no train-labels-idx1-ubyte"),
        ("half of the images", cut(picture, 0.5), r"is truncated or damaged"),
        ("no header", cut(picture, 0.1), r"is truncated: \d+ bytes"),
        ("another magic number", write(picture, "x" * 40), r"is not an IDX file of 3 dimensions"),
        ("fewer labels", lambda p: write_idx(p / label, torch.arange(3)), r"4 images but 3 labels"),
        (
            "another size",
            lambda p: write_idx(p / picture, torch.zeros(4, 3, 3)),
            r"they must have one size",
        ),
    ):
        cases.append(case(f"images: {name}", idx, damage, load_images, sentence))
    cases += [
        Case("images: no folder", lambda p: load_images(p / "no"), "no such folder of images"),
        Case("images: a file", lambda p: load_images(__file__), "is a file; name the folder"),
        case(
            "text: half of a gzip file",
            gz,
            cut("stories.txt.gz", 0.5),
            lambda p: list(read_stories(p / "stories.txt.gz")),
            "is truncated, or not a gzip file",
        ),
        case(
            "text: no gzip file",
            gz,
            write("stories.txt.gz", "text"),
            lambda p: list(read_stories(p / "stories.txt.gz")),
            "is truncated, or not a gzip file",
        ),
        Case(
            "text: no file",
            lambda p: list(read_stories(p / "no.txt")),
            "no such file or folder of text",
        ),
        Case("text: an empty folder", lambda p: list(read_stories(p)), "holds no text"),
        Case(
            "tokenizer of no text",
            lambda p: train_tokenizer([], 100),
            "no text to train a tokenizer on",
        ),
        Case(
            "tokenizer too small",
            lambda p: train_tokenizer(["a story"], 5),
            "does not hold this text",
        ),
    ]
    cases += [
        case(
            f"packing at n_ctx={n}",
            text,
            lambda p: None,
            lambda p, n=n: pack_stories(["a b c"], load_tokenizer(p / "data/tokenizer"), n),
            f"n_ctx must be at least 2, got {n}",
        )
        for n in (0, 1, -5)
    ]
    return cases


def cases():
    return [*models(), *stored(), *texts()]
