"""A stage as `ray job submit` runs it: uploaded, on a cluster that it joins, far from the user's working directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray
from chaos import wait_until
from demo_pairs import emoji_shards
from latent_samples import fill
from ray.job_submission import JobStatus, JobSubmissionClient

from latentclip.checkpoint import newest_good
from latentclip.verify import verify

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """A cluster that takes jobs."""

    url: str
    """Of its dashboard."""
    session: Path
    """Folder of its temporary files, the jobs' working directories among them."""

    def submit(self, name: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """`ray job submit` from the repository's root; the process ends when the job does."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.url, "--submission-id", name]
        command += ["--runtime-env-json", json.dumps({"env_vars": environment})]
        command += ["--working-dir", ".", "--", "python", *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A local cluster with a dashboard, whose `python` is the one that runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(BIN), prepend=os.pathsep)
        with ray.init(
            address="local", num_cpus=8, include_dashboard=True, object_store_memory=100 * 2**20, log_to_driver=False
        ) as context:
            yield Head(f"http://{context.dashboard_url}", Path(context.address_info["session_dir"]))


@pytest.mark.slow
def test_encode_runs_as_a_job_and_a_relative_output_is_refused(head: Head, tmp_path: Path) -> None:
    pairs, latents = emoji_shards(tmp_path / "pairs", shards=2, rows=6), tmp_path / "latents"
    options = ("pipelines/encode.py", "demo", "--pairs", str(pairs), "--views", "1", "--batch-size", "4")
    jobs = {
        "absolute": head.submit("absolute", *options, "--latents", str(latents)),
        "relative": head.submit("relative", *options, "--latents", "latents"),
    }
    output = {name: job.communicate()[0] for name, job in jobs.items()}
    client = JobSubmissionClient(head.url)
    ended = {name: (client.get_job_info(name).status, client.get_job_info(name).driver_exit_code) for name in jobs}

    assert jobs["absolute"].returncode == 0, output["absolute"]
    assert ended["absolute"] == (JobStatus.SUCCEEDED, 0)
    assert verify(str(latents), str(pairs)).state == "complete"

    assert jobs["relative"].returncode == 1
    assert ended["relative"] == (JobStatus.FAILED, 2)
    assert "error: the output 'latents' is relative and would land in the job's" in output["relative"]
    assert "Traceback" not in output["relative"]

    uploads = list((head.session / "runtime_resources" / "working_dir_files").glob("_ray_pkg_*/"))
    assert uploads
    for upload in uploads:
        names = {path.name for path in upload.iterdir()}
        assert {"latentclip", "pipelines"} <= names
        assert not names & {".git", ".venv", "runs", "latents"}


@pytest.mark.slow
def test_a_job_that_is_stopped_leaves_a_checkpoint(head: Head, tmp_path: Path) -> None:
    fill(tmp_path / "latents", shards=2, rows=18, latent_shape=(4, 4, 4))
    run = tmp_path / "run"
    options = ("photos", "--latents", str(tmp_path / "latents"), "--run", str(run), "--max-minutes", "None")
    options += ("--model", "Latent-ViT-tiny", "--steps", "1000000", "--batch-size", "12", "--log-steps", "1")
    job = head.submit("stopped", "pipelines/train.py", *options, RAY_JOB_STOP_WAIT_TIME_S="120")
    steps = run / "samples.jsonl"
    wait_until(lambda: steps.exists() and steps.stat().st_size, "the first step")
    assert newest_good(run) is None

    client = JobSubmissionClient(head.url)
    client.stop_job("stopped")
    output = job.communicate()[0]
    wait_until(lambda: client.get_job_status("stopped").is_terminal(), "the end of the job")
    assert client.get_job_status("stopped") == JobStatus.STOPPED
    checkpoint = newest_good(run)
    assert checkpoint is not None, output
    assert len(steps.read_text().splitlines()) == int(checkpoint.name.removeprefix("step_"))
