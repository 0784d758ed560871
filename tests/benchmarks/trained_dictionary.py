"""Train the dictionary of the case `pairs-512`: `python -m tests.benchmarks.trained_dictionary TEXT`.

TEXT holds stories parted by ``<|endoftext|>`` (plain or .gz). A bilinear language model of width 512 is
trained on it for some minutes, then a TopK SAE with 32,768 features on the input of its layer. Neither
is good, both are trained: what the search for the strongest pairs depends on, how much feature
directions differ in what the layer does with them, is that of a dictionary and not of random rows. The
result stays on this machine (100 MB, `DICTIONARY`, ignored by git).
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformer_lens import HookedTransformer

import tl_bilinear  # noqa: F401  gives HookedTransformer.from_config
from tests.benchmarks.layers import DICTIONARY
from tl_bilinear import BilinearTensor
from tl_bilinear.io import save_tensors

WIDTH, FEATURES, CONTEXT, VOCABULARY = 512, 32768, 128, 2048
HOOK = "blocks.0.mlp.hook_in"


def tokens_of(path: Path) -> torch.Tensor:
    """[n, CONTEXT] tokens, each row beginning with [BOS]."""
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY, special_tokens=["[UNK]", "[BOS]"], show_progress=False
    )
    tokenizer.train_from_iterator(stories, trainer)
    ids = torch.tensor([i for e in tokenizer.encode_batch(stories) for i in e.ids])
    rows = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    return torch.cat([torch.ones(len(rows), 1, dtype=torch.long), rows], 1)


def train_model(tokens: torch.Tensor, minutes: float) -> HookedTransformer:
    torch.manual_seed(0)
    model = HookedTransformer.from_config(
        bilinear=True, n_layers=1, d_model=WIDTH, d_head=64, n_ctx=CONTEXT, d_vocab=VOCABULARY,
        normalization_type="RMSPre", positional_embedding_type="rotary", seed=0, device="cpu",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    order, start, step = torch.randperm(len(tokens)), time.monotonic(), 0
    while (share := (time.monotonic() - start) / (60 * minutes)) < 1:
        batch = tokens[order[(torch.arange(16) + 16 * step) % len(tokens)]]
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 30) * (1 - share)
        loss = model(batch, return_type="loss")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    return model


def train_dictionary(model: HookedTransformer, tokens: torch.Tensor, steps: int) -> torch.Tensor:
    sae = TopKTrainingSAEConfig(
        d_in=WIDTH, d_sae=FEATURES, k=30, decoder_init_norm=1.0, rescale_acts_by_decoder_norm=True,
        aux_loss_coefficient=1.0, apply_b_dec_to_input=True, device="cpu",
    )  # fmt: skip
    batch = 1024
    cfg = LanguageModelSAERunnerConfig(
        sae=sae, model_name="none", model_class_name="HookedTransformer", hook_name=HOOK,
        model_from_pretrained_kwargs={}, dataset_path="in-memory", streaming=False,
        is_dataset_tokenized=True, prepend_bos=True, context_size=CONTEXT,
        training_tokens=steps * batch, train_batch_size_tokens=batch, store_batch_size_prompts=16,
        n_batches_in_buffer=16, lr=1e-3, lr_scheduler_name="cosineannealing", lr_end=1e-4,
        device="cpu", seed=0, exclude_special_tokens=[1], n_checkpoints=0, checkpoint_path=None,
        output_path=None, logger=LoggingConfig(log_to_wandb=False), verbose=False,
    )  # fmt: skip
    data = Dataset.from_dict({"tokens": tokens.tolist()})
    trained = LanguageModelSAETrainingRunner(cfg, override_model=model, override_dataset=data).run()
    rows = trained.W_dec.detach()
    return rows / rows.norm(dim=1, keepdim=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--minutes", type=float, default=12, help="of training the model")
    parser.add_argument("--steps", type=int, default=300, help="of training the dictionary")
    options = parser.parse_args()
    tokens = tokens_of(options.text)
    model = train_model(tokens, options.minutes)
    decoder = train_dictionary(model, tokens, options.steps)
    layer = BilinearTensor.from_model(model, 0)
    DICTIONARY.parent.mkdir(exist_ok=True)
    factors = {"left": layer.left, "right": layer.right, "out": layer.out}
    save_tensors(DICTIONARY, {**factors, "decoder": decoder}, {"kind": "trained dictionary"})
    print(f"wrote {DICTIONARY}")


if __name__ == "__main__":
    main()
