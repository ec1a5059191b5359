"""Repairs of sharded models and of replicas on two processes change the model, not a copy of its parameters."""

import copy

import pytest
import torch
from torch import nn

import gradscope as gs
from tests.helpers import noise
from tests.processes import both, needs_gloo

pytestmark = needs_gloo
X = noise(20, 6)
GOAL = 1.1


def network():
    """The last layer has 5 rows, which two processes cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()


def mesh(*sizes):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor")[: len(sizes)])


def fsdp(model, mesh=None):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[2], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model, parts=None):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(model, parts or mesh(2), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def in_two_dimensions(model):
    both = mesh(2, 1)
    return fsdp(tensor_parallel(model, both["tensor"]), both["data"])


WRAPPERS = {
    "fsdp": fsdp,
    "tensor parallel": tensor_parallel,
    "both": in_two_dimensions,
    "ddp": nn.parallel.DistributedDataParallel,
}


def whole(model):
    with torch.no_grad():
        held = getattr(model, "module", model).named_parameters()
        return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in held}


def repaired():
    """Weights before, after apply() and after undo(), and the output between, of models that were called before."""
    found = {}
    for name, wrap in WRAPPERS.items():
        model = wrap(network())
        before = whole(model)
        model(X)  # the root of FSDP2 holds whole parameters from now on
        plan = gs.repair(model, X, goal=GOAL, probes="exact")
        plan.apply()
        output, after = model(X).detach(), whole(model)
        plan.undo()
        found[name] = {"before": before, "after": after, "undone": whole(model), "output": output}
        found[name]["output undone"] = model(X).detach()
    return found


def factors():
    """Factors from random probes, which differ between processes."""
    return {name: gs.repair(wrap(network()), X, goal=GOAL, probes=2).factors for name, wrap in WRAPPERS.items()}


def said(call):
    with pytest.raises(ValueError) as error:
        call()
    return str(error.value)


def in_context():
    """A repair that was computed inside `gs.unsharded` is refused there, and changes the model afterwards."""
    model = fsdp(network())
    before = whole(model)
    with gs.unsharded(model):
        plan = gs.repair(model, X, goal=GOAL, probes="exact")
        messages = [said(plan.apply)]
    plan.apply()
    with gs.unsharded(model):
        messages.append(said(plan.undo))
    return messages, plan.factors, before, whole(model)


def sharded_later():
    """A repair of parameters that the model no longer has."""
    model = network()
    plan = gs.repair(model, X, goal=GOAL, probes="exact")
    fsdp(model)
    return said(plan.apply), plan.applied


def trained():
    """One process's part of the parameters has changed since the repair was computed."""
    model = fsdp(network())
    plan = gs.repair(model, X, goal=GOAL, probes="exact")
    with torch.no_grad():
        model[0].weight.add_(0.1)
    return said(plan.apply)


FUNCTIONS = ["repaired", "factors", "in_context", "sharded_later", "trained"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return both(__file__, *FUNCTIONS, folder=tmp_path_factory.mktemp("both"))


@pytest.fixture(scope="module")
def alone():
    """The model of one process, repaired."""
    model = network()
    gs.repair(model, X, goal=GOAL, probes="exact").apply()
    return model


@pytest.mark.parametrize("name", WRAPPERS)
def test_two_processes_repair_what_one_repairs(found, alone, name):
    expected, plain = dict(alone.named_parameters()), network()
    for one in (each[name] for each in found["repaired"]):
        assert one["before"].keys() == expected.keys()
        assert not torch.allclose(one["after"]["0.weight"], one["before"]["0.weight"], rtol=0.01)
        for parameter, value in one["after"].items():
            torch.testing.assert_close(value, expected[parameter].detach(), rtol=1e-9, atol=1e-12)
            assert torch.equal(one["undone"][parameter], one["before"][parameter])
        torch.testing.assert_close(one["output"], alone(X).detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one["output undone"], plain(X).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", WRAPPERS)
def test_all_processes_have_the_same_factors(found, name):
    first, second = (each[name] for each in found["factors"])
    assert first == second and first.keys() == {"0.weight", "2.weight", "4.weight"}


def test_a_change_inside_the_context_is_refused_and_one_afterwards_is_kept(found):
    for messages, factors, before, after in found["in_context"]:
        for message in messages:
            assert message.startswith("Inside gs.unsharded(model), the parameters are copies")
        for name, value in before.items():
            torch.testing.assert_close(after[name], value * factors.get(name, 1.0), rtol=1e-15, atol=0)


def test_a_model_that_was_sharded_since_is_refused(found):
    for message, applied in found["sharded_later"]:
        assert message.startswith("The model has another parameter '0.weight' than when the repair was computed")
        assert not applied


def test_a_shard_that_has_changed_is_refused(found):
    assert all("'0.weight' has changed since the repair was computed" in message for message in found["trained"])


def test_a_plan_does_not_change_a_copy():
    model = network()
    plan = gs.repair(model, X, goal=GOAL, probes="exact")
    model[0] = copy.deepcopy(model[0])
    with pytest.raises(ValueError, match=r"another parameter '0.weight' .* compute a new repair"):
        plan.apply()
