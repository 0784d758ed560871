"""Pack a trained model and its SAEs as the package's demo: ``python -m tl_bilinear.demo.pack``.

Weights are rounded to float16, and every number of the model card is measured after rounding.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from torch import Tensor

from tl_bilinear.demo import CARD, FOLDER, MODEL, MOMENTS, NAME, SAES, SEPARATOR, STORIES
from tl_bilinear.io import whole_directory, write_json
from tl_bilinear.models.huggingface import save_llama

MODEL_CARD = "MODEL_CARD.md"
LM_OPTIONS = (
    "n_layers",
    "d_model",
    "d_mlp",
    "n_heads",
    "batch",
    "epochs",
    "learning_rate",
    "weight_decay",
    "warmup",
)
SAE_OPTIONS = ("layers", "tokens", "batch", "learning_rate", "final_learning_rate")
# A row of training text may start in the middle of a story; without an opening, so does the model.
_OPENINGS = ("once upon a time", "one day", "there was", "tom and lily", "lily", "tim")
_TEMPERATURE = 0.8
_ROWS = 16  # stories sampled at once


app = App(name="python -m tl_bilinear.demo.pack", result_action="return_value")


@app.default
def pack(
    lm: Annotated[Path, Parameter(help="Folder of a `tl-bilinear train lm` run.")],
    saes: Annotated[Path, Parameter(help="Folder of a `tl-bilinear train saes` run.")],
    data: Annotated[Path, Parameter(help="Folder of `tl-bilinear data`, of both.")],
    out: Annotated[Path, Parameter(help="Folder to write: tl_bilinear/demo/files.")],
    /,
    *,
    stories: Annotated[int, Parameter(help="How many stories the model writes.")] = 400,
) -> None:
    """Write the demo's files, the model card among them."""
    from sae_lens import SAE

    from tl_bilinear.features import evaluate_saes
    from tl_bilinear.models import HookedBilinearTransformer
    from tl_bilinear.recipes.language import (
        LanguageData,
        LanguageRun,
        SAERun,
        language_loss,
        pack_stories,
        sample_stories,
    )

    run, dictionaries, text = LanguageRun.load(lm), SAERun.load(saes), LanguageData.load(data)
    llama, bos = run.llama(), text.tokenizer.bos_token_id
    with whole_directory(out, "demo") as folder:
        save_llama(llama.half(), text.tokenizer, folder / MODEL)
        llama = llama.float()
        rounded: dict[str, Any] = {}
        for source in sorted((Path(saes) / "saes").iterdir()):
            sae = SAE.load_from_disk(source)
            sae.cfg.metadata.model_name = NAME
            # The config still says float32, so the weights are loaded as float32, which is exact.
            _half(sae).save_model(folder / SAES / source.name)
            rounded[source.name] = SAE.load_from_disk(folder / SAES / source.name, dtype="float32")
        hooked = HookedBilinearTransformer.from_hf(llama, tokenizer=text.tokenizer, device="cpu")
        rows = text.validation.with_format("torch")[:256]["input_ids"].long()
        evaluation = evaluate_saes(hooked, rounded, rows)
        written = sample_stories(
            llama,
            text.tokenizer,
            stories,
            prompts=_OPENINGS,
            temperature=_TEMPERATURE,
            batch_size=_ROWS,
        )
        (folder / STORIES).write_bytes(gzip.compress(SEPARATOR.join(written).encode(), mtime=0))
        packed = pack_stories(written, text.tokenizer, n_ctx=text.n_ctx)
        write_moments(hooked, packed, folder)
        card = {
            "model": {
                "n_ctx": text.n_ctx,
                "vocabulary": len(text.tokenizer),
                "parameters": run.parameters,
                "loss": language_loss(llama, text.validation, bos),
                "loss_before_rounding": run.loss,
                "training_loss": [step["loss"] for step in run.history if "loss" in step][-1],
                "tokens": run.tokens,
                "text_tokens": text.rows["train"] * text.n_ctx,
                "validation_tokens": text.rows["validation"] * text.n_ctx,
                "stories": text.stories,
                "seconds": run.seconds,
                "config": dataclasses.asdict(run.config),
            },
            "saes": {
                "config": dataclasses.asdict(dictionaries.config),
                "evaluation": json.loads(evaluation.to_pandas().to_json(orient="records")),
                "evaluated_on": evaluation.tokens,
            },
            "stories": len(written),
        }
        write_json(folder / CARD, card)
        (folder / MODEL_CARD).write_text(_model_card(card))
    print(evaluation)
    size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {out}")


@app.command
def moments() -> None:
    """Measure again what each layer of the demo reads on its stories, and write it."""
    from tl_bilinear.demo import load_demo_model, load_demo_tokens

    write_moments(load_demo_model("cpu"), load_demo_tokens(), FOLDER)


def write_moments(model: Any, tokens: Tensor, folder: Path) -> None:
    """The moments of every layer's input, special tokens and the first of a row left out."""
    import torch

    from tl_bilinear.features.populations import layer_moments

    mask = ~torch.isin(tokens, torch.tensor(model.tokenizer.all_special_ids))
    mask[:, 0] = False
    layers = range(model.cfg.n_layers)
    found = layer_moments(model, layers, tokens, mask, population="tokens of the demo's stories")
    (folder / MOMENTS).mkdir(exist_ok=True)
    for layer, measured in zip(layers, found, strict=True):
        measured.to(torch.float32).save(folder / MOMENTS / f"{layer}.safetensors")


def _model_card(card: dict[str, Any]) -> str:
    model, saes = card["model"], card["saes"]
    lm, sae = model["config"], saes["config"]
    rows = "\n".join(
        f"| {each['sae']} | {each['nmse']:.3f} | {each['l0']:.0f} | {each['features']} | {each['dead']} | "
        f"{each['loss_added']:.3f} | {each['loss_added_relative']:.1%} | {each['loss_recovered']:.3f} |"
        for each in saes["evaluation"]
    )
    return f"""# A small bilinear language model with SAEs

**Model.** A transformer with bilinear MLPs that writes TinyStories: {lm["n_layers"]} layers, d_model
{lm["d_model"]}, d_mlp {lm["d_mlp"]}, {lm["n_heads"]} heads, {model["parameters"]:,} parameters, context
{model["n_ctx"]}, rotary positions, RMSNorm without weights, no biases; a lower-case WordPiece vocabulary of
{model["vocabulary"]:,} entries. Weights are float16; loaders give float32.

**Data.** {model["stories"]["train"]:,} stories of TinyStories (Eldan and Li 2023, CDLA-Sharing-1.0),
{model["text_tokens"]:,} tokens, seen {model["tokens"] / model["text_tokens"]:.1f} times; {model["stories"]["validation"]:,} other
stories, {model["validation_tokens"]:,} tokens, for validation. About half a per cent of the whole data set.

**Training.** AdamW, learning rate {lm["learning_rate"]:g} with linear decay, weight decay {lm["weight_decay"]:g}, {lm["batch"]} rows
a step, {model["tokens"]:,} tokens, {model["seconds"] / 60:.0f} minutes on two CPU cores shared with other work.

**Loss.** {model["loss"]:.3f} nats a token on the validation stories ([BOS] not counted); {model["loss_before_rounding"]:.3f} before
rounding to float16; {model["training_loss"]:.3f} on training text at the end. A token of this vocabulary is a longer or
shorter piece of text than one of another, so losses compare only within it.

**SAEs.** TopK of k = {sae["k"]}, {sae["expansion"]:g} features a dimension, {sae["tokens"]:,} tokens, learning rate {sae["learning_rate"]:g} to
{sae["final_learning_rate"]:g}, auxiliary loss {sae["aux_loss"]:g}, unit decoder rows, tied start, no encoder bias. [BOS] is left out. On
{saes["evaluated_on"]:,} validation tokens, clean loss {saes["evaluation"][0]["loss"] - saes["evaluation"][0]["loss_added"]:.3f}:

| SAE | NMSE | L0 | features | dead | loss added | relative | recovered |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

Dead: active on none of these tokens. Recovered: of what zeros in the same place would cost.

**Stories.** `stories.txt.gz` holds {card["stories"]} stories that the model wrote itself, at temperature {_TEMPERATURE:g}.

**Limits.** Small, trained on little text many times over: it writes sentences, loses its plot and knows nothing.
The SAEs have seen few tokens, too. It is here to try methods on, fast and offline; claims about language models
need larger ones. It writes names, places and habits of its data without judgement.

**Made by** (`stories` being a folder with the text):

```bash
tl-bilinear tokenizer stories --out tokenizer --size {model["vocabulary"]}
tl-bilinear data stories --validation validation.txt --tokenizer tokenizer --out data
tl-bilinear train lm data --out lm --config small {_options(lm, LM_OPTIONS)}
tl-bilinear train saes lm/model --data data --out saes {_options(sae, SAE_OPTIONS)}
python -m tl_bilinear.demo.pack lm saes data tl_bilinear/demo/files
```
"""


def _options(config: dict[str, Any], names: tuple[str, ...]) -> str:
    """Some settings of a config as options of the command line."""
    return " ".join(
        f"--{name.replace('_', '-')} {_written(config[name])}"
        for name in names
        if config[name] is not None
    )


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _half(sae: Any) -> Any:
    for parameter in sae.parameters():
        parameter.data = parameter.data.half()
    return sae


if __name__ == "__main__":
    app()
