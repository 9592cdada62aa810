"""`python -m svdconvert`."""

from svdconvert.cli import main

main()
