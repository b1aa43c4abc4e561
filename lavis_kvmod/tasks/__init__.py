"""What a batch is trained on, and how answers and captions are scored."""
