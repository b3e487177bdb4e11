"""`python -m launcher --config x.yaml`, and the script that an installed `msrun.sh` starts."""

import sys

if not __package__:  # started as a file: nothing may be imported from its folder, the package
    del sys.path[0]

from launcher.cli import leave, main

if __name__ == "__main__":
    leave(main(owns_process=True))
