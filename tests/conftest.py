"""Every public tensor argument is checked against its jaxtyping annotation while the tests run."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from hypothesis import settings

import tests.typecheck  # noqa: F401  the hook below names it

jaxtyping.install_import_hook("tl_bilinear", "tests.typecheck.check")

settings.register_profile("default", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("default")

SHARED = Path(__file__).parents[2] / "shared"


# The matrices of the tests are small: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_collection_finish():
    """Keep what was imported out of garbage collections, of which Trainer makes one for each run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """Without the annotation checks, as a user's program runs: for tests of the package's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data folder beside the repository; a test that asks for it skips where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip(f"needs real data that this machine does not have: {SHARED / 'data'}")
    return SHARED / "data"


def folder_hub(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face hub that is a folder: ``owner/name/file``. Everything else is out of reach."""
    import huggingface_hub
    from huggingface_hub import errors

    root.mkdir()

    def hf_hub_download(repo_id, filename, **_):
        response = SimpleNamespace(headers={}, request=None)  # what the errors below read
        if not (root / repo_id).is_dir():
            raise errors.RepositoryNotFoundError(f"no repository {repo_id}", response=response)
        if not (root / repo_id / filename).is_file():
            raise errors.RemoteEntryNotFoundError(f"no file {filename}", response=response)
        return str(root / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return root


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A `folder_hub` for one test."""
    return folder_hub(tmp_path / "hub", monkeypatch)
