"""Results on a GPU against those on a CPU, and synchronization with the GPU.  Skipped without a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import gradscope as gs
from experiments.data.images import Augmentation, Images
from experiments.training import loop
from experiments.training.recipe import Recipe
from gradscope.models import AlexNetB, ResNet
from tests.helpers import seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]
RECIPE = Recipe(
    max_steps=20, batch_size=32, log_every=5, precision="float32", augmentation=Augmentation(crop=4, cutout=8)
)


def images():
    pixels = torch.randint(256, (256, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    return Images(pixels, (pixels[:, 0].float().mean((1, 2)) > 127.5).long())


def trained(device, recipe, data=None):
    model = AlexNetB(generator=seeded()).to(device).to(memory_format=torch.channels_last)
    data = data or images().to(torch.device(device))
    return model, loop.train(model, data, data, recipe)


@pytest.fixture(autouse=True)
def _no_tf32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_same_losses_as_on_a_cpu():
    losses = [[r["train_loss"] for r in trained(device, RECIPE)[1]] for device in ("cpu", "cuda")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "rtol"), [({"precision": "bfloat16"}, 0.05), ({"compile": True}, 1e-3)], ids=["bfloat16", "compile"]
)
def test_faster_ways_give_nearly_the_same(change, rtol):
    losses = [[r["train_loss"] for r in trained("cuda", recipe)[1]] for recipe in (RECIPE, replace(RECIPE, **change))]
    np.testing.assert_allclose(losses[0], losses[1], rtol=rtol)


@pytest.mark.parametrize("precision", ["float32", "auto"])
@pytest.mark.parametrize("place", ["device", "file"])
def test_a_step_never_waits_for_the_device(tmp_path, place, precision):
    device, recipe = torch.device("cuda"), replace(RECIPE, clip=1.0, label_smoothing=0.1, precision=precision)
    data = images().to(device) if place == "device" else images().mapped(tmp_path, device)
    model = AlexNetB(generator=seeded()).to(device).to(memory_format=torch.channels_last)
    optimizer, order, cast = recipe.make_optimizer(model), data.order(0, 0), recipe.cast(device)

    def step(number):
        indices = order[32 * (number % 8) : 32 * (number % 8 + 1)]
        return loop.update(model, optimizer, data, indices, recipe, number, 20, cast=cast)

    step(0)  # the first step builds what is cached, such as mean and deviation of the images
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(number) for number in range(1, 11)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses)


def test_mapped_images_arrive_unchanged(tmp_path):
    data, device = images(), torch.device("cuda")
    mapped = data.mapped(tmp_path, device)
    for a, b in zip(data.to(device).batch(torch.arange(40)), mapped.batch(torch.arange(40)), strict=True):
        assert a.is_cuda and torch.equal(a, b)


def test_coefficients_and_monitor():
    model, x = ResNet(depth=8, width=8, generator=seeded()), torch.randn(8, 3, 32, 32, generator=seeded(1))
    expected = gs.gsc(model, x, probes=2).log10_values
    model, x = model.cuda(), x.cuda()
    np.testing.assert_allclose(gs.gsc(model, x, probes=2).log10_values, expected, atol=1e-3)
    monitor = gs.Monitor(model, x, every=2, max_overhead=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        monitor.step(loss, x)
        optimizer.step()
    assert set(monitor.to_frame()["step"]) == {0, 2}


@pytest.mark.parametrize(("check_every", "late"), [(1, 0), (None, 46)])
def test_what_the_monitor_reads_late_it_says_so(check_every, late):
    """A check waits for the device, so by default the monitor checks one step in 50, and every recorded step."""
    model, x = (
        ResNet(depth=8, width=8, generator=seeded()).cuda(),
        torch.randn(8, 3, 32, 32, generator=seeded(1)).cuda(),
    )
    monitor = gs.Monitor(model, x, every=10**6, check_every=check_every)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    named = r"read 46 updates later.*check_every=1" if late else f"the parameters of layer '{names[3]}' hold NaN"
    with pytest.raises(gs.NonFiniteError, match=rf"The loss is nan at step 4: .*{named}"):
        for step in range(60):
            if step == 4:
                with torch.no_grad():
                    model.get_submodule(names[3]).weight[0] = float("nan")
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            monitor.step(loss, x)
            optimizer.step()
    assert monitor.steps == 5 + late


def test_a_gradient_that_is_not_finite_is_seen_on_the_device():
    model, x = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()).cuda(), torch.ones(2, 4).cuda()
    model[1].register_forward_hook(lambda module, args, output: output + torch.sqrt(0.0 * output))
    monitor = gs.Monitor(model, x, every=10**6, check_every=1)
    model(x).sum().backward()
    with pytest.raises(gs.NonFiniteError, match=r"The gradient is not finite at step 0: .*'1'.* backward pass"):
        monitor.step(1.0, x)
