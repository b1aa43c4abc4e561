"""From soft prompt to text: the frozen language model, its inputs, its decoding, its answers."""
