"""Every kind of bad input gets an error that names the culprit and the way out."""

import math
import warnings

import pytest
import torch
from torch import nn

import gradscope as gs
from gradscope.models.mlp import MLP


def mlp(**options) -> MLP:
    return MLP(**{"depth": 4, "width": 6, "generator": torch.Generator().manual_seed(0), **options})


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bad", "count"), [(math.nan, "1 NaN and 0 Inf"), (math.inf, "0 NaN and 1 Inf")])
def test_nan_or_inf_in_x(bad, count):
    x = noise(5, 6)
    x[2, 3] = bad
    with pytest.raises(ValueError, match=rf"x holds {count} among 30 entries, the first at \(2, 3\)"):
        gs.gsc(mlp(), x)


def test_empty_batch():
    with pytest.raises(ValueError, match=r"batch is empty: .* shape \(0, 6\); give at least one sample"):
        gs.gsc(mlp(), noise(0, 6))


def test_batch_of_one_with_batch_norm_names_the_layer():
    with pytest.raises(ValueError, match=r"'layers\.0\.norm' normalizes over the batch, .* at least two samples"):
        gs.gsc(mlp(norm="batch"), noise(1, 6))


def test_batch_of_one_without_batch_norm_is_fine():
    assert gs.gsc(mlp(norm="layer"), noise(1, 6)).num_samples == 1


def test_model_without_parameters():
    with pytest.raises(ValueError, match=r"Sequential has no parameters\. .* nn\.ModuleList"):
        gs.gsc(nn.Sequential(nn.Tanh()), noise(5, 6))


def test_layers_in_a_plain_list_beside_a_module_whose_parameters_are_none():
    class Unregistered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linears = [nn.Linear(6, 6), nn.Linear(6, 6)]
            self.norm = nn.LayerNorm(6, elementwise_affine=False)

        def forward(self, x):
            for linear in self.linears:
                x = self.norm(linear(x))
            return x

    with pytest.raises(ValueError, match=r"Unregistered has no parameters\. .* nn\.ModuleList"):
        gs.gsc(Unregistered(), noise(5, 6).float())


class Constant(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.linear, self.how = nn.Linear(6, 6), how

    def forward(self, x):
        if self.how == "detached":
            return self.linear(x).detach()
        if self.how == "parameters":
            return self.linear(torch.ones_like(x))
        return self.linear(x.detach())


@pytest.mark.parametrize("how", ["detached", "parameters", "input detached"])
def test_output_that_does_not_depend_on_x(how):
    with pytest.raises(ValueError, match=r"output does not depend on x: .* \.detach\(\)"):
        gs.gsc(Constant(how), noise(5, 6))


def test_unknown_layer_offers_the_nearest_names():
    with pytest.raises(ValueError, match=r"No layer is called 'layer\.2'\. Nearest names: .*'layers\.2'"):
        gs.gsc(mlp(), noise(5, 6), layers=["layer.2"])
    with pytest.raises(ValueError, match=r"No layer is called 'layers\.9'\. Nearest names: 'layers\.\d'"):
        gs.gsc(mlp(), noise(5, 6), target="layers.9")
    with pytest.raises(ValueError, match=r"'layers\.\[0-9\]'\. In a pattern, only \* and \? are wildcards\. Nearest"):
        gs.gsc(mlp(), noise(5, 6), layers="layers.[0-9]")


def test_layers_that_choose_nothing():
    with pytest.raises(ValueError, match="accepted none of the recorded layers"):
        gs.gsc(mlp(), noise(5, 6), layers=lambda layer: False)
    with pytest.raises(TypeError, match="must return True or False for a layer; for 'input' it returned a Tensor"):
        gs.gsc(mlp(), noise(5, 6), layers=lambda layer: torch.ones(2))
    with pytest.raises(ValueError, match=r"layers= is an empty list"):
        gs.gsc(mlp(), noise(5, 6), layers=[])


@pytest.mark.parametrize("probes", [0, -3, 2.5, True, "all"])
def test_probes(probes):
    with pytest.raises(ValueError, match="probes must be"):
        gs.gsc(mlp(), noise(5, 6), probes=probes)


def test_non_finite_activations_name_the_first_layer():
    model = mlp()
    with torch.no_grad():
        model.layers[2].linear.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"Layer 'layers\.2\.linear' is the first with NaN or Inf"):
        gs.gsc(model, noise(5, 6))


def test_model_on_another_device_than_x():
    with pytest.raises(ValueError, match=r"x is on cpu, but 'layers\.0\.linear\.weight' .* is on meta"):
        gs.gsc(mlp().to("meta"), noise(5, 6))


def test_output_of_zeros():
    model = mlp()
    with torch.no_grad():
        model.layers[3].linear.weight.zero_()
    with pytest.raises(ValueError, match=r"output of layer 'layers\.3' is zero for the whole batch"):
        gs.gsc(model, noise(5, 6))


def test_mean_reduced_loss():
    with pytest.raises(ValueError, match=r'one loss per sample, shape \(5,\); got \(\)\..*reduction="none"'):
        gs.gsc(mlp(), (noise(5, 6), torch.zeros(5, dtype=torch.long)), loss_fn=nn.CrossEntropyLoss())


def test_reductions():
    with pytest.raises(ValueError, match=r"reduction must be one of 'batch', 'mean', 'geometric', got 'max'"):
        gs.gsc(mlp(), noise(5, 6), reduction="max")
    with pytest.raises(ValueError, match=r"'mean' needs independent samples, .* model\.eval\(\)"):
        gs.gsc(mlp(norm="batch"), noise(5, 6), reduction="mean")
    with pytest.raises(ValueError, match=r'"geometric" takes logarithms .* probes="exact"'):
        gs.gsc(mlp(), noise(5, 6), reduction="geometric", probes=4)


def test_a_sample_without_output_has_no_gsc_of_its_own():
    x = noise(5, 6)
    x[3] = 0
    with pytest.raises(ValueError, match=r'layer .layers\.3. is zero for sample 3, .* reduction="batch"'):
        gs.gsc(mlp(activation="tanh"), x, reduction="mean")


@pytest.mark.parametrize("measure", [gs.repair, gs.attention, gs.compare])
def test_a_function_without_a_loss_does_not_ask_for_one(measure):
    with pytest.raises(ValueError, match="the labels would be ignored: give only the inputs") as error:
        measure(mlp(), (noise(5, 6), noise(5)))
    assert "loss_fn" not in str(error.value)


def test_forms_of_data():
    with pytest.raises(ValueError, match="the labels would be ignored: give loss_fn= or only the inputs"):
        gs.gsc(mlp(), [noise(5, 6), noise(5)])
    with pytest.raises(TypeError, match=r"With loss_fn, data must be a pair \(inputs, labels\); got Tensor"):
        gs.gsc(mlp(), noise(5, 6), loss_fn=nn.MSELoss(reduction="none"))
    for several in (iter([noise(5, 6)]), torch.utils.data.DataLoader(noise(5, 6))):
        with pytest.raises(TypeError, match=r"got \w+, which holds several batches: give one, such as next"):
            gs.capture(mlp(), several)
    with pytest.raises(ValueError, match=r"data contains no tensor"):
        gs.gsc(mlp(), {"x": 3})
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got builtin"):
        gs.gsc(torch.relu, noise(5, 6))


def test_output_without_a_tensor():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return "nothing"

    with pytest.raises(TypeError, match=r"returned str without a floating-point tensor that has entries; .* forward="):
        gs.gsc(Strange(), noise(5, 6))


def test_an_exception_inside_the_model_says_where_and_leaves_the_model_clean():
    model = mlp(norm="batch")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.layers[2].activation.forward = lambda x: 1 / 0
    rng = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError) as caught:
        gs.gsc(model, noise(5, 6))
    assert "Raised inside layer 'layers.2.activation'" in caught.value.__notes__[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_jacobian_the_wrong_way_round():
    captured = gs.capture(mlp(), noise(5, 6))
    with pytest.raises(
        ValueError, match=r"'layers\.0' comes before 'layers\.2', so it cannot be the target: swap the two"
    ):
        captured.jacobian("layers.2", "layers.0")


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        return torch.jit.script(model)


@pytest.mark.parametrize("measure", [gs.gsc, gs.measure, gs.first_nonfinite, gs.check, gs.Monitor])
def test_scripted_parts_are_named(measure):
    for model, name in (
        (nn.Sequential(nn.Linear(6, 6), scripted(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)))), "'1'"),
        (scripted(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6))), "The model"),
    ):
        with pytest.raises(ValueError, match=rf"^{name} \(RecursiveScriptModule\) is TorchScript, .* original module"):
            measure(model, noise(5, 6))


def test_quantized_parts_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(6, 6)), {nn.Linear})
        with pytest.raises(ValueError, match=r"no derivative of an operation in layer '1\.0' \(is it quantized\?\)"):
            gs.gsc(nn.Sequential(nn.Linear(6, 6), part, nn.Linear(6, 2)), noise(5, 6))


def test_a_model_without_numbers():
    with pytest.raises(ValueError, match=r"is on meta: a meta tensor holds no numbers, so give the model its weights"):
        gs.gsc(mlp().to("meta"), noise(5, 6))


def test_empty_tensors_among_the_outputs_are_not_measured():
    class Some(torch.nn.Linear):
        def forward(self, x):
            return {"none": None, "empty": x[:0], "output": super().forward(x)}

    class Nothing(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, :0]

    model, x = Some(4, 3).double(), torch.ones(2, 4).double()
    plain = torch.nn.Linear(4, 3).double()
    plain.load_state_dict(model.state_dict())
    assert gs.gsc(model, x)["input"].value == pytest.approx(gs.gsc(plain, x)["input"].value, rel=1e-12)
    with pytest.raises(
        TypeError, match=r"returned Tensor without a floating-point tensor that has entries; .*forward="
    ):
        gs.gsc(Nothing(4, 3).double(), x)
