"""The whole analysis on a bilinear transformer and SAEs that were trained on real text, by SAELens."""

import math

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)

from tl_bilinear import FeatureInteractions

WORDS, CONTEXT, D = 300, 32, 32
POINTS = ["blocks.0.mlp.hook_in", "blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"]

pytestmark = [pytest.mark.slow, pytest.mark.shared]


@pytest.fixture(scope="module")
def tokens():
    from tests.conftest import SHARED

    path = SHARED / "data" / "tinystories_valid.txt"
    if not path.is_file():
        pytest.skip(f"needs real data that this machine does not have: {path}")
    words = path.read_text().lower().replace(".", " . ").replace(",", " , ").split()
    common = sorted(set(words), key=lambda w: (-words.count(w), w))[:WORDS]
    number = {word: i + 2 for i, word in enumerate(common)}
    ids = torch.tensor([number.get(word, 1) for word in words])
    rows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], 1)


@pytest.fixture(scope="module")
def model(tokens):
    torch.manual_seed(0)
    built = HookedSAETransformer.from_config(
        bilinear=True, n_layers=1, d_model=D, d_head=8, d_mlp=64, n_ctx=CONTEXT, d_vocab=WORDS + 2,
        normalization_type="RMSPre", positional_embedding_type="rotary", seed=0, device="cpu",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(built.parameters(), weight_decay=0.05)
    for step in range(200):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 200)
        batch = tokens[torch.randint(len(tokens), (32,))]
        loss = built(batch, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.8 * math.log(WORDS)
    return built


@pytest.fixture(scope="module")
def saes(model, tokens, tmp_path_factory):
    found = {}
    for hook in POINTS:
        config = LanguageModelSAERunnerConfig(
            sae=TopKTrainingSAEConfig(
                d_in=D, d_sae=4 * D, k=8, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=True
            ),
            model_name="small", model_class_name="HookedTransformer", model_from_pretrained_kwargs={},
            hook_name=hook, dataset_path="in-memory", streaming=False, is_dataset_tokenized=True,
            prepend_bos=True, context_size=CONTEXT, training_tokens=60_000,
            train_batch_size_tokens=512, store_batch_size_prompts=32, n_batches_in_buffer=64, lr=2e-3,
            lr_scheduler_name="cosineannealing", lr_end=1e-5, device="cpu", seed=0,
            exclude_special_tokens=[0], n_checkpoints=0, checkpoint_path=None, output_path=None,
            logger=LoggingConfig(log_to_wandb=False), verbose=False,
        )  # fmt: skip
        data = Dataset.from_dict({"tokens": tokens.tolist()})
        runner = LanguageModelSAETrainingRunner(config, override_model=model, override_dataset=data)
        folder = tmp_path_factory.mktemp("sae")
        runner.run().save_inference_model(folder)
        found[hook] = SAE.load_from_disk(folder)
    return found


@pytest.mark.parametrize("point", POINTS[:2])
def test_the_whole_analysis(model, saes, tokens, point):
    features = FeatureInteractions(model, 0, saes[point], saes[POINTS[2]])
    some = tokens[:200]
    run = features.run(some)
    correlation = run.low_rank_correlation(k=8, progress=False)
    assert correlation.share_above(0.75, rank=8, min_active=50) > 0.5
    rising = correlation.mean_active(50)
    assert rising[-1] > rising[0]

    # Of the features that are used, the one of largest leading eigenvalue.
    table = features.sweep(k=2, progress=False).to_pandas()
    used = set(correlation.features[correlation.counts >= 50].tolist())
    feature = int(next(f for f in table["feature"] if f in used))
    examples = run.examples(feature, k=5)
    assert len(examples.sequences) == 5

    for row in range(3):  # exact where it is strongest
        place = int(examples.positions[row])
        found = run.attribute(feature, place, int(examples.sequences[row]))
        assert found.error < 1e-5
        assert found.measured == pytest.approx(float(examples.values[row]), rel=1e-3)

    # What the active pairs do is what the weights say, and more than chance.
    active = run.active_interactions(feature)
    assert active.pairs_per_token <= 8 * 9 / 2
    checked = run[:100].verify_pairs(feature, active.top(5, kind="cross"))
    assert (checked.difference[checked.tokens > 0] < 1e-3).all()
    assert checked.measured.abs().nanmean() > checked.control.nanmean()

    statistics = features.statistics(feature)
    assert len(statistics.outlying_eigenvalues) >= 1
