"""Names of layers of two models: wrappers, inserted layers, renamed layers, and layers without a partner."""

import pytest

from gradscope.comparing.differences.matching import Structure, bare, matched

ACT, LIN, NORM = (Structure(((4, 8),), shapes) for shapes in ((), ((8, 8), (8,)), ((8,), (8,))))
HEAD, WIDE = Structure(((4, 2),), ((2, 8), (2,))), Structure(((4, 9),), ((9, 8),))


def named(prefix, *structures):
    return {f"{prefix}{number}": structure for number, structure in enumerate(structures)}


@pytest.mark.parametrize(
    "name, expected",
    [("module.net.0", "net.0"), ("net._orig_mod.0#2", "net.0#2"), ("a._checkpoint_wrapped_module", "a"), ("0", "0")],
)
def test_wrappers_are_no_part_of_a_name(name, expected):
    assert bare(name) == expected


CASES = {
    "wrapped": (named("", LIN, ACT), named("module.", LIN, ACT), {"module.0": "0", "module.1": "1"}),
    "renamed": (named("a.", LIN, ACT, HEAD), named("b.", LIN, ACT, HEAD), {"b.0": "a.0", "b.1": "a.1", "b.2": "a.2"}),
    "inserted, so that numbers shift": (
        named("", LIN, ACT, LIN, ACT, HEAD),
        named("", LIN, NORM, ACT, LIN, NORM, ACT, HEAD),
        {"0": "0", "2": "1", "3": "2", "5": "3", "6": "4"},
    ),
    "equal names and shapes, other classes": (named("", LIN, ACT), named("", LIN, NORM), {"0": "0", "1": "1"}),
    "another width": (named("", LIN, ACT), named("", WIDE, ACT), {"1": "1"}),
    "one renamed between equal names": (
        {"in": LIN, "relu": ACT, "out": HEAD},
        {"in": LIN, "act": ACT, "out": HEAD},
        {"in": "in", "act": "relu", "out": "out"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("first, second, expected", CASES.values(), ids=CASES)
def test_partners(first, second, expected):
    found = matched(first, second)
    assert dict(found.partner) == expected
    assert set(found.only_first) == first.keys() - set(expected.values())
    assert set(found.only_second) == second.keys() - expected.keys()
    assert set(found.renamed) == {(a, b) for b, a in expected.items() if bare(a) != bare(b)}


def test_a_wrapper_is_not_reported_as_a_layer_without_a_partner():
    found = matched({"0": LIN, "output": ACT}, {"module.0": LIN, "module": ACT, "output": ACT})
    assert dict(found.partner) == {"module.0": "0", "output": "output"} and not found.only_second
