"""Times of gradscope, of other tools, and of one forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import gradscope as gs
from benchmarks.race import floor, peers
from benchmarks.race.chains import Chain, alexnet, dead, mlp, resnet
from benchmarks.race.errors import log10_values, relative_rms
from benchmarks.race.sizes import Sizes
from benchmarks.tables.rows import Row, timed
from benchmarks.tables.timing import Contestant, race

PASS = "forward + backward"
PROFILE = "profile, 1 probe"
HOOKED = "forward with empty hooks + backward to the input"
MATRIX = "matrix, 1 probe a target"
STATISTICS = "gs.measure, default statistics"
EXACT = "profile, exact"
DEFLATED = "profile, deflated"
WORST = "error of the deflated profile, worst layer"
FARTHEST = "error of the deflated profile, farthest layer"
FLOOR = "products of the exact profile"
RATE = f"product of side {floor.SIDE}"
ARITHMETIC = "arithmetic of the exact profile"
JACREV = "vmap(jacrev)"
FUNCTIONAL = "autograd.functional.jacobian"
HUTCHINSON = {num: f"curvlinops.hutchinson_squared_fro, {num}" for num in (1, 16)}


def deep(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times on the deep SELU network: gradscope, the lower bound of its exact profile, and peers, which must agree."""
    chain = mlp(*sizes.deep)
    contestants = [
        *_common(chain),
        Contestant(HOOKED, lambda: floor.hooked_pass(chain)),
        Contestant(MATRIX, lambda: gs.gsc_matrix(chain.model, chain.x, probes=1)),
        Contestant(EXACT, lambda: gs.gsc(chain.model, chain.x, probes="exact")),
        Contestant(FLOOR, floor.products(chain)),
        Contestant(RATE, floor.square_product()),
        *_exact_peers(chain),
    ]
    if peers.HAS_CURVLINOPS:
        contestants += [Contestant(name, partial(peers.hutchinson, chain, num)) for num, name in HUTCHINSON.items()]
    times = race(contestants, repeats)
    exact, norms = times[EXACT].result, times[JACREV].result
    for name in (JACREV, FUNCTIONAL):
        peers.assert_exact(name, times[name].result, chain, exact)
    for num, name in HUTCHINSON.items():
        if name in times:
            peers.assert_estimate(name, times[name].result, num, norms, chain, exact)
    arithmetic = floor.flops(chain) / (2 * floor.SIDE**3) * times[RATE].median
    return [
        *timed(group, "", times, PASS),
        Row(group, "", ARITHMETIC, "seconds", arithmetic, reference=PASS, ratio=arithmetic / times[PASS].median),
    ]


def wide(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times on the wide SELU network: an exact profile, run once, and deflated profiles with their largest error."""
    chain = mlp(*sizes.wide)
    rank, num = sizes.deflated_wide
    deflated = gs.Deflated(rank=rank, num=num)
    times = race(
        [
            *_common(chain),
            Contestant(DEFLATED, lambda: gs.gsc(chain.model, chain.x, probes=deflated)),
            Contestant(EXACT, lambda: gs.gsc(chain.model, chain.x, probes="exact"), once=True),
        ],
        repeats,
    )
    exact = times[EXACT].result
    errors = relative_rms(log10_values(chain, deflated, sizes.seeds), exact.log10_values[:, 0])
    worst = int(errors.argmax())
    case = f"rank {rank}, num {num}"
    rows = timed(group, "", times, PASS)
    return [
        *(replace(row, case=case) if row.what == DEFLATED else row for row in rows),
        Row(group, f"{case}: {exact.layers[worst]}", WORST, "relative_rms", float(errors[worst]), num=sizes.seeds),
        Row(group, f"{case}: {exact.layers[0]}", FARTHEST, "relative_rms", float(errors[0]), num=sizes.seeds),
    ]  # fmt: skip


def images(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times on AlexNet A in evaluation mode; few logits make its exact profile inexpensive.  Peers must agree."""
    chain = alexnet(sizes.images)
    times = race(
        [
            *_common(chain),
            Contestant(EXACT, lambda: gs.gsc(chain.model, chain.x, probes="exact")),
            *_exact_peers(chain),
        ],
        repeats,
    )
    for name in (JACREV, FUNCTIONAL):
        peers.assert_exact(name, times[name].result, chain, times[EXACT].result)
    return timed(group, "", times, PASS)


def images_residual(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times on ResNet-8 in evaluation mode."""
    return timed(group, "", race(_common(resnet(sizes.images)), repeats), PASS)


def images_statistics(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times of the default statistics of AlexNet A in evaluation mode, with four times the batch size."""
    chain = alexnet(4 * sizes.images)
    contestants = [
        Contestant(PASS, chain.forward_backward),
        Contestant(STATISTICS, lambda: gs.measure(chain.model, chain.x)),
    ]
    return timed(group, "", race(contestants, repeats), PASS)


def deep_dead(group: str, sizes: Sizes, repeats: int) -> list[Row]:
    """Times of an exact profile if 40 % of the output units are dead: their zeros must not cost another sweep."""
    chain = dead(*sizes.deep)
    contestants = [
        Contestant(FLOOR, floor.products(chain)),
        Contestant(EXACT, lambda: gs.gsc(chain.model, chain.x, probes="exact")),
    ]
    return timed(group, "", race(contestants, repeats), FLOOR)


def growth(group: str, sizes: Sizes, repeats: int) -> Iterator[Row]:
    """Times of a profile when one size varies: depth, width, batch size or number of probes."""
    depth, width, batch = sizes.deep
    series: dict[str, tuple[Callable[[], Chain], int]] = {
        **{f"depth {n}": (partial(mlp, n, width, batch), 1) for n in sizes.depths},
        **{f"width {n}": (partial(mlp, depth, n, batch), 1) for n in sizes.widths},
        **{f"batch {n}": (partial(mlp, depth, width, n), 1) for n in sizes.batches},
        **{f"probes {n}": (partial(mlp, depth, width, batch), n) for n in sizes.probes},
    }
    for case, (make, num) in series.items():
        yield from _growth(group, case, make(), num, repeats)


def _growth(group: str, case: str, chain: Chain, num: int, repeats: int) -> list[Row]:
    profile = Contestant("profile", lambda: gs.gsc(chain.model, chain.x, probes=num))
    return timed(group, case, race([Contestant(PASS, chain.forward_backward), profile], repeats), PASS)


def _common(chain: Chain) -> list[Contestant]:
    return [
        Contestant(PASS, chain.forward_backward),
        Contestant(PROFILE, lambda: gs.gsc(chain.model, chain.x, probes=1)),
    ]


def _exact_peers(chain: Chain) -> list[Contestant]:
    return [
        Contestant(JACREV, partial(peers.vmap_jacrev, chain)),
        Contestant(FUNCTIONAL, partial(peers.functional_jacobian, chain)),
    ]
