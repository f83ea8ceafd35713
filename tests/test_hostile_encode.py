"""The hostile corpus through the whole encode path: each item its typed reject or its latent, and nothing else hurt."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import hostile
import pytest
from encoded import encode_all

from latentclip.dataset import LatentDataset
from latentclip.rejects import Reason
from latentclip.verify import verify

IMAGE = hostile.encode(hostile.picture())


def write_shard(folder: Path, name: str, data: bytes) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def test_every_image_is_a_latent_or_its_typed_reject(tmp_path: Path) -> None:
    bad, odd = hostile.bad_images(), hostile.odd_images()
    members = [
        member for name, (data, _) in bad.items() for member in hostile.sample(name.replace(".", ""), image=data)
    ]
    for name, data in odd.items():
        members += [(name, data), (f"{name.partition('.')[0]}.txt", b"odd")]
    write_shard(tmp_path / "pairs", "00000.tar", hostile.tar(*members))
    (record,) = encode_all(tmp_path / "pairs", tmp_path / "latents")
    refused = {key: reason for reason, keys in record.rejected_keys.items() for key in keys}
    assert refused == {name.replace(".", ""): reason for name, (_, reason) in bad.items()}
    (rows,) = LatentDataset(tmp_path / "latents")
    assert rows.keys == [name.partition(".")[0] for name in odd]
    assert verify(str(tmp_path / "latents"), str(tmp_path / "pairs")).state == "complete"


def test_every_caption_is_stored_clean_or_its_typed_reject(tmp_path: Path) -> None:
    captions = hostile.captions()
    members = [(f"{name}.png", IMAGE) for name in captions]
    members += [(f"{name}.txt", data) for name, (data, _) in captions.items() if data is not None]
    write_shard(tmp_path / "pairs", "00000.tar", hostile.tar(*members))
    (record,) = encode_all(tmp_path / "pairs", tmp_path / "latents")
    (rows,) = LatentDataset(tmp_path / "latents")
    became: dict[str, Any] = dict(zip(rows.keys, rows.captions, strict=True))
    became |= {key: Reason(reason) for reason, keys in record.rejected_keys.items() for key in keys}
    assert became == {name: fate for name, (_, fate) in captions.items()}


PROGRAM = textwrap.dedent(
    """
    import json, resource, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from encoded import encode_all
    from latentclip.errors import UsageError
    encode_all(sys.argv[2] + "/warm", sys.argv[2] + "/warm-latents")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shard in sorted(Path(sys.argv[2], "pairs").iterdir()):
        start = time.process_time()
        try:
            (record,) = encode_all(str(shard), sys.argv[2] + "/latents")
            fate = {"stored": record.counts.stored, **record.rejects}
        except UsageError as error:
            fate = str(error)
        seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"name": shard.name, "fate": fate, "seconds": seconds, "grown": (peak - before) * 1024}))
    """
)


@pytest.fixture(scope="module")
def fates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each hostile shard in an encoder's process of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    write_shard(folder / "warm", "00000.tar", hostile.tar(*hostile.sample("a", image=IMAGE)))
    for name, (data, _) in hostile.PAIR_SHARDS.items():
        write_shard(folder / "pairs", f"{name.replace('.', '-')}.{name.rpartition('.')[2]}", data())
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    lines = map(json.loads, done.stdout.splitlines())
    return {line["name"].rpartition(".")[0].replace("-", "."): line for line in lines}


@pytest.mark.parametrize("name", hostile.PAIR_SHARDS)
def test_every_shard_has_its_fate_within_memory_and_time(name: str, fates: dict[str, dict[str, Any]]) -> None:
    expected, became = hostile.PAIR_SHARDS[name][1], fates[name]
    if isinstance(expected, str):
        assert expected in became["fate"]
        assert name.replace(".", "-") in became["fate"]
    else:
        assert Counter(became["fate"]) == Counter(expected)
    assert became["grown"] < 2 * 2**30, "bytes of memory"
    assert became["seconds"] < 10, "seconds of processor time"
