"""Latent-CLIP at scale: a CLIP that reads the latents of a VAE."""

__version__ = "0.1.0"
__all__ = ["__version__"]
