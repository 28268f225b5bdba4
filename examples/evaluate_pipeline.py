"""How robust is the model behind a zero-shot pipeline? Usage: python evaluate_pipeline.py MODEL my_images/"""

import sys

from transformers import pipeline

import hpt_hf

pipe = pipeline("zero-shot-image-classification", model=sys.argv[1])
results = hpt_hf.evaluate(pipe, sys.argv[2], attack="standard", eps="2/255", limit=100)
print(results.to_markdown())
