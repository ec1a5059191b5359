"""One recorded forward pass: the right tensor whatever the model does, and a model that is left as it was."""

import copy
import pickle
import warnings
from collections import UserDict

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradscope as gs
from gradscope.models.mlp import MLP
from tests.bruteforce import gsc_log10


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(1))


def linears(num: int) -> list[nn.Linear]:
    torch.manual_seed(0)
    return [nn.Linear(6, 6, dtype=torch.float64) for _ in range(num)]


def test_nothing_is_changed():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 6)
    ).double()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones_like(model[4].weight)
    x = noise(8, 6)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    x_before, rng = x.clone(), torch.get_rng_state()
    gs.gsc(model, x)
    gs.gsc_matrix(model, x)
    gs.measure(model, x)
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert all(buffers[name] is buffer for name, buffer in model.named_buffers())
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert torch.equal(model[4].weight.grad, torch.ones_like(model[4].weight))
    assert model[0].weight.grad is None
    assert not model[0].weight.requires_grad
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    pickle.loads(pickle.dumps(copy.deepcopy(model)))


def test_in_place_operations_after_a_layer_do_not_redirect_its_gradient():
    class InPlace(nn.Module):
        def __init__(self, in_place: bool):
            super().__init__()
            self.first, self.second = linears(2)
            self.in_place = in_place
            self.relu = nn.ReLU(inplace=in_place)

        def forward(self, x):
            h = self.first(x)
            if self.in_place:
                h += x
            else:
                h = h + x
            return self.second(self.relu(h))

    x = noise(5, 6)
    inside = gs.gsc(InPlace(True), x, layers=["first", "relu", "input"], probes="exact")
    for name in ("first", "relu", "input"):
        assert inside[name].log10_value == pytest.approx(gsc_log10(InPlace(False), name, x), abs=1e-10)


def test_nan_inside_a_row_is_named_by_the_first_layer_and_an_input_with_nan_by_its_place():
    model = nn.Sequential(linears(1)[0], nn.Sequential(*linears(2)), linears(1)[0])
    model[1][0].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"Layer '1\.0' is the first with NaN or Inf"):
        gs.gsc(model, noise(5, 6))
    x = noise(5, 6)
    x[2, 3] = float("nan")

    class Strict(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linears(1)[0]

        def forward(self, x):
            if not x.isfinite().all():
                raise ArithmeticError
            return self.linear(x)

    for network in (linears(1)[0], Strict()):
        with pytest.raises(ValueError, match=r"x holds 1 NaN and 0 Inf among 30 entries, the first at \(2, 3\)"):
            gs.gsc(network, x)


def test_a_loss_that_refuses_nan_does_not_hide_the_layer():
    def loss(output, labels):
        if not output.isfinite().all():
            raise ArithmeticError
        return output.square().sum(1)

    model = nn.Sequential(*linears(2))
    model[1].bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="Layer '1' is the first with NaN or Inf"):
        gs.gsc(model, (noise(5, 6), torch.zeros(5)), loss_fn=loss)


def test_a_model_may_overwrite_its_input():
    layers, x = linears(2), noise(5, 6)
    before = x.clone()
    measured = gs.gsc(nn.Sequential(nn.ReLU(inplace=True), *layers), x, probes="exact")["input"].log10_value
    assert measured == pytest.approx(gsc_log10(nn.Sequential(nn.ReLU(), *layers), "input", x), abs=1e-10)
    assert torch.equal(x, before)


def test_each_call_of_a_module_is_a_layer():
    shared = linears(1)[0]

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.act = shared, nn.Tanh()

        def forward(self, x):
            return self.act(self.shared(self.act(self.shared(x))))

    profile = gs.gsc(Twice(), noise(5, 6))
    assert profile.layers == ("input", "shared", "act", "shared#2", "act#2")
    untied = nn.Sequential(shared, nn.Tanh(), copy.deepcopy(shared), nn.Tanh())
    expected = gs.gsc(untied, noise(5, 6))
    np.testing.assert_allclose(profile.log10_values, expected.log10_values, atol=1e-12)


def test_an_identity_is_another_name_and_no_row():
    model = nn.Sequential(linears(1)[0], nn.Identity(), nn.Dropout(0.5).eval(), nn.Tanh())
    captured = gs.capture(model, noise(5, 6))
    assert [layer.name for layer in captured.units] == ["input", "0", "3"]
    assert captured.layers[1].names == ("0", "1", "2")
    assert gs.gsc(model, noise(5, 6), layers="1").layers == ("1", "3")


@pytest.mark.parametrize("how", ["chunk", "split", "unbind"])
def test_several_outputs_of_one_node_are_no_cut_vertex_by_themselves(how):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = linears(2)

        def forward(self, x):
            h = self.first(x)
            if how == "unbind":
                a, b = h.reshape(-1, 2, 3).unbind(1)
            else:
                a, b = h.chunk(2, 1) if how == "chunk" else h.split(3, 1)
            return self.last(torch.cat([gs.tap(a.tanh(), "left"), b.sin()], dim=1))

    model, x = Halves(), noise(5, 6)
    captured = gs.capture(model, x)
    on_trunk = {layer.name: layer.on_trunk for layer in captured.layers}
    assert on_trunk == {"input": True, "first": True, "left": False, "last": True}
    for name in ("input", "first"):
        assert gs.gsc(model, x, probes="exact")[name].log10_value == pytest.approx(gsc_log10(model, name, x), abs=1e-10)


def test_tap_marks_functional_code_and_does_nothing_outside_a_measurement():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = linears(2)

        def forward(self, x):
            return self.last(gs.tap(torch.sin(self.first(x)), "sine"))

    model, x = Functional(), noise(5, 6)
    assert gs.gsc(model, x).layers == ("input", "first", "sine", "last")
    assert gs.tap(x, "anything") is x


def test_integer_input_starts_at_the_embedding():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh()).double()
    tokens = torch.randint(0, 11, (4, 3), generator=seeded())
    profile = gs.gsc(model, tokens, probes="exact")
    assert profile.layers == ("0", "1", "2")
    rest = gs.gsc(model[1:], model[0](tokens).detach(), probes="exact")
    np.testing.assert_allclose(profile.log10_values, rest.log10_values, atol=1e-12)


def test_frozen_layers_and_a_caller_under_no_grad():
    model = MLP(depth=4, width=6, generator=seeded()).double()
    expected = gs.gsc(model, noise(5, 6)).log10_values
    model.requires_grad_(False)
    with torch.no_grad():
        np.testing.assert_array_equal(gs.gsc(model, noise(5, 6)).log10_values, expected)


def test_dropout_mask_is_the_one_that_was_seen():
    model = nn.Sequential(linears(1)[0], nn.Dropout(0.5), linears(1)[0])
    torch.manual_seed(7)
    captured = gs.capture(model, noise(5, 6))
    J = captured.jacobian("0", "1").dense()
    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones(5, 6, dtype=torch.float64), 0.5)
    torch.testing.assert_close(J, torch.diag(mask.flatten()))


def test_describe_lists_layers_and_modules_that_never_fired():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = linears(2)

        def forward(self, x):
            return self.used(x)

    frame = gs.capture(Unused(), noise(5, 6)).describe().to_frame().set_index("layer")
    assert list(frame.index) == ["input", "used", "unused"]
    assert list(frame["fired"]) == [True, True, False]
    assert frame.loc["used", "shape"] == "5x6"


def test_a_compiled_model_is_measured_through_its_eager_original():
    model = MLP(depth=4, width=6, generator=seeded()).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own imports
        compiled_model = torch.compile(model)
    with pytest.warns(UserWarning, match="compiled; its eager original is measured"):
        compiled = gs.gsc(compiled_model, noise(5, 6))
    np.testing.assert_array_equal(compiled.log10_values, gs.gsc(model, noise(5, 6)).log10_values)
    for measurement in (gs.capture, gs.check):
        for wrapped in (compiled_model, nn.DataParallel(compiled_model)):
            with pytest.warns(UserWarning, match="compiled; its eager original is measured") as caught:
                measurement(wrapped, noise(5, 6))
            assert caught[0].filename == __file__


def test_coupling_is_detected_not_guessed():
    class Contrast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linears(1)[0]

        def forward(self, x):
            h = self.linear(x)
            return h - h.roll(1, dims=0)

    x = noise(8, 6)
    plain = nn.Sequential(*linears(2))
    assert not gs.capture(plain, x).coupled
    assert gs.capture(Contrast(), x).coupled
    normalized = nn.Sequential(linears(1)[0], nn.BatchNorm1d(6).double())
    assert gs.capture(normalized, x).coupled
    assert not gs.capture(normalized.eval(), x).coupled
    assert gs.gsc(Contrast(), x, probes="exact")["input"].log10_value == pytest.approx(
        gsc_log10(Contrast(), "input", x), abs=1e-10
    )


def test_an_inner_tensor_returned_late_keeps_its_place():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linears(1)[0]

        def forward(self, x):
            h = torch.sin(x)  # functional, so its only name is that of the tuple's second entry, recorded last
            return self.linear(h), h

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x)[0]

    captured = gs.capture(Outer(), noise(5, 6))
    assert [layer.name for layer in captured.layers] == ["input", "inner[1]", "inner.linear"]
    matrix = gs.gsc_matrix(Outer(), noise(5, 6), layers=lambda layer: True, probes="exact")
    assert np.isfinite(matrix.log10_values[np.triu_indices(3)]).all()


def test_a_mapping_that_is_no_dict():
    model = MLP(depth=4, width=6, generator=seeded()).double()
    np.testing.assert_array_equal(
        gs.gsc(model, UserDict(x=noise(5, 6))).log10_values, gs.gsc(model, noise(5, 6)).log10_values
    )


def test_checkpointed_layers_do_not_move_running_statistics():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(linears(1)[0], nn.BatchNorm1d(6).double(), nn.Tanh())
            self.head = linears(1)[0]

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    model, x = Checkpointed(), noise(8, 6)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    profile = gs.gsc(model, x, probes="exact")
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    plain = nn.Sequential(model.block, model.head)
    assert profile["input"].log10_value == pytest.approx(gsc_log10(plain, "input", x), abs=1e-10)


def test_a_frozen_embedding_is_named_as_the_reason():
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6)).double()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"no module with trainable weights .* unfreeze the embedding"):
        gs.gsc(model, torch.randint(0, 11, (4, 3), generator=seeded()))


def test_a_frozen_embedding_is_a_remark_where_the_rest_is_measured():
    model, tokens = gs.models.GPT(depth=2, width=8, heads=2, length=4, vocabulary=5), torch.tensor([[0, 1, 2, 3]])
    assert not any("Frozen" in remark for remark in gs.capture(model, tokens).remarks)
    model.embedding.tokens.requires_grad_(False)  # the embedding of positions still starts a graph
    assert any("Frozen embedding: embedding.tokens." in remark for remark in gs.capture(model, tokens).remarks)


def test_a_layer_that_does_not_lead_to_the_target():
    model = MLP(depth=4, width=6, generator=seeded()).double()
    with pytest.raises(ValueError, match=r"Layer 'layers\.3' was recorded, but the target does not depend on it"):
        gs.gsc(model, noise(5, 6), target="layers.1", layers="layers.3")


def test_a_model_that_catches_the_exception_of_a_layer():
    class Raises(nn.Module):
        def forward(self, x):
            raise ArithmeticError

    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.raises, self.second = Raises(), linears(1)[0]
            self.block = nn.Sequential(self.raises, linears(1)[0])

        def forward(self, x):
            try:
                return self.block(x)
            except ArithmeticError:
                return self.second(x)

    captured = gs.capture(Careful(), noise(5, 6))
    assert [layer.name for layer in captured.layers] == ["input", "second"]
    assert "raises" in captured.uncalled


class Sparse(nn.Module):
    def forward(self, x):
        return x.to_sparse()


class ThroughSparse(nn.Module):
    """Three linear layers, with a sparse tensor between the first two; ``make`` and ``dense`` may do nothing."""

    def __init__(self, make, dense, ending):
        super().__init__()
        self.first, self.second, self.last = linears(3)
        self.make, self.dense, self.ending = make, dense, ending

    def forward(self, x):
        return self.ending(self.last(self.second(self.dense(self.make(self.first(x))))))


def test_sparse_tensors_are_left_out_and_a_sparse_output_is_refused():
    x = noise(5, 6)
    plain = ThroughSparse(nn.Identity(), lambda h: h, nn.Identity())
    within = ThroughSparse(Sparse(), torch.Tensor.to_dense, nn.Identity())
    at_end = ThroughSparse(nn.Identity(), lambda h: h, Sparse())
    within.load_state_dict(plain.state_dict())
    at_end.load_state_dict(plain.state_dict())
    assert gs.capture(within, x).left_out == {"make": "returned only sparse or nested tensors"}
    expected = gs.gsc(plain, x, probes="exact")
    found = gs.gsc(within, x, probes="exact")
    assert found.sources == expected.sources
    np.testing.assert_array_equal(found.log10_values, expected.log10_values)
    with pytest.raises(ValueError, match=r"The output is a sparse or nested tensor.*to_dense\(\)"):
        gs.gsc(at_end, x)
    dense = gs.gsc(at_end, x, probes="exact", forward=lambda model, batch: model(batch).to_dense())
    assert dense.sources == (*expected.sources, "output")
    np.testing.assert_allclose(dense.log10_values[:-1], expected.log10_values, atol=1e-12)
