"""Bad command lines: one line on stderr, exit code 2, no traceback, and nothing written."""

import contextlib
import io
import os

from tests.faults.campaign import Case
from tl_bilinear import cli


class Refused(Exception):
    """What a command said on stderr; that it is one line of its own was seen."""


def command(*arguments):
    """The command in an empty folder."""

    def call(folder):
        before, out, err = os.getcwd(), io.StringIO(), io.StringIO()
        (folder / "empty").mkdir()
        os.chdir(folder / "empty")
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = cli.main([str(each) for each in arguments])
            left = sorted(os.listdir())
        finally:
            os.chdir(before)
        lines = err.getvalue().strip().splitlines()
        problem = (
            f"exit code {status}"
            if status != 2
            else f"{len(lines)} lines"
            if len(lines) != 1
            else f"it left {left}"
            if left
            else "unexpected"
            if "This is a bug" in lines[0]
            else ""
        )
        if problem:
            raise AssertionError(f"{problem}: {lines}")
        raise Refused(lines[0])

    return call


NONE = "/no/such/folder"


def cases():
    table = [
        (["odd"], 'Unknown command "odd"'),
        (["train", "odd"], 'Unknown command "odd"'),
        (["quickstart", "--data", NONE], "no such folder of images"),
        (["quickstart", "--size", "0"], "size must be at least 1, got 0"),
        (["quickstart", "--size", "-3"], "size must be at least 1, got -3"),
        (["quickstart", "--size", "wide"], "Invalid value for --size"),
        (["quickstart", "--size", "1e12"], "Invalid value for --size|size must be"),
        (["quickstart", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["quickstart", "--batch", "0"], "batch must be at least 1, got 0"),
        (["quickstart", "--noise", "nan"], "noise must not be negative, got nan"),
        (["quickstart", "--noise", "-1"], "noise must not be negative, got -1"),
        (["quickstart", "--weight-decay", "inf"], "weight_decay must not be negative, got inf"),
        (["quickstart", "--seed", "x"], "Invalid value for --seed"),
        (["quickstart", "--sise", "3"], "Did you mean --size"),
        (["quickstart", "--data", ""], "images|folder|splits|cannot load"),
        (["images", "--data", NONE], "no such folder of images"),
        (["images", "--studies", "odd"], "odd"),
        (["images", "--seeds", "1"], "seeds"),
        (["images", "--seeds", "x"], "Invalid value for --seeds"),
        (["images", "--size", "0"], "size must be at least 1"),
        (["images", "--epochs", "-1"], "epochs must be at least 1"),
        (["images", "--label", "99"], "label"),
        (["images", "--label", "-1"], "label"),
        (["images", "--sizes", "0"], "size"),
        (["images", "--noise", "nan"], "noise must not be negative"),
        (["tokenizer", f"{NONE}.txt"], "no such file or folder of text"),
        (["tokenizer", "--size", "-1"], "size must be at least 1, got -1"),
        (["tokenizer", "--size", "1000000000000"], "size must be less than"),
        (["tokenizer", "--limit", "0"], "limit must be at least 1, got 0"),
        (["tokenizer", "--size", "many"], "Invalid value for --size"),
        (["data", "--validation", "2"], "validation must be a share between 0 and 1"),
        (["data", "--n-ctx", "1"], "n_ctx must be at least 2, got 1"),
        (["data", "--n-ctx", "1000000000000"], "n_ctx must be less than"),
        (["data", f"{NONE}.txt"], "holds no tokenizer"),
        (["data", f"{NONE}.txt", "--tokenizer", NONE], "holds no tokenizer"),
        (["train", "lm"], "is not prepared text"),
        (["train", "lm", NONE], "is not prepared text"),
        (["train", "lm", "--config", "huge"], "unknown config 'huge'"),
        (["train", "lm", "--learning-rate", "1e30"], "learning_rate must be at most 1"),
        (["train", "lm", "--learning-rate", "nan"], "learning_rate must not be negative, got nan"),
        (["train", "lm", "--batch", "0"], "batch must be at least 1"),
        (["train", "lm", "--n-heads", "3"], "does not divide into n_heads=3"),
        (["train", "lm", "--activation", "odd"], "unknown activation 'odd'"),
        (["train", "lm", "--precision", "fp4"], "unknown precision 'fp4'"),
        (["train", "lm", "--device", "tpu"], "device is 'cpu' or left out"),
        (["train", "lm", "--epochs", "inf"], "epochs must not be negative, got inf"),
        (["train", "compare", "--activations", "odd"], "is not prepared text|odd"),
        (["train", "compare", "--activation", "reglu"], "Did you mean --activations"),
        (["train", "saes"], "MODEL"),
        (["train", "saes", NONE], "is not prepared text|is not a directory"),
        (["train", "saes", "x", "--k", "0"], "k must be at least 1"),
        (["train", "saes", "x", "--points", "odd"], "unknown points odd"),
        (["train", "saes", "x", "--layers", "a"], "Invalid value for --layers"),
        (["train", "saes", "x", "--tokens", "3"], "3 tokens do not make one batch"),
        (["train", "saes", "x", "--learning-rate", "0"], "learning_rate must be positive"),
        (["finetune"], "MODEL"),
        (["finetune", NONE], "is not prepared text"),
        (["finetune", "x", "--path", "odd"], "unknown path 'odd'"),
        (["finetune", "x", "--schedule", "odd"], "unknown schedule 'odd'"),
        (["finetune", "x", "--distill", "2"], "distill must lie in"),
        (["finetune", "x", "--anneal", "nan"], "anneal must lie in"),
        (["finetune", "x", "--fit-rows", "0"], "fit_rows must be at least 1"),
    ]
    return [
        Case(" ".join(["tl-bilinear", *line]), command(*line), sentence) for line, sentence in table
    ]
