"""`hpt-hf COMMAND …`: one subcommand a file of `hpt_hf.commands`; nothing heavy is imported before a command runs."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version

from hpt_hf.commands.help import print_help
from hpt_hf.utils import did_you_mean

COMMANDS = {
    "train": "from a recipe to a robust CLIP in a folder that `pipeline` opens",
    "evaluate": "clean and robust accuracy, with intervals and sanity checks",
    "transfer": "which proxy suits a student: accuracy on images attacked for another model",
    "sweep": "settings of a recipe, chosen by rule on classes left out of training, then over seeds",
    "compare": "models on the same images: paired differences with intervals, the Pareto front",
    "leaderboard": "a static page that ranks results",
    "verify": "measure again what a model's results claim",
    "interpolate": "between the original and the robust weights, a point chosen by rule",
    "convert": "read others' checkpoints; write transformers', open_clip's form or a vision tower",
    "push": "publish a folder on the Hub, with its results in the card",
    "estimate": "hours, memory and disk of a recipe, from a few of its own steps",
    "demo": "a page to try an attack on",
    "quickstart": "the whole story on small CLIPs, in minutes on a CPU",
    "pretrain": "make the small vanilla CLIPs of the lab",
}


def main(argv: list[str] | None = None) -> None:
    """Exit 2 for an unknown command; a command exits as it says itself."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print("usage: hpt-hf COMMAND [--config RECIPE] [--flag value …]\n")
        print("\n".join(f"  {name:<12} {what}" for name, what in COMMANDS.items()))
        print("\n`hpt-hf COMMAND --help` lists the flags of a command.")
    elif command == "--version":
        print(version("hpt_hf"))
    elif command not in COMMANDS:
        near = did_you_mean(command, COMMANDS, "see hpt-hf --help")
        print(f"hpt-hf: unknown command {command!r}{near}", file=sys.stderr)
        sys.exit(2)
    elif "-h" in rest or "--help" in rest:
        print_help(command, COMMANDS[command])
    else:
        try:
            importlib.import_module(f"hpt_hf.commands.{command}").main(rest)
        except KeyboardInterrupt:
            sys.exit(130)
