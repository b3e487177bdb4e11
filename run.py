"""The entry: `python run.py --config x.yaml --run_mode train`."""

from launcher.cli import leave, main

if __name__ == "__main__":
    leave(main(owns_process=True))
