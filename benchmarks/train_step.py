"""Training steps beside open_clip's own trainer: samples/s of both in turn, on the same model, batches and recipe.

    latent shards  ->  latentclip.fit.Fit: loader, checks, step, log          \\
    their batches, ready in memory  ->  open_clip_train.train.train_one_epoch  /  samples/s, ratio, losses compared
    python benchmarks/train_step.py [--json steps.json]

Sizes follow the device: a small and a paper's model on CPUs; on a GPU both of the paper's architectures in bf16, plain,
with gradient checkpointing and compiled, with model FLOPs utilisation and memory. Ours reads shards from disk, while
open_clip's trainer is handed batches that lie in (on GPUs: page-locked) memory, so that no loader of its slows it down.
Saving checkpoints is in neither. Each step's loss is compared, which proves that both do the same work. Runs without Ray.
"""

from __future__ import annotations

import copy
import itertools
import json
import logging
import math
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from step_common import Case, Rate, devices_flops, machine, write_latents  # beside this file
from step_contestants import OpenClip, Ours

from latentclip.cost import Cost
from latentclip.dataset import LatentDataset
from latentclip.fit import FitSettings

CPU = (Case("Latent-ViT-tiny", 32, 256), Case("Latent-ViT-B-8-512", 64, 16, steps=4))
GPU = tuple(
    Case(model, 64, batch, steps=20, checkpointing=checkpointing, compile=compiled)
    for model, batch in (("Latent-ViT-B-8-512", 1024), ("Latent-ViT-B-4-512-plus", 384))
    for checkpointing, compiled in ((False, False), (True, False), (False, True))
)
