"""`python -m fpo` is the command `fpo`."""

from fpo.cli import main

main()
