"""``python -m gradscope``: the same as the command ``gradscope``."""

import sys

from gradscope.command.main import main

if __name__ == "__main__":
    sys.exit(main())
