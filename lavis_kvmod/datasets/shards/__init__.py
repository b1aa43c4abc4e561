"""Tar shards in webdataset's form: ``KEY.jpg`` beside ``KEY.json``, read in order and never unpacked.

The data's way: `files` (which shards there are, and what their index says) → `rows` (what a sample says) →
`plan` (who reads which part of an epoch, in what order) → `stream` (batches, from any batch on) → `datasets` →
`builders`. `counting` reads shards to their end to index and check them; `packing` writes what the others read.
"""
