"""From visual tokens to a soft prompt: the Q-Former, and the Key/Value prefix it attends to."""
