import sys

from hpt_hf.cli import main

if __name__ == "__main__":
    main(["transfer", *sys.argv[1:]])
