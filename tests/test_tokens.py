"""Tokens stored beside the latents: the same batches as from captions, in both containers."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_pairs import emoji_shards

from latentclip._rows import join, take
from latentclip.codec import load_codec
from latentclip.dataset import LatentDataset
from latentclip.encode import EncodeSettings, ShardEncoder
from latentclip.errors import UsageError
from latentclip.loader import LatentLoader
from latentclip.model import read_config
from latentclip.opened import token_notices
from latentclip.records import DatasetFile
from latentclip.storage import Folder
from latentclip.text import Tokenizer, load_tokenizer
from latentclip.tokens import token_format, tokenise
from latentclip.verify import verify

MODELS = ("Latent-ViT-B-8-512", "Latent-ResNet-10-MiniLM")


def tokenizer_of(model: str) -> Tokenizer:
    return load_tokenizer(read_config(model))


def encoded(folder: Path, tokens: str | None, container: str = "parquet") -> LatentDataset:
    pairs = emoji_shards(folder / "pairs", shards=2, rows=6, size=32)
    settings = EncodeSettings(image_size=32, batch_size=6, tokens=tokens, container=container)  # type: ignore[arg-type]
    encoder = ShardEncoder(load_codec("demo"), settings, Folder(folder / "latents"))
    encoder.dataset.publish(encoder.folder)
    for shard in sorted(pairs.iterdir()):
        encoder.encode(str(shard))
    assert verify(str(folder / "latents"), str(pairs)).state == "complete"
    return LatentDataset(folder / "latents")


@pytest.mark.parametrize("model", MODELS)
def test_stored_tokens_are_the_tokenizers(model: str) -> None:
    captions = ["a cat", "", "一只红色的猫 🐈", "word " * 200]
    stored, made = tokenise(model, captions), token_format(model)
    np.testing.assert_array_equal(stored.astype(np.int64), tokenizer_of(model)(captions).numpy())
    assert (stored.dtype, stored.shape) == (np.dtype("<u2"), (4, made.context))
    assert stored.max() < made.vocabulary <= 2**16
    assert made.hash == tokenizer_of(model).hash
    assert tokenise(model, []).shape == (0, made.context)


def test_a_large_vocabulary_takes_four_bytes() -> None:
    assert replace(token_format(MODELS[0]), vocabulary=250_000, dtype="int32").stored_dtype == np.dtype("<i4")


@pytest.mark.parametrize("container", ["parquet", "webdataset"])
def test_training_reads_the_tokens_that_are_stored(tmp_path: Path, container: str) -> None:
    model = MODELS[0]
    dataset = encoded(tmp_path / "with", model, container)
    plain = encoded(tmp_path / "without", None, container)
    tokenizer = tokenizer_of(model)
    batches = [LatentLoader(one, tokenizer, batch_size=12).batch(0) for one in (dataset, plain)]
    assert batches[0]["keys"] == batches[1]["keys"]
    assert batches[0]["text"].dtype == torch.int64
    assert torch.equal(batches[0]["text"], batches[1]["text"])

    def never(captions: list[str]) -> torch.Tensor:
        pytest.fail("captions are tokenised again")

    never.hash = tokenizer.hash  # type: ignore[attr-defined]
    assert torch.equal(LatentLoader(dataset, never, batch_size=12).batch(0)["text"], batches[0]["text"])


def test_a_model_with_another_tokenizer_reads_the_captions(tmp_path: Path) -> None:
    dataset = encoded(tmp_path, MODELS[0])
    other = tokenizer_of(MODELS[1])
    batch = LatentLoader(dataset, other, batch_size=12).batch(0)
    captions = {key: caption for rows in dataset for key, caption in zip(rows.keys, rows.captions, strict=True)}
    assert torch.equal(batch["text"], other([captions[key] for key in batch["keys"]]))
    assert token_notices(dataset, tokenizer_of(MODELS[0]), MODELS[0]) == []
    (line,) = token_notices(dataset, other, MODELS[1])
    assert f"encode with --tokens {MODELS[1]} to store its own" in line


def test_the_dataset_says_whose_tokens_they_are(tmp_path: Path) -> None:
    dataset = encoded(tmp_path, MODELS[0])
    made = token_format(MODELS[0])
    assert (made.tokenizer, made.context, made.vocabulary) == ("clip", 77, 49408)
    assert DatasetFile.read(Folder(tmp_path / "latents")).tokens == made == dataset.dataset.tokens
    with pytest.raises(UsageError, match="tokens is given there and None here"):
        encoded(tmp_path, None)


def test_plain_readers_find_the_tokens(tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from webdataset.tariterators import group_by_keys, tar_file_expander

    dataset = encoded(tmp_path / "parquet", MODELS[0])
    expected = dataset.read(0)
    assert expected.tokens is not None
    table = pq.read_table(tmp_path / "parquet" / "latents" / "00000.parquet")
    layout = table.schema.field("tokens").metadata
    assert (layout[b"hash"].decode(), layout[b"context"]) == (tokenizer_of(MODELS[0]).hash, b"77")
    column = np.frombuffer(b"".join(table["tokens"].to_pylist()), layout[b"dtype"].decode()).reshape(-1, 77)
    np.testing.assert_array_equal(column, expected.tokens)

    encoded(tmp_path / "tar", MODELS[0], "webdataset")
    stream = io.BytesIO((tmp_path / "tar" / "latents" / "00000.tar").read_bytes())
    samples = list(group_by_keys(tar_file_expander([{"url": "a shard", "stream": stream}])))
    stored = [np.load(io.BytesIO(sample["tokens.npy"]), allow_pickle=False) for sample in samples]
    np.testing.assert_array_equal(stored, expected.tokens)


def test_an_unknown_model_is_refused_before_any_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no model nonsense"):
        encoded(tmp_path, "nonsense")
    assert not (tmp_path / "latents").exists()


def test_rows_that_are_chosen_and_joined_keep_their_tokens(tmp_path: Path) -> None:
    one, two = encoded(tmp_path, MODELS[0])
    both = take(join(one, two), [7, 0])
    assert both.captions == [two.captions[1], one.captions[0]]
    np.testing.assert_array_equal(both.tokens, tokenise(MODELS[0], both.captions))
