"""The named experiments: literal values for every stage. A new experiment is a new entry; no code looks at its name.

python pipelines/encode.py photos --pairs pairs/ --latents latents/ --codec madebyollin/taesdxl
"""

from __future__ import annotations

import math

import tyro

from latentclip.augment import LatentAugmentation
from latentclip.encode import EncodeSettings
from latentclip.fit import FitSettings
from latentclip.training import Optimisation
from latentclip.views import DRAWINGS, PAPER
from pipelines.configs import EncodeConfig, EvaluateConfig, Experiment, TrainConfig

GIVEN: str = tyro.MISSING
"""Must be given on the command line."""


DEMO_SETS = [
    ("known", "twemoji", "train"),
    ("known", "openmoji", "evaluation"),
    ("unseen", "twemoji", "evaluation"),
    ("unseen", "openmoji", "evaluation"),
    ("variants", "twemoji", "evaluation"),
    ("variants", "openmoji", "evaluation"),
]
"""What the demo is judged on: split, drawing style, and the folder where its shards lie."""

DEMO = Experiment(
    description="Emoji on a laptop: 64 px drawings, the packaged codec, a small conv net and a frozen MiniLM",
    encode=EncodeConfig(
        pairs="runs/demo/pairs/train",
        latents="runs/demo/latents/train",
        codec="demo",
        settings=EncodeSettings(image_size=64, views=9, recipe=DRAWINGS, batch_size=64),
    ),
    train=TrainConfig(
        latents="runs/demo/latents/train",
        run="runs/demo",
        settings=FitSettings(
            model="Latent-ResNet-10-MiniLM-residual",
            steps=2800,
            batch_size=512,
            optimisation=Optimisation(
                learning_rate=8e-3, warmup=0.05, weight_decay=0.1, gradient_clip=1.0, max_logit_scale=20
            ),
            augmentation=LatentAugmentation(shift=1, noise=0.3),
            plain_share=0.7,
        ),
    ),
    evaluate=EvaluateConfig(
        checkpoint="runs/demo",
        latents=(
            *(
                f"{split}/{style}=runs/demo/latents/{folder}/{split}-{style}-*.parquet"
                for split, style, folder in DEMO_SETS
            ),
        ),
        out="runs/demo",
    ),
)

PHOTOS = Experiment(
    description="A few thousand photographs with captions or class names: 256 px, TAESDXL, conv net, frozen MiniLM",
    encode=EncodeConfig(
        pairs=GIVEN,
        latents=GIVEN,
        codec="madebyollin/taesdxl",
        settings=EncodeSettings(image_size=256, batch_size=16),
    ),
    train=TrainConfig(
        latents=GIVEN,
        run=GIVEN,
        settings=FitSettings(
            model="Latent-ResNet-10-s2-MiniLM",
            max_minutes=2.5,
            batch_size=64,
            optimisation=Optimisation(
                learning_rate=3e-3, warmup=0.03, weight_decay=0.1, gradient_clip=1.0, max_logit_scale=20, mixup=0.4
            ),
            augmentation=LatentAugmentation(crop=0.6, flip=0.5, noise=0.3),
        ),
    ),
    evaluate=EvaluateConfig(checkpoint=GIVEN, latents=tyro.MISSING, out=GIVEN),
)

_PAPER_ENCODE = EncodeConfig(
    pairs=GIVEN,
    latents=GIVEN,
    codec="madebyollin/sdxl-vae-fp16-fix",
    settings=EncodeSettings(
        image_size=512, views=4, recipe=PAPER, kind="sample", scaled=False, tokens="Latent-ViT-B-8-512"
    ),
)
_PAPER_BATCH, _PAPER_RATE, _WARMUP_STEPS = 128 * 640, 1e-3, 3000


def _paper(
    description: str, model: str, *, workers: int = 128, batch: int = _PAPER_BATCH, steps: int = 415_000
) -> Experiment:
    """The paper's training (arXiv 2503.08455): 34 B samples at a batch of 81,920 on 128 GPUs, or fewer.

    Fewer GPUs get a smaller batch, at a learning rate scaled by the square root of its share, as suits Adam (Malladi et
    al., 2022, arXiv 2205.10287). The paper's own batch would leave a training that they finish in days a few thousand
    steps; whoever wants it nevertheless gives `--batch-size 81920 --learning-rate 1e-3 --micro-batch N`, which is
    exact, with the N that `--dry-run` names. `auto` precision is bf16 on GPUs.
    """
    rate = _PAPER_RATE * math.sqrt(batch / _PAPER_BATCH)
    return Experiment(
        description=description,
        encode=_PAPER_ENCODE,
        train=TrainConfig(
            latents=GIVEN,
            run=GIVEN,
            workers=workers,
            settings=FitSettings(
                model=model,
                steps=steps,
                batch_size=batch,
                gradient_checkpointing=True,
                optimisation=Optimisation(learning_rate=rate, warmup=_WARMUP_STEPS / steps),
                checkpoint_minutes=30,
            ),
        ),
        evaluate=EvaluateConfig(checkpoint=GIVEN, latents=tyro.MISSING, out=GIVEN),
    )


def _papers(name: str, model: str) -> dict[str, Experiment]:
    """The paper's training of a model, and what of it one GPU or eight do in days: 0.4 B and 3.3 B samples."""
    full = f"The paper's {model} on LAION-2B-en and COYO, SDXL latents of 512 px"
    one, eight = (f"{model} at the paper's recipe, scaled to {number}" for number in ("one GPU", "8 GPUs"))
    return {
        name: _paper(full, model),
        f"{name}-1gpu": _paper(one, model, workers=1, batch=4096, steps=100_000),
        f"{name}-8gpu": _paper(eight, model, workers=8, batch=8 * 4096, steps=100_000),
    }


EXPERIMENTS = {
    "demo": DEMO,
    "photos": PHOTOS,
    **_papers("paper-b-8-512", "Latent-ViT-B-8-512"),
    **_papers("paper-b-4-512-plus", "Latent-ViT-B-4-512-plus"),
}
