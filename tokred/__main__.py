# SPDX-License-Identifier: Apache-2.0
# Copyright (c) 2026 The tokred authors
"""``python -m tokred doctor | ops | methods | bench | report``."""

import argparse
import sys

from tokred._cli import COMMANDS


def main() -> int:
    """Run a command; the exit status says whether it succeeded."""
    parser = argparse.ArgumentParser(prog="python -m tokred", description="Kernels for token reduction, as torch ops.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, help_text, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=help_text, description=help_text))
    arguments = parser.parse_args()
    return COMMANDS[arguments.command][2](arguments)


if __name__ == "__main__":
    sys.exit(main())
