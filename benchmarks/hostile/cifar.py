"""Read the CIFAR-10 batches in a folder, as the commands do: ``python -m benchmarks.hostile.cifar FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from experiments.data import cifar10_files

if __name__ == "__main__":
    try:
        cifar10_files.load(Path(sys.argv[1]), train=True)
    except (ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
