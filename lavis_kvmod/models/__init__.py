"""The model, in the order the image travels: ``vision``, ``connectors``, ``language``.

``vision`` (image encoder and auxiliary encoder) -> ``connectors`` (Key/Value prefix, Q-Former) -> ``language`` (prompt,
OPT, answer). ``blip2_opt_kvmod`` is the figure; ``base`` is what all members of the family share. ``settings`` declares
the keys of the ``model:`` section, ``build`` makes the parts of them, ``loading`` brings weights into the model.

Shapes are written with one legend throughout: ``b`` batch, ``n`` visual tokens, ``q`` query tokens, ``p`` prefix
tokens, ``h`` heads, ``d`` head width, ``c`` cross-attention layers, ``t`` text tokens.
"""
