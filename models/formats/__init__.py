"""Tile encoders under the names that other libraries give their weights, and back: one file per format.

``published.py`` says what every format is read into. How they differ, beside the names:

    format         class position   registers          positions at another size       mask token
    ours           own               without positions  as position_antialias/_offset   yes
    timm           own; folded into  without positions, antialias, exact ratio          no
                   the token where   or (Virchow2)
                   no_embed_class    with them
    DINOv2         own               without positions  no antialias, offset 0.1; with  yes
                                                        registers antialias, offset 0
    transformers   own               without positions  no antialias, exact ratio;      yes
                                                        with registers antialias

DINOv3's encoders have rotary positions, which are no weights. Of its three formats its own and transformers' keep the mask
token, and its own alone the norm of local crops' class tokens.
"""
