"""Lets ``python -m safetyheads`` be the command line."""

from safetyheads.cli.app import main

main()
