"""STREAM, text back: the captioner and the redescription loss (MirrorGAN, Sec. 3.3)."""

from mirror_modules.stream.captioner import Captioner, append_end
from mirror_modules.stream.redescription import RedescriptionLoss, balance_gradients, redescription_loss

__all__ = ["Captioner", "RedescriptionLoss", "append_end", "balance_gradients", "redescription_loss"]
