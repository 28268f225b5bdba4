"""A robust CLIP from a folder of classes. Usage: python train_on_a_folder.py STUDENT PROXY my_images/ OUT"""

import sys

import hpt_hf

student, proxy, images, output = sys.argv[1:]
trainer = hpt_hf.HPTTrainer(student, proxy=proxy, dataset=images, config="own_images", output_dir=output)
trainer.train()
print(f"pipeline('zero-shot-image-classification', model='{trainer.save()}')")
