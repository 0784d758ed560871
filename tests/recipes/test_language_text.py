"""Reading, cleaning, tokenizing and packing text."""

import gzip
import itertools
import json
import tracemalloc

import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.recipes.stories import make_stories
from tl_bilinear.recipes.language import (
    Cleaner,
    LanguageData,
    TextConfig,
    TokenizerConfig,
    clean_story,
    data,
    load_tokenizer,
    make_tokenizer,
    pack_stories,
    packing,
    prepare_text,
    read_stories,
    text,
    train_tokenizer,
)

STORIES = make_stories(120)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(STORIES, 180)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(STORIES))
    return path


# ---------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", ["stories.txt", "stories.txt.gz"])
def test_stories_of_a_file(tmp_path, name):
    content = "One day,\nall was well.\n<|endoftext|>\nThe end.<|endoftext|>Again.\n<|endoftext|>\n"
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    stories = [s.strip() for s in read_stories(tmp_path / name)]
    assert stories == ["One day,\nall was well.", "The end.", "Again."]


def test_a_folder_in_the_order_of_its_names(tmp_path):
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "notes.md").write_text("not text")
    assert list(read_stories(tmp_path)) == ["first", "second"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        FileNotFoundError, match=r"empty holds no text: expected files ending in \.txt"
    ):
        read_stories(tmp_path / "empty")


@pytest.mark.parametrize("missing", ["./no.txt", "/no/such/place", "tiny.txt.gz"])
def test_a_path_that_is_not_there(missing):
    with pytest.raises(FileNotFoundError, match="no such file or folder of text"):
        read_stories(missing)


def test_a_hub_that_is_out_of_reach():
    with pytest.raises(ConnectionError, match=r"'nobody/nothing' .split 'train'. cannot be read"):
        read_stories("nobody/nothing")


def test_a_hub_data_set_is_streamed(monkeypatch):
    rows = Dataset.from_dict({"text": ["a", "b"]})

    def load(name, split, streaming):
        assert (name, split, streaming) == ("roneneldan/TinyStories", "train", True)
        return rows.to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    assert list(read_stories()) == ["a", "b"]
    with pytest.raises(ValueError, match="has no column 'story'; it has text"):
        list(read_stories(column="story"))


@pytest.mark.parametrize("damage", ["truncated", "not gzip", "flipped"])
def test_a_broken_file(tmp_path, damage):
    whole = gzip.compress("\n<|endoftext|>\n".join(STORIES).encode())
    middle = len(whole) // 2
    flipped = bytes(255 - byte for byte in whole[middle : middle + 50])
    broken = {
        "truncated": whole[:-20],
        "not gzip": b"plain text",
        "flipped": whole[:middle] + flipped + whole[middle + 50 :],
    }[damage]
    (tmp_path / "s.txt.gz").write_bytes(broken)
    with pytest.raises(ValueError, match=r"s\.txt\.gz is truncated, or not a gzip file"):
        list(read_stories(tmp_path / "s.txt.gz"))


def test_a_text_without_separators_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_LONGEST", 1000)
    (tmp_path / "book.txt").write_text("a line of a book\n" * 100)
    with pytest.raises(
        ValueError, match=r"a story of more than 1,000 characters: separate the stories"
    ):
        list(read_stories(tmp_path / "book.txt"))


# ---------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("  One day.\r\nAll\twas well. \n", "One day.\nAll was well."),
        ("“Hi,” said Zoë\u2019s café — and…", '"Hi," said Zoe\'s cafe - and...'),
        ("she said, â€œI canâ€™tâ€\x9d", 'she said, "I can\'t"'),
        ("cafÃ© au lait", "cafe au lait"),
        ("zero\u200bwidth\u00a0space", "zerowidth space"),
        ("", ""),
        ("a \ufffd b", None),
        ("a \x00 b", None),
        ("\u4f60\u597d", None),
        ("Ã¢Ã¢ \u2200", None),
    ],
)
def test_one_story(given, cleaned):
    assert clean_story(given) == cleaned


@given(st.text())
def test_what_is_kept_is_printable_ascii_and_stays(story):
    cleaned = clean_story(story)
    if cleaned is not None:
        assert all(" " <= c <= "~" or c == "\n" for c in cleaned)
        assert clean_story(cleaned) == cleaned


@given(st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)))
def test_ascii_is_only_stripped(story):
    assert clean_story(story) == story.strip()


def test_the_report_counts_each_story_once():
    cleaner = Cleaner()
    stories = ["One day.", "One day.\n", "Two.", "", "  ", "bad \ufffd\ufffd end", "“Two.”", "Two."]
    assert list(cleaner(stories)) == ["One day.", "Two.", '"Two."']
    report = cleaner.report()
    assert (report.read, report.kept, report.repaired) == (8, 3, 1)
    assert report.dropped == {"duplicate": 2, "corrupt": 1, "empty": 2}
    assert report.characters == len("One day.Two.") + len('"Two."')
    assert report.examples["corrupt"] == ["bad \ufffd\ufffd end"]
    assert report.examples["duplicate"] == ["One day.", "Two."]
    assert str(report).startswith("3 of 8 stories kept")
    assert list(cleaner(["Two.", "Three."])) == ["Three."]  # a second stream, free of the first


def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, monkeypatch):
    """Two million stories of a kilobyte may take their digests, not their gigabytes."""

    def peak(count, folder):
        stories = (f"{STORIES[i % 100]} {'and so on. ' * 70} {i}" for i in range(count))
        monkeypatch.setattr(data, "read_stories", lambda *_, **__: stories)
        tracemalloc.start()
        try:
            prepare_text("s", TextConfig(n_ctx=32), tokenizer=tokenizer, out=folder, progress=False)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    monkeypatch.setattr(data, "_BATCH", 50)
    monkeypatch.setattr(packing, "_BATCH", 50)
    peak(100, tmp_path / "warm")
    growth = peak(1500, tmp_path / "large") - peak(500, tmp_path / "small")
    assert growth / 1000 < 250  # bytes a story


# ---------------------------------------------------------------------- the tokenizer


def test_what_the_tokenizer_does(tokenizer):
    """As PAPER_FACTS has it: [UNK] 0, [BOS] 1, [EOS] 2; lower case, no accents, single digits."""
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["[UNK]", "[BOS]", "[EOS]"]
    assert len(tokenizer) == 180
    ids = tokenizer("Once, Lily's CÁT").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("[BOS]", "once", ",", "lily", "'", "s", "cat"),
    ]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("42 tims").input_ids)
    assert pieces[1:3] == ["4", "2"]
    assert pieces[-1].startswith("##")
    assert (
        tokenizer("42 tims", add_special_tokens=False).input_ids
        == tokenizer("42 tims").input_ids[1:]
    )
    assert tokenizer.decode(ids, skip_special_tokens=True).startswith("once, lily")
    padded = tokenizer(["once", "once, lily"], padding=True).input_ids
    assert padded[0][-1] == tokenizer.pad_token_id == 2
    assert tokenizer.unk_token_id in tokenizer("\u4f60").input_ids
    ascii = "".join(map(chr, range(32, 127)))
    assert tokenizer.unk_token_id not in tokenizer(ascii + " zyxqj").input_ids


def test_the_same_text_gives_the_same_tokenizer(tokenizer):
    for _ in range(3):
        assert train_tokenizer(STORIES, 180).get_vocab() == tokenizer.get_vocab()


def test_a_folder_with_it_is_an_ordinary_tokenizer(tmp_path, tokenizer, source):
    made, report = make_tokenizer(
        source, TokenizerConfig(size=180), out=tmp_path / "t", progress=False
    )
    assert report.kept == len(STORIES)
    assert made.get_vocab() == tokenizer.get_vocab()
    for loaded in (load_tokenizer(tmp_path / "t"), AutoTokenizer.from_pretrained(tmp_path / "t")):
        assert loaded("Once, 42 times").input_ids == tokenizer("Once, 42 times").input_ids
        assert loaded.pad_token == "[EOS]"
    make_tokenizer(
        source, TokenizerConfig(size=150), out=tmp_path / "t", progress=False
    )  # replaced
    assert len(load_tokenizer(tmp_path / "t")) == 150
    (tmp_path / "t" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        make_tokenizer(source, TokenizerConfig(size=150), out=tmp_path / "t", progress=False)


def test_transformer_lens_takes_it_from_memory_and_from_a_folder(tmp_path, tokenizer):
    from tests.models.building import config
    from tl_bilinear import HookedBilinearTransformer

    tokenizer.save_pretrained(tmp_path / "t")
    expected = tokenizer("once upon a time").input_ids
    for one in (tokenizer, load_tokenizer(tmp_path / "t")):
        model = HookedBilinearTransformer(config(d_vocab=-1), tokenizer=one)
        assert model.cfg.d_vocab == 180
        assert model.to_tokens("once upon a time").tolist() == [expected]
        assert model.to_tokens("once upon a time", prepend_bos=False).tolist() == [expected[1:]]
        assert model.tokenizer.bos_token_id == 1


def test_a_vocabulary_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"a vocabulary of 20 does not hold this text.*choose size >= \d+"
    ):
        train_tokenizer(STORIES, 20)
    with pytest.raises(ValueError, match="no stories"):
        train_tokenizer([], 100)


def test_a_folder_without_a_usable_tokenizer(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="holds no tokenizer: make one with"):
        load_tokenizer(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version')
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


# ---------------------------------------------------------------------- rows


def prepare(source, tokenizer, folder, **options):
    config = TextConfig(**{"n_ctx": 24, "validation": 0.2, **options})
    return prepare_text(source, config, tokenizer=tokenizer, out=folder, progress=False)


def reference_rows(stories, tokenizer, n_ctx):
    """One token at a time."""
    rows, row = [], [1]
    for story in stories:
        tokens = [*tokenizer(story).input_ids, 2]  # [BOS] story [EOS]
        for i, token in enumerate(tokens):
            if i == 0 and row == [1]:
                continue  # the row's own [BOS]
            row.append(token)
            if len(row) == n_ctx:
                rows.append(row)
                row = [1]
    return rows


@pytest.mark.parametrize("n_ctx", [2, 7, 24, 100])
def test_rows_hold_the_stories_in_their_order(source, tokenizer, tmp_path, n_ctx):
    made = prepare(source, tokenizer, tmp_path / "data", n_ctx=n_ctx)
    held_out = [s for s in STORIES if data._part(s, 0.2) == "validation"]
    kept = [s for s in STORIES if s not in held_out]
    for part, stories in (("train", kept), ("validation", held_out)):
        rows = getattr(made, part)["input_ids"][:]
        assert [list(row) for row in rows] == reference_rows(stories, tokenizer, n_ctx)
        assert made.stories[part] == len(stories)
        assert all(row[0] == 1 for row in rows)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert all(0 <= left < n_ctx for left in report["tokens_left_over"].values())


def test_the_folder_is_what_datasets_reads(source, tokenizer, tmp_path):
    made = prepare(source, tokenizer, tmp_path / "data")
    train = load_from_disk(tmp_path / "data" / "train")
    assert train.column_names == ["input_ids"]
    assert train.cache_files  # memory-mapped
    again = LanguageData.load(tmp_path / "data")
    assert again.fingerprint == made.fingerprint
    assert again.cleaning == made.cleaning
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "stories.txt"]


def test_the_split_is_by_story_and_stays_when_text_is_added(source, tokenizer, tmp_path):
    stories = [*STORIES, *STORIES]
    sides = {story: data._part(story, 0.2) for story in stories}
    shares = sum(side == "validation" for side in sides.values()) / len(sides)
    assert 0.1 < shares < 0.3
    few = prepare(source, tokenizer, tmp_path / "few", limit=60)
    held_out = [s for s in STORIES[:60] if sides[s] == "validation"]
    assert few.stories == {"train": 60 - len(held_out), "validation": len(held_out)}


def test_a_validation_source_of_its_own_is_kept_out_of_training(source, tokenizer, tmp_path):
    other = tmp_path / "valid.txt"
    other.write_text("\n<|endoftext|>\n".join(STORIES[:30]))
    made = prepare(source, tokenizer, tmp_path / "data", validation=other)
    assert made.stories == {"train": len(STORIES) - 30, "validation": 30}
    assert made.cleaning.dropped["duplicate"] == 30
    assert [list(r) for r in made.validation["input_ids"][:]] == reference_rows(
        STORIES[:30], tokenizer, 24
    )


def test_errors_leave_no_folder(source, tokenizer, tmp_path, monkeypatch):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(ValueError, match="do not fill one row of n_ctx=90000 tokens"):
        prepare(source, tokenizer, tmp_path / "data", n_ctx=90000)
    with pytest.raises(ValueError, match="n_ctx must be at least 2"):
        prepare(source, tokenizer, tmp_path / "data", n_ctx=1)
    for n_ctx in (0, 1):
        with pytest.raises(ValueError, match="n_ctx must be at least 2"):
            pack_stories(STORIES, tokenizer, n_ctx=n_ctx)
    with pytest.raises(ValueError, match="size must be at least 1, got -1"):
        TokenizerConfig(size=-1)
    with pytest.raises(ValueError, match="a share between 0 and 1, or a source"):
        prepare(source, tokenizer, tmp_path / "data", validation=1.5)

    def full(self, table):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        prepare(source, tokenizer, tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_is_there_is_replaced_only_if_it_is_such_a_folder(source, tokenizer, tmp_path):
    prepare(source, tokenizer, tmp_path / "data")
    assert prepare(source, tokenizer, tmp_path / "data", n_ctx=12).n_ctx == 12
    (tmp_path / "mine").mkdir()
    for folder in ("mine", "data"):
        (tmp_path / folder / "thesis.tex").touch()
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            prepare(source, tokenizer, tmp_path / folder)


def test_damaged_folders(source, tokenizer, tmp_path):
    folder = tmp_path / "data"
    with pytest.raises(
        FileNotFoundError, match=r"is not prepared text .it has no report\.json.: make it"
    ):
        LanguageData.load(folder)
    prepare(source, tokenizer, folder)
    train_tokenizer(STORIES, 150).save_pretrained(folder / "tokenizer")
    with pytest.raises(
        ValueError, match="a vocabulary of 180, the tokenizer there has 150 entries"
    ):
        LanguageData.load(folder)
    tokenizer.save_pretrained(folder / "tokenizer")
    LanguageData.load(folder)
    arrow = next((folder / "train").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"train.*(cannot be read|prepare the text again)"):
        LanguageData.load(folder)
    (folder / "report.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON, or not all of it"):
        LanguageData.load(folder)


def test_real_text(shared_data, tmp_path):
    source = shared_data / "tinystories_valid.txt"
    tokenizer, report = make_tokenizer(
        source, TokenizerConfig(size=1000), out=tmp_path / "t", progress=False
    )
    assert (report.kept, report.dropped["corrupt"]) == (512, 0)
    stories = list(itertools.islice(read_stories(source), 50))
    ids = [tokenizer(story).input_ids for story in stories]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert sum(map(len, ids)) / sum(map(len, stories)) < 0.33  # tokens a character
