"""`python -m nuteprune`."""

from nuteprune.cli import main

main()
