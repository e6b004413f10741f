"""A run as one HTML page.

`parts` finds what there is, `figures` and `maps` draw, `sections` say what each part shows, `pretrain.pages` is the
paper.
"""
