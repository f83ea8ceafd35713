"""A folder of latent shards, or several, as one sequence of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.records import DATASET_FILE, SUFFIXES, DatasetFile, Record, finished, split_generation
from latentclip.shards import LatentRows, parse_shard
from latentclip.source import Cache, shard_bytes
from latentclip.storage import Folder, list_shards, locate, shard_stem


@dataclass(frozen=True)
class ShardInfo:
    """What a reader must know to plan and check: the data file `url` holds `rows` rows in `bytes` bytes."""

    url: str
    name: str
    rows: int
    sha256: str
    generation: int
    bytes: int


class LatentDataset:
    """The finished shards of a folder, a pattern or a list, in name order; of each shard the newest generation.

    Raises:
        UsageError: nothing there, no `dataset.json`, no finished shard, or folders of different latents.
        ShardCorrupt: a record or `dataset.json` was changed.
    """

    def __init__(self, source: str | Path) -> None:
        self.source = str(source)
        chosen = _chosen(self.source)
        datasets = {folder.url: DatasetFile.read(folder) for folder, _ in chosen}
        self.dataset = next(iter(datasets.values()))
        for url, dataset in datasets.items():
            if dataset.header() != self.dataset.header():
                raise UsageError(f"{url} holds other latents than {next(iter(datasets))}; read one of them at a time")
        with ThreadPoolExecutor(16) as pool:
            infos = list(pool.map(lambda pair: _info(*pair), chosen))
        self.shards = sorted(infos, key=lambda info: (info.name, info.url))

    @property
    def space(self) -> LatentSpace:
        """The latent space of all shards."""
        return self.dataset.latent_space

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.shards)

    def read(self, index: int, columns: Sequence[str] | None = None, cache: Cache | None = None) -> LatentRows:
        """The rows of one shard, checked against its record; raises ShardCorrupt. For `columns` see `read_shard`."""
        info = self.shards[index]
        return parse_shard(shard_bytes(info, cache), info.url, columns=columns, dataset=self.dataset)

    def __iter__(self) -> Iterator[LatentRows]:
        return (self.read(index) for index in range(len(self)))


def _chosen(source: str) -> list[tuple[Folder, str]]:
    """Folder and record name of each finished shard.

    A folder is read by its records and not by its data files, so that a lost data file is an error when it is read.
    """
    plain = "://" not in source or not set(source) & set("*?[{,")
    if plain and DATASET_FILE in Folder(source).names():
        chosen = [(Folder(source), record) for record in finished(Folder(source)).values()]
    else:
        chosen = _named(list_shards(source, tuple(SUFFIXES.values())))
    if not chosen:
        raise UsageError(f"{source} holds no finished shard; run encode first, or let it finish")
    return chosen


def _named(urls: list[str]) -> list[tuple[Folder, str]]:
    stems: dict[str, dict[str, None]] = {}
    for url in urls:
        stem, _ = split_generation(shard_stem(url, SUFFIXES.values()))
        stems.setdefault(locate(url)[0].url, {})[stem] = None
    chosen = []
    for folder in map(Folder, stems):
        DatasetFile.read(folder)
        records = finished(folder)
        chosen += [(folder, records[stem]) for stem in stems[folder.url] if stem in records]
    return chosen


def _info(folder: Folder, name: str) -> ShardInfo:
    record = Record.read(folder, name)
    return ShardInfo(
        folder.path(record.data), record.data, record.counts.stored, record.sha256, record.generation, record.bytes
    )
