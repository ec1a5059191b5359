"""TODO docstring."""

from __future__ import annotations

import hashlib

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def generator(seed: int, purpose: str) -> torch.Generator:
    """An independent stream for each purpose (model, data, probes) of a seed."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_torch(seed: int) -> None:
    """What `torch.manual_seed` does; that would also note where it was called for each accelerator that is not there,
    which takes 0.3 ms below Hydra."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; with several GPUs the runs of a sweep take them in turn.

    Raises:
        ValueError: Not a device, or none of that kind in this machine.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _job() % torch.cuda.device_count())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name} cannot be used here ({str(error).splitlines()[0]}); use device=auto."
        ) from error
    return torch.device(name)


def tf32(allowed: bool) -> None:
    """Whether CUDA may round the factors of float32 products and convolutions to TensorFloat-32.

    Not in a file that is run as ``__main__``: launchers pickle its functions, and the module of cuDNN cannot be.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _job() -> int:
    """The number of this run in its sweep; 0 where it is no sweep."""
    if not HydraConfig.initialized():
        return 0
    job = HydraConfig.get().job
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)
