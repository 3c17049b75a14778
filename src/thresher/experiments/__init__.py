"""What the commands do, from end to end: a specification in, rows and folders out."""
