"""The commands of the README, run as a user runs them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from pandas.testing import assert_frame_equal

from experiments import collect, figures, measure, seeds
from experiments.archive import collecting, reference
from experiments.config import build, schema
from experiments.config.command_line import parse
from experiments.data import batches
from experiments.evidence.study import results
from experiments.reports import growth
from experiments.runs import names
from gradscope import frames
from tests.commands import run
from tests.helpers import ROOT

CONF = ROOT / "conf"
schema.register()


def command(module: str, *arguments: str, ok: bool = True) -> str:
    code, out, err = run(f"experiments.{module}", *arguments, COLUMNS="120")
    assert (code == 0) == ok, out + err
    return out + err


SMALL = ("model.depth=8", "model.width=10", "data.batch_size=12")


def test_a_single_run_prints_its_table_and_writes_frame_and_manifest(tmp_path):
    text = command("measure", *SMALL, "model.activation=selu", "matrix=true", f"results={tmp_path}", "sweep=try")
    assert "layers.3" in text
    assert "rate" in text
    (folder,) = names.folders(tmp_path / "try")
    assert folder.name.startswith("activation=selu,batch_size=12,depth=8")
    assert str(folder) in text
    frame = frames.load(folder / "frame.parquet")
    pairs = frame[frame["quantity"] == "gsc"].groupby("target", observed=True).size()
    assert pairs["layers.7"] == 9
    assert pairs["layers.2"] == 4
    assert len(pairs) == 9
    assert set(frame["quantity"]) == {"gsc", "preactivation_std", "sign_diversity"}
    assert set(frame["activation"]) == {"selu"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["model"]["depth"] == 8
    assert manifest["versions"]["torch"] == torch.__version__
    assert {"commit", "dirty", "hardware", "seconds", "schema"} <= manifest.keys()


def test_a_sweep_is_collected_and_drawn(tmp_path):
    out = command(
        "measure", "-m", *SMALL, "model.activation=relu,tanh", "model.norm=none,batch", "seed=range(2)",
        f"results={tmp_path}", "sweep=grid",
    )  # fmt: skip
    assert out == "grid: all 8 runs are done.\n"  # no bar when not a terminal
    assert "8 runs" in command("collect", f"results={tmp_path}", "sweep=grid")
    text = command("figures", "study=grid", f"results={tmp_path}", "html=true")
    page = (tmp_path / "grid" / "figures" / "report.html").read_text()
    for network in ("relu", "relu+batch", "tanh", "tanh+batch"):
        assert network in text and f'<th scope="row">{network}</th>' in page
    drawn = {path.name for path in (tmp_path / "grid" / "figures").iterdir()} - {"report.html"}
    assert drawn == {f"{n}.{s}" for n in ("gsc", "preactivation_std", "sign_diversity") for s in ("png", "svg")}


def test_a_study_key_on_the_command_line_replaces_the_studys_own(tmp_path):
    command("measure", "-m", "study=architectures", "seed=3", "model=relu,tanh_batch", *SMALL, "matrix=false",
            f"results={tmp_path}")  # fmt: skip
    collected = collecting.collect(tmp_path / "architectures")
    frame, manifest = collected.frame, collected.manifest
    assert manifest["runs"] == 2
    assert set(frame["seed"]) == {3}
    assert set(frame["model"]) == {"relu", "tanh_batch"}


def test_published_results_are_drawn_without_any_run(tmp_path):
    command("measure", "-m", *SMALL, "seed=0,1", f"results={tmp_path}/runs", "sweep=s")
    command("collect", f"results={tmp_path}/runs", "sweep=s")
    command("figures", "study=s", f"results={tmp_path}/runs", f"reference={tmp_path}/ref", "publish=true")
    published = tmp_path / "ref" / "s"
    assert {"data.csv", "manifest.json", "gsc.png"} <= {path.name for path in published.iterdir()}
    text = command("figures", "study=s", f"results={tmp_path}/none", f"reference={tmp_path}/ref")
    assert f"Figure: {published}/gsc.png" in text
    original = collecting.load(tmp_path / "runs" / "s").frame.drop(columns="run")
    loaded = reference.load(published)
    again = loaded.frame
    assert loaded.manifest["runs"] == 2
    assert set(again.columns) == set(original.columns) - frames.OPTIONAL.keys()
    assert len(list((tmp_path / "ref" / "s").glob("*.svg"))) == 0
    np.testing.assert_allclose(again["log10_value"], original["log10_value"], rtol=0, atol=5.1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.detph=3", r"Key 'detph' not in 'MLPConfig'\n\s+full_key: model\.detph"),
        ("model.depth=deep", r"Value 'deep'.* could not be converted to Integer\n\s+full_key: model\.depth"),
        ("sed=3", r"Key 'sed' not in 'MeasureConfig'"),
        ("seed=one", r"Value 'one'.* could not be converted to Integer\n\s+full_key: seed"),
        ("model=alexnet_c", r"Could not find 'model/alexnet_c'"),
    ],
)
def test_typos_and_wrong_types_name_the_key(override, message):
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(HydraException) as caught:
        compose("measure", [override])
    chain = f"{caught.value}\n{caught.value.__cause__}"
    assert re.search(message, chain), chain


def test_a_typo_on_the_command_line_ends_without_a_traceback():
    text = command("measure", "model.detph=3", ok=False)
    assert "detph" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.activation=rellu", r"activation must be one of .*; did you mean 'relu'\?"),
        ("model.depth=0", r"depth must be an integer from 1 to 100,000, got 0"),
        ("mode=training", r"mode must be train or eval, got 'training'"),
        ("dtype=float8", r"dtype must be one of float32"),
        ("data.batch_size=0", r"data\.batch_size must be at least 1, got 0"),
        ("probes=0", r'probes must be a whole number >= 1, "exact", "auto" or gs\.Deflated\(rank, num\); got 0'),
        ("rtol=2", r"rtol must be a number between 0 and 1"),
        ("device=cuda:99", r"device=cuda:99 cannot be used here"),
    ],
)
def test_bad_values_say_what_is_allowed(override, message):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("measure", [*SMALL, override])
    with pytest.raises(ValueError, match=message):
        measure.measure_seeds(cfg, {"model": "mlp", "data": "noise"})


def test_arguments_of_figures_and_collect():
    assert parse(figures.Config, ["study=x"]).study == "x"
    with pytest.raises(ValueError, match=r"Unknown key 'studdy'; did you mean 'study'\?"):
        parse(figures.Config, ["studdy=x"])
    with pytest.raises(ValueError, match="publish: "):
        parse(figures.Config, ["publish=maybe"])
    with pytest.raises(ValueError, match="'x' is not key=value; keys are results, sweep"):
        parse(collect.Config, ["x"])


def test_missing_runs_say_what_to_do(tmp_path):
    assert "No finished runs under" in command("collect", f"results={tmp_path}", ok=False)
    said = command("figures", "study=none", f"results={tmp_path}", ok=False)
    assert (
        "none was not collected (python -m experiments.collect sweep=none), and results/none/data.csv does not" in said
    )


MODELS = [path.stem for path in sorted((CONF / "model").glob("*.yaml"))]
# A map of the plane has two inputs, and no image has; a language model reads text.
CASES = [
    (model, source)
    for source in ("noise", "digits")
    for model in MODELS
    if model != "gpt" and (model, source) != ("plane", "digits")
] + [("gpt", "text")]


@pytest.mark.parametrize(("model", "source"), CASES)
def test_every_model_and_data_composes_and_measures(model, source):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = [f"model={model}", f"data={source}", "data.batch_size=4", "probes=2"]
        special = {"resnet": ["model.depth=8"], "custom": ["model._target_=gradscope.models.alexnet.AlexNetB"]}
        images = [] if model.startswith("alexnet") else ["model.depth=3", "model.width=8"]
        overrides += special.get(model, images)
        cfg = compose("measure", overrides)
    profile, frame = measure.measure_seeds(cfg, {"model": model, "data": source})
    assert np.isfinite(profile.log10_values).all()
    assert set(frame["data"]) == {source}
    frames.check(frame)


def test_a_list_of_seeds_is_the_runs_of_its_seeds(monkeypatch):
    monkeypatch.setattr(measure, "MOST_FRAMES", 3)  # frames are put together on the way, more than once

    def measured(*overrides):
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("measure", [*SMALL, "matrix=true", "nlc=true", *overrides])
        return measure.measure_seeds(cfg, {"model": "mlp", "data": "noise"})

    profile, together = measured("seeds=[5,2,7,0,3]", "seed=9")
    alone = [measured(f"seed={seed}") for seed in (5, 2, 7, 0, 3)]
    assert_frame_equal(together, pd.concat([frame for _, frame in alone], ignore_index=True))
    assert_frame_equal(profile.to_frame(), alone[-1][0].to_frame())


def test_a_measurement_that_is_no_frame_is_refused():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("measure", [*SMALL, "+measurement._target_=tests.experiments.test_commands.no_frame"])
    with pytest.raises(
        TypeError, match=r"measurement\._target_=tests\.experiments\.test_commands\.no_frame returned a list"
    ):
        measure.measure_seeds(cfg, {"model": "mlp", "data": "noise"})


def no_frame(model, x, *, generator):
    return [1.0]


def grown(values, *, generator):
    """A model that changes the list that it is given."""
    values.append(8)
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in values))


def test_arguments_of_a_configuration_stay_as_they_are():
    part = {"_target_": "tests.experiments.test_commands.grown", "values": [1]}
    assert len(build.model(part, 0)) == len(build.model(part, 1)) == 2 and part["values"] == [1]


@pytest.mark.parametrize("study", [path.stem for path in sorted((CONF / "study").glob("*.yaml"))])
def test_every_study_composes(study):
    settings = (CONF / "study" / f"{results(study)}.yaml").read_text()  # whose runs it reads
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train" if "\ntrain:" in settings else "measure", [f"study={study}"])
    assert cfg.sweep == results(study)


def test_equal_configuration_equal_folder_and_place_does_not_matter(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        a, b, c = (
            compose("measure", [f"seed={s}", f"device={d}", f"results={tmp_path}"])
            for s, d in ((1, "cpu"), (1, "auto"), (2, "cpu"))
        )
    assert names.folder(a, ["seed=1"]) == names.folder(b, ["seed=1"]) != names.folder(c, ["seed=2"])
    long = names.folder(a, [f"model.depth={'9' * 300}"])
    assert len(long.name) <= 120


def test_streams_of_one_seed_are_independent():
    values = {
        torch.randn(1, generator=seeds.generator(seed, purpose)).item()
        for seed in range(4)
        for purpose in ("model", "data", "probes")
    }
    assert len(values) == 12


def test_digits_and_noise_are_standardized():
    generator = torch.Generator().manual_seed(0)
    digits = batches.digits(1000, (), generator=generator)
    assert digits.shape == (1000, 3, 32, 32)
    assert torch.equal(digits[:, 0], digits[:, 2])
    assert float(digits.mean()) == pytest.approx(0, abs=0.05)
    with pytest.raises(ValueError, match=r"data\.batch_size=5000 .* 1797 digits"):
        batches.digits(5000, (), generator=generator)
    assert batches.noise(3, (2, 5), generator=generator).shape == (3, 2, 5)


def test_growth_table_averages_log_gsc_over_seeds():
    depth = np.arange(9, -1, -1)
    rows = [
        frames.tidy(
            {
                "layer": [f"l{i}" for i in range(10)], "index": np.arange(10), "depth_from_output": depth,
                "target": "l9", "quantity": "gsc", "log10_value": depth * slope, "log10_stderr_probe": 0.0,
                "log10_stderr_sample": 0.0,
                "reduction": "batch", "coupled": False, "num_probes": 0, "num_samples": 3,
            }
        ).assign(model="m", activation="relu", norm="none", seed=seed)
        for seed, slope in enumerate((0.1, 0.2))
    ]  # fmt: skip
    table = growth.growth_table(pd.concat(rows), ["activation", "norm"])
    assert table["rate"].item() == pytest.approx(10**0.15)
    assert table["log10_gsc"].item() == pytest.approx(9 * 0.15)
    assert table["log10_gsc_stderr"].item() == pytest.approx(9 * 0.05)


@pytest.mark.skipif(
    not (Path(os.environ.get("GRADSCOPE_DATA", "")) / "cifar-10-batches-bin").is_dir(),
    reason="GRADSCOPE_DATA has no CIFAR-10",
)
def test_cifar10_batches_are_standardized_images():
    batch = batches.cifar10(500, (), download=False, generator=torch.Generator().manual_seed(0))
    assert batch.shape == (500, 3, 32, 32)
    assert batch.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (batch.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1
