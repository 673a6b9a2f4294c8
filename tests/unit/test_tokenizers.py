"""Tokenizers of model folders: which one runs them, and what their tokens stand for."""

import json
import pathlib
import random
import shutil
import sys
import unicodedata

import numpy as np
import pytest

from saejax.data import bpe, tokens
from saejax.data.corpus import Document
from saejax.data.tokenizers import LibraryTokenizer, load_tokenizer

EMBEDDED = pathlib.Path(bpe.__file__).parents[1] / "subjects" / "embedded"
TEXTS = [
    "The cat's 3 hats, and the dogs; été naïve 日本語 русский",
    " leading and trailing  spaces \n\n\ttabs\r\n",
    "emoji 👩‍👩‍👧 ² ⅷ ٣٤ \x1c\x85\u2028 e\u0301",
    "def f(x):\n    return x['<|endoftext|>']  # <s> </s>\n",
    "",
]
MATERIAL = [*TEXTS, "the cat sat on the mat and the hat " * 20, "low lower lowest " * 20]


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded subject's tokenizer with its config."""
    for name in ("tokenizer.json", "config.json"):
        shutil.copyfile(EMBEDDED / name, tmp_path / name)
    return tmp_path


def edit(path, change):
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def test_the_embedded_tokenizer_is_plain_python():
    found = load_tokenizer(EMBEDDED)
    assert type(found) is bpe.Tokenizer
    assert (found.bos_id, found.eot_id, found.default_bos) == (0, 0, "document")
    assert found.special_ids == {0} and found.max_id == 4095 and found.byte_exact
    assert found.fingerprint == bpe.Tokenizer.load(EMBEDDED).fingerprint
    assert found.encode_batch(TEXTS) == [found.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    "family, settings, expected",
    [
        ("gpt2", {}, "document"),
        ("gpt_neox", {}, "none"),
        ("qwen2", {}, "none"),
        ("gpt_neox", {"add_bos_token": True}, "context"),
        ("llama", {}, "none"),  # the file has a post-processor, and it adds nothing
        ("something_new", {}, "none"),
    ],
)
def test_where_a_bos_belongs(folder, family, settings, expected):
    edit(folder / "config.json", lambda c: c.update(model_type=family))
    edit(folder / "tokenizer_config.json", lambda c: c.update(settings))
    processor = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    edit(folder / "tokenizer.json", lambda c: c.update(post_processor=processor))
    assert load_tokenizer(folder).default_bos == expected
    edit(folder / "tokenizer.json", lambda c: c.update(post_processor=None))
    silent = "context" if family == "llama" else expected
    assert load_tokenizer(folder).default_bos == silent


def test_a_token_that_does_not_exist_is_named(folder):
    edit(folder / "tokenizer_config.json", lambda c: c.update(bos_token="<bos>"))
    with pytest.raises(ValueError, match=r"bos_token = '<bos>' is not in tokenizer\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json file is needed; .*save_pretr"):
        load_tokenizer(folder)


def test_a_missing_library_is_one_line_with_the_reason(folder, monkeypatch):
    edit(folder / "tokenizer.json", lambda c: c.update(normalizer={"type": "NFC"}))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(
        ValueError, match=r"normalizer .*needs the package tokenizers: pip"
    ) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)


# --- With the library -----------------------------------------------------------------------------


def write(folder, tokenizer, model_type, **settings):
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def neox(library, folder):
    """GPT-NeoX: NFC, ByteLevel, a run of spaces as an added token that is not special."""
    models, trainers = library.models, library.trainers
    made = library.Tokenizer(models.BPE())
    made.normalizer = library.normalizers.NFC()
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]
    )
    made.train_from_iterator(MATERIAL, trainer)
    made.add_tokens([library.AddedToken(text, normalized=True) for text in ("    ", "été")])
    end = "<|endoftext|>"
    return write(folder, made, "gpt_neox", bos_token=end, eos_token={"content": end})


def llama3(library, folder):
    """Llama 3: its own split, ByteLevel without regex, a template that adds the BOS."""
    made = library.Tokenizer(library.models.BPE(ignore_merges=True))
    split = library.pre_tokenizers.Split(
        library.Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"),
        "isolated",
    )
    level = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = library.pre_tokenizers.Sequence([split, level])
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
    )
    made.train_from_iterator(MATERIAL, trainer)
    template = library.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made.post_processor = library.processors.Sequence(
        [library.processors.ByteLevel(trim_offsets=False), template]
    )
    return write(folder, made, "llama", bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def gemma(library, folder):
    """Gemma: SentencePiece as BPE with byte fallback, spaces written as ▁."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTé'.,:;<>|/\n", "▁t", "he", "▁the", "at", "▁cat"]
    vocab = {piece: i for i, piece in enumerate([*pieces, "▁c"])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("a", "t"), ("▁", "c"), ("▁c", "at")]
    model = library.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    made = library.Tokenizer(model)
    made.add_special_tokens(["<pad>", "<eos>", "<bos>", "<unk>"])
    made.normalizer = library.normalizers.Replace(" ", "▁")
    parts = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback()]
    made.decoder = library.decoders.Sequence([*parts, library.decoders.Fuse()])
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return write(folder, made, "gemma2", add_bos_token=True, **settings)


def bert(library, folder):
    """BERT: WordPiece, lower case, [CLS] before a text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "s", "##s", "sat", "'", ".", ","]
    made = library.Tokenizer(
        library.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    made.add_special_tokens(words[:4])
    made.normalizer = library.normalizers.BertNormalizer()
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.decoder = library.decoders.WordPiece()
    made.post_processor = library.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return write(folder, made, "bert", pad_token="[PAD]", cls_token="[CLS]")


KINDS = {"neox": neox, "llama3": llama3, "gemma": gemma, "bert": bert}


@pytest.fixture(params=KINDS)
def loaded(request, tmp_path):
    library = pytest.importorskip("tokenizers")
    return request.param, load_tokenizer(KINDS[request.param](library, tmp_path / "model"))


def test_ids_are_the_librarys(loaded, tmp_path):
    kind, found = loaded
    library = pytest.importorskip("tokenizers")
    assert isinstance(found, LibraryTokenizer)
    plain = library.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in TEXTS:
        if "<" not in text:
            assert found.encode(text) == plain.encode(text, add_special_tokens=False).ids
        unknown = {1} if kind == "bert" else set()
        assert not set(found.encode(text)) & (found.special_ids - unknown)
    assert found.encode_batch(TEXTS) == [found.encode(text) for text in TEXTS]
    assert found.ids() == sorted(plain.get_vocab().values())
    assert found.vocab_size == found.max_id + 1 == max(found.ids()) + 1


def test_bytes_of_tokens_are_those_of_the_text(loaded):
    kind, found = loaded
    for text in TEXTS:
        raw = b"".join(map(found.token_bytes, found.encode(text)))
        if kind == "bert":
            continue
        expected = unicodedata.normalize("NFC", text) if kind == "neox" else text
        assert raw.decode() == expected
        assert found.decode(found.encode(text)) == expected
    assert found.byte_exact == (kind == "llama3")
    if kind == "bert":
        ids = found.encode("The cats sat.")
        assert b"".join(map(found.token_bytes, ids)) == b" the cats sat ."
    if kind == "gemma":
        assert found.token_text(found.encode("日")[0]) == "<0xe6>"
    with pytest.raises(ValueError, match="is not in the vocabulary"):
        found.token_bytes(found.vocab_size)
    with pytest.raises(ValueError, match="lone surrogate"):
        found.encode("\ud800")


def test_special_tokens_and_where_the_bos_goes(loaded):
    kind, found = loaded
    expected = {
        "neox": (0, 0, "none", {0}),
        "llama3": (0, 1, "context", {0, 1}),
        "gemma": (2, 1, "context", {0, 1, 2, 3}),
        "bert": (2, 0, "context", {0, 1, 2, 3}),
    }[kind]
    assert (found.bos_id, found.eot_id, found.default_bos, found.special_ids) == expected
    documents = [Document("a", "the cat sat, " * 30), Document("b", "the cat sat " * 13)]
    packed = tokens.pack(documents, found, 16, tails="pad", min_tail=4)
    first = found.decode([found.bos_id])
    if kind == "neox":
        assert packed.lead == 0 and packed.keep[0].all() and 0 not in packed.tokens[0]
    else:
        assert packed.lead == 1 and (packed.tokens[:, 0] == found.bos_id).all(), first
        assert not packed.keep[:, 0].any()
    for i, row in enumerate(packed.tokens):
        ids = found.encode(documents[packed.document[i]].text)
        real = row[packed.lead : packed.length[i]]
        np.testing.assert_array_equal(real, ids[packed.offset[i] :][: len(real)])


def test_the_fingerprint_follows_the_file_and_the_marks(tmp_path):
    library = pytest.importorskip("tokenizers")
    folder = gemma(library, tmp_path / "model")
    one = load_tokenizer(folder).fingerprint
    assert one == load_tokenizer(folder).fingerprint
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<pad>"))
    other = load_tokenizer(folder).fingerprint
    edit(folder / "tokenizer.json", lambda c: c["model"]["vocab"].update(zz=999))
    assert len({one, other, load_tokenizer(folder).fingerprint}) == 3


def test_null_in_the_tokenizers_settings_outweighs_the_models_config(tmp_path):
    library = pytest.importorskip("tokenizers")
    folder = neox(library, tmp_path / "model")
    edit(folder / "config.json", lambda c: c.update(bos_token_id=0, eos_token_id=[0, 5]))
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    assert load_tokenizer(folder).eot_id == 0 == load_tokenizer(folder).bos_id
    edit(folder / "tokenizer_config.json", lambda c: c.update(bos_token=None))
    assert load_tokenizer(folder).bos_id is None
    edit(folder / "tokenizer_config.json", lambda c: c.pop("bos_token"))
    edit(folder / "config.json", lambda c: c.update(bos_token_id=50256))
    assert load_tokenizer(folder).bos_id is None, "the default of another model"


def test_what_the_library_refuses_or_nobody_knows_is_named(tmp_path):
    library = pytest.importorskip("tokenizers")
    folder = gemma(library, tmp_path / "model")

    def unknown(content):
        content.update(decoder=None, normalizer=None)

    edit(folder / "tokenizer.json", unknown)
    with pytest.raises(ValueError, match="decoder = null is of no known kind"):
        load_tokenizer(folder)
    edit(folder / "tokenizer.json", lambda c: c["model"].update(type="Novel"))
    with pytest.raises(ValueError, match="the tokenizers library refuses it"):
        load_tokenizer(folder)
    folder = neox(library, tmp_path / "other")
    edit(folder / "tokenizer_config.json", lambda c: c.update(bos_token=None, eos_token=None))
    with pytest.raises(ValueError, match="names an eos_token, pad_token or bos_token"):
        load_tokenizer(folder)


def test_plain_python_gives_the_librarys_ids_on_odd_text():
    library = pytest.importorskip("tokenizers")
    plain, other = (
        load_tokenizer(EMBEDDED),
        library.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json")),
    )
    other.encode_special_tokens = True
    rng = random.Random(1)
    # Both know other versions of Unicode: only characters that are old enough for either.
    kinds = [c for c in map(chr, range(0x2FFF)) if unicodedata.ucd_3_2_0.category(c)[0] != "C"]
    odd = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2028'sdmtlvre0²é<|>"
    for _ in range(400):
        pool = kinds if rng.random() < 0.5 else odd
        text = "".join(rng.choice(pool) for _ in range(rng.randint(1, 80)))
        assert plain.encode(text) == other.encode(text).ids, text
