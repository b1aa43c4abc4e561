"""What a user types, one file a command: arguments in, a call, a message out."""
