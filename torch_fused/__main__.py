"""The command line: ``python -m torch_fused demo | doctor``."""

import argparse
import sys

from . import demo, doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="torch_fused", description="Fused PyTorch ops: try them on this machine.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("demo", help="a model writes text, stock Hugging Face beside torch_fused")
    demo.add_arguments(command)
    command.set_defaults(run=demo.run)
    command = commands.add_parser("doctor", help="what runs where on this machine, and whether it is right")
    doctor.add_arguments(command)
    command.set_defaults(run=doctor.run)
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
