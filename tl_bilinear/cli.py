"""The command `tl-bilinear`: each command reads its settings, calls one function and prints the result.

Options, defaults and help are the fields of config dataclasses and their docstrings, which cyclopts
reads; a setting is written once, there. Commands import what they need when they run, so help is quick.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
import traceback
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import App, ArgumentCollection, CycloptsError, Parameter
from cyclopts.config import Dict

from tl_bilinear.explorer.config import ExploreConfig
from tl_bilinear.paper.config import CertifyConfig, GallerySettings, QuickstartConfig
from tl_bilinear.recipes.language.config import (
    CONFIGS,
    TINYSTORIES,
    FinetuneConfig,
    LanguageConfig,
    RunOptions,
    SAETrainingConfig,
    TextConfig,
    TokenizerConfig,
    choose_config,
)

PRESET = "--config"
EXPLORER = "explorer.html"


def _version() -> str:
    from importlib.metadata import version

    return f"tl-bilinear {version('tl-bilinear')}"


def _complete(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Let `--config NAME` fill in the options that are not given, and commas separate a list."""
    for argument in arguments:
        if argument.name == PRESET and argument.tokens:
            name = argument.tokens[0].value
            preset = dataclasses.asdict(choose_config(name))
            unlike = {k: v for k, v in preset.items() if v != getattr(LanguageConfig, k)}
            source = Dict(unlike, source=f"{PRESET} {name}", use_commands_as_keys=False)
            source(app, commands, arguments)
        consumed, takes_many = argument.token_count()
        if consumed and takes_many:
            argument.tokens[:] = [
                token.evolve(value=part)
                for token in argument.tokens
                for part in token.value.split(",")
            ]


app = App(
    name="tl-bilinear",
    help="Bilinear MLPs and weight-based interpretability.\n\n"
    "An error is one line; with --debug it comes with its traceback.",
    version=_version,
    version_flags="--version",
    config=_complete,
    default_parameter=Parameter(negative_iterable=()),
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
    suppress_keyboard_interrupt=False,
)
train = App(name="train", help="Train a model, resumably.")
app.command(train)


def fields_of(hidden: str = "") -> Parameter:
    """Mark a parameter whose fields are options of the command, except for a hidden one."""
    return Parameter(name="*", parse=f"^(?!{hidden}$)" if hidden else None)


Data = Annotated[Path, Parameter(help="Folder that `tl-bilinear data` wrote.")]
OwnData = Annotated[Path, Parameter(help="Folder that `tl-bilinear data --tokenizer MODEL` wrote.")]
Out = Annotated[Path, Parameter(help="Folder to write. What an earlier call wrote is replaced.")]
Folder = Annotated[Path, Parameter(help="Folder of the run. The same command goes on with it.")]
Preset = Annotated[
    str, Parameter(name=PRESET, help=f"Settings to start from: {', '.join(CONFIGS)}.")
]
Quiet = Annotated[bool, Parameter(negative=(), help="Show no progress bar.")]
Source = Annotated[
    str,
    Parameter(
        help="A .txt or .txt.gz file with stories separated by <|endoftext|>, a folder of such files, "
        "or the name of a data set on the Hugging Face hub."
    ),
]


# ---------------------------------------------------------------------- images


@app.command
def quickstart(
    *,
    config: Annotated[QuickstartConfig, fields_of()] = QuickstartConfig(),
    quiet: Quiet = False,
) -> None:
    """Read two bilinear models off their weights: one trained here on images, one of language.

    Settings of the training that are not given are the paper's: size 256, noise 0.4, weight decay 1,
    batch 2048, 20 epochs; below 20,000 images batch 256 and 60 epochs.
    """
    from tl_bilinear.explorer import quickstart_page
    from tl_bilinear.paper.quickstart import REPORT, run_quickstart

    try:
        result = run_quickstart(config, progress=not quiet)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; nothing was written") from None
    page = config.out / EXPLORER
    quickstart_page(result, page, progress=not quiet)
    print(
        result,
        f"Open {page} to draw images, and to read every feature. {config.out / REPORT} explains it all.",
        sep="\n\n",
    )


@app.command
def images(
    *,
    config: Annotated[GallerySettings, fields_of()] = GallerySettings(),
    quiet: Quiet = False,
) -> None:
    """Make the image figures of the paper: one HTML page, JSON and CSV.

    The defaults are reduced settings, some minutes on two cores; the paper's are --data FOLDER
    --size 512 --seeds 5 --sizes 30,100,300,1000 --epochs 100. Trained models are kept in a folder of
    runs, so that an interrupted command goes on.
    """
    from tl_bilinear.paper.gallery import PAGE, make_gallery

    made = make_gallery(config, report=print, progress=not quiet)
    seconds = sum(study.seconds for study in made)
    print(f"{len(made)} studies in {seconds:.0f} s. Open {config.out / PAGE}.")


@app.command(name="certify")
def certify_images(
    *,
    config: Annotated[CertifyConfig, fields_of()] = CertifyConfig(),
    quiet: Quiet = False,
) -> None:
    """Prove how far every test image is from another answer, and write a certificate of it.

    The certificate is checked by one file that needs numpy only, and lies beside it. Trained models are
    kept in a folder of runs, so that an interrupted command goes on.
    """
    from tl_bilinear.paper.certification import CERTIFICATE, CHECKER, PAGE, certify

    print(certify(config, progress=not quiet))
    print(
        f"Open {config.out / PAGE}. To check again: "
        f"python {config.out / CHECKER} {config.out / CERTIFICATE}"
    )


@app.command
def explore(
    *, config: Annotated[ExploreConfig, fields_of()] = ExploreConfig(), quiet: Quiet = False
) -> None:
    """Write a page in which a layer of the model that ships is read, and open it.

    Every output and input feature between two SAEs: where it is active, which pairs make it, and for
    each token the exact sum. With --images image models instead, and a switch between them. The page
    opens from disk, without a server.
    """
    from tl_bilinear.explorer import explore_demo, explore_images, serving

    if config.images:
        view = explore_images(config, progress=not quiet)
        print(view)
        if config.open:
            view.open()
        return
    view, run = explore_demo(config, progress=not quiet)
    print(view)
    if config.serve:
        with serving(view.path, run, port=config.port) as address:
            print(f"Serving on {address}; Ctrl-C ends it.")
            if config.open:
                webbrowser.open(address)
            threading.Event().wait()
    elif config.open:
        view.open()


# ---------------------------------------------------------------------- text


@app.command
def tokenizer(
    source: Source = TINYSTORIES,
    /,
    *,
    out: Out = Path("tokenizer"),
    config: Annotated[TokenizerConfig, fields_of()] = TokenizerConfig(),
    quiet: Quiet = False,
) -> None:
    """Train the paper's lower-case WordPiece tokenizer on text."""
    from tl_bilinear.recipes.language import make_tokenizer

    made, report = make_tokenizer(source, config, out=out, progress=not quiet)
    print(f"{report}\n{len(made):,} entries in {out}")


@app.command
def data(
    source: Source = TINYSTORIES,
    /,
    *,
    tokenizer: Annotated[
        Path, Parameter(help="Folder of a tokenizer, such as `tl-bilinear tokenizer` writes.")
    ] = Path("tokenizer"),
    out: Out = Path("data"),
    config: Annotated[TextConfig, fields_of()] = TextConfig(),
    quiet: Quiet = False,
) -> None:
    """Clean text, tokenize it and pack it into rows for training."""
    from tl_bilinear.recipes.language import prepare_text

    print(prepare_text(source, config, tokenizer=tokenizer, out=out, progress=not quiet))


# ---------------------------------------------------------------------- training


@train.command
def lm(
    data: Data = Path("data"),
    /,
    *,
    out: Folder = Path("runs/lm"),
    preset: Preset = "paper",
    config: Annotated[LanguageConfig, fields_of()] = CONFIGS["paper"],
    options: Annotated[RunOptions, fields_of()] = RunOptions(),
    quiet: Quiet = False,
) -> None:
    """Train a language model.

    On several processes: accelerate launch -m tl_bilinear train lm ...
    """
    from tl_bilinear.recipes.language import train_language_model

    run = train_language_model(data, config, folder=out, progress=not quiet, **vars(options))
    if _speaks():
        print(run)


@train.command
def compare(
    data: Data = Path("data"),
    /,
    *,
    out: Folder = Path("runs/compare"),
    activations: Annotated[
        tuple[str, ...],
        Parameter(help="Which, separated by commas; equal time is the time of the first one."),
    ] = ("bilinear", "reglu", "swiglu", "geglu"),
    preset: Preset = "paper",
    config: Annotated[LanguageConfig, fields_of(hidden="activation")] = CONFIGS["paper"],
    options: Annotated[RunOptions, fields_of()] = RunOptions(),
    quiet: Quiet = False,
) -> None:
    """Train a model with each activation, for equal epochs and for equal time (Table 4)."""
    from tl_bilinear.recipes.language import compare_activations

    compared = compare_activations(
        data, config, folder=out, activations=activations, progress=not quiet, **vars(options)
    )
    if _speaks():
        print(compared)


@train.command
def saes(
    model: Annotated[
        str,
        Parameter(help="Folder of a bilinear model, or its name on the Hugging Face hub."),
    ],
    /,
    *,
    data: OwnData = Path("data"),
    out: Folder = Path("runs/saes"),
    config: Annotated[SAETrainingConfig, fields_of()] = SAETrainingConfig(),
    device: Annotated[str | None, Parameter(help="Such as cpu or cuda.")] = None,
    quiet: Quiet = False,
) -> None:
    """Train SAEs around the layers of a model, all from one forward pass (Table 3).

    SAEs are in OUT/saes, as SAELens writes them; the table has NMSE, L0, dead features, loss added and
    recovered (Fig. 21).
    """
    from tl_bilinear.recipes.language import train_saes

    print(train_saes(model, data, config, folder=out, device=device, progress=not quiet))


@app.command
def finetune(
    model: Annotated[
        str, Parameter(help="Folder of a Hugging Face Llama, or its name on the hub.")
    ],
    /,
    *,
    data: OwnData = Path("data"),
    out: Folder = Path("runs/finetune"),
    path: Annotated[
        tuple[str, ...],
        Parameter(
            help="How: affine, beta (the paper's) or closed; several are separated by commas.",
            show_default=FinetuneConfig.path,
        ),
    ] = (FinetuneConfig.path,),
    config: Annotated[FinetuneConfig, fields_of(hidden="path")] = FinetuneConfig(),
    options: Annotated[RunOptions, fields_of()] = RunOptions(),
    quiet: Quiet = False,
) -> None:
    """Make a Llama with a gated MLP bilinear, beside the same finetuning of it as it is.

    Each run ends in OUT/PATH/model, a Hugging Face Llama with hidden_act="linear"; OUT/curves.html
    shows the losses (Fig. 22).
    """
    from tl_bilinear.recipes.language import compare_finetuning

    configs = {each: dataclasses.replace(config, path=each) for each in path}
    compared = compare_finetuning(
        model, data, configs, folder=out, progress=not quiet, **vars(options)
    )
    if _speaks():
        compared.write_curves(out / "curves.html")
        print(compared)


def _speaks() -> bool:
    from tl_bilinear.recipes.language.run_folder import is_first_process

    return is_first_process()


# ---------------------------------------------------------------------- running


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, with one line on stderr for any failure.

    The exit status is 0, 130 for Ctrl-C, and 2 for every failure. One that should not happen says where
    to report it.
    """
    raised: BaseException
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        app([each for each in given if each != "--debug"])
        return 0
    except KeyboardInterrupt as error:
        raised, status, line = error, 130, str(error) or "interrupted"
    except (CycloptsError, ValueError, OSError, ImportError, MemoryError) as error:
        raised, status, line = error, 2, str(error) or type(error).__name__
    except Exception as error:
        raised, status = error, 2
        if _NO_MEMORY.search(str(error)):  # torch raises a RuntimeError
            line = f"there is not enough memory for these sizes: {error}"
        else:
            line = f"unexpected {type(error).__name__}: {error}. This is a bug: {_how_to_report()}"
    if status == 2 and _was_interrupted(raised):
        status, line = 130, "interrupted"
    if "--debug" in given:
        traceback.print_exception(raised)
    print("tl-bilinear:", " ".join(line.splitlines()), file=sys.stderr)
    return status


_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: a library that is being imported may turn it into its own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _how_to_report() -> str:
    from importlib.metadata import metadata

    urls = dict(url.split(", ", 1) for url in metadata("tl-bilinear").get_all("Project-URL") or ())
    where = f" at {urls['Issues']}" if "Issues" in urls else ""
    return f"please report it{where} with the traceback that --debug shows"
