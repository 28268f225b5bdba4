"""A model family of one's own: hpt-hf evaluate --model examples/own_family.py:my_family:FOLDER --dataset …

Here a CLIP of a `model_type` that transformers does not know. A family of another shape also says how it takes
features and scale.
"""

from transformers import AutoConfig, CLIPConfig, CLIPModel

from hpt_hf.models.families import Family


class MyConfig(CLIPConfig):
    model_type = "my_clip"


class MyCLIP(CLIPModel):
    config_class = MyConfig


AutoConfig.register(MyConfig.model_type, MyConfig)
my_family = Family("my CLIP", MyCLIP)
