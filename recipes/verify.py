import sys

from hpt_hf.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
