"""From pixels to features: the image encoder, the auxiliary encoder, and the cache of what both give."""
