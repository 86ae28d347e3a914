"""Losses that couple the samples of a batch, for `loss_over="window"`, in the memory of a tile of rows."""

from accumops.losses.contrastive import CLIPLoss, InfoNCE, NTXent, SigLIPLoss
from accumops.losses.temperature import LearnedTemperature

__all__ = ["CLIPLoss", "InfoNCE", "LearnedTemperature", "NTXent", "SigLIPLoss"]
