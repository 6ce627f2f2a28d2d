"""`mglmm-small`: the checkpoint of this repository, its parts, its demo."""

from .checkpoint import assemble, default_folder

__all__ = ["assemble", "default_folder"]
