"""Credentials reach the workers and stand nowhere else: not in logs, job records, or what objects print."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from demo_pairs import emoji_shards
from s3_servers import s3_server

from latentclip.decoders import DecoderPool, Preparation
from pipelines.credentials import Credentials

SECRET = "dummy-secret-of-the-test"


def test_only_names_are_printed() -> None:
    credentials = Credentials.of({"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": "http://x", "PATH": "/bin"})
    assert credentials.names == ("AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY")
    assert credentials.reveal() == {"AWS_ENDPOINT_URL": "http://x", "AWS_SECRET_ACCESS_KEY": SECRET}
    for shown in (repr(credentials), str(credentials), f"{credentials}"):
        assert SECRET not in shown
        assert "AWS_SECRET_ACCESS_KEY" in shown
    assert pickle.loads(pickle.dumps(credentials)) == credentials


def test_decoders_of_hostile_images_get_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with DecoderPool(Preparation(image_size=8), size=1) as pool:
        assert SECRET.encode() not in Path(f"/proc/{pool.pids[0]}/environ").read_bytes()


PROGRAM = """
import os, sys, ray
from dataclasses import replace
from latentclip.fit import FitSettings
from pipelines import encode, evaluate, train, verify
from pipelines.cluster import cluster
from pipelines.configs import EvaluateConfig, TrainConfig, VerifyConfig
from pipelines.credentials import Sealed
from pipelines.experiments import DEMO

@ray.remote(max_calls=1)  # no later worker is this process
def seen(sealed):
    before = os.environ.get("AWS_SECRET_ACCESS_KEY")
    sealed.open()
    print("a worker prints", sealed)
    return before, os.environ["AWS_SECRET_ACCESS_KEY"]

pairs, latents, run, cache, endpoint = sys.argv[1:]
secret = sys.stdin.read()
with cluster():
    session = ray._private.worker._global_node.get_session_dir_path()
    # After the cluster has started, as on a cluster of others.
    os.environ |= {"AWS_SECRET_ACCESS_KEY": secret, "AWS_ACCESS_KEY_ID": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT": endpoint, "AWS_ALLOW_HTTP": "true"}
    before, after = ray.get(seen.remote(Sealed(os.environ)))
    settings = replace(DEMO.encode.settings, views=1, batch_size=4)
    config = replace(DEMO.encode, pairs=pairs, latents=latents, settings=settings)
    assert encode.run(config)["stored"] == 8
    settings = FitSettings(model="Latent-ViT-tiny", steps=2, batch_size=4)
    assert train.run(TrainConfig(latents=latents, run=run, settings=settings, cache=cache, cache_gb=0.1))
    evaluate.run(EvaluateConfig(checkpoint=run, latents=(latents,), out=run))
    assert verify.run(VerifyConfig(latents=latents)).state == "complete"
print("RESULT", session, before, after == secret)
"""


def test_a_secret_reaches_the_workers_of_all_stages_and_no_file_of_ray(tmp_path: Path) -> None:
    with s3_server("moto", tmp_path) as endpoint:
        _check_secret(tmp_path, endpoint)


def _check_secret(tmp_path: Path, endpoint: str) -> None:
    pairs = emoji_shards(tmp_path / "pairs", shards=2, rows=4)
    environment = {**os.environ, "RAY_BACKEND_LOG_LEVEL": "debug", "RAY_enable_export_api_write": "1"}
    environment.pop("AWS_SECRET_ACCESS_KEY", None)
    run, cache = tmp_path / "run", tmp_path / "cache"
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(pairs), "s3://latents/secret", str(run), str(cache), endpoint],
        input=SECRET,  # a command line stands in Ray's records
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout
    *_, session, before, after = ran.stdout.strip().splitlines()[-1].split()
    assert (before, after) == ("None", "True")
    assert SECRET not in ran.stdout
    assert len(list(cache.glob("?" * 64))) == 2, "training read its shards through the cache"
    searched = 0
    for folder in (Path(session), run, cache):
        for path in folder.rglob("*"):
            if path.is_file():
                searched += 1
                assert SECRET.encode() not in path.read_bytes(), f"the secret stands in {path}"
    assert searched > 20
