"""Profiles of real architectures at their real size: GPT-2 small and ResNet-50, random weights, from transformers.

    python -m benchmarks.large [--quick] [--repeats N] [--output FOLDER]

Compares one forward and backward pass with parameter gradients and a profile of all units with one probe; for GPT-2
also GSC by source position, the residual ledger and attention heads, each with one probe.  Times are taken in turns in
one process, peak memory in separate processes.  Needs ``pip install '.[zoo]'``; downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import gradscope as gs
from benchmarks.memory import resident
from benchmarks.tables.provenance import manifest
from benchmarks.tables.report import table
from benchmarks.tables.rows import Row, timed, to_frame
from benchmarks.tables.timing import Contestant, race

OUTPUT = Path("results/benchmarks")
THREADS, REPEATS, WIDTH = 2, 5, 150
PASS, PROFILE, UNITS = "forward + backward", "profile, 1 probe, all units", "units in the profile"
POSITIONS, LEDGER, HEADS = "GSC by source position", "residual ledger", "attention heads"


@dataclass(frozen=True)
class Large:
    """A model of transformers, in training mode but without dropout, and one batch."""

    model: nn.Module
    batch: Mapping[str, Tensor]

    def forward_backward(self) -> None:
        """A training step without the update; deletes the gradients."""
        self.model(**self.batch).logits.square().mean().backward()
        self.model.zero_grad(set_to_none=True)

    def profile(self) -> gs.Profile:
        """A profile of all units with one probe."""
        return gs.gsc(self.model, self.batch, probes=1)

    def of_transformers(self) -> list[Contestant]:
        """The quantities of transformers, one by one."""
        return [
            Contestant(POSITIONS, lambda: gs.gsc(self.model, self.batch, probes=1, positions="source")),
            Contestant(LEDGER, lambda: gs.residual(self.model, self.batch, probes=1)),
            Contestant(HEADS, lambda: gs.attention(self.model, self.batch)),
        ]


def gpt2(quick: bool, samples: int = 2, tokens: int = 128) -> Large:
    """GPT-2 small, 124 M parameters; batch 2 and 128 tokens by default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50} if quick else {}
    small |= {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **small)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (2, 16) if quick else (samples, tokens), generator=generator)
    return Large(_seeded(lambda: GPT2LMHeadModel(config)), {"input_ids": ids})


def resnet50(quick: bool, samples: int = 8) -> Large:
    """ResNet-50, 25.6 M parameters, at 224 pixels, with batch statistics; batch 8 by default."""
    from transformers import ResNetConfig, ResNetForImageClassification

    small: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2]} if quick else {}
    config = ResNetConfig(**(small | {"num_labels": 10 if quick else 1000}))
    size = (2, 3, 32, 32) if quick else (samples, 3, 224, 224)
    images = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return Large(_seeded(lambda: ResNetForImageClassification(config)), {"pixel_values": images})


MODELS: dict[str, Callable[[bool], Large]] = {"gpt2_small": gpt2, "resnet50": resnet50}


def large(group: str, repeats: int, quick: bool) -> Iterator[Row]:
    """Times of both calls, and the peak memory of each in a new process."""
    made = MODELS[group](quick)
    contestants = [Contestant(PASS, made.forward_backward), Contestant(PROFILE, made.profile)]
    times = race(contestants + (made.of_transformers() if group == "gpt2_small" else []), repeats)
    yield from timed(group, "", times, PASS)
    yield Row(group, "", UNITS, "count", float(len(times[PROFILE].result.layers)))
    if not Path("/proc/self/clear_refs").exists():
        return
    peaks = {what: _peak_elsewhere(group, what, quick) for what in (PASS, PROFILE)}
    for what, value in peaks.items():
        yield Row(group, "", what, "bytes", value, reference=PASS, ratio=value / peaks[PASS])


def peak(group: str, what: str, quick: bool) -> int:
    """Largest increase of this process's resident set during one call, in bytes; a call at a tiny size comes first."""
    call = {PASS: Large.forward_backward, PROFILE: Large.profile}[what]
    call(MODELS[group](True))
    made = MODELS[group](quick)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    call(made)
    return resident("VmHWM") - before


def main(arguments: list[str] | None = None) -> None:
    """Print both tables, and write one frame and its manifest."""
    options = _options(arguments)
    torch.set_num_threads(1 if options.quick else THREADS)
    if options.peak:
        print(peak(options.peak[0], options.peak[1], options.quick))
        return
    console, begin, rows = Console(width=WIDTH), time.perf_counter(), list[Row]()
    for group in MODELS:
        measured = list(large(group, options.repeats, options.quick))
        console.print(table(group, measured))
        rows += measured
    options.output.mkdir(parents=True, exist_ok=True)
    to_frame(rows).to_csv(options.output / "large.csv", index=False)
    seconds = time.perf_counter() - begin
    written = manifest(quick=options.quick, repeats=options.repeats, seconds=round(seconds, 1), models=list(MODELS))
    (options.output / "large.json").write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"{options.output / 'large.csv'} ({seconds:.1f} s)", highlight=False)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """Build with seed 0 of torch's global generator, which transformers uses; restores its state."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(0)
        return make().train()


def _peak_elsewhere(group: str, what: str, quick: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.large", "--peak", group, what, *(["--quick"] if quick else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, to test that everything runs")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--peak", nargs=2, metavar=("MODEL", "CALL"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
