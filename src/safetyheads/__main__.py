"""The entry of the command line: ``safetyheads`` and ``python -m safetyheads``."""

import sys


def main() -> None:
    """Run a command and end the process; an interrupt while modules are imported is one line too."""
    try:
        from safetyheads.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was begun\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
