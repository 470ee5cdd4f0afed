"""`python -m gateway.cli`: the command where its script is not on the path, as under `sliceway up`."""

from gateway.cli import main

main()
