"""The monitor inside Lightning and inside the Trainer of transformers, on real runs of both."""

import json
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import gradscope as gs
from tests.helpers import noise

lightning = pytest.importorskip("lightning.pytorch", reason="needs the extra lightning")
transformers = pytest.importorskip("transformers", reason="needs the extra transformers")

# Both frameworks warn of things that are none of ours: few workers, no logger, deprecated calls of torch.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error::gradscope.MonitorWarning")]


class Module(lightning.LightningModule):
    def __init__(self, poison_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.act, self.last = nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)
        self.poison_at, self.losses = poison_at, []

    def forward(self, x):
        return self.last(self.act(self.first(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch
        if batch_idx == self.poison_at:
            with torch.no_grad():
                self.first.weight[0, 0] = math.nan
        loss = functional.cross_entropy(self(x), y)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, callback, tmp_path, **options):
    x = noise(96, 6).float()
    loader = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback],
        **{"logger": False} | options,
    )  # fmt: skip
    trainer.fit(module, loader)
    return trainer


def test_lightning(tmp_path):
    from gradscope.callbacks.lightning import MonitorCallback

    probe, module = noise(8, 6, seed=3).float(), Module()
    before = gs.gsc(module, probe, probes="exact").log10_values[:, 0]
    callback = MonitorCallback(probe, every=2, probes="exact", max_overhead=None)
    fit(module, callback, tmp_path, accumulate_grad_batches=3)
    frame = callback.monitor.to_frame()
    assert callback.monitor.steps == 4 and set(frame["step"]) == {0, 2}  # 12 batches, 3 an update
    np.testing.assert_allclose(
        frame[(frame["step"] == 0) & (frame["quantity"] == "gsc")]["log10_value"], before, rtol=1e-12
    )
    assert callback.monitor.alarms.losses == pytest.approx(np.mean(np.reshape(module.losses, (4, 3)), axis=1), rel=1e-6)
    again = MonitorCallback(probe, every=2)
    again.load_state_dict(callback.state_dict())
    fit(module, again, tmp_path)
    assert again.monitor.steps == 4 + 12


def whole_gradient(monitor):
    frame = monitor.to_frame().query("quantity == 'gradient_norm' and step == 0")
    return math.hypot(*frame["value"])


def test_whether_gradients_are_clipped(tmp_path):
    """Lightning tells of them before it clips, the Trainer of transformers only afterwards."""
    from gradscope.callbacks.lightning import MonitorCallback
    from gradscope.callbacks.transformers import MonitorCallback as ForTrainer

    callback = MonitorCallback(noise(8, 6, seed=3).float(), every=100)
    fit(Module(), callback, tmp_path, gradient_clip_val=1e-3)
    assert whole_gradient(callback.monitor) > 0.1
    callback = ForTrainer({"input_ids": torch.zeros(4, 8, dtype=torch.long)}, every=100)
    run_trainer(language_model(), [callback], tmp_path, max_grad_norm=1e-3)
    assert whole_gradient(callback.monitor) == pytest.approx(1e-3, rel=1e-3)


def test_lightning_stops_with_the_layer_named(tmp_path):
    from gradscope.callbacks.lightning import MonitorCallback

    with pytest.raises(gs.NonFiniteError, match="at step 5: the parameters of layer 'first' hold NaN or Inf"):
        fit(Module(poison_at=5), MonitorCallback(noise(8, 6).float(), every=100), tmp_path)


def language_model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


class Sentences(torch.utils.data.Dataset):
    def __init__(self):
        self.ids = torch.randint(0, 40, (48, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def run_trainer(model, callbacks, tmp_path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, seed=0,
        **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=callbacks)
    trainer.train()
    return trainer


def test_the_trainer_of_transformers(tmp_path):
    from gradscope.callbacks.transformers import MonitorCallback

    probe = {"input_ids": torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(2))}
    model, alone = language_model(), language_model()
    callback = MonitorCallback(probe, every=2, max_overhead=None)
    trainer = run_trainer(model, [callback], tmp_path)
    frame = callback.monitor.to_frame()
    assert callback.monitor.steps == 6 and set(frame["step"]) == {0, 2, 4}
    assert {"transformer.h.0", "transformer.h.1"} <= set(frame[frame["quantity"] == "gsc"]["layer"])
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found = np.array(callback.monitor.alarms.losses)
    assert np.ptp(found / np.array(logged)) < 1e-2 and len(found) == 6  # the same up to the Trainer's own scale
    assert not model._forward_hooks
    run_trainer(alone, [], tmp_path)
    for a, b in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def language_model_with_a_nan():
    model = language_model()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    return model


@pytest.mark.parametrize("options", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "label smoothing"])
def test_the_trainer_of_transformers_stops_with_the_layer_named(tmp_path, options):
    """With label smoothing the model returns no loss, but there are gradients."""
    from gradscope.callbacks.transformers import MonitorCallback

    model, probe = language_model_with_a_nan(), {"input_ids": torch.zeros(4, 8, dtype=torch.long)}
    callback = MonitorCallback(probe, every=100)
    named = r"the parameters of layer 'transformer\.h\.1\.mlp\.c_fc' hold NaN"
    with warnings.catch_warnings(), pytest.raises(gs.NonFiniteError, match=named):
        warnings.simplefilter("ignore", gs.MonitorWarning)
        run_trainer(model, [callback], tmp_path, **options)
    assert not model._forward_hooks
    assert set(callback._batch) == {"input_ids"} if options else {"input_ids", "labels"}


def test_the_trainer_of_transformers_without_a_loss(tmp_path):
    from gradscope.callbacks.transformers import MonitorCallback

    callback = MonitorCallback({"input_ids": torch.zeros(4, 8, dtype=torch.long)}, every=2, max_overhead=None)
    with pytest.warns(gs.MonitorWarning, match="returned no loss .is label_smoothing_factor or compute") as seen:
        run_trainer(language_model(), [callback], tmp_path, label_smoothing_factor=0.1)
    assert len([w for w in seen if w.category is gs.MonitorWarning]) == 1
    assert callback.monitor.alarms.losses == [] and set(callback.monitor.to_frame()["step"]) == {0, 2, 4}


DTYPES: list[torch.dtype] = []  # outside the module, whose attributes a measurement restores


class Logging(Module):
    """Logs in its forward pass, by itself and through an inner module of Lightning."""

    def __init__(self):
        super().__init__()
        self.inner = Module()

    def forward(self, x):
        hidden = self.first(x)
        DTYPES.append(hidden.dtype)
        self.log("hidden", hidden.mean())
        self.log_dict({"square": hidden.square().mean()}, on_step=False, on_epoch=True)
        return self.last(self.act(hidden))


def test_lightning_logs_only_what_training_logs(tmp_path):
    from gradscope.callbacks.lightning import MonitorCallback

    logged = []
    for callback in (
        lightning.Callback(),
        MonitorCallback(noise(8, 6, seed=3).float() + 5, every=1, max_overhead=None),
    ):
        module = Logging()
        trainer = fit(module, callback, tmp_path)
        logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert "log" not in vars(module)
    assert logged[0] == logged[1] and set(logged[0]) >= {"hidden", "square"}


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-mixed", torch.bfloat16)])
def test_lightning_measures_in_the_precision_of_the_trainer(tmp_path, precision, dtype):
    """Coefficients are in the precision of the parameters; all other passes are those of training."""
    from gradscope.callbacks.lightning import MonitorCallback

    seen = []
    for callback in (lightning.Callback(), MonitorCallback(noise(5, 6).float(), every=100, layers=["first", "last"])):
        DTYPES.clear()
        fit(Logging(), callback, tmp_path, precision=precision)
        seen.append(list(DTYPES))
    alone, monitored = seen
    assert set(alone) == {dtype} and set(monitored) == {
        dtype,
        torch.float64 if dtype == torch.float64 else torch.float32,
    }
    assert monitored.count(dtype) > len(alone)  # the statistics


def test_the_trainer_of_transformers_with_tuples(tmp_path):
    """With ``return_dict=False`` the loss is the first output; a probe batch is no batch of training."""
    from gradscope.callbacks.transformers import MonitorCallback

    class Tuples(transformers.GPT2LMHeadModel):
        def forward(self, input_ids, labels=None, **options):
            return super().forward(input_ids, labels=labels, **options).to_tuple()

    found = []
    for kind in (transformers.GPT2LMHeadModel, Tuples):
        model = kind(language_model().config)
        model.load_state_dict(language_model().state_dict())
        callback = MonitorCallback({"input_ids": torch.zeros(4, 8, dtype=torch.long)}, every=2, max_overhead=None)
        run_trainer(model, [callback], tmp_path)
        found.append(callback.monitor.alarms.losses)
        assert set(callback._batch) == {"input_ids", "labels"}
    assert len(found[0]) == 6 and found[0] == found[1]


class Counting(Module):
    """A metric that is updated in the forward pass and logged at the end of the epoch."""

    def __init__(self):
        super().__init__()
        self.mean = pytest.importorskip("torchmetrics").MeanMetric()

    def forward(self, x):
        hidden = self.first(x)
        self.mean(hidden.detach().mean())
        return self.last(self.act(hidden))

    def on_train_epoch_end(self):
        self.log("mean", self.mean)


def test_lightning_metrics_count_only_what_training_counts(tmp_path):
    from gradscope.callbacks.lightning import MonitorCallback

    logged = []
    for callback in (
        lightning.Callback(),
        MonitorCallback(noise(8, 6, seed=3).float() + 5, every=1, max_overhead=None),
    ):
        trainer = fit(Counting(), callback, tmp_path)
        logged.append(float(trainer.callback_metrics["mean"]))
    assert logged[0] == logged[1]


def record_values(frame):
    """step -> {name: value} of the monitor's frame."""
    return {step: gs.sinks.values_of(rows) for step, rows in frame.groupby("step")}


def test_lightning_loggers_get_the_records(tmp_path):
    """Also with accumulated batches, and after a first fit: the step is the Trainer's."""
    from lightning.pytorch.loggers import CSVLogger

    from gradscope.callbacks.lightning import MonitorCallback

    ended, rows = [], []

    class Own:
        def write(self, step, values):
            rows.append((step, dict(values)))

        def close(self, error=None):
            ended.append(type(error))

    logger = CSVLogger(tmp_path)
    callback = MonitorCallback(noise(8, 6).float(), every=2, max_overhead=None, sinks=[Own()])
    trainer = fit(Module(), callback, tmp_path, accumulate_grad_batches=3, logger=logger)
    assert callback.monitor.schedule.total_steps == trainer.global_step == 4
    wanted = record_values(callback.monitor.to_frame())
    assert dict(rows) == wanted and set(wanted) == {0, 2} and ended == [type(None)]
    logged = pd.read_csv(next(tmp_path.rglob("metrics.csv"))).set_index("step")
    for step, values in wanted.items():
        for name, value in values.items():
            assert logged.loc[step, name.replace("#", "-")] == pytest.approx(value, rel=1e-12)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(Module(), DataLoader(TensorDataset(noise(96, 6).float(), torch.zeros(96, dtype=torch.long)), 8))
    assert callback.monitor.to_frame()["step"].min() >= 4
    failing = MonitorCallback(noise(8, 6).float(), every=100, sinks=[Own()])
    with pytest.raises(gs.NonFiniteError):
        fit(Module(poison_at=5), failing, tmp_path)
    assert ended[-1] is gs.NonFiniteError


@pytest.mark.parametrize("through_trainer", [False, True])
def test_the_log_of_the_trainer_holds_the_records(tmp_path, through_trainer):
    """The probe batch is a plain tensor of token ids."""
    from gradscope.callbacks.transformers import MonitorCallback

    heard = []

    class Listener(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            heard.append(dict(logs))

    callback = MonitorCallback(torch.zeros(4, 8, dtype=torch.long), every=2, max_overhead=None)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, max_steps=5, report_to=[], save_strategy="no",
        use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    model = language_model()
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=[callback, Listener()])
    if through_trainer:
        callback.log = trainer.log
    trainer.train()
    wanted = record_values(callback.monitor.to_frame())
    entries = [entry for entry in trainer.state.log_history if any("/" in name for name in entry)]
    found = {entry["step"]: {name: v for name, v in entry.items() if "/" in name} for entry in entries}
    assert found == wanted and set(found) == {0, 2, 4} and len(entries) == 3
    assert sum(any("/" in name for name in logs) for logs in heard) == 3 * through_trainer
    assert sum("loss" in logs for logs in heard) == 5 and callback.monitor.schedule.total_steps == 5
    trainer.state.save_to_json(str(tmp_path / "state.json"))
    read = transformers.TrainerState.load_from_json(str(tmp_path / "state.json")).log_history
    assert json.dumps(read, sort_keys=True) == json.dumps(trainer.state.log_history, sort_keys=True)


def test_the_step_of_a_resumed_trainer(tmp_path):
    from gradscope.callbacks.transformers import MonitorCallback

    probe = {"input_ids": torch.zeros(4, 8, dtype=torch.long)}
    arguments = {"output_dir": str(tmp_path), "report_to": [], "save_steps": 3, "use_cpu": True, "disable_tqdm": True}
    steps = []
    for max_steps in (3, 6):
        callback = MonitorCallback(probe, every=2, max_overhead=None)
        options = transformers.TrainingArguments(max_steps=max_steps, **arguments)
        trainer = transformers.Trainer(language_model(), options, train_dataset=Sentences(), callbacks=[callback])
        trainer.train(resume_from_checkpoint=max_steps == 6)
        steps.append(sorted(set(callback.monitor.to_frame()["step"])))
    assert steps == [[0, 2], [4]]
