"""What sinks hold is what the monitor's frame holds; a sink that fails stops nothing."""

import warnings

import pytest
import torch
from torch import nn

import gradscope as gs
from tests.experiments.training.disk import full_disk
from tests.helpers import noise

EVENTS = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra sinks"
).EventAccumulator
mlflow = pytest.importorskip("mlflow", reason="needs the extra sinks")
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of mlflow and torch.utils.tensorboard
    pytest.mark.filterwarnings("error::gradscope.sinks.SinkWarning"),
]


class Run:
    """The calls that runs of wandb and trackio have in common."""

    def __init__(self):
        self.logged = []

    def log(self, metrics, step=None):
        self.logged.append((step, metrics))

    def finish(self):
        raise AssertionError("the run belongs to the caller")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def trained(steps=5, **options):
    """The monitor after some steps of training, and the weights."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.Monitor(model, noise(6, 6), every=2, max_overhead=None, **options) as monitor:
        for step in range(steps):
            loss = model(noise(8, 6, seed=step)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor, [p.detach().clone() for p in model.parameters()]


def expected(frame):
    """(name, step) -> value, row by row of the monitor's frame."""
    found = {}
    for row in frame.itertuples():
        gsc = row.quantity == "gsc"
        found[("log10_gsc" if gsc else row.quantity) + "/" + row.layer, row.step] = (
            row.log10_value if gsc else row.value
        )
    return found


def events(folder):
    reader = EVENTS(str(folder))
    reader.Reload()
    return {(tag, event.step): event.value for tag in reader.Tags()["scalars"] for event in reader.Scalars(tag)}


def metrics(client, run):
    keys = client.get_run(run).data.metrics
    return {(key, m.step): m.value for key in keys for m in client.get_metric_history(run, key)}


def test_every_sink_holds_what_the_frame_holds(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    run, own = Run(), SummaryWriter(str(tmp_path / "own"))
    local = gs.sinks.MLflow(tmp_path / "store", "mine", name="first", config={"train": {"lr": 0.1}})
    mlflow.set_tracking_uri((tmp_path / "active").as_uri())
    with mlflow.start_run() as active:
        monitor, weights = trained(sinks=[gs.sinks.TensorBoard(tmp_path / "events"), local, run, own, mlflow])
    own.close()
    wanted = expected(monitor.to_frame())
    assert {step for _, step in wanted} == {0, 2, 4} and len(wanted) == len(monitor.to_frame()) > 30
    assert {(name, step): value for step, values in run.logged for name, value in values.items()} == wanted
    for folder in ("events", "own"):  # in float32
        assert events(tmp_path / folder) == pytest.approx(wanted, rel=1e-6, nan_ok=True)
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.params) == ("first", "FINISHED", {"train.lr": "0.1"})
    assert metrics(client, found.info.run_id) == wanted
    assert metrics(mlflow.MlflowClient((tmp_path / "active").as_uri()), active.info.run_id) == wanted
    for a, b in zip(weights, trained()[1], strict=True):
        assert torch.equal(a, b)


class Failing(Run):
    def __init__(self, at):
        super().__init__()
        self.at, self.attempts = at, 0

    def log(self, metrics, step=None):
        self.attempts += 1
        if step in self.at:
            raise ConnectionError("the server is gone")
        super().log(metrics, step)


def test_a_sink_that_fails_warns_once_and_training_goes_on():
    once, always, good = Failing({2}), Failing(range(100)), Run()
    with pytest.warns(gs.sinks.SinkWarning) as seen:
        monitor, weights = trained(12, sinks=[once, always, good])
    own = [str(w.message) for w in seen if w.category is gs.sinks.SinkWarning]
    assert len(own) == 2 and all(
        "Sink test_sinks.Failing failed: ConnectionError: the server is gone." in w for w in own
    )
    assert [step for step, _ in once.logged] == [0, 4, 6, 8, 10]
    assert always.attempts == 3  # then it is given up
    assert [step for step, _ in good.logged] == [0, 2, 4, 6, 8, 10] == sorted(set(monitor.to_frame()["step"]))
    for a, b in zip(weights, trained(12)[1], strict=True):
        assert torch.equal(a, b)


def test_event_files_go_on_after_a_full_disk(tmp_path):
    sink = gs.sinks.TensorBoard(tmp_path)
    sinks = gs.sinks.Sinks([sink])
    sinks.write(0, {"loss": 1.0})
    with (
        full_disk(150),
        pytest.warns(gs.sinks.SinkWarning, match=r"Sink gradscope.TensorBoard failed: OSError.*File too"),
    ):
        sinks.write(1, {"loss" * 40: 2.0})
    sinks.write(2, {"loss": 3.0})
    sinks.close()
    assert events(tmp_path) == {("loss", 0): 1.0, ("loss", 2): 3.0} and sink._file is None


def test_sinks_are_told_how_a_run_ended():
    ended = []

    class Own:
        def write(self, step, values):
            pass

        def close(self, error=None):
            ended.append(error)

    trained(1, sinks=[Own()])
    with pytest.raises(KeyboardInterrupt), gs.Monitor(net(), noise(6, 6), sinks=[Own()]) as monitor:
        raise KeyboardInterrupt
    monitor.close()  # closes nothing twice
    with torch.no_grad():
        broken = net()
        broken[0].weight[0, 0] = torch.nan
    with pytest.raises(gs.NonFiniteError), gs.Monitor(broken, noise(6, 6), sinks=[Own()], check_every=100) as monitor:
        monitor.step(torch.tensor(torch.nan))
    monitor = gs.Monitor(net(), noise(6, 6), sinks=[Own()])
    try:
        raise LookupError
    except LookupError:
        monitor.close()  # the error of something else
    assert [type(error) for error in ended] == [type(None), KeyboardInterrupt, gs.NonFiniteError, type(None)]


@pytest.mark.parametrize("sinks", ["tensorboard", ["tensorboard"], [3], [None]])
def test_what_is_no_sink(sinks):
    with pytest.raises(TypeError, match=r"sinks must be a list of objects with write.*; got ('tensorboard'|3|None)\."):
        gs.Monitor(net(), noise(6, 6), sinks=sinks)


def test_mlflow_takes_as_many_numbers_as_there_are(tmp_path):
    values = {f"gradient_norm/layer{number}": float(number) for number in range(1200)}
    sink = gs.sinks.MLflow(tmp_path, config={f"key{number}": number for number in range(150)})
    sink.write(3, values)
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    found = client.get_run(sink._run)
    assert found.data.metrics == values and len(found.data.params) == 150


def test_what_the_budget_thinned_is_said_once():
    now = [0.0]

    def clock():
        now[0] += 1e-3
        return now[0]

    monitor = gs.Monitor(net(), noise(6, 6), every=1, max_overhead=1e-9, total_steps=60, clock=clock)
    for _ in range(60):
        monitor.step()
    with pytest.warns(gs.MonitorWarning, match=r"took 20 of 60 scheduled records; .* max_overhead=1e-09\. For more"):
        frame = monitor.to_frame()
    assert sorted(set(frame["step"])) == list(range(0, 60, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", gs.MonitorWarning)
        monitor.to_frame()
        monitor.close()
