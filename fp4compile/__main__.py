"""`python -m fp4compile`."""

from fp4compile.cli import main

main()
