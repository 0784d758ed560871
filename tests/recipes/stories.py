"""Small stories with a vocabulary and a grammar, as many as asked for, each different."""

import random

from tl_bilinear.recipes.language import TextConfig, prepare_text, train_tokenizer

NAMES = ("Lily", "Tom", "Mia", "Ben", "Anna", "Max")
THINGS = ("ball", "cat", "red box", "big tree", "little dog", "cake", "boat")
PLACES = ("park", "garden", "house", "forest")
DEEDS = ("found", "saw", "lost", "wanted", "loved")


def make_stories(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    stories: dict[str, None] = {}
    while len(stories) < count:
        name, friend = draw.sample(NAMES, 2)
        thing, other = draw.sample(THINGS, 2)
        story = (
            f"Once upon a time, {name} {draw.choice(DEEDS)} a {thing} in the {draw.choice(PLACES)}. "
            f'"Look, {friend}!" said {name}. {friend} {draw.choice(DEEDS)} the {other}. '
            f"They were happy, and {name} went to the {draw.choice(PLACES)}. The end."
        )
        stories[story] = None
    return list(stories)


def prepare_stories(folder, count, vocabulary):
    """Rows of 32 tokens, a tenth of the stories for validation."""
    stories = make_stories(count)
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    return prepare_text(
        folder / "stories.txt",
        TextConfig(n_ctx=32, validation=0.1),
        tokenizer=train_tokenizer(stories, vocabulary),
        out=folder / "data",
        progress=False,
    )
