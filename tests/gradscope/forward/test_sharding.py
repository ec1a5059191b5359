"""Sharded models on two processes are measured as the model of one process, and are left as they were."""

import copy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise
from tests.processes import both, needs_gloo

pytestmark = needs_gloo
X, Y = noise(8, 6), noise(8, 3, seed=2)
EXACT = 1e-12


class Net(nn.Module):
    """Sizes that two processes cannot share evenly; tied, frozen and single parameters; buffers and dropout."""

    def __init__(self, tied=True):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.again = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.norm, self.act, self.drop = nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5)
        self.last, self.head, self.gain = nn.Linear(8, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(1, 1) / 3)
        if tied:
            self.again.weight = self.up.weight
        self.head.bias.requires_grad_(False)
        self.double()

    def encode(self, x):
        return self.act(self.up(x))

    def forward(self, x):
        h = self.norm(x + self.down(self.act(self.up(x))))
        return self.head(self.last(self.drop(self.act(self.again(h)))) * self.gain)


def mesh(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor")[: len(sizes)])


def fsdp(model, mesh=None, **options):
    from torch.distributed.fsdp import fully_shard

    for part in (model.down, model.last):  # the others are tied, or stay with the root
        fully_shard(part, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def tensor_parallel(model, mesh=None):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns, rows, whole = ColwiseParallel(), RowwiseParallel(), ColwiseParallel(output_layouts=Replicate())
    plan = {"up": columns, "down": rows, "again": columns, "last": rows, "head": whole}
    return parallelize_module(model, mesh or globals()["mesh"](2), plan)


def in_two_dimensions(model):
    both = mesh(2, 1)
    return fsdp(tensor_parallel(model, both["tensor"]), both["data"])


# How a model is wrapped, whether parameters may be tied, and whether each process trains on all samples.
WRAPPERS = {
    "fsdp": (fsdp, True, False),
    "tensor parallel": (tensor_parallel, False, True),
    "both": (in_two_dimensions, False, False),
    "ddp": (nn.parallel.DistributedDataParallel, True, False),
}


def losses(output, labels):
    return (output - labels).square().sum(1)


def measured(model):
    """What must be equal, by name."""
    torch.manual_seed(5)  # of dropout masks
    frame = gs.measure(model, (X, Y), loss_fn=losses)
    return {
        "gsc": gs.gsc(model, X, probes="exact").log10_values,
        "gsc to the loss": gs.gsc(model, (X, Y), loss_fn=losses).log10_values,
        "gsc inside": gs.gsc(model, X, layers="*", target="last", probes="exact").log10_values,
        "gsc_matrix": gs.gsc_matrix(model, X, probes="exact").log10_values,
        "parameter_gsc": gs.parameter_gsc(model, X, probes="exact").log10_values,
        "nlc": np.array(gs.nlc(model, noise(40, 6), probes="exact").value),
        "measure": frame["value"].to_numpy(),
        "rows": (frame["layer"] + " " + frame["quantity"]).tolist(),
    }


def trained(model, own):
    """Records of three steps on this process's ``own`` samples."""
    model.eval()  # dropout and statistics of batches differ between shares of a batch
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gs.Monitor(model, X, every=1, max_overhead=None, probes="exact") as monitor:
        for _ in range(3):
            optimizer.zero_grad()
            loss = losses(model(X[own]), Y[own]).mean()
            loss.backward()
            monitor.step(loss)
            optimizer.step()
    return monitor.to_frame()[["step", "layer", "index", "quantity", "value", "log10_value"]]


def state(model):
    """What a measurement must leave as it was: objects, numbers and hooks of every module."""
    return (
        [(name, id(p), type(p).__name__, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
        + [
            (name, id(b), float(b.double().sum()) if type(b) is torch.Tensor else None)
            for name, b in model.named_buffers()
        ]
        + [list(m._forward_pre_hooks.items()) + list(m._forward_hooks.items()) for m in model.modules()]
        + [(type(m), sorted(vars(m))) for m in model.modules()]
    )


def all_wrappers():
    rank, found = torch.distributed.get_rank(), {}
    for name, (wrap, tied, everything) in WRAPPERS.items():
        model = wrap(Net(tied))
        before = state(model)
        numbers = measured(model)
        found[name] = (
            numbers,
            before == state(model),
            trained(model, slice(None) if everything else slice(rank, None, 2)),
        )
    return found


def between_forward_and_backward():
    """Gradients with and without a measurement between the forward and the backward pass."""
    found = []
    for keep, measures in ((True, False), (True, True), (False, True)):
        model = fsdp(Net(), reshard_after_forward=not keep).eval()
        loss = losses(model(X), Y).mean()
        if measures:
            gs.gsc(model, X, probes="exact")
        loss.backward()
        found.append([p.grad.full_tensor().numpy() for p in model.parameters() if p.grad is not None])
    return found


class Heads(nn.Module):
    """Attention whose code knows how many heads one process has, as it must under tensor parallelism."""

    def __init__(self, heads):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.values, self.out = heads, nn.Linear(6, 8), nn.Linear(8, 6)
        self.double()

    def forward(self, x):
        return self.out(self.values(x).view(len(x), self.heads, 4).flatten(1))


def said(call):
    """The message of an error, with its notes."""
    try:
        return call()
    except Exception as error:
        return "\n".join([str(error), *getattr(error, "__notes__", ())])


def sentences():
    """What is refused, each with its message, and what works instead."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, old = fsdp(Net()), FullyShardedDataParallel(nn.Linear(6, 3), device_id=torch.device("cpu"))
    plan = {"values": ColwiseParallel(), "out": RowwiseParallel()}
    local, general = (parallelize_module(Heads(num), mesh(2), plan) for num in (1, -1))
    with gs.unsharded(model):
        inside = gs.capture(model.eval(), X).jacobian("up", "head").dense().shape
    return {
        "capture": said(lambda: gs.capture(model, X)),
        "capture, inside": inside,
        "first version of FSDP": said(lambda: gs.gsc(old, X)),
        "sizes of one process": said(lambda: gs.gsc(local, X, probes="exact")),
        "afterwards": tuple(local(X).shape),
        "any size": gs.gsc(general, X, probes="exact").log10_values,
    }


def without_norm():
    model = Net().eval()
    model.norm = nn.Identity()
    return model


def precision():
    """GSC, and the types of parameters afterwards, of a model whose parameters FSDP2 casts to bfloat16."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = fsdp(without_norm(), mp_policy=policy, reshard_after_forward=False)
    model(X)  # the modules now hold rounded parameters
    profile = gs.gsc(model, X, probes="exact").log10_values
    return profile, [p.dtype for p in model.parameters()]


def streams():
    """Each process measures its own part of the data, with the probes that one process would draw for it."""
    rank, found = torch.distributed.get_rank(), {}
    for wrap in (fsdp, tensor_parallel):
        model = wrap(Net(tied=False)).eval()
        found[wrap.__name__] = gs.gsc(model, iter([X[rank::2]]), probes=3).log10_values
    return found


def faults():
    """What two monitors say of a loss that overflows in one of the processes only."""
    model, labels = fsdp(Net()).eval(), Y * (1e200 if torch.distributed.get_rank() else 1)
    monitor = gs.Monitor(model, X, loss_fn=losses)
    loss = losses(model(X), labels).mean()
    loss.backward()
    return said(lambda: monitor.step(loss, (X, labels)))


def differences():
    """What differs between a model and another one in which one layer is 5 % larger, both sharded."""
    found = {}
    for name in ("fsdp", "tensor parallel", "both"):
        wrap, tied, _ = WRAPPERS[name]
        one, other = wrap(Net(tied)).eval(), wrap(larger(Net(tied))).eval()
        with gs.unsharded(one), gs.unsharded(other):
            found[name] = gs.diff(one, other, X, probes="exact", measures=[]).frame
    return found


def larger(model):
    model.down.weight.data.mul_(1.05)
    return model


def kinds():
    """Which layers are compared with their siblings, if only some of them are sharded."""
    from torch.distributed.fsdp import fully_shard

    model = stack()
    for part in model[2:6:2]:
        fully_shard(part)
    with gs.unsharded(model):
        return gs.compare(model, X).judged


def stack(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*[part for _ in range(5) for part in (nn.Linear(6, 6), nn.Tanh())]).double()


def whole_models():
    """What a model that is whole for a while can do: be copied, load weights, and run a method known to FSDP2."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    model, before = fsdp(without_norm()), without_norm()
    register_fsdp_forward_method(model, "encode")
    with gs.unsharded(model):
        twin = copy.deepcopy(model)
        twin.load_state_dict({name: 2 * value for name, value in before.state_dict().items()})
        same = type(twin) is Net and torch.equal(twin.up.weight, 2 * before.up.weight)
    profile = gs.gsc(model, X, forward=lambda model, x: model.encode(x), probes="exact", layers="*")
    return same, profile.log10_values, type(model) is not Net


def stages():
    """Factors of two different models, each sharded over a mesh of one process only."""
    from torch.distributed.fsdp import fully_shard

    model = stack(torch.distributed.get_rank())
    fully_shard(model, mesh=mesh(2, 1)["tensor"])
    return gs.repair(model, X).factors


FUNCTIONS = ["all_wrappers", "between_forward_and_backward", "sentences", "precision", "streams", "faults"]
FUNCTIONS += ["differences", "kinds", "whole_models", "stages"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return both(__file__, *FUNCTIONS, folder=tmp_path_factory.mktemp("both"))


@cache
def alone(tied):
    """The same in one process."""
    return measured(Net(tied)), trained(Net(tied), slice(None))


@pytest.mark.parametrize("name", WRAPPERS)
def test_two_processes_measure_what_one_measures(found, name):
    expected = alone(WRAPPERS[name][1])[0]
    for numbers, _, _ in (one[name] for one in found["all_wrappers"]):
        assert numbers.keys() == expected.keys() and numbers.pop("rows") == expected["rows"]
        for what, values in numbers.items():
            np.testing.assert_allclose(values, expected[what], rtol=EXACT, atol=EXACT, err_msg=what)


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_is_left_as_it_was(found, name):
    assert [same for _, same, _ in (one[name] for one in found["all_wrappers"])] == [True, True]


@pytest.mark.parametrize("name", WRAPPERS)
def test_two_monitors_record_what_one_records(found, name):
    expected = alone(WRAPPERS[name][1])[1]
    for _, _, records in (one[name] for one in found["all_wrappers"]):
        pd.testing.assert_frame_equal(records, expected, rtol=EXACT, atol=EXACT)


def test_a_measurement_between_forward_and_backward_changes_no_gradient(found):
    for plain, kept, freed in found["between_forward_and_backward"]:
        assert len(plain) == len(kept) == len(freed) == 11
        for one, two, three in zip(plain, kept, freed, strict=True):
            np.testing.assert_array_equal(one, two)
            np.testing.assert_allclose(one, three, rtol=EXACT, atol=EXACT)


def test_a_model_that_cannot_be_whole_by_itself_is_refused(found):
    for said in found["sentences"]:
        assert said["capture"].startswith("The model is sharded") and "gs.unsharded(model)" in said["capture"]
        assert said["capture, inside"] == (24, 64)
        assert "FullyShardedDataParallel" in said["first version of FSDP"]
        assert "fully_shard instead" in said["first version of FSDP"]


def test_code_that_knows_the_size_of_a_shard_is_refused_and_any_size_is_measured(found):
    expected = gs.gsc(Heads(2), X, probes="exact").log10_values
    for said in found["sentences"]:
        assert "invalid for input" in said["sizes of one process"]
        assert "must not use sizes of one shard" in said["sizes of one process"]
        assert said["afterwards"] == (8, 6)
        np.testing.assert_allclose(said["any size"], expected, rtol=EXACT, atol=EXACT)


def test_parameters_are_measured_in_their_own_precision(found):
    expected = gs.gsc(without_norm(), X, probes="exact").log10_values
    for values, types in found["precision"]:
        np.testing.assert_allclose(values, expected, rtol=EXACT, atol=EXACT)
        assert set(types) == {torch.bfloat16}  # restored


def test_a_stream_draws_the_probes_of_one_process(found):
    expected = gs.gsc(Net(tied=False).eval(), iter([X]), probes=3).log10_values
    for values in found["streams"]:
        for kind in values:
            np.testing.assert_allclose(values[kind], expected, rtol=EXACT, atol=EXACT, err_msg=kind)


@pytest.mark.parametrize("name", ["fsdp", "tensor parallel", "both"])
def test_two_sharded_models_differ_as_those_of_one_process(found, name):
    tied = WRAPPERS[name][1]
    expected = gs.diff(Net(tied).eval(), larger(Net(tied)).eval(), X, probes="exact", measures=[])
    assert expected.first == "down"
    for frame in (one[name] for one in found["differences"]):
        pd.testing.assert_frame_equal(frame, expected.frame, rtol=1e-9, atol=EXACT)


def test_layers_of_which_some_are_sharded_are_siblings(found):
    expected = gs.compare(stack(), X).judged
    assert len(expected) >= 4 and found["kinds"] == [expected, expected]


def test_a_whole_model_can_be_copied_and_loaded(found):
    forward = lambda model, x: model.encode(x)  # noqa: E731 - as a user writes it
    expected = gs.gsc(without_norm(), X, forward=forward, probes="exact", layers="*").log10_values
    for same, values, wrapped in found["whole_models"]:
        assert same and wrapped
        np.testing.assert_allclose(values, expected, rtol=EXACT, atol=EXACT)


def test_stages_of_a_pipeline_have_factors_of_their_own(found):
    for rank, factors in enumerate(found["stages"]):
        assert factors == pytest.approx(gs.repair(stack(rank), X).factors, rel=1e-9)
    assert found["stages"][0] != pytest.approx(found["stages"][1], rel=1e-3)


def test_all_monitors_stop_at_the_fault_of_one_process(found):
    first, second = found["faults"]
    assert first == second and "The loss is inf" in first and "the loss function is the first" in first
