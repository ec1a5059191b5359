"""GSC and the matrix against full Jacobians written out in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.models.alexnet import AlexNetA, AlexNetB
from gradscope.models.mlp import MLP
from tests.bruteforce import gsc_log10, jacobian, sample_gsc, stages


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))


def mlp(**options) -> MLP:
    return MLP(**{"depth": 5, "width": 12, "generator": seeded(), **options}).double()


NETWORKS = {
    f"{activation}+{norm}+{residual}": {"activation": activation, "norm": norm, "residual": residual}
    for activation in ("relu", "tanh", "selu", "gelu")
    for norm in ("none", "batch", "layer")
    for residual in ("none", "identity")
}


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS.keys())
def test_exact_profile_is_the_full_batch_jacobian(options):
    model, x = mlp(**options), noise(8, 12)
    profile = gs.gsc(model, x, probes="exact")
    assert profile.layers == ("input", *(f"layers.{i}" for i in range(5)))
    expected = [gsc_log10(model, name, x) for name in profile.layers]
    np.testing.assert_allclose(profile.log10_values[:, 0], expected, atol=1e-10, rtol=0)
    assert not profile.num_probes.any()
    assert (profile.log10_stderr_probe == 0).all()
    assert profile.coupled == (options["norm"] == "batch")


@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_column_of_the_exact_matrix_is_a_profile(options):
    model, x = mlp(**options), noise(8, 12)
    matrix = gs.gsc_matrix(model, x, probes="exact")
    for column, target in enumerate(matrix.targets):
        if target == "input":
            continue
        profile = gs.gsc(model, x, target=target, probes="exact")
        rows = len(profile.layers)
        np.testing.assert_allclose(matrix.log10_values[:rows, column], profile.log10_values[:, 0], atol=1e-10)
        assert np.isnan(matrix.log10_values[rows:, column]).all()
    assert np.allclose(np.diag(matrix.log10_values), 0)


@pytest.mark.parametrize("options", [{"norm": "batch"}, {"norm": "none"}, {"residual": "identity"}], ids=str)
def test_columns_of_the_matrix_against_truncated_networks(options):
    model, x = mlp(**options), noise(8, 12)
    matrix = gs.gsc_matrix(model, x, probes="exact")
    for depth in (1, 3):
        head = nn.Sequential(*list(model.layers)[:depth])
        expected = [gsc_log10(head, name, x) for name in ("input", *map(str, range(depth)))]
        np.testing.assert_allclose(matrix.log10_values[: depth + 1, depth], expected, atol=1e-10)


@pytest.mark.parametrize("network", [AlexNetA, AlexNetB])
def test_alexnets_are_exact_from_ten_cotangents(network):
    # Dropout draws a new mask in every forward pass, so the brute force needs the mode in which it is off.
    model = network(generator=seeded()).double().eval()
    x = noise(2, 3, 32, 32)
    profile = gs.gsc(model, x)
    assert not profile.num_probes.any()
    names = [name for name, _ in model.named_children()]
    for name in ("input", "relu2", "pool1", "conv4", "flatten", "fc1"):
        first = names.index(name) + 1 if name != "input" else 0
        tail = nn.Sequential(*list(model.children())[first:])
        with torch.no_grad():
            f_k = nn.Sequential(*list(model.children())[:first])(x)
            f_l = model(x)
        # Samples are independent, so the full Jacobian is block diagonal: one block a sample.
        blocks = [torch.autograd.functional.jacobian(tail, sample[None]) for sample in f_k]
        square = sum(block.square().sum() for block in blocks)
        expected = square / f_k.numel() * f_k.square().sum() / f_l.square().sum()
        assert profile[name].log10_value == pytest.approx(float(expected.log10()), abs=1e-10)


def test_jacobian_operator_against_brute_force():
    model, x = mlp(norm="batch", activation="tanh"), noise(8, 12)
    captured = gs.capture(model, x)
    for name in ("input", "layers.1"):
        op = captured.jacobian(name, "layers.4")
        expected = jacobian(model, name, x)
        torch.testing.assert_close(op.dense(), expected, atol=1e-12, rtol=1e-10)
        v, u = noise(96, seed=5), noise(96, seed=6)
        torch.testing.assert_close(op @ v, expected @ v, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(op.T @ u, expected.T @ u, atol=1e-12, rtol=1e-10)
        assert float(u @ (op @ v)) == pytest.approx(float((op.T @ u) @ v), rel=1e-12)
        exact = gs.qm_norm(op, probes="exact")
        assert exact.value == pytest.approx(float(torch.linalg.matrix_norm(expected)) / math.sqrt(96), rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "geometric"])
def test_reductions_over_single_samples(reduction):
    model, x = mlp(activation="selu", norm="layer"), noise(8, 12)
    profile = gs.gsc(model, x, reduction=reduction)
    for name in profile.layers:
        values = sample_gsc(model, name, x)
        expected = values.mean().log10() if reduction == "mean" else values.log10().mean()
        assert profile[name].log10_value == pytest.approx(float(expected), abs=1e-10)


def test_sample_error_of_the_mean_is_that_of_its_samples():
    model, x = mlp(activation="selu"), noise(8, 12)
    profile = gs.gsc(model, x, reduction="mean")
    values = sample_gsc(model, "layers.0", x)
    relative = values.std() / math.sqrt(8) / values.mean()
    assert profile.log10_stderr_sample[1, 0] == pytest.approx(float(relative) / math.log(10), rel=1e-9)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_probes_are_unbiased_and_their_errors_are_right(norm):
    model, x = mlp(norm=norm), noise(8, 12)
    exact = gs.gsc(model, x, probes="exact").log10_values[:-1, 0]
    z, linear = [], []
    for seed in range(200):
        probed = gs.gsc(model, x, probes=64, generator=seeded(seed))
        z.append((probed.log10_values[:-1, 0] - exact) / probed.log10_stderr_probe[:-1, 0])
        linear.append(10 ** (probed.log10_values[:-1, 0] - exact))
    spread = np.std(linear, axis=0, ddof=1) / math.sqrt(200)
    assert (np.abs(np.mean(linear, axis=0) - 1) < 4 * spread).all()
    assert (np.std(z, axis=0) > 0.85).all()
    assert (np.std(z, axis=0) < 1.2).all()


def test_all_sign_vectors_average_to_the_exact_value():
    # The probes that gsc draws are signs; over all 2^8 of them the mean is |J|_F^2 with no luck involved.
    model, x = MLP(depth=3, width=4, activation="tanh", norm="batch", generator=seeded()).double(), noise(2, 4, seed=3)
    captured = gs.capture(model, x)
    op = captured.jacobian("layers.0", "layers.2")
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 8)
    mean = torch.stack([(op.T @ v).square().sum() for v in signs]).mean()
    _, f_0, f_2 = stages(model, ["layers.0", "layers.2"], x)
    expected = math.log10(float(mean / 8 * f_0.square().sum() / f_2.square().sum()))
    assert gs.gsc(model, x, probes="exact")["layers.0"].log10_value == pytest.approx(expected, abs=1e-12)


def test_one_probe_bounds_its_error_where_samples_are_independent_and_admits_ignorance_where_not():
    x = noise(8, 12)
    independent = gs.gsc(mlp(), x, probes=1)
    assert (independent.log10_stderr_probe[:-1] > 0).all()
    # An upper bound of the one leaves a lower bound of the other, and together they are the spread that is seen.
    assert np.isfinite(independent.log10_stderr_sample[:-1]).all()
    coupled = gs.gsc(mlp(norm="batch"), x, probes=1)
    assert np.isnan(coupled.log10_stderr_probe[:-1]).all()
    assert (coupled.num_probes[:-1] == 1).all()


def test_loss_target_is_the_vector_of_sample_losses():
    model, x = mlp(out_features=3), noise(8, 12)
    labels = torch.arange(8) % 3
    loss = nn.CrossEntropyLoss(reduction="none")
    profile = gs.gsc(model, (x, labels), loss_fn=loss)
    assert profile.target == "loss"

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return loss(self.model(x), labels)

    expected = [gsc_log10(WithLoss(), name if name == "input" else f"model.{name}", x) for name in profile.layers[:-1]]
    np.testing.assert_allclose(profile.log10_values[:-1, 0], expected, atol=1e-10)


def test_other_forms_of_data():
    model, x = mlp(), noise(8, 12)
    expected = gs.gsc(model, x).log10_values
    np.testing.assert_array_equal(gs.gsc(model, {"x": x}).log10_values, expected)
    by_function = gs.gsc(model, [x, "ignored"], forward=lambda model, batch: model(batch[0]))
    np.testing.assert_array_equal(by_function.log10_values, expected)


def test_same_call_same_number_and_the_global_generator_is_left_alone():
    model, x = mlp(norm="batch"), noise(8, 12)
    before = torch.get_rng_state()
    first, second = gs.gsc(model, x, probes=4), gs.gsc(model, x, probes=4)
    np.testing.assert_array_equal(first.log10_values, second.log10_values)
    assert torch.equal(before, torch.get_rng_state())


def test_selected_layers_keep_their_place_in_the_frame():
    model, x = mlp(), noise(8, 12)
    frame = gs.gsc(model, x, layers=["layers.3", "layers.1*"]).to_frame()
    assert list(frame["layer"]) == ["layers.1", "layers.1.linear", "layers.3", "layers.4"] or "layers.1.linear" in set(
        frame["layer"]
    )
    by_name = frame.set_index("layer")
    assert by_name.loc["layers.3", "index"] == 4
    assert by_name.loc["layers.3", "depth_from_output"] == 1
    assert list(frame["index"]) == sorted(frame["index"])


def test_layers_inside_a_branch_are_measured_through_the_named_tensor():
    model, x = mlp(residual="identity"), noise(8, 12)
    profile = gs.gsc(model, x, layers=["layers.2.activation", "layers.1"], probes="exact")
    for name in ("layers.2.activation", "layers.1"):
        assert profile[name].log10_value == pytest.approx(gsc_log10(model, name, x), abs=1e-10)


def test_matrix_refuses_a_layer_inside_a_branch():
    with pytest.raises(ValueError, match=r"'layers\.2\.activation' lies inside a branch"):
        gs.gsc_matrix(mlp(residual="identity"), noise(8, 12), layers=["layers.2.activation", "layers.1"])


def test_bundles_of_any_size_give_the_same_numbers(monkeypatch):
    model, x = mlp(norm="batch"), noise(8, 12)
    whole = gs.gsc_matrix(model, x, probes=5)
    monkeypatch.setattr("gradscope.backward.sweep.batch_bytes", lambda device: 3 * 8 * 12 * 8)
    pieces = gs.gsc_matrix(model, x, probes=5)
    np.testing.assert_allclose(pieces.log10_values, whole.log10_values, atol=1e-12)


def test_progress_ends_at_one():
    seen = []
    gs.gsc(mlp(norm="batch"), noise(8, 12), probes="exact", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_summary_names_target_samples_and_growth():
    text = gs.gsc(mlp(depth=20, norm="batch"), noise(8, 12)).summary()
    assert "'layers.19'" in text
    assert "8 samples, coupled" in text
    assert "rate" in text
    assert "at least 6 layers" in gs.gsc(mlp(), noise(8, 12)).summary()


def test_half_precision_networks_are_measured(dtype=torch.bfloat16):
    model, x = mlp(depth=10), noise(8, 12)
    exact = gs.gsc(model, x).log10_values[:, 0]
    rounded = gs.gsc(model.to(dtype), x.to(dtype)).log10_values[:, 0]
    # bfloat16 rounds to 2^-8; ten layers of such errors, relative, on a squared quantity.
    np.testing.assert_allclose(rounded, exact, atol=10 * 2 * 2**-8 / math.log(10))


def test_a_batch_of_one_in_every_reduction():
    model, x = mlp(activation="tanh"), noise(1, 12)
    batch, mean, geometric = (gs.gsc(model, x, reduction=r).log10_values for r in ("batch", "mean", "geometric"))
    np.testing.assert_allclose(mean, batch, atol=1e-12)
    np.testing.assert_allclose(geometric, batch, atol=1e-12)
    assert (gs.gsc(model, x, probes=1).log10_stderr_probe[:-1] > 0).all()


class TwoInputs(nn.Module):
    """Batch normalization in a branch that joins before the trunk begins."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.h = (nn.Linear(4, 4) for _ in range(3))
        self.bn = nn.BatchNorm1d(4)

    def forward(self, a, b):
        return self.h(torch.tanh(torch.tanh(self.bn(self.a(a))) + self.b(b)))


def test_coupling_inside_a_branch_is_seen():
    model, a, b = TwoInputs().double(), noise(6, 4), noise(6, 4, seed=2)
    captured = gs.capture(model, {"a": a, "b": b})
    assert captured.coupled
    profile = gs.gsc(model, {"a": a, "b": b}, layers=["input", "a", "b"], probes="exact")
    J = torch.autograd.functional.jacobian(lambda v: model(v, b), a).reshape(24, 24)
    expected = J.square().sum() / 24 * a.square().sum() / model(a, b).detach().square().sum()
    assert profile["input"].log10_value == pytest.approx(float(expected.log10()), abs=1e-10)
    with pytest.raises(ValueError, match="needs independent samples"):
        gs.gsc(model, {"a": a, "b": b}, layers=["a", "b"], reduction="mean")


def test_coupling_does_not_depend_on_the_layers_that_were_asked_for():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Tanh()).double()
    assert gs.capture(model, noise(6, 4), layers="3").coupled


def test_several_inputs_without_a_trunk_are_pointed_out():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x, t):
            for layer in self.layers:
                x = torch.tanh(layer(x) * t)
            return x

    model, batch = Gated().double(), {"x": noise(5, 4), "t": noise(5, 1, seed=2)}
    with pytest.warns(UserWarning, match=r"Only 1 layers lie on the trunk.*forward=lambda model, x"):
        gs.gsc(model, batch)
    held = gs.gsc(model, batch["x"], forward=lambda model, x: model(x, batch["t"]), layers="layers.*")
    assert len(held.layers) == 4


@pytest.mark.parametrize(("num_samples", "num_tokens"), [(6, 4), (4, 2)])
def test_a_column_whose_first_dimension_is_not_the_batch(num_samples, num_tokens):
    class TimeFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.ln, self.out = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, x):
            return self.out(torch.tanh(self.ln(self.inp(x).transpose(0, 1)))).transpose(0, 1)

    model, x = TimeFirst().double(), noise(num_samples, num_tokens, 4)
    matrix = gs.gsc_matrix(model, x, layers=["input", "inp", "ln", "out"], probes="exact")
    J = torch.autograd.functional.jacobian(lambda v: model.ln(model.inp(v).transpose(0, 1)), x).reshape(x.numel(), -1)
    f_l = model.ln(model.inp(x).transpose(0, 1)).detach()
    expected = J.square().sum() / x.numel() * x.square().sum() / f_l.square().sum()
    column = matrix.targets.index("ln")
    assert matrix.log10_values[0, column] == pytest.approx(float(expected.log10()), abs=1e-10)
