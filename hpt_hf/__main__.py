"""`python -m hpt_hf train …`: the form for torchrun and `accelerate launch -m`."""

from hpt_hf.cli import main

if __name__ == "__main__":
    main()
