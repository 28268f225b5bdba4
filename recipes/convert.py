import sys

from hpt_hf.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
