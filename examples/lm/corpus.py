"""Text as tokens: a tokenizer trained on it, files held out, and batches that are a function of seed and step."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fp4compile.files import write_atomically
from lm.files import files_of, python_sources, read_file, shuffled
from lm.machine import BadInput

EPOCHS = 4  # beyond about four, repeated text teaches less than new text (Muennighoff et al. 2023)
HELD_OUT = 0.05
END = "<|end|>"  # between files
_SAMPLE = 16 * 2**20  # bytes that the tokenizer is trained on
_PIECE = 2**17  # bytes that are tokenised at once, so that one long file keeps all cores busy
_BATCH = 128  # pieces: what is in memory as Python lists


@dataclass(frozen=True)
class Corpus:
    """A tokenised text.

    Attributes:
        source: where it came from.
        train, held_out: tokens [n], int32.
        size: bytes of both together.
        digest: of the tokens: two runs with one digest read the same text.
    """

    source: str
    train: Tensor
    held_out: Tensor
    size: int
    digest: str

    @property
    def bytes_per_token(self) -> float:
        """Mean length of a token."""
        return self.size / (len(self.train) + len(self.held_out))


def find_files(text: Path | None) -> tuple[str, list[Path]]:
    """What the text is called, and its files in order; the default is every installed Python package."""
    if text is not None:
        return text.name, shuffled(files_of(text))
    return "sources of the installed Python packages", shuffled(python_sources(Path(sysconfig.get_paths()["purelib"])))


def read_documents(paths: Sequence[Path], limit: int) -> list[bytes]:
    """The files' contents, each once, until there are `limit` bytes."""
    seen: dict[bytes, bytes] = {}
    total = 0
    for path in paths:
        data = read_file(path)
        digest = hashlib.sha256(data).digest()
        if data.strip() and digest not in seen:
            seen[digest] = data[: limit - total]
            total += len(seen[digest])
            if total >= limit:
                break
    return list(seen.values())


def hold_out(documents: Sequence[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Files to train on and files held out: the last ones, 5% of the bytes; the end of the file if there is one."""
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) - int(len(text) * HELD_OUT)
        return [text[:cut]], [text[cut:]]
    wanted, first, held = HELD_OUT * sum(map(len, documents)), len(documents), 0
    while held < wanted and first > 1:
        first -= 1
        held += len(documents[first])
    return list(documents[:first]), list(documents[first:])


def pieces(document: bytes) -> Iterator[str]:
    """A file in pieces that end with a line, where lines are short enough."""
    start = 0
    while start < len(document):
        end = min(len(document), start + _PIECE)
        if end < len(document):
            end = document.rfind(b"\n", start, end) + 1 or end
        yield document[start:end].decode("utf-8", errors="replace")
        start = end


def train_tokenizer(documents: Sequence[bytes], vocabulary: int) -> Tokenizer:
    """A byte-level BPE tokenizer of the text itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def sample() -> Iterator[str]:
        total = 0
        for document in documents:
            yield from pieces(document)
            total += len(document)
            if total > _SAMPLE:
                return

    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, documents: Sequence[bytes]) -> Tensor:
    """All files as one row of tokens [n], int32, each behind an END."""
    end, tokens, texts = tokenizer.token_to_id(END), array("i"), []

    def flush() -> None:
        for encoded in tokenizer.encode_batch_fast(texts):
            tokens.extend(encoded.ids or [end])  # an empty piece stands for the beginning of a file
        texts.clear()

    for document in documents:
        for text in ("", *pieces(document)):
            texts.append(text)
            if len(texts) == _BATCH:
                flush()
    flush()
    return torch.frombuffer(tokens, dtype=torch.int32)


def load_corpus(text: Path | None, max_mb: float, vocabulary: int, folder: Path) -> Corpus:
    """The tokenised text, from `folder` if it lies there already."""
    source, paths = find_files(text)
    limit = int(max_mb * 1e6)
    listing = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([source, listing, limit, vocabulary]).encode()).hexdigest()[:16]
    path = folder / f"corpus-{key}.safetensors"
    if not path.exists():
        documents = read_documents(paths, limit)
        if not documents:
            raise BadInput(f"--text {text or ''}: {source}: there is no text in it")
        train, held_out = hold_out(documents)
        tokenizer = train_tokenizer(train, vocabulary)
        tensors = {"train": tokenise(tokenizer, train), "held_out": tokenise(tokenizer, held_out)}
        digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors.values())).hexdigest()
        about = {"source": source, "size": str(sum(map(len, documents))), "digest": digest}
        write_atomically(folder / f"tokenizer-{key}.json", tokenizer.to_str().encode())
        write_atomically(path, safetensors.torch.save(tensors, about))
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
        return Corpus(
            about["source"], file.get_tensor("train"), file.get_tensor("held_out"), int(about["size"]), about["digest"]
        )


def check_length(corpus: Corpus, sequence: int, batch: int, steps: int) -> None:
    """Refuse a text that is too short for a window, or that would be read more than `EPOCHS` times."""
    for name, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens) <= sequence:
            raise BadInput(
                f"the text ({corpus.source}) has {len(tokens):,} {name} tokens; --sequence {sequence} needs "
                f"{sequence + 1:,} or more. Use a larger text (--text, --max-mb) or a shorter --sequence."
            )
    windows = (len(corpus.train) - 1) // sequence
    if steps * batch > EPOCHS * windows:
        raise BadInput(
            f"the text ({corpus.source}) has {len(corpus.train):,} training tokens; {steps} steps of "
            f"{batch} × {sequence} tokens read it {steps * batch / windows:.1f} times, {EPOCHS} epochs are the most. "
            f"Use a larger text (--text, --max-mb) or at most {EPOCHS * windows // batch} --steps."
        )


def mixed(seed: int, number: int) -> int:
    """A seed for torch's generators from two numbers: 32 bits, because that is all that the CPU's reads."""
    return int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:4], "big")


class Batches:
    """The training batches: windows of an epoch in an order of its own, a function of the seed and the step alone."""

    def __init__(self, tokens: Tensor, sequence: int, batch: int, seed: int) -> None:
        self.tokens, self.sequence, self.batch, self.seed = tokens, sequence, batch, seed
        self.windows = (len(tokens) - 1) // sequence  # in an epoch
        self._order = lru_cache(2)(self._make_order)

    def _make_order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch))
        return torch.randperm(self.windows, generator=generator).to(self.tokens.device)

    def starts(self, step: int) -> Tensor:
        """First token of each window of a step, [batch]."""
        found, first, last = [], step * self.batch, (step + 1) * self.batch
        while first < last:
            epoch, position = divmod(first, self.windows)
            found.append(self._order(epoch)[position : position + last - first])
            first += len(found[-1])
        return torch.cat(found) * self.sequence

    def at(self, step: int) -> Tensor:
        """The windows of a step, [batch, sequence + 1], on the tokens' device."""
        return windows_at(self.tokens, self.starts(step), self.sequence)


def windows_at(tokens: Tensor, starts: Tensor, sequence: int) -> Tensor:
    """Windows of sequence + 1 tokens, [len(starts), sequence + 1], int64."""
    return tokens[starts[:, None] + torch.arange(sequence + 1, device=starts.device)].long()
