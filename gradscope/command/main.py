"""Arguments of the command ``gradscope``, and its errors as one sentence with exit code 2."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gradscope.command import completion, experiments, measurements
from gradscope.command.subject import DTYPES, shape

SUBJECT = "my_net:resnet --input 8,3,32,32"
MEASUREMENTS = {
    "report": ("write one HTML page about a model", [SUBJECT, f"{SUBJECT} --out page.html"]),
    "check": ("test whether gradscope measures a model correctly; exit code 1 if a test fails",
              [SUBJECT, "my_net:gpt --input 2,16 --input-ids 50257"]),
    "profile": ("print the Gradient Scale Coefficient (GSC) of every layer, the growth rate and a verdict",
                [SUBJECT, f"{SUBJECT} --out gsc.png", "my_net:mlp --data batch.npz --rtol 0.02 --json"]),
    "matrix": ("print the Gradient Scale Coefficient (GSC) between all pairs of layers",
               [SUBJECT, f"{SUBJECT} --layers 'layer1*,layer2*' --out matrix.csv"]),
    "diff": ("print which layers differ between two models; exit code 1 if one does",
             ["my_net:resnet my_net:converted --input 8,3,32,32", "my_net:resnet bfloat16 --input 8,3,32,32"]),
}  # fmt: skip
OUTPUTS = {"report": "the page (default: report.html)", "check": None,
           "diff": "also write the result: .csv, .parquet, .png or .html"}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a check failed, 2 for an error in what the user gave."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in experiments.COMMANDS:
        experiments.run(arguments[0], arguments[1:])
        return 0
    given = parser().parse_args(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        print(
            "gradscope: error: only train uses several processes: start this command without torchrun.", file=sys.stderr
        )
        return 2
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return int(given.run(given))
        except KeyboardInterrupt:
            print(f"gradscope {given.command}: interrupted; nothing was written.", file=sys.stderr)
            return 130
        except Exception as error:
            if getattr(given, "traceback", False):
                raise
            plain = isinstance(error, (ValueError, OSError, TypeError))
            text = f"{'' if plain else f'{type(error).__name__}: '}{error}"
            print(f"gradscope {given.command}: error: {text}", file=sys.stderr)
            return 2


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    whole = _parser(argparse.ArgumentParser, prog="gradscope", description="Gradient diagnostics for torch networks.",
                    epilog=_examples("report " + SUBJECT, "measure -m model=relu,tanh 'seed=range(8)' sweep=mine",
                                     "figures study=mine"))  # fmt: skip
    whole.add_argument("--version", action="version", version=_version())
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for name, (text, examples) in MEASUREMENTS.items():
        one = _parser(commands.add_parser, name, help=text, description=f"{text[0].upper()}{text[1:]}.",
                      epilog=_examples(*(f"{name} {example}" for example in examples)))  # fmt: skip
        one.set_defaults(run=getattr(measurements, name))
        _add_subject(one)
        if name == "diff":
            one.add_argument("other", metavar="OTHER",
                             help=f"MODULE:FACTORY of the second model, or {', '.join(DTYPES)} for a copy")  # fmt: skip
        if name in ("profile", "matrix", "diff"):
            one.add_argument("--probes", default="auto", help="auto (default), exact, or a number of random probes")
        if name in ("profile", "matrix"):
            one.add_argument("--layers", metavar="GLOBS", help="patterns of layer names, separated by commas")
            one.add_argument("--rtol", type=float, metavar="R", help="requested relative standard error of every value")
        if name == "profile":
            one.add_argument("--target", metavar="LAYER", help="GSC with respect to this layer (default: the output)")
        if (out := OUTPUTS.get(name, "also write the result: .csv, .parquet or .png")) is not None:
            one.add_argument("--out", metavar="FILE", help=out)
    for name, text in experiments.COMMANDS.items():
        commands.add_parser(name, help=text)  # for the list of commands: `main` runs them
    shell = _parser(commands.add_parser, "completion", help="print a script that completes commands and options",
                    description="Print a script that completes commands, options, and keys of the experiments.",
                    epilog='examples:\n  eval "$(gradscope completion bash)"    # in ~/.bashrc')  # fmt: skip
    shell.add_argument("shell", choices=completion.SHELLS)
    shell.set_defaults(run=lambda given: print(completion.script(whole, given.shell)) or 0)
    return whole


def _add_subject(one: argparse.ArgumentParser) -> None:
    one.add_argument("model", metavar="MODULE:FACTORY",
                     help="Python module, in the current folder or installed, and its function that returns the model "
                          "without arguments, or its torch.nn.Module")  # fmt: skip
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=shape, metavar="SHAPE",
                        help="standard normal input of this shape, batch first: 8,3,32,32")  # fmt: skip
    source.add_argument("--data", metavar="FILE.npz", help="the input is the array x, or the only array, of this file")
    one.add_argument("--input-ids", type=int, metavar="N", help="with --input: random token ids from 0 to N - 1")
    one.add_argument("--dtype", choices=DTYPES, help="of model and input (default: the model's; for check float64)")
    one.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, mps")
    one.add_argument("--seed", type=int, default=0, help="random seed of weights and input (default: 0)")
    one.add_argument("--eval", action="store_true", help="put the model in evaluation mode first")
    one.add_argument("--json", action="store_true", help="print the result as one JSON object")
    one.add_argument("--traceback", action="store_true", help="show where an error was raised")


def _parser(make: Any, *arguments: Any, **options: Any) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = make(
        *arguments, **options, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    return made


def _examples(*lines: str) -> str:
    return "\n".join(["examples:", *(f"  gradscope {line}" for line in lines)])


def _version() -> str:
    from gradscope import __version__

    return f"gradscope {__version__}"


def _warn(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"Warning: {message}", file=sys.stderr)
