"""Is one model better than the other, on the same images? Usage: python compare_two_models.py A B my_images/"""

import sys

import hpt_hf

first, second, images = sys.argv[1:]
results = hpt_hf.evaluate([first, second], images, "pgd", "2/255")
for row in hpt_hf.compare(results, reference=first):
    print(f"{row.model}: clean {row.clean:.1f}%, robust {row.robust:.1f}%")
    if row.against:
        print(f"  against {first}: clean {row.against['clean']}, robust {row.against['robust']}")
