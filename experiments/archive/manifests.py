"""The manifests of many runs as one."""

from __future__ import annotations

import json
from typing import Any

# Keys of a manifest that belong to one run only.
OF_ONE_RUN = ("seconds", "finished", "peak_memory_bytes")


class Distinct:
    """All values of each key in the manifests of runs.  A nested key is given by its path.

    Arguments:
        content: Values that were found before: a list for each path, which is a JSON list of keys.
    """

    def __init__(self, content: dict[str, list[Any]]) -> None:
        self._values = {key: {json.dumps(one, sort_keys=True): None for one in known} for key, known in content.items()}
        self._seen: set[tuple[tuple[str, ...], str]] = set()

    def add(self, manifest: dict[str, Any]) -> None:
        """Add the values of one manifest, without those that belong to one run only."""
        self._add((), {key: value for key, value in manifest.items() if key not in OF_ONE_RUN})

    def _add(self, path: tuple[str, ...], value: Any) -> None:
        text = json.dumps(value, sort_keys=True)
        if (path, text) in self._seen:  # the manifests of a sweep agree in most parts
            return
        if isinstance(value, dict) and value:
            for key, part in value.items():
                self._add((*path, key), part)
        else:
            self._values.setdefault(json.dumps(path), {})[text] = None
        if path:
            self._seen.add((path, text))

    def content(self) -> dict[str, list[Any]]:
        """All values of each path."""
        return {key: [json.loads(value) for value in values] for key, values in self._values.items()}

    def together(self) -> dict[str, Any]:
        """One nested manifest.  A key has one value if all runs agree, else the list of all values."""
        result: dict[str, Any] = {}
        for key, values in self.content().items():
            *parents, last = json.loads(key)
            place = result
            for parent in parents:
                if not isinstance(place.setdefault(parent, {}), dict):  # in some runs, the key has a single value
                    place[parent] = {"": place[parent]}
                place = place[parent]
            place, last = (place[last], "") if isinstance(place.get(last), dict) else (place, last)
            place[last] = values[0] if len(values) == 1 else values
        return result
