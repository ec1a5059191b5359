"""The study of convolution, on synthetic pictures."""

from collections import OrderedDict
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from experiments.archive import reference
from experiments.data.images import Images
from experiments.evidence.means import geometric_mean, mean
from experiments.studies import convolution
from experiments.studies.convolution import backpropagation, claims, measurement, numbers
from gradscope.measures import shifted
from tests.helpers import ROOT, seeded


@pytest.fixture(scope="module")
def published():
    return reference.load(ROOT / "results" / "convolution")


def pictures(num, seed):
    """Of 3 x 32 x 32 bytes, and their labels."""
    return Images(
        torch.randint(256, (num, 3, 32, 32), dtype=torch.uint8, generator=seeded(seed)),
        torch.randint(10, (num,), generator=seeded(seed)),
    )


def small_alexnet():
    """The layers of AlexNet B with few channels."""
    layers, channels = [], 3
    for name, width, pooled in (("1", 4, True), ("2", 4, True), ("3", 4, False), ("4", 4, False)):
        layers += [(f"conv{name}", nn.Conv2d(channels, width, 5, padding=2)), (f"relu{name}", nn.ReLU())]
        layers += [(f"pool{name}", nn.MaxPool2d(2))] if pooled else []
        channels = width
    return nn.Sequential(OrderedDict([*layers, ("flatten", nn.Flatten()), ("fc", nn.Linear(4 * 64, 10))]))


@pytest.fixture(scope="module")
def measured():
    """The untrained network, the images, and the frame."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(measurement, "pictures", lambda: (pictures(60, 0), pictures(20, 1)))
        model, x = small_alexnet(), torch.randn(8, 3, 32, 32, generator=seeded(2))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        options = {"train_steps": 3, "train_batch": 16, "num_images": 50}
        frame = convolution.measure(model, x, generator=seeded(3), **options)
        assert any((tensor != before[name]).any() for name, tensor in model.state_dict().items())
        model.load_state_dict(before)
    return model, x, frame.assign(seed=0)


def test_gradients_by_hand_are_compared_and_a_wrong_one_is_seen(monkeypatch):
    def worst():
        return backpropagation.compared(seeded(0)).set_index("layer")["value"]

    assert (worst() < 1e-14).all()
    right = backpropagation.conv2d_input_gradient
    monkeypatch.setattr(
        backpropagation,
        "conv2d_input_gradient",
        lambda g, w, *rest, **how: right(g, w[:, :, ::-1, ::-1], *rest, **how),
    )
    monkeypatch.setattr(backpropagation, "average_pool2d_gradient", lambda g, shape, size, **how: np.zeros(shape))
    wrong = worst()
    assert wrong["convolution, input"] > 0.1 and wrong["average pooling"] == 1
    assert wrong["convolution, kernel"] < 1e-14


def test_an_output_under_a_shift_by_hand(measured):
    model, x, frame = measured
    with torch.no_grad():
        f, moved = model(x), model(shifted(x, (2, 0)))
    distances = (f[:, None] - f[None]).square().sum(dim=2)
    typical = distances.sum() / (len(x) * (len(x) - 1))
    expected = ((f - moved).square().sum(dim=1).mean() / typical).sqrt()
    found = numbers.change(frame, "alexnet_b", "before", 2)
    np.testing.assert_allclose(found, [float(expected)], rtol=1e-4)
    same = (f.argmax(1) == moved.argmax(1)).float().mean()
    of = {"network": "alexnet_b", "training": "before", "shift": 2}
    assert numbers.by_seed(frame, "class_agreement", **of) == pytest.approx([float(same)])


def test_maps_move_by_whole_strides_only(measured):
    _, _, frame = measured
    rows = frame[frame["quantity"] == "equivariance_error"]
    assert set(rows["layer"]) == set(claims.STRIDES_OF) and set(rows["training"]) == {"before", "after"}
    for row in rows.itertuples():
        whole = row.shift % claims.STRIDES_OF[row.layer] == 0
        assert row.value < 1e-5 if whole else row.value > 0.01


def test_pooled_maps_by_hand(measured):
    model, x, frame = measured
    with torch.no_grad():
        maps, moved = (
            nn.functional.avg_pool2d(model.relu1(model.conv1(images)), 2).flatten(1)
            for images in (x, shifted(x, (1, 0)))
        )
    typical = (maps[:, None] - maps[None]).square().sum(dim=2).sum() / (len(x) * (len(x) - 1))
    expected = ((maps - moved).square().sum(dim=1).mean() / typical).sqrt()
    of = {"pooling": "average", "layer": "relu1", "training": "before"}
    assert numbers.by_seed(frame, "pooled_change", **of) == pytest.approx([float(expected)], rel=1e-4)


def test_a_mosaic_is_four_images():
    x = torch.arange(8 * 2 * 3 * 3.0).reshape(8, 2, 3, 3)
    tiles = measurement.mosaic(x)
    assert tiles.shape == (2, 2, 6, 6)
    assert torch.equal(tiles[1, :, :3, 3:], x[5]) and torch.equal(tiles[1, :, 3:, :3], x[6])


def test_noise_is_stationary_and_accuracies_are_there(measured):
    _, _, frame = measured
    assert frame.loc[frame["quantity"] == "test_accuracy", "value"].between(0, 1).all()
    assert (frame["quantity"] == "test_accuracy").sum() == 2
    many = measurement.stationarity(np.random.default_rng(0).random((4000, 8, 8)))
    found = many.drop_duplicates("quantity").set_index("quantity")["value"]
    assert found["mean_spread"] < 0.02 and found["variance_spread"] < 0.02
    assert found["covariance_explained"] == pytest.approx(1, abs=0.01)


def says(collected):
    return {claim.says: claim.holds for claim in convolution.STUDY.claims(collected)}


@pytest.mark.parametrize(
    ("quantity", "value", "claim", "holds"),
    [
        ("backpropagation_error", 1e-3, "Hand-written gradients of convolution and pooling", False),
        ("equivariance_error", 0.2, "Away from the border, a map moves", False),
        ("equivariance_error", 0.01, "Shifts by one or two pixels", False),
        ("border_error", 0.0, "Zero padding breaks", False),
        ("class_agreement", 1.0, "After training, nine of ten", True),
        ("invariance_error", 1e3, "After training, the output of the AlexNet", False),
        ("mean_spread", 0.0, "The mean of a pixel", True),
        ("covariance_explained", 0.99, "The covariance of two pixels", True),
        ("correlation_spread", 0.5, "Neighboring pixels", False),
        ("correlation_spread", 0.03, "Neighboring pixels", False),  # of 0.08, what neighbors lack to 1
        ("correlation_spread", 0.001, "Neighboring pixels", True),
    ],
)
def test_claims_follow_the_frame(published, quantity, value, claim, holds):
    frame = published.frame.copy()
    frame["value"] = frame["value"].where(frame["quantity"] != quantity, value)
    found = says(replace(published, frame=frame))
    assert [verdict for text, verdict in found.items() if text.startswith(claim)] == [holds]


def test_pooled_maps_are_compared_seed_by_seed(published):
    frame = published.frame.copy()
    worse = (frame["quantity"] == "pooled_change") & (frame["pooling"] == "max")
    frame["value"] = frame["value"].where(~worse, 10.0)
    found = says(replace(published, frame=frame))
    assert found["Max pooling lowers the relative change of a map under a shift by one pixel"] is False
    assert found["Average pooling lowers the relative change of a map more than max pooling"] is True


def trained(published, quantity, factors, spread=0.01, **columns):
    """The frame with a quantity after training that is a factor of that before, one a seed, nearly."""
    frame = published.frame.copy()
    rows = frame["quantity"] == quantity
    for name, value in columns.items():
        rows &= frame[name] == value
    keys = ["layer", "network", "seed", "shift"]
    before = frame[rows & (frame["training"] == "before")].set_index(keys)["value"]
    after = rows & (frame["training"] == "after")
    wanted = [tuple(row) for row in frame.loc[after, keys].itertuples(index=False)]
    if quantity == "contrast":  # is of no shift
        before, wanted = before.droplevel("shift"), [key[:3] for key in wanted]
    factor = np.array([factors * (1 + spread * (key[2] - 2)) for key in wanted])
    frame.loc[after, "value"] = before.loc[wanted].to_numpy() * factor
    return replace(published, frame=frame)


STAGE = "raining makes the maps of {} more equivariant, for a shift by one pixel"


@pytest.mark.parametrize(("factor", "holds"), [(0.5, True), (1.5, False), (1.0, None)])
@pytest.mark.parametrize("stage", ["pool1", "conv2", "pool2", "conv3", "conv4"])
def test_training_is_judged_stage_by_stage(published, stage, factor, holds):
    collected = trained(published, "equivariance_error", factor, layer=stage)
    found = {text: verdict for text, verdict in says(collected).items() if text.endswith(STAGE.format(stage))}
    assert list(found.values()) == [holds]
    assert next(iter(found)).startswith("Exploratory") is (stage != "conv4")  # the one claimed before looking


def test_one_of_several_intervals_is_that_of_bonferroni():
    values = [1.0, 2.0, 4.0, 5.0]
    low, high = stats.t.interval(1 - 0.05 / 5, 3, loc=3.0, scale=stats.sem(values))
    found = mean(values, comparisons=5)
    assert (found.low, found.high) == pytest.approx((low, high))
    assert geometric_mean(np.exp(values), comparisons=5).high == pytest.approx(np.exp(high))


@pytest.mark.parametrize(
    ("moved", "apart", "holds", "words"),
    [
        (1.0, 3.0, True, "The distance contributes more"),
        (0.2, 1.1, False, "The change contributes more"),
        (0.5, 2.0, None, "It is undecided which"),
    ],
)
def test_relative_invariance_is_taken_apart(published, moved, apart, holds, words):
    """Change and distance after training are known multiples of those before."""
    once = trained(published, "invariance_error", moved, spread=0.05)
    collected = trained(once, "contrast", apart)
    found = says(collected)
    assert [verdict for text, verdict in found.items() if "by a larger factor" in text] == [holds]
    smaller = "Exploratory: training lowers the change of the output under a shift by one pixel"
    assert found[smaller] is (True if moved < 1 else None)
    assert found["Exploratory: training increases the distance between the outputs for two images"] is True
    factor = geometric_mean(numbers.training_factors(collected.frame, "alexnet_b")[0])
    assert factor.value == pytest.approx(moved, rel=0.01)
    details = convolution.details(collected)
    assert words in details and f"| {factor} |" in details


def test_the_answer_follows_the_claims(published):
    answer = convolution.answer(published)
    assert answer.startswith("Convolutions keep the symmetry")
    assert "is broken by stride (for other shifts) and zero padding (at the border)." in answer
    frame = published.frame.copy()
    frame["value"] = frame["value"].where(frame["quantity"] != "equivariance_error", 0.2)
    frame["value"] = frame["value"].where(frame["quantity"] != "border_error", 0.0)
    for name in ("mean_spread", "variance_spread"):
        frame["value"] = frame["value"].where(frame["quantity"] != name, 0.01)
    answer = convolution.answer(replace(published, frame=frame))
    assert answer.startswith("Convolutions do not keep the symmetry") and "by stride (for other shifts)." in answer
    assert "2 of these 5" in answer


def test_figures_show_the_means(published):
    drawn = convolution.STUDY.figures(published)
    before = drawn["equivariance"].axes[0]
    line = next(c for c in before.containers if c.get_label() == "conv4").lines[0]
    rows = published.frame[published.frame["quantity"] == "equivariance_error"]
    rows = rows[(rows["layer"] == "conv4") & (rows["training"] == "before")]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), dtype=float), rows.groupby("shift")["value"].mean())
    for figure in drawn.values():
        plt.close(figure)


def test_intervals_of_a_fraction_end_at_1_and_others_do_not(published):
    made = convolution.figures.draw(published)
    left, right = axes = made["invariance"].axes
    ends = [[segment[:, 1] for bars in ax.containers for segment in bars[2][0].get_segments()] for ax in axes]
    tops = [np.max(of_panel) for of_panel in ends]
    classes = published.frame[published.frame["quantity"] == "class_agreement"]
    groups = classes.groupby(["network", "training", "shift"], observed=True)["value"]
    assert max(mean(values).high for _, values in groups) > 1 == tops[1] < right.get_ylim()[1]
    changes = [numbers.change(published.frame, network, when, shift)
               for network in numbers.NAMES for when in numbers.WHEN for shift in measurement.SHIFTS]  # fmt: skip
    assert tops[0] == pytest.approx(max(mean(values).high for values in changes)) and tops[0] < left.get_ylim()[1]
    for figure in made.values():
        plt.close(figure)
