import sys

from hpt_hf.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
