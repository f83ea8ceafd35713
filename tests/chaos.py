"""SIGKILLs in a running encode job on a local cluster of several nodes: what is killed, who watches, what is left.

pairs = write_pairs(folder / "pairs", shards=60, rows=500)
with Nodes() as nodes, Reader(folder / "latents") as reader:
    survive(Job(nodes.address, pairs, folder / "latents"), nodes, reader, schedule(seed=0, shards=60, kills))
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
from demo_pairs import tar_of
from PIL import Image
from ray.cluster_utils import Cluster

from latentclip.records import RECORD_SUFFIX, DatasetFile, Record
from latentclip.shards import read_shard
from latentclip.storage import Folder

ROOT = Path(__file__).parents[1]
MARK = "LATENTCLIP_CHAOS"
"""Environment variable that all processes of a cluster and of its jobs inherit, so that none is overlooked."""
DETECTION = {"health_check_period_ms": 1000, "health_check_timeout_ms": 5000, "health_check_failure_threshold": 4}
"""Ray's settings with which a killed node is noticed in 3 to 8 s instead of 14."""
OBJECT_STORE = 100 * 2**20
Kind = Literal["worker", "decoder", "raylet", "driver"]


def write_pairs(folder: Path, shards: int, rows: int) -> Path:
    """Pair shards of small pictures, each different; about 4,000 a second."""
    for shard in range(shards):
        noise = np.random.default_rng(shard).integers(0, 256, (rows, 8, 8, 3), np.uint8)
        names = [f"{shard:05d}{row:05d}" for row in range(rows)]
        samples = [(f"{name}.jpg", jpeg(cells), f"picture {name}") for name, cells in zip(names, noise, strict=True)]
        tar_of(folder / f"{shard:05d}.tar", list(samples))
    return folder


def jpeg(cells: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(cells).resize((64, 64), Image.Resampling.BICUBIC).save(data, "JPEG")
    return data.getvalue()


@dataclass(frozen=True)
class Process:
    """A process with our mark."""

    pid: int
    title: str

    @property
    def kind(self) -> Kind | None:
        if self.title.startswith("ray::MapWorker"):
            return "worker"
        if "_decoder_process" in self.title:
            return "decoder"
        return "driver" if "pipelines/encode.py" in self.title else None

    def kill(self) -> bool:
        """Whether it was still there."""
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def processes(mark: str) -> list[Process]:
    """The living processes whose environment holds `mark`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append(Process(int(entry.name), title))
    return found


def wait_until(true: Callable[[], object], what: str, seconds: float = 120) -> None:
    """Wait for something that no event announces."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
        time.sleep(0.02)


class Nodes:
    """A head without CPUs and some nodes of one CPU each, on this machine; all temporary files in one folder."""

    def __init__(self, mark: str | None = None, count: int = 3, **system_config: object) -> None:
        self.mark = mark or uuid.uuid4().hex
        self.count = count
        self.folder = Path(tempfile.mkdtemp(prefix="lc"))  # short, since sockets lie in it
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        self.environment = {
            MARK: self.mark,
            "RAY_TMPDIR": str(self.folder / "ray"),
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "RAY_worker_niceness": "0",  # as of a local cluster, so that other work on the machine changes little
        }
        self.system_config = {**DETECTION, **system_config}

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def __enter__(self) -> Nodes:
        self.before = set(os.listdir("/dev/shm"))
        self.saved = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
        self.cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": self.system_config})
        for _ in range(self.count):
            self.add()
        return self

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE)

    def kill_one(self, rng: random.Random) -> None:
        """SIGKILL the raylet of a worker node, and put another node in its place."""
        self.remove(rng.choice(sorted(self.cluster.worker_nodes, key=lambda node: str(node.node_id))))
        self.add()

    def remove(self, node: Any) -> None:
        """SIGKILL the raylet of a node."""
        os.kill(raylet(node), signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.cluster.shutdown()
        for name, value in self.saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder / "ray", ignore_errors=True)
        if kind is None:
            wait_until(lambda: not processes(self.mark), "the end of all processes", 30)
            assert leftovers(self.temporary) == []
            wait_until(lambda: not self.segments(), "the end of all shared memory", 30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def segments(self) -> set[str]:
        """Files in shared memory that appeared in the meantime and are of no living process of somebody else's."""
        new = set(os.listdir("/dev/shm")) - self.before
        maps = []
        for path in Path("/proc").glob("[0-9]*/maps") if new else ():
            with suppress(OSError):
                maps.append(path.read_text())
        return {name for name in new if not any(f"/dev/shm/{name}" in text for text in maps)}


def raylet(node: Any) -> int:
    """The process of a node that all its others belong to."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid


def leftovers(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class Job:
    """The command that a user runs, again and again."""

    def __init__(self, address: str, pairs: Path, latents: Path, encoders: int = 3, views: int = 1) -> None:
        self.latents = latents
        self.arguments = ["demo", "--pairs", str(pairs), "--latents", str(latents), "--ray-address", address]
        self.arguments += ["--encoders", str(encoders), "--threads", "1", "--decoders", "1"]
        self.arguments += ["--batch-size", "32", "--views", str(views)]
        self.log = latents.with_name(latents.name + ".log")
        self.starts = 0

    def start(self) -> None:
        command = [sys.executable, "pipelines/encode.py", *self.arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        self.starts += 1

    def stop(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


class Reader(Thread):
    """Somebody who looks at the output every 20 ms and reads whatever is new; `problems` holds what was not whole."""

    def __init__(self, latents: Path, interval: float = 0.02) -> None:
        super().__init__(daemon=True)
        self.folder = Folder(latents)
        self.interval = interval
        self.problems: list[str] = []
        self.seen: dict[str, int] = {}
        self.polls = 0
        self.slowest = 0.0
        self._end = Event()

    @property
    def published(self) -> int:
        """Records so far."""
        return sum(name.endswith(RECORD_SUFFIX) for name in tuple(self.seen))

    def run(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.interval):
            self.poll()
            self.polls += 1
            now = time.monotonic()
            self.slowest, last = max(self.slowest, now - last), now

    def poll(self) -> None:
        for name in self.folder.names():
            if name in self.seen:
                continue
            try:
                self.seen[name] = self.check(name)
            except Exception as error:
                self.problems.append(f"{name}: {error!r}")
                self.seen[name] = 0

    def check(self, name: str) -> int:
        if name.endswith(RECORD_SUFFIX):
            record = Record.read(self.folder, name)
            dataset = DatasetFile.read(self.folder)
            rows = read_shard(self.folder.path(record.data), checksum=record.sha256, size=record.bytes, dataset=dataset)
            assert len(rows) == record.counts.stored
        elif name.endswith(".parquet"):
            pq.read_table(self.folder.path(name), page_checksum_verification=True)
        elif name == "dataset.json":
            DatasetFile.read(self.folder)
        return 1

    def __enter__(self) -> Reader:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


@dataclass
class ColdStarts(Thread):
    """Watches actors from the moment they are one to their first decoder, which is started when the codec is loaded."""

    mark: str
    began: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)
        self._end = Event()
        self._ready: set[int] = set()

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        while not self._end.wait(0.25):
            now = time.monotonic()
            there = processes(self.mark)
            parents = {parent(process.pid) for process in there if process.kind == "decoder"}
            for process in there:
                if process.kind == "worker":
                    self.began.setdefault(process.pid, now)
                    if process.pid in parents - self._ready:
                        self._ready.add(process.pid)
                        self.seconds.append(now - self.began[process.pid])

    def __enter__(self) -> ColdStarts:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()

    def report(self) -> dict[str, float]:
        """How many actors began to start, how many were ready, and how long those took."""
        longest, median = (function(self.seconds or [0.0]) for function in (max, statistics.median))
        values = {"begun": len(self.began), "ready": len(self.seconds), "seconds": sum(self.seconds)}
        return {**values, "median_seconds": median, "longest_seconds": longest}


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@dataclass(frozen=True)
class Kill:
    """What is killed once so many shards are published, and how many seconds later."""

    published: int
    kind: Kind
    delay: float


def schedule(seed: int, shards: int, kills: dict[Kind, int], until: float = 0.9) -> list[Kill]:
    """Kills in random order and at random times until a share of the shards is published."""
    rng = random.Random(seed)
    kinds = [kind for kind, count in kills.items() for _ in range(count)]
    rng.shuffle(kinds)
    times = sorted(rng.randrange(max(1, int(shards * until))) for _ in kinds)
    return [Kill(time, kind, rng.uniform(0, 2)) for time, kind in zip(times, kinds, strict=True)]


def survive(job: Job, nodes: Nodes, reader: Reader, kills: list[Kill], seed: int) -> Counter[str]:
    """Run the job through all kills to its end; returns what was killed. A driver that fails by itself is an error."""
    rng = random.Random(seed)
    killed: Counter[str] = Counter()
    job.start()
    for kill in kills:
        wait_until(lambda kill=kill: reader.published >= kill.published or ended(job), f"{kill}", 600)
        time.sleep(kill.delay)
        if kill.kind == "driver":
            job.stop(signal.SIGKILL)
            job.start()
        elif kill.kind == "raylet":
            nodes.kill_one(rng)
        else:
            kill_process(job, nodes.mark, kill.kind, rng)
        killed[kill.kind] += 1
    assert job.process.wait() == 0, job.output()
    return killed


def kill_process(job: Job, mark: str, kind: Kind, rng: random.Random) -> None:
    """SIGKILL one process of a kind, waiting for one if none is there."""

    def one_died() -> bool:
        there = [process for process in processes(mark) if process.kind == kind]
        return bool(there and rng.choice(there).kill()) or ended(job)

    wait_until(one_died, f"a {kind} to kill")


def ended(job: Job) -> bool:
    """False while the job runs; an end before its time is an error."""
    status = job.process.poll()
    assert status is None, f"the job ended with {status} before everything was killed: {job.output()}"
    return False


def working(mark: str) -> Iterator[Process]:
    """What a job on a cluster consists of; nothing once it has ended."""
    return (process for process in processes(mark) if process.kind)


def published_files(latents: Path) -> dict[str, bytes]:
    """Every file that must be the same in each run, by name."""
    return {
        path.name: path.read_bytes()
        for path in latents.iterdir()
        if not path.name.startswith("encode.")  # the configuration and the log name the run
    }
