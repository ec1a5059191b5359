"""Commands run as a user runs them, in this process, which has imported everything."""

import sys

from experiments.config import command_line


def run_main(main, capsys, monkeypatch, *arguments):
    """What the command printed, and its exit code (None: it just ended)."""
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    code = None
    try:
        command_line.run_hydra(main)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):  # what Python prints then
            print(code, file=sys.stderr)
            code = 1
    said = capsys.readouterr()
    return said.out + said.err, code
