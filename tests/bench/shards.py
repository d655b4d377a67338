"""Token shards of random ids, made by the binary itself.

A tokenizer that maps one word to each id turns random words into random ids, all equally likely, so
that `oxitron data tokenize` writes the shards and nothing but the binary knows their format.

Speed must not depend on what the documents say, and packing must not make attention cheaper than it
is for a peer: a document is as long as several samples, exactly, so that no sample holds the end of
one document and the beginning of the next; or samples hold a whole number of documents, exactly.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import runs

END_OF_TEXT, UNKNOWN = "<|endoftext|>", "<unk>"
FIRST_WORD = 2  # the ids before it are those two
DOCUMENT_TOKENS = 16384


def word(token: int) -> str:
    """The word of an id."""
    return f"w{token:x}"


def tokenizer(vocab_size: int) -> dict:
    """A tokenizer.json with `vocab_size` ids, the words separated by spaces."""
    vocabulary = {END_OF_TEXT: 0, UNKNOWN: 1}
    vocabulary.update((word(token), token) for token in range(FIRST_WORD, vocab_size))
    end_of_text = {
        "id": 0,
        "content": END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end_of_text],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": UNKNOWN},
    }


def write(
    binary: Path, folder: Path, vocab_size: int, tokens: int, document_tokens: int | None = None
) -> Path:
    """Writes at least `tokens` random tokens of shards into a new folder and returns it."""
    document_tokens = document_tokens or DOCUMENT_TOKENS
    ids = range(FIRST_WORD, vocab_size)
    draw = random.Random(vocab_size)
    documents = (
        [*draw.choices(ids, k=document_tokens - 1), 0] for _ in range(-(-tokens // document_tokens))
    )
    return write_documents(binary, folder, vocab_size, documents)


def write_documents(
    binary: Path, folder: Path, vocab_size: int, documents: Iterable[Sequence[int]]
) -> Path:
    """Writes shards of these documents into a new folder and returns it. Each ends with the id of
    the end of text, 0, which the binary adds to what it reads."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(vocab_size)))
    words = [word(token) for token in range(vocab_size)]
    with open(folder / "corpus.jsonl", "w", encoding="ascii") as corpus:
        for *ids, end in documents:
            if end != 0:
                raise ValueError("a document ends with the end of text")
            corpus.write(json.dumps({"text": " ".join(words[token] for token in ids)}) + "\n")
    command = [binary, "data", "tokenize", folder / "corpus.jsonl"]
    command += ["--tokenizer", folder / "tokenizer.json", "--out", folder / "shards"]
    runs.run_to_end([str(part) for part in command], folder / "output.txt")
    return folder / "shards"
