"""What every command that visits a corpus is made of."""
