"""Modules that look like attention: by the names of their class, their place, or their projections to q, k and v.

Names never decide what is measured, only which modules are said to be without attention.
"""

from __future__ import annotations

import re

from torch import nn

from gradscope.forward.modules import Modules
from gradscope.transformers.attention.interception import Interception

CALLED, UNCALLED = "called, but no attention was seen in it", "never called"

_NAMED = re.compile(r"attention|attn", re.IGNORECASE)
_PLACED = re.compile(r"(^|_)(attention|attn)\d*$", re.IGNORECASE)
_JOINT = re.compile(r"qkv|^query_key_value$|^c_attn$|^in_proj_weight$", re.IGNORECASE)
_SINGLE = re.compile(r"^(to_)?(q|k|v|query|key|value)(_proj|_lin|_linear|_proj_weight)?$")


def unseen(modules: Modules, watched: Interception) -> dict[str, str]:
    """Modules that are named like attention or hold projections to queries, keys and values, but no call was seen.

    Returns their names, each with whether the module was called.  Of modules inside each other, the innermost counts.
    """
    found = [name for name, module in modules.items() if _looks_like_attention(name, module)]
    inner = [name for name in found if not any(_inside(other, name) for other in found if other != name)]
    layers = {seen.layer.partition("#")[0] for seen in watched.calls}
    return {
        name or type(modules[""]).__name__: CALLED if name in watched.called else UNCALLED
        for name in inner
        # Projections may lie in a module whose parent computes the attention.
        if not any(layer in (name, name.rpartition(".")[0]) or _inside(layer, name) for layer in layers)
    }


def may_attend(model: nn.Module) -> bool:
    """Whether a module looks like attention by its names."""
    return any(_looks_like_attention(name, module) for name, module in model.named_modules())


def _looks_like_attention(name: str, module: nn.Module) -> bool:
    """Whether the names of a module, its class, or its members say that it computes attention."""
    members = [*module._parameters, *module._modules]
    if any(map(_JOINT.search, members)) or sum(map(bool, map(_SINGLE.search, members))) > 1:
        return True
    named = _NAMED.search(type(module).__name__) or _PLACED.search(name.rpartition(".")[2])
    return bool(named) and any(any(True for _ in child.parameters()) for child in module.children())


def _inside(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")
