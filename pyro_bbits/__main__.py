"""`python -m pyro_bbits` is `bbits`; so is `torchrun -m pyro_bbits`."""

from pyro_bbits.cli import main

if __name__ == "__main__":
    main()
