"""The command line: ``python -m torch_fused demo | doctor | metal``."""

import platform
import sys

import torch

from . import __version__, demo, doctor
from .arguments import USAGE, Failure, Parser
from .cache import CacheError
from .metal import check as metal_check


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="torch_fused", description="Fused PyTorch ops: try them on this machine.")
    versions = f"torch_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser("demo", help="a model writes text, stock Hugging Face beside torch_fused")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run, prog=command.prog)
    command = commands.add_parser("doctor", help="what runs where on this machine, and whether it is right")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run, prog=command.prog)
    command = commands.add_parser("metal", help="what is in a Metal file, and what is wrong with it")
    metal_check.add_arguments(command)
    command.set_defaults(run=metal_check.run, prog=command.prog)
    args = parser.parse_args(argv)
    if "run" not in args:
        print("torch_fused: name a command: demo, doctor or metal (torch_fused --help explains them)", file=sys.stderr)
        return USAGE
    try:
        return args.run(args)
    except (Failure, CacheError) as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:
        return 130  # as a shell reports what an interrupt has ended


if __name__ == "__main__":
    sys.exit(main())
