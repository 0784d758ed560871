"""Whatever a file holds, the functions that load it raise the package's own errors, or load it whole."""

import contextlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults import files
from tests.faults.campaign import OWN, patience, raised_here
from tl_bilinear.tensor import BilinearTensor

pytestmark = pytest.mark.usefixtures("unchecked")


def result(folder):
    files.layer().save(folder / files.RESULT)


WEIGHTS, CONFIG = files.WEIGHTS, files.CONFIG
LOADERS = {
    "a result": (result, files.RESULT, lambda p: BilinearTensor.load(p / files.RESULT)),
    **{
        f"{kind}, {name}": (make, name, load)
        for kind, (make, load, _) in files.weights_of().items()
        for name in (WEIGHTS, CONFIG)
    },
    "text": (files.text, files.REPORT, lambda p: files.LanguageData.load(p / "data")),
    "a tokenizer": (
        files.text,
        files.TOKENIZER,
        lambda p: files.load_tokenizer(p / "data/tokenizer"),
    ),
    "a run": (files.language_run, "run/result.json", lambda p: files.LanguageRun.load(p / "run")),
    "a run's settings": (
        files.language_run,
        "run/run.json",
        lambda p: files.LanguageRun.load(p / "run"),
    ),
    "a comparison": (files.comparison, "comparison.json", files.ActivationComparison.load),
    "a checkpoint": (
        files.checkpoint,
        "checkpoint-3/seconds.json",
        lambda p: files.require_whole(p / "checkpoint-3"),
    ),
    "images": (files.idx, "train-images-idx3-ubyte", files.load_images),
}

# Damage: cut at a share, or bytes of it put in place of those there.
DAMAGE = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 0.999), st.just(b"")),
    st.tuples(st.just("put"), st.floats(0, 1), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("all"), st.just(0.0), st.binary(max_size=40)),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


def refuses_or_loads(load, folder):
    with patience():
        try:
            load(folder)
        except OWN as error:
            if not raised_here(error):
                raise


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=DAMAGE)
def test_damaged_bytes(kind, damage, tmp_path_factory):
    make, name, load = LOADERS[kind]
    folder = files.copy(make, tmp_path_factory.mktemp("fuzz"))
    how, share, given_bytes = damage
    whole = (folder / name).read_bytes()
    place = int(share * len(whole))
    changed = {
        "cut": whole[:place],
        "put": whole[:place] + given_bytes + whole[place + len(given_bytes) :],
        "insert": whole[:place] + given_bytes + whole[place:],
        "all": given_bytes,
    }[how]
    (folder / name).write_bytes(changed)
    refuses_or_loads(load, folder)


@pytest.mark.parametrize(
    "kind", [kind for kind, (_, name, _) in LOADERS.items() if name.endswith(".json")]
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_other_values_in_json(kind, data, tmp_path_factory):
    """One value of a JSON file replaced by any other."""
    make, name, load = LOADERS[kind]
    folder = files.copy(make, tmp_path_factory.mktemp("fuzz"))
    content = json.loads((folder / name).read_text())
    table, key = content, None
    while isinstance(table, dict) and table:
        key = data.draw(st.sampled_from(sorted(table)))
        if not isinstance(table[key], dict) or not table[key] or data.draw(st.booleans()):
            break
        table = table[key]
    value = data.draw(JSON)
    with contextlib.suppress(TypeError):
        table[key] = value
    (folder / name).write_text(json.dumps(content))
    refuses_or_loads(load, folder)
