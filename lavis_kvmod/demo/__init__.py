"""The embedded default: real handwriting (`digits`) and small frozen parts pre-trained on this machine (`parts`)."""
