"""`python -m rlpjepa_zoo` and `accelerate launch -m rlpjepa_zoo`."""

from .cli.app import main

if __name__ == "__main__":
    main()
