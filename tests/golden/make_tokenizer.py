"""Writes tokenizer.json: what the `tokenizers` library does with hard texts.

Needs tokenizers (run in an environment of its own):

    python tests/golden/make_tokenizer.py

The ids come from the embedded subject's tokenizer file, the merges from a training of the
library's own on the same texts.
"""

import json
import pathlib
import random
import sys
import unicodedata

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

ROOT = pathlib.Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "saejax" / "subjects" / "embedded" / "tokenizer.json"
TEXTS = [
    "",
    " ",
    "a",
    "def f(x):\n    return x  # it's, we've, they'll, I'm, you'd, he's, we're\n\n\n",
    "don'T DON'T 'S's'st''t",
    "x = 0x1F + 1_000_000 - 3.14e-10 ** ¾ ½ ² Ⅷ ٣٤ १२ 十",
    "tabs\tand \t mixed \r\n line\rends \x0b\x0c and\x85next\u2028\u2029",
    "information separators \x1c\x1d\x1e\x1f stay symbols \x00\x7f",
    "spaces \xa0 \u1680 \u2000\u200a \u202f \u205f \u3000 end   ",
    "zero width \u200b \u200d \ufeff \u2060 joiners",
    "combining e\u0301 n\u0303 o\u0308 and precomposed é ñ ö",
    "Ελληνικά русский עברית العربية हिन्दी ไทย 日本語 한국어 中文",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and 🇨🇭 flags",
    "math ∑∫√≤ 𝒜𝔹ℂ letters ⅀ modifier ʰʲˠ titlecase ǅ ǈ",
    "low_line _private __dunder__ snake_case9 a1b2c3",
    "<|endoftext|> written out is ordinary text here",
    "=" * 300 + "\n" + " " * 300 + "x",
    "ab" * 200 + "aaaaaaa" * 40,
]


def random_texts(n: int) -> list[str]:
    rng = random.Random(0)
    kinds = [
        c for c in map(chr, range(0x2FFFF)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")
    ]
    plain = " \t\n'stremvldaA_09.,()=\"#"
    return [
        "".join(
            rng.choice(kinds if rng.random() < 0.3 else plain) for _ in range(rng.randint(1, 60))
        )
        for _ in range(n)
    ]


def main() -> None:
    tokenizer = Tokenizer.from_file(str(EMBEDDED))
    texts = TEXTS + random_texts(60)
    # The library turns a written-out special token into its id; saejax does not, see bpe.py.
    ids = [
        [] if "<|endoftext|>" in text else tokenizer.encode(text, add_special_tokens=False).ids
        for text in texts
    ]
    fresh = Tokenizer(models.BPE())
    fresh.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        min_frequency=2,
    )
    fresh.train_from_iterator(texts, trainer)
    content = {
        "made_with": f"tokenizers {tokenizers.__version__}, Unicode {unicodedata.unidata_version}",
        "texts": texts,
        "ids": ids,
        "merges": json.loads(fresh.to_str())["model"]["merges"],
    }
    path = pathlib.Path(__file__).with_name("tokenizer.json")
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")
    print(path.name, path.stat().st_size, content["made_with"], file=sys.stderr)


if __name__ == "__main__":
    main()
