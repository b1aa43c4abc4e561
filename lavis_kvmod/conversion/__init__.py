"""BLIP-2 checkpoints between LAVIS's layout and Hugging Face's: names, config, and ``lavis-kvmod convert``."""
