"""The model, in the order the image travels:

``auxiliary`` (EfficientNet features) -> ``kv_prefix`` (Key/Value prefix) -> ``qformer`` (cross-attention over
prefix and visual tokens) -> ``blip2_opt_kvmod`` (the full model). ``backbones`` loads the frozen towers, ``text``
lays out prompt and answer for the language model, ``settings`` holds every key of the ``model:`` section.

Shapes are written with one legend throughout: ``b`` batch, ``n`` visual tokens, ``q`` query tokens, ``p`` prefix
tokens, ``h`` heads, ``d`` head width, ``c`` cross-attention layers, ``t`` text tokens.
"""
