"""Runs of a few numbers, for tests of what is done with them afterwards."""

import json

import pyarrow.parquet as pq
from hydra import compose, initialize_config_module

from experiments.config import schema
from experiments.files import write_json
from gradscope import frames

schema.register()
CHOICES = {"model": "mlp", "data": "noise", "optimizer": "sgd"}
SMALL = ("model.depth=4", "model.width=6")
ELSEWHERE = json.dumps({"machine": "elsewhere", "pid": 1, "started": "1"})


def composed(name, *overrides):
    with initialize_config_module("conf", version_base="1.3"):
        return compose(name, list(overrides))


def configured(name, *overrides):
    return composed(name, *SMALL, *overrides)


def example(**changes):
    columns = {
        "layer": ["a", "b", "c"], "index": [0, 1, 2], "depth_from_output": [2, 1, 0], "target": "c", "quantity": "gsc",
        "log10_value": [1.5, 0.7, 0.0], "log10_stderr_probe": [0.01, 0.02, 0.0], "log10_stderr_sample": 0.1,
        "reduction": "batch", "coupled": False, "num_probes": 8, "num_samples": 10,
    }  # fmt: skip
    return frames.tidy(columns | changes)


def finished(sweep, name, frame, **said):
    """The folder of a run that is done."""
    folder = sweep / name
    frames.save(frame.assign(model="mlp", seed=0), folder / "frame.parquet")
    write_json(folder / "manifest.json", {"config": {"seed": 0}, "seconds": 1.0})
    status = {"state": "done", "files": ["frame.parquet", "manifest.json"], "overrides": [name]} | said
    write_json(folder / "status.json", status)
    return folder


def of_schema(path, version, frame):
    """A frame as another version of the schema would have written it."""
    frames.save(frame, path)
    table = pq.read_table(path)
    kept = {key: value for key, value in table.schema.metadata.items() if key != frames.METADATA_KEY}
    pq.write_table(table.replace_schema_metadata(kept | {frames.METADATA_KEY: str(version)}), path)
    return path
