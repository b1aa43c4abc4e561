"""``lavis-kvmod doctor``: what is installed, what is missing, and whether a run fits this machine.

It is run when things are broken. So its modules import torch, LAVIS and what stands on them only where they are asked
for something, and a failure there is one of the findings.
"""
