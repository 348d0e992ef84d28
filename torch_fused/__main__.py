"""The command line: ``python -m torch_fused demo | doctor | metal``."""

import platform
import sys

import torch

from . import __version__, demo, doctor
from .arguments import USAGE, Failure, Parser
from .cache import CacheError
from .metal import check as metal_check


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="torch_fused", description="Fused PyTorch ops: try and check them on this machine.")
    versions = f"torch_fused {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    parser.add_argument("--version", action="version", version=versions)
    commands = parser.add_subparsers(metavar="COMMAND")
    command = commands.add_parser("demo", help="generate text and compare stock Hugging Face with torch_fused")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run, prog=command.prog)
    command = commands.add_parser("doctor", help="check every op on this machine, and show which runtime it uses")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run, prog=command.prog)
    command = commands.add_parser("metal", help="list the kernels of a Metal file, and check it for errors")
    metal_check.add_arguments(command)
    command.set_defaults(run=metal_check.run, prog=command.prog)
    args = parser.parse_args(argv)
    if "run" not in args:
        print("torch_fused: give a command: demo, doctor or metal (see torch_fused --help)", file=sys.stderr)
        return USAGE
    try:
        return args.run(args)
    except (Failure, CacheError) as error:
        print(f"{args.prog}: {error}", file=sys.stderr)
        return getattr(error, "status", 1)
    except KeyboardInterrupt:
        return 130  # the exit status of an interrupted command in a shell


if __name__ == "__main__":
    sys.exit(main())
