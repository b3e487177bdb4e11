"""The entry: `python run.py --config x.yaml --run_mode train`."""

import sys

from launcher.cli import main

if __name__ == "__main__":
    sys.exit(main())
