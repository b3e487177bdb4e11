"""`python -m launcher --config x.yaml --run_mode train`, for an installed package."""

from launcher.cli import leave, main

if __name__ == "__main__":
    leave(main(owns_process=True))
