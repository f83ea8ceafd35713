"""A folder of latent shards, or several, as one sequence of shards: those of today, or those of a snapshot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path

from latentclip import lineage
from latentclip.errors import UsageError
from latentclip.latent_space import LatentSpace
from latentclip.lineage import Numbers
from latentclip.pinning import require_same, whereabouts
from latentclip.quarantine import quarantined
from latentclip.records import DATASET_FILE, SUFFIXES, DatasetFile, Record, ShardCorrupt, finished, split_generation
from latentclip.resolver import Resolver
from latentclip.shards import LatentRows, find_record, parse_shard
from latentclip.snapshot import PinnedShard, Snapshot
from latentclip.source import shard_bytes
from latentclip.storage import Folder, list_shards, locate, shard_stem


@dataclass(frozen=True)
class ShardInfo:
    """What a reader must know to plan and check.

    `url`, `name`, `sha256`, `generation` and `bytes` (the size) are of the data file that counts today; `rows`,
    `row_ids` and `shapes` are what the snapshot pinned, and differ from that file's where it was rewritten since.
    """

    url: str
    name: str
    rows: int
    sha256: str
    generation: int
    bytes: int
    row_ids: lineage.Ranges = field(default_factory=list, hash=False)
    """Of the rows, in stored order (`lineage`)."""
    shapes: dict[str, lineage.Ranges] = field(default_factory=dict, hash=False)
    """The rows of each shape, `{"4x48x80": [[0, 3], [7, 9]]}`; empty in a data set of one shape."""
    xxh3: str = ""
    """Of the data file that counts today, see Record."""

    @property
    def stem(self) -> str:
        """The name of the shard in any generation: `00042`."""
        return split_generation(shard_stem(self.name, SUFFIXES.values()))[0]


class LatentDataset:
    """The finished shards of a folder, a pattern or a list; of each shard the newest generation.

    Without a snapshot they come in name order, and are pinned from then on: `snapshot` says as what. With one they are
    exactly the snapshot's shards in its order, and `resolve` says where its rows are in the files of today.

    Raises:
        UsageError: nothing there, no `dataset.json`, no finished shard, folders of different latents, or a shard of
            the snapshot that is not what or where it was.
        ShardCorrupt: a record or `dataset.json` was changed.
    """

    def __init__(self, source: str | Path, snapshot: Snapshot | None = None) -> None:
        self.source = str(source)
        self.folder, chosen = _finished(self.source)
        self.folders = list({folder.url: folder for folder, _ in chosen}.values())
        datasets = {folder.url: DatasetFile.read(folder) for folder in self.folders}
        self.dataset = next(iter(datasets.values()))
        for url, dataset in datasets.items():
            if dataset.header() != self.dataset.header():
                raise UsageError(f"{url} holds other latents than {next(iter(datasets))}; read one of them at a time")
        with ThreadPoolExecutor(16) as pool:
            infos = list(pool.map(lambda pair: _info(pair[0], Record.read(*pair)), chosen))
        self.found = _by_stem(infos)
        """All finished shards, by stem, in name order, as they were when this was made."""
        if self.dataset.latent_shape is None and any(info.rows and not info.shapes for info in infos):
            raise UsageError(
                f"records in {self.source} do not say which row is of which shape, as older ones did not; run "
                f"python -m latentclip migrate {self.source}"
            )
        self._pin(snapshot or Snapshot(tuple(map(_pinned, self.found.values()))))

    def at(self, snapshot: Snapshot) -> LatentDataset:
        """The same data set at another snapshot, listed again only if need be; raises as the constructor does."""
        other = copy(self)
        try:
            other._pin(snapshot)
        except UsageError:  # perhaps a shard was not there yet when this was listed
            return LatentDataset(self.source, snapshot)
        return other

    @property
    def space(self) -> LatentSpace:
        """The latent space of all shards."""
        return self.dataset.latent_space

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.shards)

    def read(self, index: int, columns: Sequence[str] | None = None) -> LatentRows:
        """The rows of one shard, checked against its record; raises ShardCorrupt. For `columns` see `read_shard`."""
        info = self.shards[index]
        return parse_shard(shard_bytes(info), info.url, columns=columns, dataset=self.dataset)

    def __iter__(self) -> Iterator[LatentRows]:
        return (self.read(index) for index in range(len(self)))

    def resolve(self, shards: Numbers, rows: Numbers) -> tuple[Numbers, Numbers]:
        """Shard numbers and rows in the files of `self.shards` (each (n,)), of those of the snapshot (n,) int64.

        Another row stands in for one that was removed since (`resolver`). Costs next to nothing while no shard is
        rewritten. Only one thread may call this and `refresh`, and must resolve again after a `refresh`.
        """
        return self._resolver.resolve(shards, rows)

    def refresh(self, index: int) -> bool:
        """Look up a shard again whose file is missing; whether a newer generation counts, which `shards` has then.

        Raises ShardCorrupt, with what to do, if the shard is no longer there at all.
        """
        info = self.shards[index]
        folder, _ = locate(info.url)
        record = find_record(folder, info.stem, self.dataset.container, info.generation + 1)
        if record is None:  # or its number is not the next, which a listing alone tells
            name = finished(folder).get(info.stem)
            if name is None:
                where = whereabouts([info.stem], [folder])
                raise ShardCorrupt(f"{self.source} lost a shard of the run under way: {where}; or begin a new run")
            record = Record.read(folder, name)
        if record.generation <= info.generation:
            return False
        self._set_file(index, _info(folder, record))
        return True

    @property
    def rewritten(self) -> int:
        """How many shards of the snapshot have a newer generation by now."""
        pairs = zip(self.shards, self.snapshot.shards, strict=True)
        return sum(today.generation > pinned.generation for today, pinned in pairs)

    def _pin(self, snapshot: Snapshot) -> None:
        """Take today's files of the snapshot's shards, in its order."""
        require_same(snapshot, self.found, self.folders, self.source)
        self.snapshot, self.shards, self._resolver = snapshot, [], Resolver(snapshot.shards)
        for number, pinned in enumerate(snapshot.shards):
            self.shards.append(self.found[pinned.stem])
            self._set_file(number, self.found[pinned.stem])

    def _set_file(self, number: int, today: ShardInfo) -> None:
        """Read a shard of the snapshot from the data file that counts today."""
        pinned = self.snapshot.shards[number]
        self.shards[number] = replace(today, rows=pinned.rows, row_ids=pinned.row_ids, shapes=pinned.shapes)
        if today.row_ids != pinned.row_ids:
            self._resolver.rewrite(number, today.row_ids)


def _finished(source: str) -> tuple[Folder | None, list[tuple[Folder, str]]]:
    """The folder, if the source is one, and folder and record name of each finished shard.

    A folder is read by its records and not by its data files, so that a lost data file is an error when it is read.
    """
    plain = "://" not in source or not set(source) & set("*?[{,")
    folder = Folder(source) if plain and DATASET_FILE in Folder(source).names() else None
    if folder:
        chosen = [(folder, record) for record in finished(folder).values()]
        held = "" if chosen else f", and {len(quarantined(folder, ()))} in quarantine"
    else:
        chosen, held = _named(list_shards(source, tuple(SUFFIXES.values()))), ""
    if not chosen:
        raise UsageError(f"{source} holds no finished shard{held}; run encode first, or let it finish")
    return folder, chosen


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


def _by_stem(infos: list[ShardInfo]) -> dict[str, ShardInfo]:
    """The shards by stem, in name order; raises UsageError if two have one."""
    found: dict[str, ShardInfo] = {}
    for info in sorted(infos, key=lambda info: (info.name, info.url)):
        if (other := found.setdefault(info.stem, info)) is not info:
            raise UsageError(f"{other.url} and {info.url} are two shards of one name; list only one")
    return found


def _info(folder: Folder, record: Record) -> ShardInfo:
    return ShardInfo(
        url=folder.path(record.data),
        name=record.data,
        rows=record.counts.stored,
        sha256=record.sha256,
        generation=record.generation,
        bytes=record.bytes,
        row_ids=record.row_ids,
        shapes=record.shapes,
        xxh3=record.xxh3,
    )


def _pinned(info: ShardInfo) -> PinnedShard:
    return PinnedShard(info.stem, info.generation, info.sha256, info.bytes, info.row_ids, info.shapes)
