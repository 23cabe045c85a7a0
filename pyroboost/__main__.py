"""Run the command line by ``python -m pyroboost``."""

from pyroboost.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
