"""A script for bash and zsh that completes commands, options, and keys of the experiments."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from gradscope.command import experiments

SHELLS = ("bash", "zsh")
HYDRA = ("measure", "train")
SCRIPT = """\
_gradscope() {{
    local words
    if ((COMP_CWORD == 1)); then
        words="{commands}"
    else
        case ${{COMP_WORDS[1]}} in
{cases}
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "${{COMP_WORDS[COMP_CWORD]}}"))
    if [[ ${{#COMPREPLY[@]}} == 1 && ${{COMPREPLY[0]}} == *= ]]; then compopt -o nospace; fi
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
complete -o default -F _gradscope gradscope"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script for a shell.  It starts no process, so that completing takes no time."""
    commands = next(action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    cases = [f'            {name}) words="{" ".join(words(name, one))}" ;;' for name, one in commands.items()]
    text = SCRIPT.format(commands=" ".join(commands), cases="\n".join(cases))
    return text if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{text}"


def words(name: str, parser: argparse.ArgumentParser) -> list[str]:
    """Return the words that may follow a command: options, or keys and the options of configuration groups."""
    if name in HYDRA:
        folders = [folder for folder in (Path("conf"), experiments.place() / "conf") if folder.is_dir()]
        options = {f"{path.parent.name}={path.stem}" for folder in folders for path in folder.glob("*/*.yaml")}
        keys = yaml.safe_load((folders[-1] / f"{name}.yaml").read_text())
        return ["-m", "--help", *(f"{key}=" for key in _keys(keys)), *sorted(options)]
    if name in experiments.COMMANDS:
        experiments.use()
        config = importlib.import_module(f"experiments.{name}").Config
        return ["--help", *(f"{key.name}=" for key in fields(config))]
    return [word for action in parser._actions for word in action.option_strings or action.choices or ()]


def _keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The paths of all values below a mapping, without what is Hydra's own."""
    for key, value in values.items():
        if isinstance(value, dict) and key != "hydra":
            yield from _keys(value, f"{prefix}{key}.")
        elif key not in ("defaults", "hydra"):
            yield f"{prefix}{key}"
