"""Random generators, the device, and the TensorFloat-32 setting of a run."""

from __future__ import annotations

import hashlib

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator for a seed and a purpose (model, data, probes).  Different purposes get independent numbers."""
    digest = hashlib.sha256(f"{seed}:{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def seed_torch(seed: int) -> None:
    """Seed the global generators, like `torch.manual_seed`."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must have at most 64 bits, got {seed}.")
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # saves 0.3 ms: `torch.manual_seed` would format a stack trace for each kind of accelerator
        torch.default_generator.manual_seed(seed)


def device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA if available, else the CPU.  Runs of a sweep use the GPUs in turn."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", _job() % torch.cuda.device_count())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"device={name} cannot be used here ({why}); use device=auto.") from error
    return torch.device(name)


def threads(number: int | None) -> None:
    """Let torch use this many threads; None: torch decides."""
    if number is not None:
        if number < 1:
            raise ValueError(f"num_threads must be a positive number or null, got {number}.")
        torch.set_num_threads(number)


def tf32(allowed: bool) -> None:
    """Allow or forbid CUDA to round the inputs of float32 matrix products and convolutions to TensorFloat-32."""
    # Not in a file that runs as ``__main__``: launchers pickle its functions, and cuDNN's module cannot be pickled.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def _job() -> int:
    """The number of this run in its sweep; 0 outside of a sweep."""
    if not HydraConfig.initialized():
        return 0
    job = HydraConfig.get().job
    return 0 if OmegaConf.is_missing(job, "num") else int(job.num)
