"""The demo as a Space: an attack on a robust CLIP, to try in a browser. MODELS names others, with blanks between."""

import os

from hpt_hf.commands.demo import main

models = os.environ.get("MODELS", "lab:student").split()
main(["--models", *models, "--host", "0.0.0.0", "--port", "7860"])
