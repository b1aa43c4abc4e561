"""Files of weights: found, opened, checked, saved, in LAVIS's layout and in Hugging Face's."""
