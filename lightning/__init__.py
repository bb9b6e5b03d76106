"""The Lightning layer: LoRAs of every kind and distilled weights; opened, matched, merged, baked and inspected.

It works on names, shapes and tensors and never runs a network. It imports `wan.checkpoints` and what is below.
"""
